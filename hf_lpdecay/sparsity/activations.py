"""Mean squares of the input features of linear layers, and of the gradients of their outputs, while a model trains."""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import hook_expert_inputs
from .sharding import average_tensor, several_processes


class ActivationStatistics:
    """Averages the square of each input feature of the layers that hold the selected weights, by forward hooks.

    Kept in the optimizer's state (`lp_feature_sq` and `lp_feature_count`), so that a checkpoint holds them. With
    `gradients` also the sums of the squared gradients of the loss with respect to the output features (`lp_output_sq`),
    which frozen weights have too.

    Args:
        model (`nn.Module`): Holds the layers.
        params (`list[torch.Tensor]`): The selected weights.
        optimizer (`torch.optim.Optimizer`): Steps them.
        gradients (`bool`, *optional*, defaults to `False`): Whether the gradients are collected, of `nn.Linear` and
            `Conv1D`; experts do not show theirs.
    """

    def __init__(
        self, model: nn.Module, params: list[Tensor], optimizer: torch.optim.Optimizer, gradients: bool = False
    ):
        self._optimizer = optimizer
        self._params = params
        self._handles = hook_inputs(model, params, self._collect)
        self._handles += hook_expert_inputs(model, params, self._collect_expert)
        if gradients:
            self._handles += hook_output_gradients(model, params, self._collect_gradient)

    @torch.no_grad()
    def _collect(self, weight: Tensor, features: Tensor) -> None:
        features = features.detach().flatten(0, -2).float()
        state = self._optimizer.state[weight]
        total = features.square().sum(0)
        state["lp_feature_sq"] = total + state["lp_feature_sq"] if "lp_feature_sq" in state else total
        state["lp_feature_count"] = len(features) + state.get("lp_feature_count", 0)

    @torch.no_grad()
    def _collect_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        state = self._optimizer.state[weight]
        total = gradient.detach().flatten(0, -2).float().square().sum(0)
        total.masked_fill_(~total.isfinite().all(), 0.0)  # float16's overflow: that step is skipped
        state["lp_output_sq"] = total + state["lp_output_sq"] if "lp_output_sq" in state else total

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
            if "lp_output_sq" in state:
                average_tensor(state["lp_output_sq"])
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

    def hook_of(weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # The weight in the optimizer: in the forward pass FSDP2 puts another one into the module.
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training and inputs:  # evaluation data must not decide what is pruned
                callback(weight, inputs[0])

        return hook

    return [module.register_forward_pre_hook(hook_of(module.weight)) for module in _layers_of(model, params)]


def hook_output_gradients(
    model: nn.Module, params: list[Tensor], callback: Callable[[Tensor, Tensor], None]
) -> list[RemovableHandle]:
    """Call a function with each weight and the gradient of its layer's output, in training mode only.

    Args:
        model (`nn.Module`): Holds the layers.
        params (`list[torch.Tensor]`): The weights.
        callback (`Callable`): Called in the backward pass.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """

    def hook_of(weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        @torch.compiler.disable  # a compiled graph does not call the hook of a tensor in it
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training and torch.is_grad_enabled():
                if not output.requires_grad:  # before the first adapter
                    output.requires_grad_(True)
                output.register_hook(lambda gradient: callback(weight, gradient))

        return hook

    return [module.register_forward_hook(hook_of(module.weight)) for module in _layers_of(model, params)]


def _layers_of(model: nn.Module, params: list[Tensor]) -> list[nn.Module]:
    """The modules that hold the weights, but for an embedding that is tied to the head: it has no input features."""
    selected = {id(param) for param in params}
    # Of a layer that PEFT adapts, PEFT's own layer is taken: it has the same input, and not always calls the other.
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    return [
        module
        for module in model.modules()
        if id(getattr(module, "weight", None)) in selected
        and id(module) not in inside
        and not isinstance(module, nn.Embedding)
    ]
