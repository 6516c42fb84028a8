"""What `finetune.py` can train a model for: each task loads and tokenizes its data, and evaluates a model on it."""

from tasks.base import Task, TaskArguments
from tasks.causal_lm import CausalLM
from tasks.question_answering import QuestionAnswering
from tasks.seq2seq import Seq2Seq
from tasks.text_classification import TextClassification
from tasks.token_classification import TokenClassification


TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "summarization": Seq2Seq,
    "translation": Seq2Seq,
}

__all__ = ["TASKS", "Task", "TaskArguments"]
