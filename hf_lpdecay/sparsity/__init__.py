"""What is sparse, and what should be: selection, the plan of a run, measurement."""

from .controller import Ramp, SparsityController
from .report import SparsityReport, measure_sparsity
from .selection import match_parameters, select_parameters


__all__ = [
    "Ramp",
    "SparsityController",
    "SparsityReport",
    "match_parameters",
    "measure_sparsity",
    "select_parameters",
]
