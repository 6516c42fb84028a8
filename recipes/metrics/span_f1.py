"""SQuAD's exact match and F1 as an `evaluate` module that needs no hub.

>>> evaluate.load("recipes/metrics/span_f1.py")
"""

import collections
import re
import string

import datasets
import evaluate


class SpanF1(evaluate.Metric):
    """Exact match, and F1 of the words in common, with the best of several right answers (arXiv 1606.05250)."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Exact match and F1 of answers, as fractions.",
            citation="",
            inputs_description="predictions: a text each, empty for no answer; references: a list of right ones each.",
            features=datasets.Features({"predictions": text, "references": [text]}),
        )

    def _compute(self, predictions, references):
        pairs = [[(words(p), words(r)) for r in right] for p, right in zip(predictions, references)]
        return {
            "f1": sum(max(f1(p, r) for p, r in answers) for answers in pairs) / len(pairs),
            "exact_match": sum(any(p == r for p, r in answers) for answers in pairs) / len(pairs),
        }


def words(text):
    """The words of an answer, without articles and punctuation."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(predicted, right):
    """Harmonic mean of the shares of words in common; without words on one side, whether both have none."""
    if not predicted or not right:
        return float(predicted == right)
    common = sum((collections.Counter(predicted) & collections.Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))
