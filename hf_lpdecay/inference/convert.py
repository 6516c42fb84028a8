"""`to_sparse`: a model whose linear layers take the memory and the time of their values that are not zero."""

import dataclasses
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..sparsity.report import count_nonzero
from ..sparsity.selection import Modules, match_layers
from .experts import SparseExperts, has_eager, match_experts, put_experts, restore_experts
from .head import PackedHead, pack_head, unpack_head
from .kernels import kernel_for
from .sparse_linear import DTYPES, SparseLinear
from .speed import MIN_SPARSITY, choose_encoding


logger = logging.get_logger(__name__)


@torch.no_grad()
def to_sparse(
    model: nn.Module,
    target_modules: Modules = "all-linear",
    exclude_modules: Modules = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make a sparse model smaller in memory and faster, for inference: its linear layers keep their non-zero values.

    A layer is replaced only where that is faster on this machine, which is measured once for each shape; the others
    stay dense, such as those with few zeros. Outputs are those of the dense model but for rounding (sums are float32),
    and `save_pretrained` writes the ordinary dense checkpoint. `state_dict()` decodes every weight and
    takes the dense model's memory. [`to_dense`] gives the dense model back. Layers that are sparse already stay so.

    Args:
        model (`nn.Module`): Any model with `nn.Linear`, `Conv1D` or experts' 3-D parameters, on a CPU
            (compiled kernels for AVX-512, AVX2 and NEON) or a CUDA device (a Triton kernel, for a bit mask and up to 8
            tokens at a time).
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Which layers, spelt as in
            [`~hf_lpdecay.LpDecayConfig`].
        exclude_modules (`list[str]` or `str`, *optional*): Which of them not.
        dtype (`torch.dtype`, *optional*): Type of the values: float32, bfloat16 or float16. Defaults to that of each
            layer's weight. Activations keep their type; with bfloat16 in a float32 model the output head, and the
            embedding that is tied to it, are kept in bfloat16 as well.

    Returns:
        `nn.Module`: The same model, in evaluation mode, its parameters frozen.

    Raises:
        ValueError: If nothing matches, a layer has another type, an adapter, is quantized or not of this device.
            Nothing is changed then.

    Example:

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/sparse", dtype=torch.bfloat16)
    >>> to_sparse(model).generate(**inputs)
    ```
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Invalid dtype={dtype}: should be torch.float32, torch.bfloat16 or torch.float16.")
    layers = {
        name: module
        for name, module in match_layers(model, target_modules, exclude_modules).items()
        if not keeps_float32(model, name) and not isinstance(module, PackedHead)
    }
    experts = match_experts(model, target_modules, exclude_modules)
    check_adapters(model, [*layers, *experts])
    for name, module in layers.items():
        check_layer(name, module)
    for name in experts:
        check_weight(name, model.get_parameter(name))
    weights = [module.weight for module in layers.values()] + [model.get_parameter(name) for name in experts]
    kernel = kernel_for(dtype or weights[0].dtype) if weights else ""
    if isinstance(kernel, str) and any(weight.device.type == "cpu" for weight in weights):
        logger.warning_once(f"{kernel} The layers stay dense, and the model as slow and as large as it is.")
        return model
    del weights
    kept = {id(module): name for name, module in layers.items()}
    tally = Tally()
    for name in kept.values():
        module = layers[name]
        weight = module.weight.detach()
        sparsity = 1 - int(count_nonzero(weight)) / max(1, weight.numel())
        new = sparse_layer(module, sparsity, dtype)
        tally.add(new, weight.nbytes, sparsity)
        if new is not None:
            model.set_submodule(name, new)
            layers[name] = module = weight = None  # the dense weight is freed as soon as it is packed
    for name, dim in experts.items():
        take_experts(model, name, dim, dtype, tally)
    pack_head(model, dtype)
    model.eval().requires_grad_(False)
    tally.tell()
    return model


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Turn a model of [`to_sparse`] back into a dense one that can be trained, in place.

    Args:
        model (`nn.Module`): With sparse layers.

    Returns:
        `nn.Module`: The same model, its weights of the type that they had before; its parameters require gradients.
    """
    restore_experts(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            model.set_submodule(name, dense_layer(module))
    unpack_head(model)
    return model.requires_grad_(True)


def sparse_layer(module: nn.Module, sparsity: float, dtype: torch.dtype | None) -> SparseLinear | None:
    """A sparse layer in place of a dense one; `None` where the dense one is faster."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    weight = (weight.t() if transposed else weight).to(dtype or weight.dtype)
    columns = choose_encoding(weight, sparsity)
    if columns is None:
        return None
    if transposed:
        weight = weight.t()
    new = SparseLinear.from_dense(weight, module.bias, columns=columns, transposed=transposed)
    new.dense_dtype = module.weight.dtype
    return new


def take_experts(model: nn.Module, name: str, dim: int, dtype: torch.dtype | None, tally: "Tally") -> None:
    """Replace the 3-D parameter of a model's experts, where sparse layers of their matrices' shape are faster."""
    weight = model.get_parameter(name).detach()
    sparsity = 1 - int(count_nonzero(weight)) / max(1, weight.numel())
    new = None
    if has_eager(model.get_submodule(name.rpartition(".")[0])):
        dtype = dtype or weight.dtype
        like = torch.empty(1, dtype=dtype, device=weight.device).expand(*(weight[0] if dim else weight[0].t()).shape)
        columns = choose_encoding(like, sparsity)
        if columns is not None:
            new = SparseExperts(weight, dtype, columns, transposed=dim == 0)
            put_experts(model, name, new)
    else:
        tally.other += 1
    tally.add(new, weight.nbytes, sparsity)


def dense_layer(module: SparseLinear) -> nn.Module:
    """The layer that a sparse one has replaced."""
    has_bias = module.bias is not None
    if module.transposed:
        new = Conv1D(module.out_features, 0)
    else:
        new = nn.Linear(module.in_features, module.out_features, bias=has_bias, device="meta")
    new.weight = nn.Parameter(module.weight.to(module.dense_dtype))
    new.bias = nn.Parameter(module.bias.detach().clone()) if has_bias else None
    return new.eval()


def layer_bytes(module: SparseLinear | SparseExperts) -> int:
    """Memory of a sparse layer's weight, or of all experts'."""
    if isinstance(module, SparseExperts):
        return sum(map(layer_bytes, module))
    return sum(tensor.nbytes for tensor in module.packed[:3])


def keeps_float32(model: nn.Module, name: str) -> bool:
    """Whether a model wants a layer in float32 in any case, and looks at its weight for that: T5's `wo`."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def check_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Whether no layer is inside an adapter's, which merges into a dense weight and would be lost without one."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name in names:
        for outer, module in adapted.items():
            if name.startswith(f"{outer}."):
                raise ValueError(
                    f"{name} is the base of a {type(module).__name__} of PEFT, which could not be merged into a sparse"
                    " layer: merge the adapter first (merge_sparse or merge_and_unload), or leave the layer out with"
                    " exclude_modules."
                )


def check_layer(name: str, module: nn.Module) -> None:
    """Whether a layer can be packed at all."""
    if type(module) not in (nn.Linear, Conv1D) and type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(module).__name__}, which computes its product in a way of its own (quantized, or an"
            " adapter's): load the model unquantized, merge the adapter, or leave the layer out with exclude_modules."
        )
    check_weight(name, module.weight)


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Whether a weight can be packed."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {weight.dtype}: load the model with dtype=torch.bfloat16, torch.float16 or torch.float32."
        )
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {weight.device}: move the model to a CPU or a CUDA device first.")


@dataclasses.dataclass
class Tally:
    """What was done, for the line that says so; experts' parameters count as one layer each."""

    layers: int = 0
    replaced: int = 0
    few: int = 0  # with few zeros
    other: int = 0  # experts that compute in another way
    before: int = 0
    after: int = 0

    def add(self, new: nn.Module | None, nbytes: int, sparsity: float) -> None:
        """Count a layer of so many bytes, and what took its place."""
        self.layers += 1
        self.replaced += new is not None
        self.few += new is None and sparsity < MIN_SPARSITY
        self.before += nbytes
        self.after += nbytes if new is None else layer_bytes(new)

    def tell(self) -> None:
        """Say in one line what was done."""
        share = f"{self.after / max(1, self.before):.0%}"
        line = f"{self.replaced} of {self.layers} linear layers are sparse; {self.before:,} bytes of weights take"
        line += f" {self.after:,} ({share})."
        slower = self.layers - self.replaced - self.few - self.other
        reasons = {
            f"{self.few} with less than {MIN_SPARSITY:.0%} zeros": self.few,
            f"{self.other} of experts that are not computed one after the other": self.other,
            f"{slower} that would not be faster on this machine": slower,
        }
        if self.replaced < self.layers:
            logger.warning(f"{line} The others stay dense: {', '.join(why for why, n in reasons.items() if n > 0)}.")
        else:
            logger.info(line)
