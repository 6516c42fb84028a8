"""`pack` and `unpack`: a lossless archive of a sparse checkpoint, about as small as it can be.

An archive is a folder. `archive.json` says which files there were, with the very bytes of their headers, and for each
tensor its pieces and a checksum; `packed-*.safetensors` hold the compressed pieces; the config, the tokenizer and what
else lay beside the weights are copied. No file has a name by which Transformers would take it for a model's weights.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..training.record import weight_files
from .codec import PIECE, Piece, decode, encode


VERSION = 1
MANIFEST = "archive.json"
# Bytes per entry of safetensors' types, and whether the highest bit is a sign.
_TYPES = {
    **dict.fromkeys(("BOOL", "U8", "F8_E8M0"), (1, False)),
    "I8": (1, False),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2"), (1, True)),
    **dict.fromkeys(("I16", "U16"), (2, False)),
    **dict.fromkeys(("F16", "BF16"), (2, True)),
    **dict.fromkeys(("I32", "U32"), (4, False)),
    "F32": (4, True),
    **dict.fromkeys(("I64", "U64"), (8, False)),
    "F64": (8, True),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD_BYTES = 1 << 30
_THREADS = max(1, min(4, os.cpu_count() or 1))
_MAX_HEADER = 100_000_000  # as in safetensors


def pack(model_dir: str | os.PathLike, out: str | os.PathLike) -> dict[str, int]:
    """Pack a saved model into an archive.

    Args:
        model_dir (`str` or `os.PathLike`): Folder with safetensors, and config and tokenizer beside them.
        out (`str` or `os.PathLike`): Folder to write; must not exist or be empty.

    Returns:
        `dict[str, int]`: `dense_bytes` of the weights' files, and `packed_bytes` of what they have become.

    Raises:
        FileNotFoundError: If there are no safetensors in the folder.
        ValueError: If weights are pickled, a file is damaged, or `out` is not empty.

    Example:

    ```python
    >>> pack("outputs/sparse", "outputs/sparse-packed")
    >>> unpack("outputs/sparse-packed", "outputs/sparse-again")
    ```
    """
    folder, sources = Path(model_dir), weight_files(model_dir)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.stem != "training_args")
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files ({', '.join(pickles)}), which are never read: save the model as safetensors,"
            " and leave optimizer states out."
        )
    headers = [_read_header(path) for path in sources]
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.is_symlink() and path not in sources and path.suffix not in _PICKLES
    )
    dense = sum(path.stat().st_size for path in sources)
    with _written_whole(out) as target, ThreadPoolExecutor(_THREADS) as pool:
        manifest: dict[str, Any] = {"version": VERSION, "files": [], "others": others}
        shards = _ShardWriter(target)
        with tqdm(total=dense, unit="B", unit_scale=True, desc="Packing") as progress:
            for path, (header, tensors) in zip(sources, headers):
                entry = {"name": path.name, "header": base64.b64encode(header).decode(), "tensors": []}
                with open(path, "rb") as file:
                    file.seek(len(header))
                    for tensor in tensors:
                        entry["tensors"].append(_pack_tensor(file, tensor, shards, pool))
                        progress.update(tensor["bytes"])
                manifest["files"].append(entry)
        manifest["shards"] = shards.close()
        for name in others:
            shutil.copyfile(folder / name, target / name)
        (target / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        packed = sum((target / name).stat().st_size for name in (*manifest["shards"], MANIFEST))
    return {"dense_bytes": dense, "packed_bytes": packed}


def unpack(archive: str | os.PathLike, out: str | os.PathLike) -> None:
    """Unpack an archive: every file as it was, byte for byte.

    Args:
        archive (`str` or `os.PathLike`): Folder that [`pack`] has written.
        out (`str` or `os.PathLike`): Folder to write; must not exist or be empty.

    Raises:
        FileNotFoundError: If there is no archive, or a part of it is missing.
        ValueError: If the archive is damaged, of another version, or `out` is not empty. Nothing is written then.
    """
    folder = Path(archive)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise ValueError(f"its version is {manifest['version']!r}, and only {VERSION} is known")
        files = [(_safe(entry["name"]), *_checked_header(entry)) for entry in manifest["files"]]
        names = [name for name, _, _ in files] + [_safe(name) for name in manifest["others"]]
        if len(set(names)) != len(names):
            raise ValueError("two files have the same name")
        shards = [_regular(folder, name) for name in manifest["shards"]]
        others = [_regular(folder, name) for name in manifest["others"]]
        total = sum(len(header) + sum(tensor["bytes"] for tensor in tensors) for _, header, tensors in files)
        with _written_whole(out) as target, ThreadPoolExecutor(_THREADS) as pool:
            if total > shutil.disk_usage(target).free:
                raise ValueError(f"it would take {total:,} bytes, more than there is room for")
            with _ShardReader(shards) as reader, tqdm(total=total, unit="B", unit_scale=True, desc="Unpacking") as bar:
                for (name, header, tensors), entry in zip(files, manifest["files"]):
                    with open(target / name, "wb") as file:
                        file.write(header)
                        for tensor, packed in zip(tensors, entry["tensors"], strict=True):
                            _unpack_tensor(file, tensor, packed, reader, pool)
                            bar.update(tensor["bytes"])
            for path in others:
                shutil.copyfile(path, target / path.name)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"The archive {folder} cannot be unpacked: {said}. Nothing was written.") from error


def _read_header(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """A safetensors file's bytes before the data, and its tensors in the order in which they lie there."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file.")
        header = start + file.read(length)
    try:
        tensors = _parse_header(header)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if path.stat().st_size != len(header) + sum(tensor["bytes"] for tensor in tensors):
        raise ValueError(f"{path} is damaged: its header does not fit its length.")
    return header, tensors


def _parse_header(header: bytes) -> list[dict[str, Any]]:
    """The tensors of a header, after a look whether they fill the data without gaps, in the types that there are."""
    if len(header) < 8 or int.from_bytes(header[:8], "little") != len(header) - 8:
        raise ValueError("a header is cut off")
    content = json.loads(header[8:])
    tensors = []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"{name} is of type {entry['dtype']!r}, which is not known")
        size, is_float = _TYPES[entry["dtype"]]
        count = 1
        for length in entry["shape"]:
            if not isinstance(length, int) or length < 0:
                raise ValueError(f"{name} has the shape {entry['shape']}")
            count *= length
        begin, end = entry["data_offsets"]
        if end - begin != count * size:
            raise ValueError(f"{name} has {count} entries in {end - begin} bytes")
        tensors.append(
            {"name": name, "begin": begin, "bytes": end - begin, "count": count, "size": size, "is_float": is_float}
        )
    tensors.sort(key=lambda tensor: (tensor["begin"], tensor["bytes"]))
    position = 0
    for tensor in tensors:
        if tensor["begin"] != position:
            raise ValueError(f"{tensor['name']} does not begin where the one before it ends")
        position += tensor["bytes"]
    return tensors


def _checked_header(entry: dict[str, Any]) -> tuple[bytes, list[dict[str, Any]]]:
    header = base64.b64decode(entry["header"], validate=True)
    return header, _parse_header(header)


def _pieces(tensor: dict[str, Any]) -> list[int]:
    """Entries of each piece."""
    return [min(PIECE, tensor["count"] - start) for start in range(0, tensor["count"], PIECE)]


def _pack_tensor(
    file: BinaryIO, tensor: dict[str, Any], shards: "_ShardWriter", pool: ThreadPoolExecutor
) -> dict[str, Any]:
    digest, pieces, waiting = hashlib.blake2b(digest_size=16), [], deque()
    blob = shards.begin(tensor["name"])

    def finish(future) -> None:
        piece = future.result()
        pieces.append([piece.nonzeros, *map(len, piece.parts)])
        for part in piece.parts:
            blob.write(part)

    for count in _pieces(tensor):
        data = file.read(count * tensor["size"])
        waiting.append(pool.submit(encode, data, tensor["size"], tensor["is_float"]))
        digest.update(data)
        if len(waiting) > _THREADS:
            finish(waiting.popleft())
    while waiting:
        finish(waiting.popleft())
    return {**shards.end(), "pieces": pieces, "blake2b": digest.hexdigest()}


def _unpack_tensor(
    file: BinaryIO, tensor: dict[str, Any], packed: dict[str, Any], reader: "_ShardReader", pool
) -> None:
    counts, name = _pieces(tensor), tensor["name"]
    if len(packed["pieces"]) != len(counts):
        raise ValueError(f"{name} has {len(packed['pieces'])} pieces instead of {len(counts)}")
    lengths = [length for piece in packed["pieces"] for length in piece[1:]]
    if not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise ValueError(f"{name} has parts of no length")
    blob = reader.get(packed["shard"], packed["key"])
    if sum(lengths) != len(blob):
        raise ValueError(f"{name} is {len(blob)} bytes long instead of {sum(lengths)}")
    digest, waiting, position = hashlib.blake2b(digest_size=16), deque(), 0

    def finish(future) -> None:
        data = future.result()
        digest.update(data)
        file.write(data)

    for count, (nonzeros, *parts) in zip(counts, packed["pieces"]):
        cut = []
        for length in parts:
            cut.append(blob[position : position + length])
            position += length
        waiting.append(pool.submit(decode, Piece(nonzeros, cut), count, tensor["size"], tensor["is_float"]))
        if len(waiting) > _THREADS:
            finish(waiting.popleft())
    while waiting:
        finish(waiting.popleft())
    if digest.hexdigest() != packed["blake2b"]:
        raise ValueError(f"the checksum of {name} is wrong")


class _ShardWriter:
    """Writes byte strings into safetensors files of about a gigabyte, one after the other."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: list[str] = []
        self._data: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def begin(self, name: str) -> BinaryIO:
        """Where the bytes of a tensor go."""
        if self._data is not None and self._data.tell() >= _SHARD_BYTES:
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
        length = self._data.tell() - self._start
        offsets = [self._start, self._data.tell()]
        self._entries[self._key] = {"dtype": "U8", "shape": [length], "data_offsets": offsets}
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


class _ShardReader:
    """Reads byte strings from safetensors files."""

    def __init__(self, paths: list[Path]):
        self._paths = {path.name: path for path in paths}

    def __enter__(self):
        self._files = {name: safe_open(path, framework="np") for name, path in self._paths.items()}
        return self

    def __exit__(self, *args):
        self._files.clear()

    def get(self, shard: str, key: str) -> memoryview:
        tensor = self._files[shard].get_tensor(key)
        if tensor.dtype != "uint8" or tensor.ndim != 1:
            raise ValueError(f"{key} is not a string of bytes")
        return memoryview(tensor)


def _safe(name: Any) -> str:
    """A file's name that cannot lead out of the folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+ -]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _regular(folder: Path, name: Any) -> Path:
    path = folder / _safe(name)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path.name} is not an ordinary file")
    if not path.exists():
        raise FileNotFoundError(f"The archive {folder} lacks {path.name}. Nothing was written.")
    return path


@contextmanager
def _written_whole(out: str | os.PathLike) -> Iterator[Path]:
    """A folder aside that gets the name `out` when all went well, and is deleted otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: name another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield aside
        os.chmod(aside, 0o755)
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
