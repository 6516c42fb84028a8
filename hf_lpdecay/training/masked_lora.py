"""Masked LoRA: the update of an adapter is zero wherever the base weight is zero, so that a merge is exact.

The effective weight of a layer is W + s (B A) * M with the mask M = (W != 0), as SparsePEFT has it (SQFT, arXiv
2410.03750). It plugs into PEFT as a `LoraVariant`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant, ParamWrapper, _LoraParameterProxy
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D


# Elements of an effective weight that are formed at a time on a CPU. Fresh memory costs more there than arithmetic.
_PIECE = 1 << 16


def is_quantized(layer: LoraLayer) -> bool:
    """Whether the base weight is stored in another form than as its floating point values."""
    return is_quantized_weight(base_parameter(layer))


def is_quantized_weight(weight: Tensor) -> bool:
    """Whether a weight is stored in another form than as its floating point values."""
    return not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter)


def base_parameter(layer: LoraLayer) -> Tensor:
    """The parameter that the adapter adds to, as it is stored."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def base_weight(layer: LoraLayer) -> Tensor:
    """The weight that the adapter adds to, dequantized."""
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    return _dense_weight(layer.get_base_layer())


def mask_layer(layer: LoraLayer, adapter: str, tied_config=None) -> None:
    """Mask one adapter of one layer, in place.

    Args:
        layer (`LoraLayer`): Any of PEFT's LoRA layers on a linear layer or on a parameter.
        adapter (`str`): The adapter's name.
        tied_config (`PretrainedConfig`, *optional*): The base model's config if the layer's weight is tied to another
            module's: a merge gives the layer a copy of its own, and says so there.
    """
    layer.lora_variant[adapter] = MaskedLoraVariant(tied_config)
    if not isinstance(layer, Masked):
        layer.__class__ = _masked_class(type(layer))


def is_masked(layer: LoraLayer, adapter: str) -> bool:
    """Whether this adapter of the layer is masked."""
    return isinstance(layer.lora_variant.get(adapter), MaskedLoraVariant)


def untie(layer: LoraLayer, config) -> None:
    """Give a layer a copy of its weight, where that is tied to another module's, and say so in the model's config."""
    base = layer.get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
    config.tie_word_embeddings = False


class MaskedLoraVariant(LoraVariant):
    """PEFT's hooks for one masked adapter of one layer.

    Args:
        tied_config (`PretrainedConfig`, *optional*): See [`mask_layer`].
    """

    def __init__(self, tied_config=None):
        self.tied_config = tied_config

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Nothing to prepare: the mask is the base weight's own zeros."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        # Rounded once, as in place.
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.data - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        return result + _apply(module, active_adapter, x, result.dtype, with_base=False)


class Masked:
    """What a masked layer changes of PEFT's layer, whichever it is."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs) -> LoraVariant | None:
        """An adapter that is made with a masked one's config, such as a weighted sum of adapters, is masked too."""
        if getattr(config, "lp_masked_layers", None) is None:
            return super().resolve_lora_variant(config=config, **kwargs)
        masked = (variant for variant in self.lora_variant.values() if isinstance(variant, MaskedLoraVariant))
        return MaskedLoraVariant(next((variant.tied_config for variant in masked), None))

    def get_delta_weight(self, adapter: str, *args, **kwargs) -> Tensor:
        """The update of the base weight, zero where that is zero."""
        delta = super().get_delta_weight(adapter, *args, **kwargs)
        if not is_masked(self, adapter):
            return delta
        return delta.masked_fill(base_weight(self).to(delta.device) == 0, 0.0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, after which exactly those weights are zero that were before it."""
        for variant in self.lora_variant.values():
            if isinstance(variant, MaskedLoraVariant) and variant.tied_config is not None:
                untie(self, variant.tied_config)
                variant.tied_config = None
        with _same_zeros(self):
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """PEFT's unmerge, likewise."""
        with _same_zeros(self):
            super().unmerge()


class MaskedLinear(Masked, Linear):
    """A masked `lora.Linear`, on an `nn.Linear` or a `Conv1D`."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """One product with the effective weight where possible: half of the work of two products."""
        adapter = self._only_adapter()
        if args or kwargs or adapter is None:
            return super().forward(x, *args, **kwargs)
        bias = self.get_base_layer().bias
        if self.lora_bias[adapter]:
            added = self.lora_B[adapter].bias * self.scaling[adapter]
            bias = added if bias is None else bias + added
        weight = self.get_base_layer().weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        result = _apply(self, adapter, x, dtype, with_base=True)
        return result if bias is None else result + bias.to(dtype)

    def _only_adapter(self) -> str | None:
        """The one adapter that acts, if nothing keeps the effective weight from being used."""
        if self.disable_adapters or self.merged or is_quantized(self):
            return None
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if len(adapters) != 1 or not is_masked(self, adapters[0]):
            return None
        if self.training and not isinstance(self.lora_dropout[adapters[0]], nn.Identity):
            return None
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or base._forward_hooks or base._forward_pre_hooks:
            return None  # they want to see what goes through the layer
        return adapters[0]


class MaskedParamWrapper(Masked, ParamWrapper):
    """A masked `lora.ParamWrapper`, on the experts' parameters."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]
        if not adapters:
            yield
            return
        delta = sum(self.get_delta_weight(adapter) for adapter in adapters)
        base, trained = self.get_base_layer(), self.get_param().requires_grad
        parametrize.register_parametrization(base, self.parameter_name, _LoraParameterProxy(delta))
        base.parametrizations[self.parameter_name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()


_CLASSES: dict[type, type] = {Linear: MaskedLinear, ParamWrapper: MaskedParamWrapper}


def _masked_class(cls: type) -> type:
    """The masked class of a LoRA layer; those of quantized layers are made when first needed."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Masked{cls.__name__}", (Masked, cls), {"__module__": __name__})
        globals()[_CLASSES[cls].__name__] = _CLASSES[cls]  # where pickle looks
    return _CLASSES[cls]


@contextmanager
def _same_zeros(layer: LoraLayer) -> Iterator[None]:
    """A weight that cancels with its update would look like one of the mask: it becomes the smallest number instead."""
    if is_quantized(layer):
        yield
        return
    kept = base_parameter(layer) != 0
    yield
    weight = base_parameter(layer).data
    # Below float16's normal numbers there are no others as small; the other types' subnormals slow a CPU down.
    tiny = 2.0**-24 if weight.dtype == torch.float16 else torch.finfo(weight.dtype).smallest_normal
    weight.masked_fill_(kept & (weight == 0), tiny)


def _dense_weight(base: nn.Module) -> Tensor:
    weight = base.weight
    if type(weight).__name__ == "Int8Params":  # PEFT's function moves it, and with that loses its scales on a CPU
        scales = weight.SCB if base.state.SCB is None else base.state.SCB
        return weight.detach().as_subclass(Tensor) * (scales.view(-1, 1) / 127)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()  # bitsandbytes packs 4-bit weights anew for a CPU's forward pass, and unpacks them for this
    try:
        return dequantize_module_weight(base).detach()
    except (NotImplementedError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"A base weight of the type {type(weight).__name__} cannot be dequantized here, and its zeros are the mask"
            f" ({error}): quantize the sparse model in another format, or mask the adapters where that one can be read."
        ) from error


def _apply(layer: LoraLayer, adapter: str, x: Tensor, dtype: torch.dtype, with_base: bool) -> Tensor:
    base = layer.get_base_layer()
    weight = None if is_quantized(layer) else base.weight
    factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    transposed = getattr(layer, "fan_in_fan_out", False)
    return _MaskedProduct.apply(x, weight, *factors, layer.scaling[adapter], transposed, with_base, dtype, base)


class _MaskedProduct(torch.autograd.Function):
    """x times the masked update, with the base weight added to it or without.

    Neither the update nor the mask is kept for the backward pass: both are formed again from A, B and the weight. The
    gradients of A and B are those of plain LoRA with the masked gradient of the whole weight, one more large product.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, transposed, with_base, dtype, base):
        ctx.save_for_backward(x, weight, a, b)
        ctx.options = scale, transposed, with_base, dtype, base
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), _effective_weight(weight, a, b, *ctx.options))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        scale, transposed, with_base, dtype, base = ctx.options
        grad_x = grad_weight = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ _effective_weight(weight, a, b, *ctx.options)).to(x.dtype)
            if any(ctx.needs_input_grad[1:4]):
                # (out_features, in_features)
                outer = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dtype)
                if ctx.needs_input_grad[1] and with_base:
                    grad_weight = (outer.T if transposed else outer).to(weight.dtype)
                weight = _dense_weight(base) if weight is None else weight
                grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
                for rows, its_weight in _rows_of(weight.T if transposed else weight):
                    masked = outer[rows].to(a.dtype) * _mask_of(its_weight, a.dtype)
                    grad_a.addmm_(b[rows].T, masked, alpha=scale)
                    torch.mm(masked, a.T, out=grad_b[rows])
                grad_b *= scale
        return grad_x, grad_weight, grad_a, grad_b, None, None, None, None, None


def _effective_weight(weight, a, b, scale, transposed, with_base, dtype, base) -> Tensor:
    """s (B A) * M or W + s (B A) * M, shape (out_features, in_features), rounded as a merge rounds it, in `dtype`."""
    if weight is None:
        weight = _dense_weight(base)
    if transposed:
        weight = weight.T
    half_on_cpu = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
    # In fewer passes over memory; in float32 the order of rounding does not matter.
    at_once = with_base and weight.dtype == a.dtype and a.dtype in (torch.float32, torch.float64)
    scaled = b * scale if at_once else b.float() if half_on_cpu else b
    right = a.float() if half_on_cpu else a
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows, its_weight in _rows_of(weight):
        mask = _mask_of(its_weight, a.dtype)
        if at_once:
            result[rows] = torch.addmm(its_weight, scaled[rows], right).mul_(mask)
            continue
        product = (scaled[rows] @ right).mul_(scale).to(a.dtype).mul_(mask)
        result[rows] = (its_weight + product).to(weight.dtype) if with_base else product
    return result


def _rows_of(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a weight whose scratch stays in a CPU's cache; all of it elsewhere."""
    rows = max(1, _PIECE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows), weight[start : start + rows]


def _mask_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where a weight is not zero. To multiply with it takes a tenth of the time of `masked_fill` on a CPU."""
    return torch.ne(weight, 0, out=torch.empty_like(weight, dtype=dtype))
