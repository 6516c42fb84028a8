"""`to_semi_structured`: 2:4 sparse linear layers on sparse tensor cores."""

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from ..sparsity.selection import Modules, match_layers


# Ampere, the first with sparse tensor cores.
_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)
# What the kernels of both backends (CUTLASS, cuSPARSELt) can tile.
_ROWS, _COLS = 32, 64


@torch.no_grad()
def to_semi_structured(
    model: nn.Module, target_modules: Modules = "all-linear", exclude_modules: Modules = None
) -> nn.Module:
    """Run the linear layers of a 2:4 sparse model on the sparse tensor cores of a GPU, for inference.

    Their weights are replaced by torch's semi-structured sparse tensors, in place: half the values and an index of two
    bits for each. Such a model can be neither trained nor saved; keep the folder it was loaded from.

    Args:
        model (`nn.Module`): As trained with ``pattern="2:4"``, bfloat16 or float16, on a GPU of compute capability 8.0
            or more.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Which layers, spelt as in
            [`~hf_lpdecay.LpDecayConfig`].
        exclude_modules (`list[str]` or `str`, *optional*): Which of them not.

    Returns:
        `nn.Module`: The same model, its outputs as before but for rounding.

    Raises:
        ValueError: If no `nn.Linear` matches, or a layer is not 2:4 sparse, has another dtype or a shape that the
            kernels do not take. Nothing is changed then.
        RuntimeError: If the model is not on such a GPU.

    Example:

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/2of4", dtype=torch.bfloat16, device_map="cuda")
    >>> to_semi_structured(model).generate(**inputs)
    ```
    """
    layers = match_layers(model, target_modules, exclude_modules)
    modules = {name: module for name, module in layers.items() if isinstance(module, nn.Linear)}
    if not modules:
        raise ValueError(
            f"target_modules={target_modules!r} matches no dense nn.Linear, and only these can be 2:4 sparse: not"
            " Conv1D, and not the layers of to_sparse, which hf_lpdecay.inference.to_dense(model) makes dense again."
        )
    for name, module in modules.items():
        _check_weight(name, module.weight)
    devices = {module.weight.device for module in modules.values()}
    for device in devices:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
            raise RuntimeError(
                f"The model is on {device}, and 2:4 sparsity is only faster on sparse tensor cores, which NVIDIA GPUs"
                " have from compute capability 8.0 (Ampere) on: move it to one, or run it as it is."
            )
    for module in modules.values():
        module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
    return model


def _check_weight(name: str, weight: torch.Tensor) -> None:
    rows, cols = weight.shape
    if weight.dtype not in _DTYPES:
        raise ValueError(f"{name} is {weight.dtype}: load the model with dtype=torch.bfloat16 or torch.float16.")
    if rows % _ROWS or cols % _COLS:
        raise ValueError(
            f"{name} has {rows} output and {cols} input features, and the kernels need multiples of {_ROWS} and"
            f" {_COLS}: leave it out with exclude_modules."
        )
    crowded = int((weight.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).sum())
    if crowded:
        raise ValueError(
            f"{name} is not 2:4 sparse: {crowded:,} of its {weight.numel() // 4:,} groups of 4 have more than 2 values."
            " Train with pattern='2:4', or leave it out with exclude_modules."
        )
