"""Adapters on a sparse model: masked so that they can be merged exactly, or merged so that the base's zeros stay."""

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .mask_record import MaskedLoraConfig, MaskRecord, check_record, record_of
from .masked_lora import (
    Masked,
    MaskedLinear,
    MaskedLoraVariant,
    base_parameter,
    base_weight,
    is_quantized,
    mask_layer,
    untie,
)


# What `init_lora_weights` begins with where PEFT subtracts the new adapter from the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def mask_lora(model: PeftModel, becoming_sparse: Collection[Tensor] = ()) -> PeftModel:
    """Mask the active LoRA adapters by the base's zeros: their update is `(B A) * (W != 0)` in every forward pass.

    A merge, by PEFT's `merge_and_unload()` or by [`merge_sparse`], then gives the outputs that there were before it, up
    to rounding, and keeps every zero of the base. Training, saving, several adapters and `disable_adapter` are PEFT's.
    The mask is SparsePEFT's (SQFT, arXiv 2410.03750). Call it after an adapter was added or loaded; an adapter that is
    masked already stays as it is, and what `add_weighted_adapter` makes of masked ones is masked too. Layers without
    zeros keep PEFT's cheaper forward pass.

    Args:
        model (`PeftModel`): With LoRA on `nn.Linear` or `Conv1D` layers, quantized ones too (the zeros of the
            dequantized weights are the mask), or on parameters such as a layer's experts. Changed in place.
        becoming_sparse (`Collection[torch.Tensor]`, *optional*): Base weights that are masked although they have no
            zeros yet.

    Returns:
        `PeftModel`: The model itself.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If an adapter is not LoRA on linear layers (DoRA, an embedding), if it changed the base's weights
            when it was made (PiSSA, OLoRA, ...) or cannot be merged, if adapters are merged, or if the adapter was
            trained on a base with other zeros.

    Example:

    ```python
    >>> base = AutoModelForCausalLM.from_pretrained("out/sparse")
    >>> model = mask_lora(get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")))
    >>> ...  # train it, save it
    >>> model.merge_and_unload().save_pretrained("out/merged")
    ```
    """
    active = model.active_adapters if isinstance(model, PeftModel) else ()
    return _mask(model, active, {id(weight) for weight in becoming_sparse})


@torch.no_grad()
def _mask(model: PeftModel, adapters: Collection[str], ids: Collection[int] = ()) -> PeftModel:
    layers = _lora_layers(model, "mask", adapters)
    record = _mask_record(layers)
    if not (record or ids):
        warnings.warn("None of the adapted weights is zero: there is nothing to mask.", stacklevel=4)
    for adapter in adapters:
        config, own = model.peft_config[adapter], _layers_of(layers, adapter)
        if getattr(config, "lp_masked_layers", None) is not None:
            check_record(config.lp_masked_layers, {n: entry for n, entry in record.items() if n in own}, adapter)
        for name, layer in own.items():
            if name in record or id(base_parameter(layer)) in ids:
                mask_layer(layer, adapter, _tied_config(model, layer))
    _write_record(model, layers, record, adapters)
    return model


@torch.no_grad()
def update_mask_record(model: PeftModel) -> None:
    """Put the zeros that the base has now into the configs of its masked adapters, which are saved with them."""
    layers = _lora_layers(model, "mask")
    _write_record(model, layers, _mask_record(layers), model.active_adapters)


def _mask_record(layers: dict[str, LoraLayer]) -> MaskRecord:
    entries = {name: record_of(base_weight(layer)) for name, layer in tqdm(layers.items(), desc="Masks", leave=False)}
    return {name: entry for name, entry in entries.items() if entry}


def _write_record(
    model: PeftModel, layers: dict[str, LoraLayer], record: MaskRecord, adapters: Collection[str]
) -> None:
    for adapter in adapters:
        config = copy.copy(model.peft_config[adapter])
        config.__class__ = MaskedLoraConfig
        config.lp_masked_layers = {name: record[name] for name in _layers_of(layers, adapter) if name in record}
        model.peft_config[adapter] = config


def _layers_of(layers: dict[str, LoraLayer], adapter: str) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in layers.items() if adapter in layer.lora_A}


def load_masked_lora(base: nn.Module, adapter: str, **kwargs) -> PeftModel:
    """Load a masked adapter, after a check that the base has the zeros that it was trained with.

    Args:
        base (`nn.Module`): The sparse base model; or, to add another adapter, a `PeftModel` of it, which is changed in
            place.
        adapter (`str`): Folder or hub id of the adapter.
        **kwargs: For `PeftModel.from_pretrained`, such as `adapter_name` and `is_trainable`; if `base` is a
            `PeftModel`, for its `load_adapter`, which activates nothing: call `set_adapter(adapter_name)` after it.

    Returns:
        `PeftModel`: The model with the adapter, masked.

    Raises:
        ValueError: If the adapter was not saved masked, if the base has other zeros, or if there is an adapter of that
            name.

    Example:

    ```python
    >>> model = load_masked_lora(base, "out/first")
    >>> load_masked_lora(model, "out/second", adapter_name="second").set_adapter("second")
    ```
    """
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
    config = MaskedLoraConfig.from_pretrained(adapter, **hub)
    if config.lp_masked_layers is None:
        raise ValueError(f"{adapter} was not saved masked: load it with PeftModel.from_pretrained, then mask_lora.")
    if not isinstance(base, PeftModel):
        config.inference_mode = not kwargs.get("is_trainable", False)
        return mask_lora(PeftModel.from_pretrained(base, adapter, config=config, **kwargs))
    name = kwargs.pop("adapter_name", "default")
    if name in base.peft_config:
        raise ValueError(f"The model has an adapter {name!r}: give the new one another name, with adapter_name.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments.*lp_masked_layers", UserWarning)
        base.load_adapter(adapter, name, **kwargs)
    try:
        base.peft_config[name].lp_masked_layers = config.lp_masked_layers  # PEFT has dropped it
        return _mask(base, [name])
    except ValueError:
        base.delete_adapter(name)
        raise


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
        model (`PeftModel`): With LoRA on `nn.Linear` or `Conv1D` layers or on parameters; its active adapters count.

    Returns:
        `MergeCost`: Relative norms, per layer and in total.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If an adapter is not LoRA on linear layers (or DoRA, which rescales all of a weight), if the base
            is quantized and the adapter is not masked, or if adapters are merged already.
    """
    layers, dropped, whole = {}, 0.0, 0.0
    for name, layer in tqdm(_lora_layers(model).items(), desc="Adapters"):
        zero = base_weight(layer) == 0
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
    dequantized = False
    for layer in tqdm(_lora_layers(model).values(), desc="Merging"):
        if is_quantized(layer):
            _dequantize(layer, model.get_base_model().dtype)
            dequantized = True
        if (config := _tied_config(model, layer)) is not None:
            untie(layer, config)
        zero = base_parameter(layer) == 0
        layer.merge(safe_merge=True)
        base_parameter(layer).masked_fill_(zero, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        base = model.merge_and_unload()
    _say_what_is_tied(base)
    if dequantized:
        _forget_quantization(base)
    worst = max(cost.layers, key=cost.layers.get)
    tqdm.write(
        f"Merged {len(cost.layers)} layers. Keeping their zeros dropped {cost.total:.2%} of the adapter's norm (most in"
        f" {worst}: {cost.layers[worst]:.2%})."
    )
    return base


def _lora_layers(
    model: PeftModel, verb: str = "merge", adapters: Collection[str] | None = None
) -> dict[str, LoraLayer]:
    """The adapted layers by the name of the weight that they adapt, without a final ".weight".

    Checked for some adapters, by default for the active ones.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"Expected a PeftModel, got a {type(model).__name__}, which has no adapters to {verb}.")
    adapters = model.active_adapters if adapters is None else adapters
    lora = type(model.base_model) is LoraModel  # AdaLoRA's is a subclass
    dora = lora and any(model.peft_config[name].use_dora for name in adapters)
    if dora or not lora:
        raise ValueError(
            f"The adapter's type is {'DoRA' if dora else PeftType(model.peft_type).value}, and only LoRA without"
            " use_dora adds to a weight, so that a part of it can be dropped or masked: train a LoRA, or merge with"
            " merge_and_unload and sparsify again."
        )
    for adapter in adapters:
        how = model.peft_config[adapter].init_lora_weights
        if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"The adapter {adapter!r} has init_lora_weights={how!r}, which changes the base's weights when it is"
                " made, so that their zeros are lost: take True, 'gaussian', 'orthogonal' or 'eva', with the base"
                " loaded anew."
            )
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        other = next((v for v in layer.lora_variant.values() if not isinstance(v, MaskedLoraVariant)), None)
        if other is not None:
            raise ValueError(f"{name} has a {type(other).__name__}: only plain LoRA adds to a weight. Leave it out.")
        if isinstance(layer, ParamWrapper):
            name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        elif not isinstance(base, (nn.Linear, Conv1D)):
            raise ValueError(
                f"{name} is a {type(base).__name__}, and adapters can be {verb}{'d' if verb[-1] == 'e' else 'ed'} on"
                " nn.Linear and Conv1D layers and parameters of floating point weights: adapt its linear layers only."
            )
        if layer.merged:
            raise ValueError(f"The adapters of {name} are merged already: call model.unmerge_adapter() first.")
        if any(layer.lora_bias.get(adapter) for adapter in adapters) and base.bias is None:
            raise ValueError(
                f"lora_bias=True has given {name} a bias that it has none to be merged with: leave lora_bias out, or"
                " leave out the layers without a bias."
            )
        layers[name] = layer
    if not layers:
        raise ValueError(
            f"The model has no adapted layer to {verb}: its adapters were merged and unloaded before. Go on with the"
            " model that the merge returned."
        )
    return layers


def _dequantize(layer: LoraLayer, dtype: torch.dtype) -> None:
    """Put an ordinary linear layer in place of a quantized one, and a LoRA layer for such layers around it."""
    old = layer.get_base_layer()
    weight = base_weight(layer).detach().to(dtype, copy=True)
    new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), old.bias
    layer.base_layer = new
    masked = isinstance(layer, Masked)
    layer.__class__ = MaskedLinear if masked else Linear


def _tied_config(model: PeftModel, layer: LoraLayer):
    """The base model's config if the layer's weight is tied to that of another module."""
    base, weight = model.get_base_model(), base_parameter(layer)
    users = [name for name, param in base.named_parameters(remove_duplicate=False) if param is weight]
    return base.config if len(users) > 1 else None


def _say_what_is_tied(base: nn.Module) -> None:
    """Modules of `modules_to_save` are copies: a head or an embedding among them is tied no longer."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None not in ends and ends[0].weight is not ends[1].weight:
        base.config.tie_word_embeddings = False


def _forget_quantization(base: nn.Module) -> None:
    base.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        base.__dict__.pop(name, None)
