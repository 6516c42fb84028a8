"""Safetensors files below the level of tensors: headers, checked, and byte strings kept in such files.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header in JSON, then
the tensors' bytes without gaps.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open


# Bits per entry of safetensors' types, bits of the units in which they are compressed (types smaller than a byte share
# one), and whether the highest bit of a unit is a sign.
_TYPES = {
    "F4": (4, 8, False),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), (6, 8, False)),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0"), (8, 8, False)),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), (8, 8, True)),
    **dict.fromkeys(("I16", "U16"), (16, 16, False)),
    **dict.fromkeys(("F16", "BF16"), (16, 16, True)),
    **dict.fromkeys(("I32", "U32"), (32, 32, False)),
    "F32": (32, 32, True),
    **dict.fromkeys(("I64", "U64"), (64, 64, False)),
    "F64": (64, 64, True),
    "C64": (64, 32, True),
}
_MAX_HEADER = 100_000_000  # as in safetensors
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class StoredTensor:
    """The bytes of a tensor in a safetensors file.

    Args:
        name (`str`): As in the file.
        begin (`int`): Where its bytes begin, counted from the end of the header.
        nbytes (`int`): How many there are.
        size (`int`): Bytes of the units of which it consists: 1, 2, 4 or 8.
        is_float (`bool`): Whether the highest bit of a unit is a sign.
    """

    name: str
    begin: int
    nbytes: int
    size: int
    is_float: bool

    @property
    def count(self) -> int:
        """Number of units."""
        return self.nbytes // self.size


def read_header(path: Path) -> tuple[bytes, list[StoredTensor]]:
    """Read what a safetensors file holds before its data.

    Returns:
        `tuple`: These very bytes, and the tensors in the order in which they lie behind them.

    Raises:
        ValueError: If it is not a safetensors file, or a damaged one.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file: fetch or save it again.")
        header = start + file.read(length)
    try:
        tensors = parse_header(header)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): save the model again.") from error
    expected = len(header) + sum(tensor.nbytes for tensor in tensors)
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {expected:,}: fetch or save it again.")
    return header, tensors


def parse_header(header: bytes) -> list[StoredTensor]:
    """Find the tensors of a header.

    Args:
        header (`bytes`): Its length and its JSON.

    Returns:
        `list[StoredTensor]`: In the order in which they lie in the file.

    Raises:
        ValueError: If they are of unknown types, or don't fill the data one after the other.
    """
    if len(header) < 8 or int.from_bytes(header[:8], "little") != len(header) - 8:
        raise ValueError("the header is cut off")
    try:
        content = json.loads(header[8:])
        content.pop("__metadata__", None)
        tensors = [_parse_entry(name, **entry) for name, entry in content.items()]
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"the header is not one of safetensors: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
        position += tensor.nbytes
    return tensors


def _parse_entry(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    if dtype not in _TYPES:
        raise ValueError(f"{name} is of type {dtype!r}, which is not known")
    bits, unit, is_float = _TYPES[dtype]
    if len(data_offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *data_offsets)):
        raise ValueError(f"{name} has the shape {shape} at {data_offsets}")
    begin, end = data_offsets
    if 8 * (end - begin) != prod(shape) * bits:
        raise ValueError(f"{name} has {prod(shape)} entries of {bits} bits in {end - begin} bytes")
    return StoredTensor(name, begin, end - begin, unit // 8, is_float)


class ShardWriter:
    """Writes byte strings into safetensors files of about a gigabyte, one after the other.

    Args:
        folder (`Path`): Where to.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: list[str] = []
        self._data: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def begin(self, name: str) -> BinaryIO:
        """Where the bytes of a tensor go."""
        if self._data is not None and self._data.tell() >= SHARD_BYTES:
            self._finish()
        if self._data is None:
            self._data = tempfile.TemporaryFile(dir=self._folder)
            self._names.append(f"packed-{len(self._names) + 1:05d}.safetensors")
        # The same tensor may lie in two files.
        self._key = name if name not in self._entries else f"{name}#{len(self._entries)}"
        self._start = self._data.tell()
        return self._data

    def end(self) -> dict[str, str]:
        """Note that they are complete, and where they are."""
        offsets = [self._start, self._data.tell()]
        self._entries[self._key] = {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}
        return {"shard": self._names[-1], "key": self._key}

    def close(self) -> list[str]:
        """Finish the last file; the names of all."""
        if self._data is not None:
            self._finish()
        return self._names

    def _finish(self) -> None:
        header = json.dumps(self._entries).encode()
        header += b" " * (-len(header) % 8)
        with open(self._folder / self._names[-1], "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, 1 << 20)
        self._data.close()
        self._data, self._entries = None, {}


class ShardReader:
    """Reads byte strings from safetensors files.

    Args:
        paths (`dict[str, Path]`): The files by name.
    """

    def __init__(self, paths: dict[str, Path]):
        self._paths = paths

    def __enter__(self):
        self._files = {name: safe_open(path, framework="np") for name, path in self._paths.items()}
        return self

    def __exit__(self, *args):
        self._files.clear()

    def get(self, shard: str, key: str) -> memoryview:
        """The bytes that were written under a key.

        Raises:
            KeyError, SafetensorError: If there are none.
            ValueError: If there is something else.
        """
        tensor = self._files[shard].get_tensor(key)
        if tensor.dtype != "uint8" or tensor.ndim != 1:
            raise ValueError(f"{key} is not a string of bytes")
        return memoryview(tensor)
