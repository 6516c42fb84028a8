"""Entity-level F1 as an `evaluate` module that needs no hub: `evaluate.load("recipes/metrics/entity_f1.py")`."""

import datasets
import evaluate


class EntityF1(evaluate.Metric):
    """Precision, recall and F1 of whole entities, as conlleval counts them: type, first and last word must be right."""

    def _info(self):
        tags = [datasets.Value("string")]
        return evaluate.MetricInfo(
            description="Precision, recall and F1 of whole entities, and the accuracy of single tags, as fractions.",
            citation="",
            inputs_description="predictions, references: one list of tags (IOB, IOB2, IOBES, BILOU or plain types).",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        found = [entities(tags) for tags in predictions]
        expected = [entities(tags) for tags in references]
        right = sum(len(f & e) for f, e in zip(found, expected))
        precision = right / max(sum(map(len, found)), 1)
        recall = right / max(sum(map(len, expected)), 1)
        pairs = [pair for p, r in zip(predictions, references) for pair in zip(p, r)]
        return {
            "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
            "precision": precision,
            "recall": recall,
            "accuracy": sum(p == r for p, r in pairs) / max(len(pairs), 1),
        }


def entities(tags):
    """The entities in a sentence as a set of type, first and last word."""
    found, kind, start = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        position, dash, name = tag.partition("-")
        if not dash or position not in ("B", "I", "E", "S", "L", "U"):  # a plain type: neighbours of one type are one
            position, name = ("O", None) if tag == "O" else ("I", tag)
        if kind is not None and (position in ("B", "S", "U") or name != kind):
            found.add((kind, start, i - 1))
            kind = None
        if kind is None and name is not None:
            kind, start = name, i
        if position in ("E", "S", "L", "U"):
            found.add((kind, start, i))
            kind = None
    return found
