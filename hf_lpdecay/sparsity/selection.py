"""Which parameters take part: `target_modules` and `exclude_modules`, as PEFT spells them."""

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .experts import expert_weights, router_names
from .patterns import Structured, parse_pattern
from .shrinkable import check_shrinkable
from .unit_search import find_units
from .units import Units, check_units


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig


logger = logging.get_logger(__name__)

Modules = list[str] | str | None


class PackedWeight:
    """A module that holds the non-zero values of a weight in place of the parameter, as `to_sparse` leaves it."""

    # What follows the module's name in that of the parameter.
    parameter_suffix = ".weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        raise NotImplementedError

    def count_nonzero(self) -> int:
        """How many entries of the weight are not zero."""
        raise NotImplementedError


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The modules of a sparse model that hold weights, by the names that their parameters had."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    return {
        f"{name}{module.parameter_suffix}": module
        for name, module in found.items()
        if name.rpartition(".")[0] not in found  # the matrix of one expert
    }


def match_parameters(
    model: nn.Module, target_modules: Modules = "all-linear", exclude_modules: Modules = None
) -> dict[str, nn.Parameter]:
    """Find the weights of the linear layers whose names match: `nn.Linear`, GPT-2's `Conv1D`, experts' 3-D parameters.

    Args:
        model (`nn.Module`): Any model.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Name suffixes, a regular
            expression for the whole name, or `"all-linear"`: every linear layer but the output head (for a
            classifier: everything behind the base model), the routers of a mixture of experts and the inside of PEFT
            adapters. Experts go by their parameters' names, such as `"experts.gate_up_proj"`, others by their modules'.
        exclude_modules (`list[str]` or `str`, *optional*): Modules to leave out, spelt alike.

    Returns:
        `dict[str, nn.Parameter]`: Weights by the name that `model.named_parameters()` gives them, each once however
        many modules share it.

    Raises:
        ValueError: If nothing matches, or only layers that [`~hf_lpdecay.to_sparse`] has replaced.
    """
    found = match_weights(model, target_modules, exclude_modules)
    params = {name: weight for name, weight in found.items() if not isinstance(weight, PackedWeight)}
    if not params:
        raise ValueError(
            f"target_modules={target_modules!r} matches sparse layers of to_sparse only, which are for inference:"
            " hf_lpdecay.inference.to_dense(model) gives the dense model back."
        )
    return params


def match_weights(
    model: nn.Module, target_modules: Modules, exclude_modules: Modules
) -> dict[str, nn.Parameter | PackedWeight]:
    """As [`match_parameters`], with the modules that hold a weight in place of a parameter."""
    packed = packed_weights(model)
    names = {id(weight): name for name, weight in (*model.named_parameters(), *packed.items())}
    # PEFT puts a layer that it adapts into another one: it keeps the name that it had.
    linears = {own_name(name): m.weight for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    linears |= {own_name(name): param for name, (param, _) in expert_weights(model).items()}
    linears |= {own_name(name.removesuffix(".weight")): module for name, module in packed.items()}

    def matching(patterns: Modules) -> list[str]:
        # The weight of a tied head goes by the embedding's name.
        other = {name: own_name(names.get(id(weight), "").removesuffix(".weight")) for name, weight in linears.items()}
        return [name for name in linears if _matches(patterns, name) or _matches(patterns, other[name])]

    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        left_out = _head_and_adapter_names(model) | router_names(model)
        tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        chosen = [name for name, weight in linears.items() if name not in left_out and id(weight) not in tied]
    else:
        chosen = matching(target_modules)
    if not chosen:
        raise ValueError(_nothing_matches("target_modules", target_modules, linears))
    if exclude_modules:
        excluded = set(matching(exclude_modules))
        if not excluded:
            raise ValueError(_nothing_matches("exclude_modules", exclude_modules, linears))
        chosen = [name for name in chosen if name not in excluded]
        if not chosen:
            raise ValueError(
                f"exclude_modules={exclude_modules!r} leaves nothing of target_modules={target_modules!r}: make one of"
                " them narrower or wider."
            )
    matched = {id(linears[name]): linears[name] for name in chosen}
    return {names[key]: weight for key, weight in matched.items()}


def match_layers(
    model: nn.Module, target_modules: Modules = "all-linear", exclude_modules: Modules = None
) -> dict[str, nn.Module]:
    """The linear layers, by name, whose weights [`match_parameters`] finds; it says what the arguments are.

    Of a model of [`~hf_lpdecay.to_sparse`] those that are dense, if any.
    """
    weights = match_weights(model, target_modules, exclude_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.weight" in weights
    }


def own_name(name: str) -> str:
    """A module's or parameter's name in the model without PEFT's adapters."""
    return name.replace(".base_layer", "")


def select_parameters(
    model: nn.Module, target_modules: Modules = "all-linear", exclude_modules: Modules = None
) -> dict[str, nn.Parameter]:
    """Choose the parameters that the p-norm decay shall act on: those that match, are trained and are not all zero.

    Zero absorbs under the decay, so a tensor that starts at zero (LoRA's B, a zero-initialised head) would never learn.

    Args:
        model, target_modules, exclude_modules: See [`match_parameters`].

    Returns:
        `dict[str, nn.Parameter]`: The chosen weights by name.

    Raises:
        ValueError: If nothing is chosen, or `target_modules` names a tensor that is all zero.
    """
    matched = match_parameters(model, target_modules, exclude_modules)
    trained = {name: param for name, param in matched.items() if param.requires_grad}
    if not trained:
        raise ValueError(
            f"target_modules={target_modules!r} matches {len(matched)} tensors, such as {next(iter(matched))}, but"
            " none of them is trained (requires_grad is False): unfreeze them or name other modules. The frozen base"
            " of a PEFT model is made sparse by LpDecayTrainer, with a target_sparsity."
        )
    zero = [name for name, param in trained.items() if not param.detach().any()]
    named = not (isinstance(target_modules, str) and target_modules.lower() == "all-linear")
    few = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
    if zero and (named or len(zero) == len(trained)):
        raise ValueError(
            f"{few}: all zero, and under the p-norm decay zero stays zero, so this would never learn."
            " Initialise it differently or leave it out with exclude_modules."
        )
    if zero:
        logger.warning_once(f"All zero, and therefore left out of the p-norm decay: {few}.")
    return {name: param for name, param in trained.items() if name not in zero}


def participants(model: nn.Module, config: "LpDecayConfig") -> dict[str, nn.Parameter]:
    """The parameters that become sparse: those that [`select_parameters`] chooses and the pattern spans.

    Args:
        model (`nn.Module`): Any model, before it is trained.
        config (`LpDecayConfig`): How it shall be made sparse.

    Returns:
        `dict[str, nn.Parameter]`: Weights by name.

    Raises:
        ValueError: If nothing is chosen, or if the pattern does not fit.
    """
    if config.pattern == "rank":  # of adapters, whose B starts at zero
        selected = {name: param for name, param in model.named_parameters() if param.requires_grad}
    else:
        selected = select_parameters(model, config.target_modules, config.exclude_modules)
    parse_pattern(config.pattern).check_all(selected, input_dims(model))
    found = selected_units(model, config, selected)
    if config.pattern in ("neurons", "heads") and config.require_shrinkable and isinstance(model, PreTrainedModel):
        check_shrinkable(model, config.pattern, found, config.target_sparsity)
    spanned = {id(param) for units in found for param in units.params}
    return {name: param for name, param in selected.items() if id(param) in spanned} if spanned else selected


def selected_units(model: nn.Module, config: "LpDecayConfig", selected: dict[str, nn.Parameter]) -> list[Units]:
    """The units that are pruned as a whole with the patterns `"neurons"`, `"heads"` and `"rank"`; else nothing.

    Args:
        model (`nn.Module`): Any model.
        config (`LpDecayConfig`): With the pattern and the target.
        selected (`dict[str, nn.Parameter]`): Weights that may take part, by name.

    Raises:
        ValueError: If they are not found, or not selected as a whole.
    """
    pattern = parse_pattern(config.pattern)
    if not isinstance(pattern, Structured):
        return []
    return check_units(find_units(model, pattern.units), selected, config.target_sparsity)


def input_dims(model: nn.Module) -> dict[str, int]:
    """The dimension of the input features in the weight of each linear layer: 1, or 0 in GPT-2's `Conv1D`.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `dict[str, int]`: By the name of the weight.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    dims = {names[id(module.weight)]: 0 if isinstance(module, Conv1D) else 1 for module in linears}
    return {**dims, **{name: dim for name, (_, dim) in expert_weights(model).items()}}


def block_weights_left_out(model: nn.Module, selected: Iterable[str]) -> dict[str, int]:
    """The matrices in a model's blocks that take no part, and their number of weights.

    Args:
        model (`nn.Module`): Any model.
        selected (`Iterable[str]`): Names of the parameters that take part.

    Returns:
        `dict[str, int]`: By parameter name; without those of routers, embeddings, vectors and adapters.
    """
    apart = router_names(model) | _head_and_adapter_names(model)
    apart |= {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    apart |= {name for name, module in model.named_modules() if type(module).__name__.endswith("Router")}
    selected = set(selected)
    return {
        name: param.numel()
        for name, param in model.named_parameters()
        if re.search(r"\.\d+\.", name)
        and param.dim() > 1
        and min(param.shape[-2:]) > 1
        and name not in selected
        and name.rpartition(".")[0] not in apart
        and not name.endswith("bias")
    }


def _matches(patterns: Modules, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def _head_and_adapter_names(model: nn.Module) -> set[str]:
    left_out = set()
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(whole, PreTrainedModel):
        output = whole.get_output_embeddings()
        base = whole.base_model
        inside = {id(module) for module in base.modules()}
        for name, module in model.named_modules():
            if module is output:  # which PEFT may have wrapped
                left_out |= {inner for inner, _ in module.named_modules(prefix=name)}
            elif output is None and id(module) not in inside:
                left_out.add(name)
    for prefix, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            left_out |= {
                f"{prefix}.{name}" for name, _ in module.named_modules() if name and not name.endswith("base_layer")
            }
    return left_out


def _nothing_matches(option: str, value: Modules, linears: dict[str, nn.Parameter]) -> str:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
    message = f"{option}={value!r} matches no linear layer."
    if not linears:
        return f"{message} The model has none (nn.Linear, Conv1D or experts' 3-D parameters)."
    wanted = [value] if isinstance(value, str) else value
    near = [match for w in wanted for match in difflib.get_close_matches(w.rsplit(".", 1)[-1], suffixes, n=1)]
    if near:
        message += f" Did you mean {near[0]!r}?"
    if isinstance(value, str):
        message += " A string is a regular expression for the whole name; give a list for suffixes."
    return f"{message} Linear layers of this model end in: {', '.join(suffixes[:20])}."
