"""`pack` and `unpack`: a lossless archive of a sparse checkpoint, about as small as it can be.

An archive is a folder. `archive.json` says which files there were, with the very bytes of the safetensors' headers, and
for each tensor its pieces and a checksum; `packed-*.safetensors` hold the compressed pieces; the config, the tokenizer
and what else lay beside the weights are copied. No file has a name by which Transformers would take it for a model's
weights.
"""

import base64
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import written_aside
from ..sparsity.checkpoint import weight_files
from .codec import PIECE, Piece, decode, encode, zstandard
from .stored import ShardReader, ShardWriter, StoredTensor, parse_header, read_header


VERSION = 1
MANIFEST = "archive.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
THREADS = max(1, min(4, os.cpu_count() or 1))
_COPIED = 1 << 20  # bytes at a time


def pack(model_dir: str | os.PathLike, out: str | os.PathLike) -> dict[str, int]:
    """Pack a saved model into an archive: every file of the folder and of those in it, but a Trainer's `checkpoint-*`.

    Args:
        model_dir (`str` or `os.PathLike`): Folder with safetensors, and config and tokenizer beside them. Links to
            files, as in the hub's cache, count as these files.
        out (`str` or `os.PathLike`): Folder to write; must not exist or be empty.

    Returns:
        `dict[str, int]`: `dense_bytes` of the weights' files, and `packed_bytes` of what they have become.

    Raises:
        FileNotFoundError: If there are no safetensors in the folder.
        ImportError: If zstandard is not installed.
        ValueError: If weights are pickled (no pickle is ever opened; of a Trainer's `training_args.bin` the bytes are
            kept), a file is damaged or cannot be kept, or `out` is not empty.

    Example:

    ```python
    >>> pack("outputs/sparse", "outputs/sparse-packed")
    >>> unpack("outputs/sparse-packed", "outputs/sparse-again")
    ```
    """
    zstandard()  # installed?
    folder = Path(model_dir)
    weight_files(folder)  # all there?
    if Path(out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in {folder}, which shall be packed: name a folder elsewhere.")
    names = _list_files(folder)
    sources = [name for name in names if name.endswith(".safetensors")]
    headers = [read_header(folder / name) for name in sources]
    others = [name for name in names if name not in sources]
    sizes = [(folder / name).stat().st_size for name in sources]
    total = sum(sizes) + sum((folder / name).stat().st_size for name in others)
    with (
        written_whole(out) as target,
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="Packing") as progress,
    ):
        shards = ShardWriter(target)
        files = []
        for name, (header, tensors) in zip(sources, headers):
            packed = _pack_tensors(folder / name, len(header), tensors, shards, pool, progress)
            files.append({"name": name, "header": base64.b64encode(header).decode(), "tensors": packed})
        content = {
            "files": files,
            "shards": shards.close(),
            "others": [{"name": name, **copy_file(folder / name, target / name, progress)} for name in others],
        }
        manifest = {"version": VERSION, "sha256": _digest(content), "content": content}
        (target / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        packed_bytes = sum((target / name).stat().st_size for name in (*content["shards"], MANIFEST))
    return {"dense_bytes": sum(sizes), "packed_bytes": packed_bytes}


def unpack(archive: str | os.PathLike, out: str | os.PathLike) -> None:
    """Unpack an archive: every file as it was, byte for byte.

    Args:
        archive (`str` or `os.PathLike`): Folder that [`pack`] has written.
        out (`str` or `os.PathLike`): Folder to write; must not exist or be empty.

    Raises:
        FileNotFoundError: If there is no archive, or a part of it is missing.
        ImportError: If zstandard is not installed.
        ValueError: If the archive is damaged, of another version, or `out` is not empty. Nothing is written then.
    """
    zstandard()  # installed?
    folder = Path(archive)
    with damage_told(folder, "unpacked", " Nothing was written."):
        content = read_manifest(folder)
        headers = [base64.b64decode(entry["header"], validate=True) for entry in content["files"]]
        tensors = [parse_header(header) for header in headers]
        names = [_safe(entry["name"]) for entry in (*content["files"], *content["others"])]
        if len(set(names)) != len(names):
            raise ValueError("two files have the same name")
        shards = {name: regular(folder, name) for name in content["shards"]}
        others = [regular(folder, entry["name"]) for entry in content["others"]]
        total = sum(map(len, headers)) + sum(tensor.nbytes for file in tensors for tensor in file)
        total += sum(path.stat().st_size for path in others)
        with written_whole(out) as target, ThreadPoolExecutor(THREADS) as pool:
            if total > shutil.disk_usage(target).free:
                raise ValueError(f"it would take {total:,} bytes, more than there is room for")
            with ShardReader(shards) as reader, tqdm(total=total, unit="B", unit_scale=True, desc="Unpacking") as bar:
                for entry, header, stored in zip(content["files"], headers, tensors):
                    path = target / entry["name"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(header)
                    _unpack_tensors(path, stored, entry["tensors"], reader, pool, bar)
                for entry, path in zip(content["others"], others):
                    if copy_file(path, target / entry["name"], bar) != {"sha256": entry["sha256"]}:
                        raise ValueError(f"the checksum of {entry['name']} is wrong")


@contextmanager
def damage_told(folder: Path, done: str, more: str = "") -> Iterator[None]:
    """Turn whatever a damaged archive causes into an error that says so."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"The archive {folder} cannot be {done}: {said}.{more}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an archive's manifest says, after a look whether it is whole.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another version.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["version"] != VERSION:
        raise ValueError(f"its version is {manifest['version']!r}, and only {VERSION} is known")
    content = manifest["content"]
    if manifest["sha256"] != _digest(content):
        raise ValueError(f"the checksum of {MANIFEST} is wrong")
    return content


def decoding(tensor: StoredTensor, entry: dict[str, Any], reader: ShardReader, function: Callable) -> Iterator[tuple]:
    """The jobs that decode the pieces of a tensor."""
    counts, lengths = _pieces(tensor), [length for piece in entry["pieces"] for length in piece[1:]]
    if len(entry["pieces"]) != len(counts) or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError(f"the pieces of {tensor.name} are not {len(counts)} with lengths")
    blob, position = reader.get(entry["shard"], entry["key"]), 0
    if sum(lengths) != len(blob):
        raise ValueError(f"{tensor.name} is {len(blob)} bytes long instead of {sum(lengths)}")
    for count, (nonzeros, *parts) in zip(counts, entry["pieces"]):
        cut = []
        for length in parts:
            cut.append(blob[position : position + length])
            position += length
        yield None, function, Piece(nonzeros, cut), count, tensor.size, tensor.is_float


def _list_files(folder: Path) -> list[str]:
    """The files of a folder and of those in it, in a fixed order, after a look whether all can be kept."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")]
        for name in folders + files:
            path = Path(parent, name)
            if path.is_symlink() and not path.is_file():
                raise ValueError(f"{path} is a link to no file, which cannot be kept: replace or delete it.")
            if path.is_dir():
                continue
            if not path.is_file():
                raise ValueError(f"{path} is not an ordinary file and cannot be kept: delete it.")
            names.append(_safe(path.relative_to(folder).as_posix()))
    if MANIFEST in names:
        raise ValueError(f"{folder} holds an {MANIFEST}: it is packed already, or the file needs another name.")
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.endswith("training_args.bin")]
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files ({', '.join(pickles)}), which are never read: save the model as safetensors,"
            " and leave optimizer states out."
        )
    return sorted(names)


def _pieces(tensor: StoredTensor) -> list[int]:
    """Units in each piece; an empty tensor has a piece of none."""
    return [min(PIECE, tensor.count - start) for start in range(0, max(1, tensor.count), PIECE)]


def _pack_tensors(
    path: Path,
    start: int,
    tensors: list[StoredTensor],
    shards: ShardWriter,
    pool: ThreadPoolExecutor,
    progress: tqdm,
) -> list[dict[str, Any]]:
    """Write the pieces of a file's tensors into shards, and say where they are."""

    def jobs() -> Iterator[tuple]:
        with open(path, "rb") as file:
            file.seek(start)
            for tensor in tensors:
                for count in _pieces(tensor):
                    data = file.read(count * tensor.size)
                    if len(data) != count * tensor.size:
                        raise ValueError(f"{path} became shorter while it was read.")
                    yield data, encode, data, tensor.size, tensor.is_float

    progress.update(start)
    packed = []
    results = in_order(pool, jobs())
    for tensor in tensors:
        digest, pieces, blob = hashlib.sha256(), [], shards.begin(tensor.name)
        for _, (data, piece) in zip(_pieces(tensor), results):
            digest.update(data)
            for part in piece.parts:
                blob.write(part)
            pieces.append([piece.nonzeros, *map(len, piece.parts)])
            progress.update(len(data))
        packed.append({**shards.end(), "pieces": pieces, "sha256": digest.hexdigest()})
    return packed


def _unpack_tensors(
    path: Path,
    tensors: list[StoredTensor],
    packed: list[dict[str, Any]],
    reader: ShardReader,
    pool: ThreadPoolExecutor,
    progress: tqdm,
) -> None:
    """Append a file's tensors to its header."""

    def jobs() -> Iterator[tuple]:
        for tensor, entry in zip(tensors, packed):
            yield from decoding(tensor, entry, reader, decode)

    if len(packed) != len(tensors):
        raise ValueError(f"{path.name} has {len(packed)} tensors instead of {len(tensors)}")
    results = in_order(pool, jobs())
    with open(path, "ab") as file:
        progress.update(file.tell())
        for tensor, entry in zip(tensors, packed):
            digest = hashlib.sha256()
            for _, (_, data) in zip(_pieces(tensor), results):
                digest.update(data)
                file.write(data)
                progress.update(len(data))
            if digest.hexdigest() != entry["sha256"]:
                raise ValueError(f"the checksum of {tensor.name} is wrong")


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[tuple[Any, Callable, Any]]) -> Iterator[tuple[Any, Any]]:
    """Run jobs `(label, function, *arguments)` in threads, few ahead; yields `(label, result)` in their order."""
    waiting = deque()
    for label, function, *arguments in jobs:
        waiting.append((label, pool.submit(function, *arguments)))
        if len(waiting) > THREADS:
            yield _finished(waiting.popleft())
    while waiting:
        yield _finished(waiting.popleft())


def _finished(job: tuple[Any, Future]) -> tuple[Any, Any]:
    """A job's label and result, of which nothing else holds on to: it may be large."""
    return job[0], job[1].result()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def copy_file(source: Path, target: str | os.PathLike, progress: tqdm | None = None) -> dict[str, str]:
    """Copy a file; its checksum."""
    digest = hashlib.sha256()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reading, open(target, "wb" if target == os.devnull else "xb") as writing:
        while data := reading.read(_COPIED):
            digest.update(data)
            writing.write(data)
            if progress is not None:
                progress.update(len(data))
    return {"sha256": digest.hexdigest()}


def _safe(name: Any) -> str:
    """A file's name, with `/` between folders, that cannot lead out of the folder on any system."""
    if not isinstance(name, str) or set(name) & set("\\:\0") or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is not a name that can be kept: no \\, : or .. may be in it")
    return name


def regular(folder: Path, name: Any, links: bool = False) -> Path:
    """The path of an ordinary file of an archive; raises for other kinds, names that lead out of the folder and, unless
    `links` are only read, for those: the hub's cache is made of them."""
    path = folder / _safe(name)
    linked = path.resolve() != folder.resolve() / name
    if (linked and not links) or (path.exists() and not path.is_file()):
        raise ValueError(f"{name} is a link or not an ordinary file (`cp -rL` makes a copy without links)")
    if not path.exists():
        raise FileNotFoundError(f"The archive {folder} lacks {name}. Nothing was written.")
    return path


@contextmanager
def written_whole(out: str | os.PathLike) -> Iterator[Path]:
    """A folder aside that gets the name `out` when all went well, and is deleted otherwise."""
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} exists and is not an empty folder: name another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as folder:
        folder.mkdir()
        yield folder
