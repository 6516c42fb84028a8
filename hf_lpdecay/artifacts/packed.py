"""Reads an archive of `pack` tensor by tensor without writing the zeros out, for models that do not want them."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .archive import THREADS, copy_file, damage_told, decoding, in_order, read_manifest, regular
from .codec import Piece, decode_packed, fill
from .stored import ShardReader, StoredTensor, parse_header


Parts = Iterator[tuple[np.ndarray, np.ndarray]]


def read_packed(folder: str | os.PathLike) -> Iterator[tuple[str, str, list[int], Parts]]:
    """Read the tensors of an archive one after the other.

    Args:
        folder (`str` or `os.PathLike`): That [`~hf_lpdecay.pack`] has written.

    Yields:
        `tuple`: The name of a tensor, its type as safetensors call it, its shape, and its parts as [`decode_packed`]
            gives them, which must be used up before the next tensor is asked for: its checksum is checked at their end.

    Raises:
        FileNotFoundError: If there is no archive, or a part of it is missing.
        ValueError: If the archive is damaged or of another version.
    """
    folder = Path(folder)
    with damage_told(folder, "loaded"):
        content = read_manifest(folder)
        shards = {name: regular(folder, name, links=True) for name in content["shards"]}
        for entry in content["others"]:
            path = regular(folder, entry["name"], links=True)
            if path.suffix == ".json" and copy_file(path, os.devnull) != {"sha256": entry["sha256"]}:
                raise ValueError(f"the checksum of {entry['name']} is wrong")
        files = [(file, base64.b64decode(file["header"], validate=True)) for file in content["files"]]
        tensors = []
        for file, header in files:
            stored, described = parse_header(header), json.loads(header[8:])
            if len(file["tensors"]) != len(stored):
                raise ValueError(f"{file['name']} has {len(file['tensors'])} tensors instead of {len(stored)}")
            tensors += [(tensor, described[tensor.name], entry) for tensor, entry in zip(stored, file["tensors"])]
    for tensor, about, entry in tensors:
        yield tensor.name, about["dtype"], about["shape"], _read_parts(folder, shards, tensor, entry)


def _read_parts(folder: Path, shards: dict[str, Path], tensor: StoredTensor, entry: dict[str, Any]) -> Parts:
    digest = hashlib.sha256()
    with damage_told(folder, "loaded"):
        # Opened anew for each tensor: what has been read of a mapped file counts as memory until it is closed.
        paths = {entry["shard"]: shards[entry["shard"]]}
        with ShardReader(paths) as reader, ThreadPoolExecutor(THREADS) as pool:
            for _, (data, mask, values) in in_order(pool, decoding(tensor, entry, reader, _decode_both)):
                digest.update(data)
                del data
                yield mask, values
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError(f"the checksum of {tensor.name} is wrong")


def _decode_both(piece: Piece, count: int, size: int, is_float: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries, which the checksum is of, and what is kept of them."""
    mask, values = decode_packed(piece, count, size, is_float)
    words = np.zeros(count, values.dtype)
    fill(words, mask, values)
    return words, mask, values
