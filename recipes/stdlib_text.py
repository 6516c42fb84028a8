"""English text that every Python installation has: the language reference and the standard library's docstrings."""

import ast
import hashlib
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset


_MIN_CHARACTERS = 200
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
    train, validation = [], []
    for text in sorted(texts, key=_checksum):
        (validation if _checksum(text) % 10 == 0 else train).append(text)
    return Dataset.from_dict({"text": train}), Dataset.from_dict({"text": validation})


def _docstrings():
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if _SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are there to be broken
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= _MIN_CHARACTERS:
                    yield text


def _checksum(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
