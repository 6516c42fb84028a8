"""Exact zeros of a saved model, read from its files without making it.

Importing Transformers' models takes longer than reading the files of a small one, so it is put off until it is needed.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from .report import RECORD_FILE, SparsityReport, TensorSparsity, count_nonzero, measure_sparsity


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .selection import Modules

# Entries of a stored tensor that are read at a time.
_SLICE = 1 << 24


def measure_folder(
    model: "PreTrainedModel", folder: str | os.PathLike, target_modules: "Modules" = "all-linear"
) -> SparsityReport:
    """Count the exact zeros of a saved model in its files, one tensor at a time.

    What lies on the disk is what others will load, and a model that several processes hold in pieces cannot be counted
    by one of them.

    Args:
        model (`PreTrainedModel`): A model of the same architecture, on any device, `meta` included. Only the names and
            shapes of its parameters matter.
        folder (`str` or `os.PathLike`): Where it was saved.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in `measure_sparsity`.

    Returns:
        `SparsityReport`: As `measure_sparsity` gives it for the loaded model.

    Raises:
        FileNotFoundError: If there are no safetensors in the folder.
    """
    from .selection import match_parameters

    stored = {tensor.name: tensor for tensor in stored_tensors(folder)}
    names = [name for name, _ in model.named_parameters()]
    if not all(name in stored for name in names):
        # Some architectures rename their weights on the way to the disk and back.
        return measure_sparsity(type(model).from_pretrained(folder, dtype="auto"), target_modules)
    selected = match_parameters(model, target_modules)
    return SparsityReport([TensorSparsity(**{**asdict(stored[name]), "selected": name in selected}) for name in names])


def measure_checkpoint(folder: str | os.PathLike) -> SparsityReport:
    """Count the exact zeros of a saved model without making it.

    Which weights are selected says its sparsity.json, if it has one that fits the files; else those of the linear
    layers of its class are.

    Args:
        folder (`str` or `os.PathLike`): With config.json and safetensors.

    Returns:
        `SparsityReport`: As `measure_sparsity` gives it for the loaded model.

    Raises:
        OSError: If config.json or safetensors are missing.
        ValueError: If the config names no architecture that Transformers has.
    """
    recorded = _recorded(folder)
    if recorded is None:
        return measure_folder(meta_model(folder), folder)
    stored = {tensor.name: tensor for tensor in stored_tensors(folder)}
    return SparsityReport([TensorSparsity(**{**asdict(stored[t.name]), "selected": t.selected}) for t in recorded])


def selected_names(folder: str | os.PathLike) -> list[str]:
    """The names of a saved model's selected weights, see [`measure_checkpoint`]."""
    recorded = _recorded(folder)
    if recorded is not None:
        return [tensor.name for tensor in recorded if tensor.selected]
    from .selection import match_parameters

    return list(match_parameters(meta_model(folder)))


def _recorded(folder: str | os.PathLike) -> list[TensorSparsity] | None:
    """The tensors in a folder's sparsity.json, if it is one and they lie in the folder's files."""
    try:
        facts = json.loads((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))
        tensors = [TensorSparsity(**tensor) for tensor in facts["tensors"]]
        wanted = {tensor.name: tensor.shape for tensor in tensors}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    shapes = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
    fits = all(shapes.get(name) == shape for name, shape in wanted.items())
    return tensors if fits and any(tensor.selected for tensor in tensors) else None


def meta_model(folder: str | os.PathLike) -> "PreTrainedModel":
    """A saved model without its weights, for the names and shapes of its parameters.

    Raises:
        OSError, ValueError: See [`model_class`].
    """
    cls, config = model_class(folder)
    with torch.device("meta"):
        return cls(config)


def model_class(folder: str | os.PathLike) -> "tuple[type[PreTrainedModel], PreTrainedConfig]":
    """The class of a saved model, and its config.

    Raises:
        OSError: If config.json is missing.
        ValueError: If the config names no architecture that Transformers has.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["no architecture"])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"The config in {folder} names {name}, and Transformers has no such class to tell which layers are linear:"
            " load the model with its own code, and use measure_sparsity(model)."
        )
    return getattr(transformers, name), config


def stored_tensors(folder: str | os.PathLike) -> Iterator[TensorSparsity]:
    """Read the weights of a folder, one after the other.

    Args:
        folder (`str` or `os.PathLike`): With model.safetensors, or with the shards that its index names.

    Yields:
        `TensorSparsity`: One for each tensor in the files, none of them `selected`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in tqdm(names, desc=f"Counting zeros in {path.name}", leave=False):
                # Opened anew for each: what has been read of a mapped file counts as memory until it is closed.
                with safe_open(path, framework="pt") as file:
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    rows = max(1, _SLICE // max(1, math.prod(shape[1:])))
                    pieces = (
                        (part[i : i + rows] for i in range(0, shape[0], rows)) if shape else [file.get_tensor(name)]
                    )
                    nonzeros = sum(int(count_nonzero(piece)) for piece in pieces)
                numel = math.prod(shape)
                yield TensorSparsity(name, shape, numel, numel - nonzeros, selected=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): save the model again.") from error


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files that hold a folder's model, and all of them.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the index of the shards is damaged.
    """
    folder = Path(folder)
    index = folder / SAFETENSORS_INDEX_FILE
    if index.is_file() and not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read ({error!r}): save the model again.") from error
    else:
        names = [SAFETENSORS_SINGLE_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"There is no {', '.join(missing)} in {folder}: save the model there with save_pretrained or"
            " trainer.save_model."
        )
    return [folder / name for name in names]
