"""English text that every Python installation has: the language reference and the standard library's docstrings."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from rows import Dataset


_MIN_CHARACTERS = 200
_MIN_CHAT_CHARACTERS = 60
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load_stdlib_text() -> tuple[Dataset, Dataset]:
    """Collect the text of this Python's `pydoc_data.topics` and of its modules' docstrings.

    Each text is on one side of the split by its own checksum, so that it is on the same side for every version of
    Python, and no text that is evaluated on is ever trained on. Equal texts count once. What there is depends on the
    version of Python: compare perplexities within one version only.

    Returns:
        `tuple[Dataset, Dataset]`: Training and evaluation texts, 9 to 1, in a column named `text`.
    """
    texts = dict.fromkeys(text.strip() + "\n\n" for text in [*topics.values(), *_docstrings()])
    return tuple(Dataset.from_dict({"text": part}) for part in _split(texts))


def load_stdlib_chats() -> tuple[Dataset, Dataset]:
    """Questions for what this Python's functions do, answered by the first paragraph of their docstrings.

    Split like the texts of [`load_stdlib_text`].

    Returns:
        `tuple[Dataset, Dataset]`: Rows for training and evaluation, 9 to 1, with `prompt` and `completion`, each one
        message of a chat.
    """
    answers = {}
    for module, node, text in _documented():
        answer = text.split("\n\n")[0]
        if isinstance(node, ast.FunctionDef) and len(answer) >= _MIN_CHAT_CHARACTERS:
            answers[answer] = f"What does `{node.name}({ast.unparse(node.args)})` in Python's {module} do?"
    return tuple(
        Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": answers[answer]}],
                    "completion": [{"role": "assistant", "content": answer}],
                }
                for answer in part
            ]
        )
        for part in _split(answers)
    )


def _split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts to train on and to evaluate on, in the order of their checksums."""
    train, validation = [], []
    for text in sorted(texts, key=_checksum):
        (validation if _checksum(text) % 10 == 0 else train).append(text)
    return train, validation


def _docstrings():
    return (text for _, _, text in _documented() if len(text) >= _MIN_CHARACTERS)


def _documented():
    """All docstrings of the standard library: the module's name, the node and the text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are there to be broken
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield module, node, text


def _checksum(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
