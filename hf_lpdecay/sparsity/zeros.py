"""Two checkpoints side by side: which zeros were gained, which were lost."""

import os
from collections.abc import Collection
from dataclasses import dataclass

from safetensors import safe_open
from tqdm.auto import tqdm

from .checkpoint import weight_files


@dataclass(frozen=True)
class ZeroChange:
    """Zeros of one tensor in two checkpoints.

    Args:
        name (`str`): As in the files.
        numel (`int`): Number of entries.
        before, after (`int`): How many of them are exactly zero in the first and in the second.
        lost (`int`): Zero in the first, but not in the second.
        gained (`int`): The other way round.
    """

    name: str
    numel: int
    before: int
    after: int
    lost: int
    gained: int


def compare_zeros(base: str | os.PathLike, folder: str | os.PathLike, names: Collection[str]) -> list[ZeroChange]:
    """Compare the zeros of two saved models of the same shape, tensor by tensor.

    Args:
        base (`str` or `os.PathLike`): The first folder, with safetensors.
        folder (`str` or `os.PathLike`): The second one.
        names (`Collection[str]`): Which tensors.

    Returns:
        `list[ZeroChange]`: One for each of them.

    Raises:
        FileNotFoundError: If there are no safetensors in a folder.
        ValueError: If one of them lacks a tensor, or they have it in different shapes.
    """
    theirs, ours = _places(base), _places(folder)
    for places, here, there in ((theirs, base, folder), (ours, folder, base)):
        missing = sorted(set(names) - places.keys())
        if missing:
            raise ValueError(
                f"{here} has no {', '.join(missing[:3])} to compare with {there}: they are not the same model."
            )
    changes = []
    for name in tqdm(sorted(names), desc="Comparing zeros", leave=False):
        with safe_open(theirs[name], framework="pt") as first, safe_open(ours[name], framework="pt") as second:
            a, b = first.get_tensor(name), second.get_tensor(name)
            if a.shape != b.shape:
                raise ValueError(f"{name} is {list(a.shape)} in {base} and {list(b.shape)} in {folder}.")
            zero, now = a == 0, b == 0
            both = int((zero & now).sum())
            before, after = int(zero.sum()), int(now.sum())
        changes.append(ZeroChange(name, a.numel(), before, after, before - both, after - both))
    return changes


def _places(folder: str | os.PathLike) -> dict[str, str]:
    places = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    return places
