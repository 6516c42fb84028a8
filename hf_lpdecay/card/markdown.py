"""Names and numbers in Markdown, whatever is in the names."""

import re
from collections.abc import Sequence
from typing import Any


def plain(text: Any) -> str:
    """Text that shows as it is: on one line, nothing in it taken for Markdown or HTML."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*\[\]<>|~#&$])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word an underscore is one


def code(text: Any) -> str:
    """Inline code that may stand in a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> str:
    """A table of cells that are Markdown already.

    Args:
        header (`Sequence[str]`): One title per column.
        rows (`Sequence[Sequence[str]]`): As many cells each.
        right (`bool`, *optional*, defaults to `True`): Align all columns but the first to the right.
    """
    rule = ["---", *["---:" if right else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
