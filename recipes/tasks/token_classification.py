"""Token classifiers: a tag for each word, such as the names of people and places; F1 of whole entities."""

from data import head, load_texts
from rows import ClassLabel
from transformers import AutoConfig, AutoModelForTokenClassification, DataCollatorForTokenClassification

from tasks.base import Task, check_columns, check_fast, forward_batches, load_metric
from tasks.text_classification import label_options


# Their tokenizers tell a word's beginning by the space before it.
_BYTE_LEVEL = ("bloom", "deberta", "gpt2", "longformer", "roberta")


class TokenClassification(Task):
    """Words in `tokens_column` and as many tags in `tags_column`, names or numbers of a `ClassLabel`.

    A word's tag is learned and predicted at its first token; words beyond `block_size` tokens are left out.
    """

    auto_class = AutoModelForTokenClassification

    def tokenizer_options(self, path):
        byte_level = AutoConfig.from_pretrained(path).model_type in _BYTE_LEVEL
        return {"add_prefix_space": True} if byte_level else {}

    def load(self) -> None:
        script = self.script
        check_fast(self.tokenizer, script.task)
        train, validation = load_texts(script)
        check_columns((train, validation), {name: getattr(script, name) for name in ("tokens_column", "tags_column")})
        feature = train.features[script.tags_column].feature
        self.labels = feature.names if isinstance(feature, ClassLabel) else _names(train[script.tags_column])
        self.train, self.validation = (
            dataset.map(self.tokenize, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
            for dataset in (head(train, script.max_train_samples), head(validation, script.max_eval_samples))
        )
        self.metric = load_metric("entity_f1")

    def tokenize(self, rows):
        script = self.script
        numbers = {label: i for i, label in enumerate(self.labels)}
        tokens = self.tokenizer(
            rows[script.tokens_column], is_split_into_words=True, truncation=True, max_length=script.block_size
        )
        labels = []
        for i, tags in enumerate(rows[script.tags_column]):
            words = tokens.word_ids(i)
            if len(tags) != len(rows[script.tokens_column][i]):
                raise ValueError(f"{len(rows[script.tokens_column][i])} words have {len(tags)} tags: {tags}.")
            unknown = [tag for tag in tags if isinstance(tag, str) and tag not in numbers]
            if unknown:
                raise ValueError(f"The tag {unknown[0]!r} is not in the training data, which has {self.labels}.")
            firsts = [word is not None and word != before for word, before in zip(words, [None, *words])]
            labels.append([numbers.get(tags[w], tags[w]) if first else -100 for w, first in zip(words, firsts)])
        return {**tokens, "labels": labels}

    def model_options(self):
        return label_options(self.labels)

    def collator(self, model):
        return DataCollatorForTokenClassification(self.tokenizer)

    def compute_metrics(self, args):
        def entity_f1(prediction):
            self.add_batch(prediction.predictions.argmax(-1), prediction.label_ids)
            return self.metric.compute()

        return entity_f1

    def evaluate(self, model, batch_size, desc):
        for batch, outputs in forward_batches(model, self.validation, self.collator(model), batch_size, desc):
            self.add_batch(outputs.logits.argmax(-1).tolist(), batch["labels"].tolist())
        return self.metric.compute()

    def add_batch(self, predictions, references) -> None:
        """Hand the tags of whole words to the metric."""
        for predicted, expected in zip(predictions, references):
            words = [(int(p), int(e)) for p, e in zip(predicted, expected) if e != -100]
            self.metric.add(prediction=[self.labels[p] for p, _ in words], reference=[self.labels[e] for _, e in words])


def _names(column) -> list[str]:
    """All tags, "O" first."""
    tags = {tag for tags in column for tag in tags}
    if not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"The tags {sorted(tags, key=str)[:5]} are numbers without names: give the names instead.")
    return sorted(tags, key=lambda tag: (tag != "O", tag.partition("-")[2], tag))
