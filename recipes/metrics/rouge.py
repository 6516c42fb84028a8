"""ROUGE as an `evaluate` module that needs no hub, but the package rouge_score.

>>> evaluate.load("recipes/metrics/rouge.py")
"""

import datasets
import evaluate
from rouge_score import rouge_scorer


class Rouge(evaluate.Metric):
    """F1 of ROUGE-1, -2 and -L, with stemmed words, in the mean over the texts."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="F1 of ROUGE-1, -2 and -L, as fractions.",
            citation="",
            inputs_description="predictions, references: a text each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        names = ["rougeL", "rouge1", "rouge2"]
        scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
        scores = [scorer.score(r, p) for p, r in zip(predictions, references)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
