"""What is sparse, and what should be: selection, the plan of a run, measurement."""

from .activations import ActivationStatistics
from .calibration import calibrate
from .controller import SparsityController
from .report import SparsityReport, measure_sparsity
from .schedule import PlainSchedule, Ramp
from .selection import input_dims, match_parameters, participants, select_parameters, selected_units
from .units import Units, find_units


__all__ = [
    "ActivationStatistics",
    "PlainSchedule",
    "Ramp",
    "SparsityController",
    "SparsityReport",
    "Units",
    "calibrate",
    "find_units",
    "input_dims",
    "match_parameters",
    "measure_sparsity",
    "participants",
    "select_parameters",
    "selected_units",
]
