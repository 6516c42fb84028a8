"""What all tasks share: their options, their interface, and a loop over batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from data import DataArguments
from rows import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, default_data_collator

from hf_lpdecay import LpDecayTrainer


METRICS = Path(__file__).parent.parent / "metrics"
TaskName = Literal[
    "causal-lm", "text-classification", "token-classification", "question-answering", "summarization", "translation"
]


@dataclass
class TaskArguments(DataArguments):
    """For what a model is trained, and where in the data that is."""

    task: TaskName = field(default="causal-lm", metadata={"help": "What the model is trained for."})
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text, or the text to summarize. Defaults to the only column of strings."},
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label (text-classification)."})
    tokens_column: str = field(default="tokens", metadata={"help": "Column of words (token-classification)."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column of their tags (token-classification)."})
    target_column: str = field(default="summary", metadata={"help": "Column with the summary (summarization)."})
    source_lang: str = field(default="en", metadata={"help": "Key in the column 'translation' to translate from."})
    target_lang: str = field(default="de", metadata={"help": "Key in the column 'translation' to translate into."})
    source_prefix: str = field(default="", metadata={"help": "Put before each source text, as T5 expects."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training example and evaluation window."})
    max_target_length: int = field(default=64, metadata={"help": "Tokens per summary or translation."})
    doc_stride: int = field(default=64, metadata={"help": "Overlap of the windows of a long context, in tokens."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens in the answer to a question."})

    def __post_init__(self):
        if self.task not in TaskName.__args__:
            raise ValueError(f"Invalid task: {self.task!r} - should be one of {', '.join(TaskName.__args__)}.")
        super().__post_init__()
        for name in ("block_size", "max_target_length", "max_answer_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name}: {value!r} - should be a whole number >= 1.")
        if not isinstance(self.doc_stride, int) or self.doc_stride < 0:
            raise ValueError(f"Invalid doc_stride: {self.doc_stride!r} - should be a whole number >= 0.")


class Task:
    """Tokenized data, and how a model is trained and evaluated on them. A subclass says what is special.

    Args:
        script (`TaskArguments`): Which data.
        path (`str`): Of the model, whose tokenizer is taken.

    Attributes:
        train, validation (`datasets.Dataset`): Tokenized.
        examples (`int`): Number of those that the metrics are of.

    Raises:
        ValueError: If the data have not what the task needs.
    """

    auto_class: ClassVar[type]
    trainer_class: ClassVar[type] = LpDecayTrainer
    train: Dataset
    validation: Dataset

    def __init__(self, script: TaskArguments, path: str):
        self.script = script
        self.tokenizer = AutoTokenizer.from_pretrained(path, **self.tokenizer_options(path))
        self.load()
        self.examples = len(self.validation)

    def tokenizer_options(self, path: str) -> dict[str, Any]:
        """More arguments for the tokenizer of the model at `path`."""
        return {}

    def load(self) -> None:
        """Load and tokenize the data: set `train` and `validation`."""
        raise NotImplementedError

    def load_model(self, path: str) -> PreTrainedModel:
        """Load the model that is trained, in float32: bfloat16 weights would lose small updates and most of the decay.
        Under autocast it computes in bfloat16 all the same."""
        return self.auto_class.from_pretrained(path, dtype=torch.float32, **self.model_options())

    def model_options(self) -> dict[str, Any]:
        """More arguments for `from_pretrained`."""
        return {}

    def collator(self, model: PreTrainedModel) -> Callable:
        """What makes a batch of rows."""
        return default_data_collator

    def compute_metrics(self, args: TrainingArguments) -> Callable | None:
        """The `Trainer`'s `compute_metrics`, for evaluations during the training."""
        return None

    def sample(self, model: PreTrainedModel) -> tuple[str, str] | None:
        """A text and how the model continues it, if it is one that writes."""
        return None

    def evaluate(self, model: PreTrainedModel, batch_size: int, desc: str) -> dict[str, float]:
        """Metrics of a model on the validation data, the most important one first."""
        raise NotImplementedError


@torch.no_grad()
def forward_batches(
    model: PreTrainedModel, rows: Any, collator: Callable, batch_size: int, desc: str
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Run a model in evaluation mode over a dataset.

    Yields:
        `tuple[dict, dict]`: A batch on the model's device, and the model's outputs.
    """
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc=desc):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {name: values.to(model.device) for name, values in batch.items()}
        yield batch, model(**batch)


def load_metric(name: str):
    """A metric of recipes/metrics, which needs no hub."""
    import evaluate  # language models do without

    return evaluate.load(str(METRICS / f"{name}.py"))


def check_columns(datasets: tuple[Dataset, ...], names: dict[str, str]) -> None:
    """Raise a `ValueError` for a column that is missing; `names` are those of the columns by option."""
    for option, name in names.items():
        for dataset in datasets:
            if name not in dataset.column_names:
                raise ValueError(f"{option}={name!r} is not one of the columns {dataset.column_names}.")


def check_fast(tokenizer, task: str) -> None:
    """Raise a `ValueError` for a tokenizer that does not know which characters a token is of."""
    if not tokenizer.is_fast:
        raise ValueError(f"task={task!r} needs a fast tokenizer, and {type(tokenizer).__name__} is none.")
