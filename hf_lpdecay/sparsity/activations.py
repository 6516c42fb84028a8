"""Mean squares of the input features of linear layers, gathered while a model trains."""

from functools import partial

import torch
from torch import Tensor, nn


class ActivationStatistics:
    """Averages the square of each input feature of the layers that hold the selected weights, by forward hooks.

    Kept in the optimizer's state (`lp_feature_sq` and `lp_feature_count`), so that a checkpoint holds them.

    Args:
        model (`nn.Module`): Holds the layers.
        params (`list[torch.Tensor]`): The selected weights.
        optimizer (`torch.optim.Optimizer`): Steps them.
    """

    def __init__(self, model: nn.Module, params: list[Tensor], optimizer: torch.optim.Optimizer):
        self._state = optimizer.state
        self._params = params
        selected = {id(param) for param in params}
        self._handles = [
            module.register_forward_pre_hook(partial(self._hook, module.weight))
            for module in model.modules()
            if id(getattr(module, "weight", None)) in selected
        ]

    @torch.no_grad()
    def _hook(self, weight: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # The weight as the optimizer knows it: in the forward pass FSDP2 puts another one into the module.
        if not module.training:  # evaluation data has no say in what is kept
            return
        features = inputs[0].detach().flatten(0, -2).float()
        state = self._state[weight]
        total = features.square().sum(0)
        state["lp_feature_sq"] = total + state["lp_feature_sq"] if "lp_feature_sq" in state else total
        state["lp_feature_count"] = len(features) + state.get("lp_feature_count", 0)

    def finish(self) -> None:
        """Stop gathering, and put together what the processes have gathered."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for param in self._params:
                # Averaging is enough: the processes see equally many tokens, and only ratios count.
                torch.distributed.all_reduce(self._state[param]["lp_feature_sq"])
