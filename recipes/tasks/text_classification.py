"""Text classifiers: one label per text; accuracy."""

from data import head, labelled_tokens, load_texts
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from tasks.base import Task, forward_batches, load_metric


class TextClassification(Task):
    """Texts of up to `block_size` tokens in `text_column`, labels in `label_column`."""

    auto_class = AutoModelForSequenceClassification

    def load(self) -> None:
        script = self.script
        train, validation, self.labels = labelled_tokens(*load_texts(script), script, self.tokenizer)
        self.train, self.validation = head(train, script.max_train_samples), head(validation, script.max_eval_samples)
        self.metric = load_metric("accuracy")

    def model_options(self):
        return label_options(self.labels)

    def collator(self, model):
        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self, args):
        def accuracy(prediction):
            return self.metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

        return accuracy

    def evaluate(self, model, batch_size, desc):
        return {"accuracy": classify(model, self.validation, self.collator(model), batch_size, self.metric, desc)}


def label_options(labels: list[str]) -> dict:
    """What a classifier's config says of its labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def classify(model, rows, collator, batch_size: int, metric, desc: str) -> float:
    """Accuracy of a classifier over a dataset."""
    for batch, outputs in forward_batches(model, rows, collator, batch_size, desc):
        metric.add_batch(predictions=outputs.logits.argmax(-1), references=batch["labels"])
    return metric.compute()["accuracy"]
