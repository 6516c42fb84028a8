"""What makes a sparse model smaller and faster where it runs."""

from .convert import to_dense, to_sparse
from .loading import load_sparse
from .semi_structured import to_semi_structured
from .sparse_linear import SparseLinear


__all__ = ["SparseLinear", "load_sparse", "to_dense", "to_semi_structured", "to_sparse"]
