"""Adapters on a sparse model: merged so that the base's zeros stay."""

import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class MergeCost:
    """What is lost of an adapter when the base's zeros stay zero.

    Args:
        layers (`dict[str, float]`): For each adapted layer of the base model the norm of the part of the adapter's
            update that falls on zeros, as a fraction of the norm of the whole update (0 if that is zero).
        total (`float`): The same over all of them together.
    """

    layers: dict[str, float]
    total: float

    def __str__(self) -> str:
        width = max(map(len, (*self.layers, "total")))
        rows = (*self.layers.items(), ("total", self.total))
        return "\n".join(f"{name:<{width}}  {cost:>7.2%}" for name, cost in rows)


@torch.no_grad()
def merge_cost(model: PeftModel) -> MergeCost:
    """Measure what [`merge_sparse`] would drop, without changing the model.

    Args:
        model (`PeftModel`): With LoRA on `nn.Linear` or `Conv1D` layers; its active adapters count.

    Returns:
        `MergeCost`: Relative norms, per layer and in total.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If an adapter is not LoRA on linear layers (or DoRA, which rescales all of a weight), if the base
            is quantized, or if adapters are merged already.
    """
    layers, dropped, whole = {}, 0.0, 0.0
    for name, layer in tqdm(_lora_layers(model).items(), desc="Adapters"):
        zero = layer.get_base_layer().weight == 0
        deltas = [layer.get_delta_weight(a) for a in layer.active_adapters if a in layer.lora_A]
        delta = sum(delta.double() for delta in deltas) if deltas else torch.zeros_like(zero, dtype=torch.float64)
        lost, norm = delta[zero].square().sum().item(), delta.square().sum().item()
        layers[name] = (lost / norm) ** 0.5 if norm else 0.0
        dropped, whole = dropped + lost, whole + norm
    return MergeCost(layers, (dropped / whole) ** 0.5 if whole else 0.0)


@torch.no_grad()
def merge_sparse(model: PeftModel) -> nn.Module:
    """Merge LoRA adapters into a sparse base model and keep every zero of it.

    An ordinary merge fills the zeros: a product of two thin matrices has none. Here the update is dropped where the
    base is exactly zero, and one line says how much of its norm that was ([`merge_cost`] gives it per layer).

    Args:
        model (`PeftModel`): With LoRA on `nn.Linear` or `Conv1D` layers. Its base is changed in place.

    Returns:
        `nn.Module`: The plain base model, its zeros those it had. Modules of `modules_to_save` are as trained.

    Raises:
        TypeError, ValueError: See [`merge_cost`].

    Example:

    ```python
    >>> model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("out/sparse"), "out/adapter")
    >>> merge_sparse(model).save_pretrained("out/merged")
    ```
    """
    cost = merge_cost(model)
    for layer in tqdm(_lora_layers(model).values(), desc="Merging"):
        weight = layer.get_base_layer().weight
        zero = weight == 0
        layer.merge(safe_merge=True)
        weight.masked_fill_(zero, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        base = model.merge_and_unload()
    worst = max(cost.layers, key=cost.layers.get)
    tqdm.write(
        f"Merged {len(cost.layers)} layers. Keeping their zeros dropped {cost.total:.2%} of the adapter's norm (most in"
        f" {worst}: {cost.layers[worst]:.2%})."
    )
    return base


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    if not isinstance(model, PeftModel):
        raise TypeError(f"Expected a PeftModel, got a {type(model).__name__}, which has no adapters to merge.")
    dora = isinstance(model.base_model, LoraModel) and any(
        model.peft_config[name].use_dora for name in model.active_adapters
    )
    if dora or not isinstance(model.base_model, LoraModel):
        raise ValueError(
            f"The adapter is a {'DoRA' if dora else type(model.base_model).__name__}, and only LoRA without use_dora"
            " adds to a weight, so that a part of it can be dropped: merge with merge_and_unload, and sparsify again."
        )
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            raise ValueError(
                f"{name} is a {type(base).__name__}, and adapters can be merged into nn.Linear and Conv1D layers of"
                " floating point weights: load the base without quantization, and adapt its linear layers only."
            )
        if layer.merged:
            raise ValueError(f"The adapters of {name} are merged already: call model.unmerge_adapter() first.")
    return layers
