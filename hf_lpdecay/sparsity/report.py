"""`measure_sparsity`: what is exactly zero, per tensor and in total."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import write_text


if TYPE_CHECKING:
    from .selection import Modules

# Where a saved model keeps its report, and the picture of it.
RECORD_FILE = "sparsity.json"
PICTURE_FILE = "sparsity.png"

# Integers as long as the floating point numbers whose highest bit is the sign and whose zeros have no other bit set.
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# Entries that are counted at a time, so that the scratch stays in the cache.
_PIECE = 1 << 18


@dataclass(frozen=True)
class TensorSparsity:
    """Exact zeros in one tensor.

    Args:
        name (`str`): As in `model.named_parameters()`.
        shape (`list[int]`): Its shape.
        numel (`int`): Number of entries.
        zeros (`int`): How many of them are exactly zero.
        selected (`bool`): Whether the tensor is in the selected scope.
    """

    name: str
    shape: list[int]
    numel: int
    zeros: int
    selected: bool

    @property
    def module(self) -> str:
        """The kind of module, the same in every layer: `model.layers.self_attn.q_proj`."""
        return re.sub(r"\.\d+(?=\.|$)", "", self.name).removesuffix(".weight")

    @property
    def layer(self) -> int | None:
        """The layer's number, if the name has one."""
        match = re.search(r"\.(\d+)\.", self.name)
        return int(match.group(1)) if match else None


@dataclass(frozen=True)
class SparsityReport:
    """Exact zeros of a model, each parameter counted once however many modules share it.

    Args:
        tensors (`list[TensorSparsity]`): One entry per parameter.
    """

    tensors: list[TensorSparsity]

    @property
    def sparsity(self) -> float:
        """Zeros in the selected tensors, as a fraction of their entries."""
        return _fraction([t for t in self.tensors if t.selected])

    @property
    def model_sparsity(self) -> float:
        """Zeros in all parameters, as a fraction of all parameters."""
        return _fraction(self.tensors)

    @property
    def left_out(self) -> list[TensorSparsity]:
        """The matrices in the model's blocks that are not selected, without routers, embeddings and adapters."""
        apart = re.compile(r"embed|bias|router|lora_|gate\.weight|shared_expert_gate", re.IGNORECASE)
        return [
            tensor
            for tensor in self.tensors
            if not tensor.selected
            and tensor.layer is not None
            and len(tensor.shape) > 1
            and min(tensor.shape[-2:]) > 1
            and not apart.search(tensor.name)
        ]

    def table(self, by: str = "tensor") -> str:
        """Format the selected tensors and the totals as a table.

        Args:
            by (`str`, *optional*, defaults to `"tensor"`): `"tensor"` for one row each, `"module"` for one row per
                kind of module over all layers.
        """
        rows: dict[str, list[TensorSparsity]] = {}
        for tensor in self.tensors:
            if tensor.selected:
                rows.setdefault(tensor.name if by == "tensor" else tensor.module, []).append(tensor)
        selected = [tensor for tensor in self.tensors if tensor.selected]
        rows["selected, in total"] = selected
        if self.left_out:
            size = sum(tensor.numel for tensor in self.left_out)
            share = size / (size + sum(tensor.numel for tensor in selected))
            rows[f"not selected, {share:.1%} of the blocks"] = self.left_out
        rows["whole model"] = self.tensors
        width = max(len(name) for name in rows)
        lines = [f"{'':<{width}}  {'parameters':>13}  {'zeros':>13}  {'sparsity':>8}"]
        for name, tensors in rows.items():
            numel, zeros = sum(t.numel for t in tensors), sum(t.zeros for t in tensors)
            lines.append(f"{name:<{width}}  {numel:>13,}  {zeros:>13,}  {_fraction(tensors):>8.2%}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python, ready for JSON."""
        selected = [tensor for tensor in self.tensors if tensor.selected]
        return {
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "selected_numel": sum(t.numel for t in selected),
            "selected_zeros": sum(t.zeros for t in selected),
            "left_out_numel": sum(t.numel for t in self.left_out),
            "model_numel": sum(t.numel for t in self.tensors),
            "model_zeros": sum(t.zeros for t in self.tensors),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def to_json(self, path: str | os.PathLike, **facts: Any) -> None:
        """Write the report to a file.

        Args:
            path (`str` or `os.PathLike`): Where to.
            facts (`Any`): Further entries beside the report's own, such as perplexities.
        """
        write_text(path, json.dumps({**facts, **self.to_dict()}, indent=2) + "\n")

    def plot(self, path: str | os.PathLike, log_history: Sequence[dict[str, Any]] = (), title: str = "") -> None:
        """Draw the sparsity per layer and module and, if there is one, the course of the training into a PNG file.

        Args:
            path (`str` or `os.PathLike`): File to write, ending in `.png`.
            log_history (`Sequence[dict]`, *optional*): `trainer.state.log_history`.
            title (`str`, *optional*): Above the picture.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from .plot import plot_run  # matplotlib is an extra, and slow to import

        plot_run(self.tensors, path, log_history, title)


@torch.no_grad()
def measure_sparsity(
    model: nn.Module, target_modules: "Modules" = "all-linear", exclude_modules: "Modules" = None
) -> SparsityReport:
    """Count the exact zeros of a model.

    Args:
        model (`nn.Module`): Any model, on any device, one of [`~hf_lpdecay.to_sparse`] included.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): What the selected scope is,
            spelt as in [`~hf_lpdecay.LpDecayConfig`].
        exclude_modules (`list[str]` or `str`, *optional*): What to leave out of it.

    Returns:
        `SparsityReport`: Per tensor and in total, of the selected scope and of the whole model.

    Raises:
        ValueError: If no linear layer matches.

    Example:

    ```python
    >>> print(measure_sparsity(model).table(by="module"))
    ```
    """
    from .selection import match_weights, packed_weights  # which imports Transformers' models

    selected = match_weights(model, target_modules, exclude_modules)
    counts = [(name, param.shape, int(count_nonzero(param))) for name, param in model.named_parameters()]
    counts += [(name, module.weight_shape, module.count_nonzero()) for name, module in packed_weights(model).items()]
    return SparsityReport(
        [
            TensorSparsity(
                name=name,
                shape=list(shape),
                numel=math.prod(shape),
                zeros=math.prod(shape) - count,
                selected=name in selected,
            )
            for name, shape, count in counts
        ]
    )


def count_nonzero(tensor: Tensor) -> Tensor:
    """`tensor.count_nonzero()`, which on a CPU branches at every entry and is several times slower than reading them.

    Args:
        tensor (`torch.Tensor`): Any tensor.

    Returns:
        `torch.Tensor`: A scalar of dtype int64, on the tensor's device. Negative zero is zero.
    """
    # A subclass, such as a DTensor, knows best.
    if type(tensor.detach()) is not Tensor or tensor.device.type != "cpu" or tensor.dtype not in _BITS:
        return tensor.count_nonzero()
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.dtype]).numpy()
    counts = (np.count_nonzero(bits[i : i + _PIECE] << 1) for i in range(0, bits.size, _PIECE))
    return torch.tensor(sum(counts), dtype=torch.int64)


def _fraction(tensors: list[TensorSparsity]) -> float:
    return sum(t.zeros for t in tensors) / max(1, sum(t.numel for t in tensors))
