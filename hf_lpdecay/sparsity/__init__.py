"""What is sparse, and what should be: selection, the plan of a run, measurement."""

from .activations import ActivationStatistics
from .controller import Ramp, SparsityController
from .patterns import parse_pattern
from .report import SparsityReport, measure_sparsity
from .selection import input_dims, match_parameters, select_parameters


__all__ = [
    "ActivationStatistics",
    "Ramp",
    "SparsityController",
    "SparsityReport",
    "input_dims",
    "match_parameters",
    "measure_sparsity",
    "parse_pattern",
    "select_parameters",
]
