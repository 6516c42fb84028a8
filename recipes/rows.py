"""Rows of a data set: those of `datasets`, or a small stand-in where that package is not installed.

The stand-in reads local text and JSON Lines files, which is enough to fine-tune a causal language model.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


try:
    from datasets import ClassLabel, Dataset, Value, load_dataset
except ModuleNotFoundError:

    @dataclass(frozen=True)
    class Value:
        """The type of a column.

        Args:
            dtype (`str`): Its name.
        """

        dtype: str

    @dataclass(frozen=True)
    class ClassLabel:
        """The type of a column of labels.

        Args:
            names (`list[str]`): The labels, in the order of their numbers.
        """

        names: list[str]

        def str2int(self, name: str) -> int:
            """The number of a label."""
            return self.names.index(name)

    class Dataset(torch.utils.data.Dataset):
        """Columns of equal length, in memory.

        Args:
            columns (`dict[str, list]`): The values of each column.
        """

        def __init__(self, columns: dict[str, list]):
            self._columns = columns

        @classmethod
        def from_dict(cls, columns: dict[str, list]) -> "Dataset":
            """Make a data set of columns."""
            return cls(dict(columns))

        @classmethod
        def from_list(cls, rows: list[dict[str, Any]]) -> "Dataset":
            """Make a data set of rows that have the same keys."""
            return cls({name: [row[name] for row in rows] for name in (rows[0] if rows else ())})

        @property
        def column_names(self) -> list[str]:
            """Names of the columns."""
            return list(self._columns)

        @property
        def features(self) -> dict[str, Value]:
            """The type of each column, by its first value."""
            return {
                name: Value("string" if values and isinstance(values[0], str) else "other")
                for name, values in self._columns.items()
            }

        def __len__(self) -> int:
            return len(next(iter(self._columns.values()), ()))

        def __getitem__(self, key: str | int) -> Any:
            if isinstance(key, str):
                return self._columns[key]
            return {name: values[key] for name, values in self._columns.items()}

        def select(self, indices: Iterable[int]) -> "Dataset":
            """Make a data set of some rows."""
            indices = list(indices)
            return Dataset({name: [values[i] for i in indices] for name, values in self._columns.items()})

        def map(
            self, function: Callable[[dict], dict], batched: bool, remove_columns: list[str], desc: str
        ) -> "Dataset":
            """Replace all columns by those that a function makes of them, all rows at once."""
            assert batched and remove_columns == self.column_names, desc
            return Dataset(dict(function(self._columns)))

    def load_dataset(path: str, *args, data_files: str | None = None, **options) -> Dataset:
        """Read a local text file as one row, or a JSON Lines file.

        Raises:
            ImportError: If anything else is asked for.
        """
        if data_files is not None and path == "text":
            return Dataset({"text": [Path(data_files).read_text(encoding="utf-8")]})
        if data_files is not None and Path(data_files).suffix == ".jsonl":
            lines = Path(data_files).read_text(encoding="utf-8").splitlines()
            return Dataset.from_list([json.loads(line) for line in lines if line.strip()])
        raise ImportError(
            f"{data_files or path} needs the package datasets, which is not installed: pip install datasets. Without"
            " it, only local .txt and .jsonl files are read."
        )


__all__ = ["ClassLabel", "Dataset", "Value", "load_dataset"]
