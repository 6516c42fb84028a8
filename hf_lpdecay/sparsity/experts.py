"""The experts of a mixture, whose linear layers Transformers keeps as 3-D parameters, (experts, out, in) or transposed.

Every expert's matrix is the weight of a linear layer like any other.
"""

from collections.abc import Callable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging


logger = logging.get_logger(__name__)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, with their names, that hold the weights of several experts as 3-D parameters."""
    for name, module in model.named_modules():
        if _projections(module):
            yield name, module


def expert_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """The experts' weights, and where their input features lie.

    The orientation is what Transformers says of the module (`is_transposed`); where it does not, the dimension which
    is the model's `hidden_size` tells.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `dict[str, tuple[nn.Parameter, int]]`: By parameter name, the weight, shape (experts, n, m), and the dimension
        of the input features in each expert's matrix: 1, or 0 where it is (in, out), as in gpt-oss.

    Raises:
        ValueError: If the orientation of a weight cannot be told.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    hidden = getattr(config, "hidden_size", None)
    found = {}
    for prefix, module in expert_modules(model):
        for name, param in _projections(module).items():
            full_name = f"{prefix}.{name}" if prefix else name
            found[full_name] = param, _input_dim(module, full_name, param, hidden)
    return found


def _projections(module: nn.Module) -> dict[str, nn.Parameter]:
    if not (hasattr(module, "is_transposed") or type(module).__name__.endswith("Experts")):
        return {}
    return {name: param for name, param in module.named_parameters(recurse=False) if param.dim() == 3}


def _input_dim(module: nn.Module, name: str, param: Tensor, hidden: int | None) -> int:
    if hasattr(module, "is_transposed"):
        return 0 if module.is_transposed else 1
    reads = not name.endswith(("down_proj", "w2"))
    matching = [dim for dim in (0, 1) if param.shape[1 + dim] == hidden]
    if len(matching) != 1:
        raise ValueError(
            f"{name}, shape {tuple(param.shape)}, holds the weights of experts, and whether it is (experts, out, in) or"
            f" (experts, in, out) cannot be told from hidden_size={hidden}: leave it out by naming other modules in"
            " target_modules."
        )
    return matching[0] if reads else 1 - matching[0]


def router_names(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose or scale experts: those beside the experts, and inside of routers."""
    found = set()
    linear = (nn.Linear, BaseTunerLayer)
    for prefix, module in model.named_modules():
        children = dict(module.named_children())
        if type(module).__name__.endswith("Router"):
            found |= {name for name, m in module.named_modules(prefix=prefix) if isinstance(m, linear)}
        elif any(name.endswith("experts") for name in children) or any(map(_is_experts, children.values())):
            found |= {f"{prefix}.{name}" for name, m in children.items() if isinstance(m, linear)}
    return found


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


def hook_expert_inputs(
    model: nn.Module, params: list[Tensor], callback: Callable[[Tensor, int, Tensor], None]
) -> list[RemovableHandle]:
    """Call a function with each selected 3-D weight, an expert's number, and the input features of its tokens.

    What the router chose is an argument of the experts' module, whichever implementation computes it (eager,
    grouped_mm, batched_mm). The input features of the down projection are computed a second time from it.

    Args:
        model (`nn.Module`): Holds the experts.
        params (`list[torch.Tensor]`): The selected weights.
        callback (`Callable`): Called before the experts compute, in training mode only; for experts with a token.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """
    selected = {id(param) for param in params}
    handles = []
    for _, module in expert_modules(model):
        weights = {name: param for name, param in _projections(module).items() if id(param) in selected}
        if weights and not is_observable(module):
            logger.warning_once(
                f"{type(module).__name__} does not show which tokens an expert gets: {', '.join(weights)} are neither"
                " compensated nor ranked by activations."
            )
        elif weights:
            hook = _hook_of(weights, callback)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def is_observable(module: nn.Module) -> bool:
    """Whether the tokens of each expert can be told from the arguments of the module."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _hook_of(weights: dict[str, Tensor], callback: Callable[[Tensor, int, Tensor], None]) -> Callable:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not module.training:  # evaluation data must not decide what is pruned
            return
        hidden_states, chosen = [*args, *kwargs.values()][:2]
        hidden_states = hidden_states.detach().flatten(0, -2)
        chosen = chosen.reshape(len(hidden_states), -1)
        reads = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(module.down_proj.shape[0]):
            tokens = (chosen == expert).any(1).nonzero().view(-1)
            if not len(tokens):
                continue
            features = hidden_states[tokens]
            if reads in weights:
                callback(weights[reads], expert, features)
            if "down_proj" in weights:
                callback(weights["down_proj"], expert, _hidden(module, reads, expert, features))

    return hook


def _hidden(module: nn.Module, reads: str, expert: int, features: Tensor) -> Tensor:
    """The input features of the down projection."""
    weight = getattr(module, reads)[expert]
    features = features @ (weight if module.is_transposed else weight.t()).to(features.dtype)
    if module.has_bias:
        features = features + getattr(module, f"{reads}_bias")[expert]
    return module._apply_gate(features) if module.has_gate else module.act_fn(features)


def first_expert(param: Tensor) -> int:
    """The number of the first expert whose matrix is in this process."""
    if not isinstance(param, DTensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1][0]
