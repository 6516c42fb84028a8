"""Experts of a mixture as sparse layers: one for each matrix of their 3-D parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..sparsity.experts import expert_weights
from ..sparsity.selection import Modules, PackedWeight, match_weights
from .sparse_linear import SparseLinear


# How models multiply by an expert's matrix, and whether that is (in, out) then.
_PRODUCTS = {"linear": False, "matmul": True, "__matmul__": True}


class SparseMatrix(SparseLinear):
    """The matrix of one expert, by which the model's own code multiplies as if it were a tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """`F.linear(x, matrix)` or `x @ matrix`; anything else is an error."""
        x, matrix, *bias = args
        if _PRODUCTS.get(func.__name__) is not getattr(matrix, "transposed", None) or kwargs:
            raise TypeError(
                f"A sparse expert takes part in products only, not in {func.__name__}: use to_dense(model)."
            )
        y = matrix(x)
        return y if not bias or bias[0] is None else y + bias[0]


class SparseExperts(nn.ModuleList, PackedWeight):
    """The matrices of all experts, in place of the 3-D parameter that holds them.

    The experts' module computes as its model's own eager implementation does: `weight[expert]` is one matrix.

    Args:
        weight (`torch.Tensor`): Shape (experts, out, in), or (experts, in, out) with `transposed`.
        dtype (`torch.dtype`): Of the values.
        columns (`bool`): See [`~hf_lpdecay.inference.encoding.encode`].
        transposed (`bool`): Whether the input features come first.
    """

    parameter_suffix = ""

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: bool, transposed: bool):
        options = {"columns": columns, "transposed": transposed}
        super().__init__(SparseMatrix.from_dense(matrix.to(dtype), **options) for matrix in weight)
        for matrix in self:
            matrix.dense_dtype = weight.dtype
        self.implementation: str | None = None
        self.handle: RemovableHandle | None = None  # of the hook that loads a dense parameter

    @property
    def weight(self) -> Tensor:
        """The dense parameter, decoded anew each time."""
        return torch.stack([matrix.weight for matrix in self])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`."""
        return (len(self), *self[0].weight_shape)

    def count_nonzero(self) -> int:
        """How many values of all matrices are not zero."""
        return sum(matrix.count_nonzero() for matrix in self)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The dense parameter under its own name."""
        destination = {} if destination is None else destination
        destination[prefix.removesuffix(".")] = self.weight
        return destination


def match_experts(model: nn.Module, target_modules: Modules, exclude_modules: Modules) -> dict[str, int]:
    """The experts' parameters that match, and the dimension of the input features in each matrix (0 or 1)."""
    dims = {name: dim for name, (_, dim) in expert_weights(model).items()}
    matched = match_weights(model, target_modules, exclude_modules) if dims else {}
    return {name: dims[name] for name in matched if name in dims}


def has_eager(module: nn.Module) -> bool:
    """Whether an experts' module has the eager implementation that multiplies by one matrix after the other."""
    return hasattr(module, "is_transposed") and hasattr(getattr(module, "config", None), "_experts_implementation")


def put_experts(model: nn.Module, name: str, new: SparseExperts) -> None:
    """Replace a 3-D parameter."""
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    new.implementation = module.config._experts_implementation
    new.handle = module.register_load_state_dict_pre_hook(_split)
    delattr(module, leaf)
    setattr(module, leaf, new)
    module.config._experts_implementation = "eager"


def _split(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Give the matrices of a dense parameter, which is loaded into its module, the names of the sparse experts."""
    for leaf, experts in module.named_children():
        weight = state_dict.get(prefix + leaf) if isinstance(experts, SparseExperts) else None
        if weight is not None and weight.dim() == 3 and len(weight) == len(experts):
            del state_dict[prefix + leaf]
            state_dict.update({f"{prefix}{leaf}.{i}.weight": matrix for i, matrix in enumerate(weight)})


def restore_experts(model: nn.Module) -> None:
    """Undo [`put_experts`] everywhere."""
    kept: str | None = None
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseExperts):
            prefix, _, leaf = name.rpartition(".")
            parent = model.get_submodule(prefix)
            # The first one was replaced while the implementation was still the user's.
            kept = kept or module.implementation
            delattr(parent, leaf)
            module.handle.remove()
            setattr(parent, leaf, nn.Parameter(module.weight.to(module[0].dense_dtype)))
            parent.config._experts_implementation = kept
