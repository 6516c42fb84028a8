"""What is sparse, and what should be: selection, the plan of a run, measurement."""

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .activations import ActivationStatistics
    from .calibration import calibrate
    from .checkpoint import measure_checkpoint, measure_folder
    from .compensation import Compensation
    from .controller import SparsityController
    from .driver import SparsityDriver
    from .report import SparsityReport, measure_sparsity
    from .schedule import PlainSchedule, Ramp
    from .selection import input_dims, match_parameters, participants, select_parameters, selected_units
    from .unit_search import find_units
    from .units import Units

_MODULES = {
    "activations": ("ActivationStatistics",),
    "calibration": ("calibrate",),
    "checkpoint": ("measure_checkpoint", "measure_folder"),
    "compensation": ("Compensation",),
    "controller": ("SparsityController",),
    "driver": ("SparsityDriver",),
    "report": ("SparsityReport", "measure_sparsity"),
    "schedule": ("PlainSchedule", "Ramp"),
    "selection": ("input_dims", "match_parameters", "participants", "select_parameters", "selected_units"),
    "unit_search": ("find_units",),
    "units": ("Units",),
}
__getattr__, __dir__ = attach(__name__, _MODULES)

__all__ = [
    "ActivationStatistics",
    "Compensation",
    "PlainSchedule",
    "Ramp",
    "SparsityController",
    "SparsityDriver",
    "SparsityReport",
    "Units",
    "calibrate",
    "find_units",
    "input_dims",
    "match_parameters",
    "measure_checkpoint",
    "measure_folder",
    "measure_sparsity",
    "participants",
    "select_parameters",
    "selected_units",
]
