"""Datasets of the recipes: from the hub, from local files, or built in."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import ClassLabel, Dataset, Value, load_dataset
from stdlib_text import load_stdlib_text
from transformers import PreTrainedTokenizerBase

from hf_lpdecay.training.record import without_path


BUILTIN = "stdlib"
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """On which data a recipe trains and evaluates."""

    dataset_name: str = field(
        default=BUILTIN, metadata={"help": f"Hub id, or '{BUILTIN}': text from Python's standard library."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the hub's dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the hub's dataset to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of the hub's dataset to evaluate on."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local json, jsonl, csv, tsv, txt or parquet file (instead of dataset_name)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of csv and tsv files that have no header."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many examples at most."})

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Invalid {name}: {value!r} - should be a whole number >= 1.")


def load_texts(script) -> tuple[Dataset, Dataset]:
    """Load the training and the evaluation data that a recipe's arguments name.

    Args:
        script (`DataArguments`): Its `train_file` and `validation_file` win over its `dataset_name`.

    Returns:
        `tuple[Dataset, Dataset]`: Training and evaluation rows as they come.

    Raises:
        FileNotFoundError: If a local file is missing.
        ValueError: If its kind is not known, or one of the two files is not given.
    """
    if script.train_file or script.validation_file:
        if not (script.train_file and script.validation_file):
            raise ValueError(
                "Give both --train_file and --validation_file: nothing is evaluated on what was trained on."
            )
        return tuple(load_file(path, script.column_names) for path in (script.train_file, script.validation_file))
    if script.dataset_name == BUILTIN:
        return load_stdlib_text()
    splits = load_dataset(script.dataset_name, script.dataset_config_name)
    for split in (script.train_split, script.validation_split):
        if split not in splits:
            raise ValueError(f"{script.dataset_name} has no split {split!r}, only {', '.join(splits)}.")
    return splits[script.train_split], splits[script.validation_split]


def data_facts(script) -> dict[str, Any]:
    """What sparsity.json and the model card say of the data, in the words of `write_record`."""
    if script.train_file:
        kind = _BUILDERS[Path(script.validation_file).suffix]
        evaluated_on = {"name": Path(script.validation_file).name, "type": kind}
        return {"trained_on": f"{Path(script.train_file).name} (a local file)", "evaluated_on": evaluated_on}
    if script.dataset_name == BUILTIN:
        name = "the documentation in Python's standard library"
        return {"trained_on": name, "evaluated_on": {"name": name, "type": BUILTIN, "split": "held-out documents"}}
    name = without_path(script.dataset_name)
    evaluated_on = {"name": name, "type": name, "split": script.validation_split}
    if script.dataset_config_name:
        evaluated_on["config"] = script.dataset_config_name
    return {"datasets": [name], "trained_on": name, "evaluated_on": evaluated_on}


def check_files(script) -> None:
    """Raise a `FileNotFoundError` or `ValueError` for local files that cannot be read, before anything else is done."""
    for option in ("train_file", "validation_file"):
        path = getattr(script, option)
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{option}={path!r}: there is no such file.")
        if path and Path(path).suffix not in _BUILDERS:
            raise ValueError(f"{option}={path!r}: should end in one of {', '.join(_BUILDERS)}.")


def text_column(dataset: Dataset, name: str | None) -> str:
    """The column that holds the text: `name`, or the only column of strings."""
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"text_column={name!r} is not one of the columns {dataset.column_names}.")
        return name
    strings = [n for n, kind in dataset.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    if len(strings) != 1:
        raise ValueError(f"Which of the columns {dataset.column_names} holds the text? Say so with --text_column.")
    return strings[0]


def blocks_of_tokens(dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """Tokenize all texts, join them and cut them into windows of `size` tokens; what is left at the end is dropped."""
    tokens = dataset.map(
        lambda rows: {"input_ids": tokenizer(rows[column], verbose=False)["input_ids"]},
        batched=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
    joined = [token for row in tokens["input_ids"] for token in row]
    windows = [joined[start : start + size] for start in range(0, len(joined) - size + 1, size)]
    if not windows:
        raise ValueError(f"The text has {len(joined)} tokens, less than one window of block_size={size}.")
    return Dataset.from_dict({"input_ids": windows, "labels": windows})


def labelled_tokens(
    train: Dataset, validation: Dataset, script, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset, list[str]]:
    """Tokenize labelled texts.

    Returns:
        `tuple[Dataset, Dataset, list[str]]`: Rows with `input_ids`, `attention_mask` and `labels`, and the names of the
        labels.
    """
    for dataset in (train, validation):
        if script.label_column not in dataset.column_names:
            raise ValueError(
                f"label_column={script.label_column!r} is not one of the columns {dataset.column_names}. If the file"
                " has no header, name its columns: --column_names text label."
            )
    column = text_column(train, script.text_column)
    feature = train.features[script.label_column]
    if not isinstance(feature, ClassLabel):
        values = sorted(set(train[script.label_column]))
        feature = ClassLabel(names=[str(value) for value in values])

    def tokenize(rows):
        tokens = tokenizer(rows[column], truncation=True, max_length=script.block_size)
        labels = rows[script.label_column]
        known = isinstance(train.features[script.label_column], ClassLabel)
        return {**tokens, "labels": labels if known else [feature.str2int(str(label)) for label in labels]}

    train, validation = (
        dataset.map(tokenize, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
        for dataset in (train, validation)
    )
    return train, validation, feature.names


def head(dataset: Dataset, size: int | None) -> Dataset:
    """The first `size` rows, or all."""
    return dataset if size is None else dataset.select(range(min(size, len(dataset))))


def load_file(path: str, column_names: list[str] | None) -> Dataset:
    suffix = Path(path).suffix
    options = {}
    if suffix == ".txt":
        options = {"sample_by": "document"}
    elif suffix in (".csv", ".tsv"):
        options = {"column_names": column_names}
        if suffix == ".tsv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    return load_dataset(_BUILDERS[suffix], data_files=str(path), split="train", **options)
