"""`load_sparse`: from the disk or the hub to a sparse model, without its weights ever being dense."""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from ..artifacts.archive import MANIFEST, unpack
from ..artifacts.hub import PACKED_FOLDER
from ..artifacts.packed import read_packed
from ..sparsity.checkpoint import model_class, weight_files
from ..sparsity.selection import Modules, match_layers
from .convert import Tally, keeps_float32, take_experts, to_sparse
from .encoding import decode, encode, encode_parts, join, pad_rows, rows_of_part, to_columns
from .experts import match_experts
from .head import pack_head
from .kernels import Weight, kernel_for
from .malloc import freed_memory_returned
from .names import CheckpointNames
from .sparse_linear import DTYPES, SparseLinear
from .speed import choose_encoding


logger = logging.get_logger(__name__)

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What is kept of a tensor: a mask and its values, or (None and) the whole of it.
_Parts = tuple[Tensor | None, Tensor]


@freed_memory_returned()
@torch.no_grad()
def load_sparse(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    target_modules: Modules = "all-linear",
    exclude_modules: Modules = None,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Load a model as [`to_sparse`] makes it, from an archive of [`~hf_lpdecay.pack`] or from a folder.

    Its weights are read one after the other and are dense, if at all, one at a time: the peak of memory is the sparse
    model's own and two of its largest tensors. Experts that the files hold one by one are joined as they come. Where
    Transformers makes a weight from the files' tensors in yet another way the model is loaded dense first, which is
    said.

    Args:
        path (`str` or `os.PathLike`): An archive, a folder that holds one named `packed`, a folder that
            `save_pretrained` wrote, or the id of a repository on the hub that was pushed with `packed=True`, of which
            only the archive is downloaded.
        dtype (`torch.dtype`, *optional*): Of the model: float32, bfloat16 or float16. Defaults to what is stored.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in [`to_sparse`].
        exclude_modules (`list[str]` or `str`, *optional*): As in [`to_sparse`].
        revision (`str`, *optional*): Branch, tag or commit on the hub. Defaults to `main`.
        token (`str`, *optional*): For the hub. Defaults to the environment's or the login's.

    Returns:
        `PreTrainedModel`: On the CPU, in evaluation mode, its parameters frozen.

    Raises:
        FileNotFoundError: If there is no such archive, folder or repository, or a file of it is missing.
        ValueError: If the archive or a file is damaged, or its config names no architecture that Transformers has.

    Example:

    ```python
    >>> model = load_sparse("outputs/sparse-packed", dtype=torch.bfloat16)
    >>> tokenizer = AutoTokenizer.from_pretrained("outputs/sparse-packed")
    ```
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Invalid dtype={dtype}: should be torch.float32, torch.bfloat16 or torch.float16.")
    folder = find_folder(path, revision, token)
    packed = (folder / MANIFEST).is_file()
    cls, config = model_class(folder)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = cls(config)
    model.tie_weights()
    layers = match_layers(model, target_modules, exclude_modules)
    for name in [name for name in layers if keeps_float32(model, name)]:
        del layers[name]
    loader = _Loader(model, layers, match_experts(model, target_modules, exclude_modules), dtype)
    for name, kind, shape, parts in tqdm(_read(folder, packed), desc="Loading", unit=" tensors", leave=False):
        loader.take(name, kind, shape, parts)
    model.tie_weights()
    if any(param.is_meta for param in model.parameters()):
        # Weights that are made from the files' in another way, or are not there: Transformers knows.
        return _load_dense_first(folder, packed, cls, dtype, target_modules, exclude_modules)
    if (folder / GENERATION_CONFIG_NAME).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.dtype = model.dtype
    model.config._name_or_path = str(path)
    pack_head(model, None)
    model.eval().requires_grad_(False)
    loader.tell()
    return model


def find_folder(path: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with the archive, or with the dense weights, that a path or an id on the hub stands for."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            validate_repo_id(str(path))
        except HFValidationError as error:
            raise FileNotFoundError(f"{path} is neither a folder nor the id of a repository on the hub.") from error
        pattern = f"{PACKED_FOLDER}/*"
        folder = Path(snapshot_download(str(path), revision=revision, token=token, allow_patterns=[pattern]))
        if not (folder / PACKED_FOLDER / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path} has no archive on the hub (it is pushed with packed=True, `lpdecay push --packed`): load it"
                " with from_pretrained, then to_sparse(model)."
            )
    if not (folder / MANIFEST).is_file() and (folder / PACKED_FOLDER / MANIFEST).is_file():
        folder = folder / PACKED_FOLDER
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"There is no {CONFIG_NAME} in {folder}: give an archive or a saved model's folder.")
    return folder


class _Loader:
    """Puts one tensor after the other into a model without weights."""

    def __init__(self, model: PreTrainedModel, layers: dict[str, nn.Module], experts: dict[str, int], dtype: Any):
        self.model, self.layers, self.experts, self.dtype = model, layers, experts, dtype
        self.tally = Tally()
        self.names = CheckpointNames(model)
        self.joined: dict[str, tuple[Tensor, int]] = {}  # parameters of which some matrices, and how many entries lack

    def take(self, name: str, kind: str, shape: list[int], parts: Iterator[_Parts]) -> None:
        """Put a tensor where it belongs."""
        found, stored = self.names.find(name), _TORCH.get(kind)
        if found is None or stored is None:
            for _ in parts:  # to its end, where the checksum is
                pass
            return
        name, place = found
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        dtype = self.dtype if self.dtype is not None and stored.is_floating_point else stored
        if dtype == torch.float16 and keeps_float32(self.model, owner_name):
            dtype = torch.float32
        expected = list(self.names.own[name].shape)
        if place is not None:
            return self._take_matrix(name, place, expected, (stored, shape, parts, dtype))
        if list(shape) != expected:
            raise ValueError(f"{name} has the shape {shape}, and the model expects {expected}")
        if leaf == "weight" and owner_name in self.layers and dtype in DTYPES:
            self._take_layer(owner_name, owner, stored, dtype, shape, parts)
        elif leaf in owner._parameters:
            self._take_parameter(name, _whole(stored, shape, parts, dtype))
        else:
            owner._buffers[leaf] = _whole(stored, shape, parts, dtype)

    def _take_parameter(self, name: str, tensor: Tensor) -> None:
        owner_name, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner_name)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        if name in self.experts and tensor.dtype in DTYPES:
            take_experts(self.model, name, self.experts[name], None, self.tally)

    def _take_matrix(self, name: str, place: tuple[int, int], expected: list[int], about: tuple) -> None:
        """Put one expert's matrix, or a part of it, into the 3-D parameter, which is packed when it is complete."""
        (expert, part), (stored, shape, parts, dtype) = place, about
        first = part * shape[0]
        if expert >= expected[0] or first + shape[0] > expected[1] or shape[1:] != expected[2:]:
            raise ValueError(f"{name} is {expected}, and the matrix of its expert {expert} has the shape {shape}")
        if name not in self.joined:
            self.joined[name] = torch.empty(expected, dtype=dtype), math.prod(expected)
        whole, left = self.joined[name]
        whole[expert, first : first + shape[0]] = _whole(stored, shape, parts, dtype)
        self.joined[name] = whole, left - math.prod(shape)
        if left == math.prod(shape):
            del self.joined[name]
            self._take_parameter(name, whole)

    def _take_layer(self, name, module, stored, dtype, shape, parts) -> None:
        transposed = isinstance(module, Conv1D)
        weight = _weight(stored, shape, parts, dtype)
        numel = math.prod(shape)
        sparsity = 1 - int(weight.starts[-1]) / max(1, numel)
        like = torch.empty(1, dtype=dtype).expand(*(reversed(shape) if transposed else shape))
        columns = choose_encoding(like, sparsity)
        if columns is None:
            module.weight = nn.Parameter(decode(weight), requires_grad=False)
            self.tally.add(None, module.weight.nbytes, sparsity)
            return
        if transposed:
            weight = encode(decode(weight).t(), columns=columns)
        elif columns:
            weight = to_columns(weight)
        new = SparseLinear(weight, None, transposed)
        new.bias = module.bias
        self.model.set_submodule(name, new)
        self.tally.add(new, numel * dtype.itemsize, sparsity)

    def tell(self) -> None:
        """Say what was done."""
        kernel = kernel_for(self.model.dtype) if self.model.dtype in DTYPES else ""
        if isinstance(kernel, str):
            logger.warning_once(f"{kernel} The layers stay dense, and the model as slow and as large as it is.")
        else:
            self.tally.tell()


def _read(folder: Path, packed: bool) -> Iterator[tuple[str, str, list[int], Iterator[_Parts]]]:
    """Names, types, shapes and parts of the tensors of an archive or a folder."""
    if packed:
        for name, kind, shape, parts in read_packed(folder):
            yield name, kind, shape, ((torch.from_numpy(np.array(mask)), torch.from_numpy(v)) for mask, v in parts)
        return
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:  # opened anew for each, as in stored_tensors
                about = file.get_slice(name)
                kind, shape = about.get_dtype(), about.get_shape()
            yield name, kind, shape, _read_rows(path, name, shape)


def _read_rows(path: Path, name: str, shape: list[int]) -> Iterator[_Parts]:
    """A tensor of a safetensors file, some rows at a time; what was read of a mapped file is memory until it closes."""
    step = rows_of_part(math.prod(shape[1:]))
    for first in range(0, shape[0] if shape else 1, step):
        with safe_open(path, framework="pt") as file:
            yield None, file.get_slice(name)[first : first + step] if shape else file.get_tensor(name)


def _weight(stored: torch.dtype, shape: list[int], parts: Iterator[_Parts], dtype: torch.dtype) -> Weight:
    """The parts of a matrix, as a weight with a bit mask."""
    rows, cols = shape
    first = next(parts, None)
    if first is None or first[0] is None:
        dense = itertools.chain([] if first is None else [first], parts)
        return encode_parts((part.to(dtype) for _, part in dense), cols, False, torch.empty(0, dtype=dtype))
    masks, values = [], []
    for mask, part in itertools.chain([first], parts):
        masks.append(mask)
        values.append(part.view(_SIGNED[stored.itemsize]).view(stored).to(dtype))
    packed = join(masks, values, None, cols, False, values[0])
    return pad_rows(packed.positions, packed.values, rows, cols)


def _whole(stored: torch.dtype, shape: list[int], parts: Iterator[_Parts], dtype: torch.dtype) -> Tensor:
    """The parts of a tensor, dense."""
    out = torch.empty(math.prod(shape), dtype=dtype)
    start = 0
    for mask, part in parts:
        if mask is not None:
            words = part.view(_SIGNED[stored.itemsize]).view(stored)
            bits = np.unpackbits(mask.numpy(), count=min(8 * len(mask), len(out) - start), bitorder="little")
            part = words.new_zeros(len(bits))
            part[torch.from_numpy(bits.view(bool))] = words
        out[start : start + part.numel()] = part.flatten()
        start += part.numel()
    return out.view(shape)


def _load_dense_first(folder: Path, packed: bool, cls: type, dtype: Any, *modules: Modules) -> PreTrainedModel:
    logger.warning(
        f"The weights in {folder} are not {cls.__name__}'s own one by one, so the model is loaded dense first."
    )
    with tempfile.TemporaryDirectory() as aside:
        source = folder
        if packed:
            source = Path(aside, "dense")
            unpack(folder, source)
        model = cls.from_pretrained(source, dtype="auto" if dtype is None else dtype)
    return to_sparse(model, *modules)
