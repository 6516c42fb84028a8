"""Sparsity as an `evaluate` module that needs no hub.

>>> evaluate.load("recipes/metrics/sparsity.py").compute(data=["outputs/sparse"])
"""

import datasets
import evaluate

from hf_lpdecay.sparsity import measure_checkpoint


class Sparsity(evaluate.Measurement):
    """Exact zeros in the linear layers of saved models, and in the models as a whole."""

    def _info(self):
        return evaluate.MeasurementInfo(
            description="Exact zeros in the linear layers of saved models, as fractions.",
            citation="",
            inputs_description="data: folders of saved models.",
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data):
        reports = [measure_checkpoint(folder) for folder in data]
        return {
            "sparsity": [report.sparsity for report in reports],
            "model_sparsity": [report.model_sparsity for report in reports],
        }
