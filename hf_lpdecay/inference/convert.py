"""`to_sparse`: a model whose linear layers take the memory and the time of their values that are not zero."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..sparsity.report import count_nonzero
from ..sparsity.selection import Modules, match_layers
from .head import pack_head, unpack_head
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
    takes the dense model's memory. [`to_dense`] gives the dense model back.

    Args:
        model (`nn.Module`): Any model with `nn.Linear` or `Conv1D`, on a CPU (compiled kernels for AVX-512, AVX2 and
            NEON) or a CUDA device (a Triton kernel, for a bit mask and up to 8 tokens at a time).
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Which layers, spelt as in
            [`~hf_lpdecay.LpDecayConfig`].
        exclude_modules (`list[str]` or `str`, *optional*): Which of them not.
        dtype (`torch.dtype`, *optional*): Type of the values: float32, bfloat16 or float16. Defaults to that of each
            layer's weight. Activations keep their type; with bfloat16 in a float32 model the output head, and the
            embedding that is tied to it, are kept in bfloat16 as well.

    Returns:
        `nn.Module`: The same model, in evaluation mode, its parameters frozen.

    Raises:
        ValueError: If nothing matches, a layer has another type, is quantized or not of this device. Nothing is changed
            then.

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
        if not keeps_float32(model, name)
    }
    for name, module in layers.items():
        check_layer(name, module)
    kernel = kernel_for(dtype or next(iter(layers.values())).weight.dtype) if layers else ""
    if isinstance(kernel, str) and any(module.weight.device.type == "cpu" for module in layers.values()):
        logger.warning_once(f"{kernel} The layers stay dense, and the model as slow and as large as it is.")
        return model
    kept = {id(module): name for name, module in layers.items()}
    before = after = 0
    replaced = few = 0
    for name in kept.values():
        module = layers[name]
        weight = module.weight.detach()
        sparsity = 1 - int(count_nonzero(weight)) / max(1, weight.numel())
        before += weight.nbytes
        new = sparse_layer(module, sparsity, dtype)
        few += sparsity < MIN_SPARSITY
        if new is None:
            after += weight.nbytes
            continue
        model.set_submodule(name, new)
        layers[name] = module = None  # the dense weight is freed as soon as it is packed
        after += layer_bytes(new)
        replaced += 1
    pack_head(model, dtype)
    model.eval().requires_grad_(False)
    tell(replaced, len(kept), few, before, after)
    return model


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Turn a model of [`to_sparse`] back into a dense one that can be trained, in place.

    Args:
        model (`nn.Module`): With sparse layers.

    Returns:
        `nn.Module`: The same model, its weights of the type that they had before; its parameters require gradients.
    """
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


def layer_bytes(module: SparseLinear) -> int:
    """Memory of a sparse layer's weight."""
    return sum(tensor.nbytes for tensor in module.packed[:3])


def keeps_float32(model: nn.Module, name: str) -> bool:
    """Whether a model wants a layer in float32 in any case, and looks at its weight for that: T5's `wo`."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def check_layer(name: str, module: nn.Module) -> None:
    """Whether a layer can be packed at all."""
    weight = module.weight
    if type(module) not in (nn.Linear, Conv1D) and type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(module).__name__}, which computes its product in a way of its own (quantized, or an"
            " adapter's): load the model unquantized, merge the adapter, or leave the layer out with exclude_modules."
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {weight.dtype}: load the model with dtype=torch.bfloat16, torch.float16 or torch.float32."
        )
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {weight.device}: move the model to a CPU or a CUDA device first.")


def tell(replaced: int, layers: int, few: int, before: int, after: int) -> None:
    """Say in one line what was done."""
    size = f"{before:,} bytes of weights take {after:,} ({after / max(1, before):.0%})"
    line = f"{replaced} of {layers} linear layers are sparse; {size}."
    if replaced < layers:
        slower = layers - replaced - few
        reasons = [f"{few} with less than {MIN_SPARSITY:.0%} zeros"] * (few > 0)
        reasons += [f"{slower} that would not be faster on this machine"] * (slower > 0)
        logger.warning(f"{line} The others stay dense: {', '.join(reasons)}.")
    else:
        logger.info(line)
