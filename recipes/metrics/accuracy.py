"""Accuracy as an `evaluate` module that needs no hub: `evaluate.load("recipes/metrics/accuracy.py")`."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal their reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Fraction of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: one integer label per example.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        hits = sum(int(p == r) for p, r in zip(predictions, references))
        return {"accuracy": hits / len(references)}
