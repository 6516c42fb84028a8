"""Mean squares of the input features of linear layers, collected while a model trains."""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import hook_expert_inputs
from .sharding import average_tensor, several_processes


class ActivationStatistics:
    """Averages the square of each input feature of the layers that hold the selected weights, by forward hooks.

    Kept in the optimizer's state (`lp_feature_sq` and `lp_feature_count`), so that a checkpoint holds them.

    Args:
        model (`nn.Module`): Holds the layers.
        params (`list[torch.Tensor]`): The selected weights.
        optimizer (`torch.optim.Optimizer`): Steps them.
    """

    def __init__(self, model: nn.Module, params: list[Tensor], optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._params = params
        self._handles = hook_inputs(model, params, self._collect)
        self._handles += hook_expert_inputs(model, params, self._collect_expert)

    @torch.no_grad()
    def _collect(self, weight: Tensor, features: Tensor) -> None:
        features = features.detach().flatten(0, -2).float()
        state = self._optimizer.state[weight]
        total = features.square().sum(0)
        state["lp_feature_sq"] = total + state["lp_feature_sq"] if "lp_feature_sq" in state else total
        state["lp_feature_count"] = len(features) + state.get("lp_feature_count", 0)

    @torch.no_grad()
    def _collect_expert(self, weight: Tensor, expert: int, features: Tensor) -> None:
        state = self._optimizer.state[weight]
        if "lp_feature_sq" not in state:
            state["lp_feature_sq"] = features.new_zeros(weight.shape[0], features.shape[-1], dtype=torch.float32)
            state["lp_feature_count"] = features.new_zeros(weight.shape[0], dtype=torch.float32)
        state["lp_feature_sq"][expert] += features.float().square().sum(0)
        state["lp_feature_count"][expert] += len(features)

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Remove the hooks, and average over all processes."""
        self.remove_hooks()
        self.average()

    def average(self) -> None:
        """Average over all processes. What they collect later is averaged together with this: only ratios count."""
        if not several_processes():
            return
        for param in self._params:
            state = self._optimizer.state[param]
            if "lp_feature_sq" not in state:  # experts whose tokens are unknown
                continue
            average_tensor(state["lp_feature_sq"])
            if torch.is_tensor(state["lp_feature_count"]):  # of experts; otherwise all see equally many tokens
                average_tensor(state["lp_feature_count"])


def hook_inputs(
    model: nn.Module, params: list[Tensor], callback: Callable[[Tensor, Tensor], None]
) -> list[RemovableHandle]:
    """Call a function with each weight and the input features of its layer, in training mode only.

    Args:
        model (`nn.Module`): Holds the layers.
        params (`list[torch.Tensor]`): The weights.
        callback (`Callable`): Called before the layer computes.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """
    selected = {id(param) for param in params}
    # Of a layer that PEFT adapts, PEFT's own layer is hooked: it has the same input, and not always calls the other.
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, BaseTunerLayer)}

    def hook_of(weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # The weight in the optimizer: in the forward pass FSDP2 puts another one into the module.
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training and inputs:  # evaluation data must not decide what is pruned
                callback(weight, inputs[0])

        return hook

    return [
        module.register_forward_pre_hook(hook_of(module.weight))
        for module in model.modules()
        # An embedding that is tied to the head has no input features.
        if id(getattr(module, "weight", None)) in selected
        and id(module) not in inside
        and not isinstance(module, nn.Embedding)
    ]
