"""Calibration: batches that are passed through the model before the first step, for importance and compensation."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .sharding import several_processes, whole


def calibrate(
    model: nn.Module,
    params: list[Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Any]],
    count: int,
    gradients: bool = True,
    show_progress: bool = True,
) -> None:
    """Pass calibration batches through the model, without a step: for the hooks on it, and for the importance.

    The squared gradients are averaged over rows and columns and written as `lp_row_sq` (n, 1) and `lp_col_sq` (1, m)
    into the optimizer's state, averaged over all processes. The state of the random number
    generators is restored.

    Args:
        model (`nn.Module`): Returns a loss for a batch.
        params (`list[torch.Tensor]`): The weights whose gradients serve the importance.
        optimizer (`torch.optim.Optimizer`): Steps them.
        batches (`Iterable[dict]`): With labels, on the model's device.
        count (`int`): How many of them to take.
        gradients (`bool`, *optional*, defaults to `True`): Whether the importance needs gradients, of these weights or
            in the hooks; without, only the forward pass is made.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: If the model returns no loss, or there are no batches.
    """
    taken = 0
    training = model.training
    model.train()
    with torch.random.fork_rng():
        for batch in tqdm(islice(batches, count), total=count, desc="Calibration", disable=not show_progress):
            taken += 1
            with torch.set_grad_enabled(gradients):
                loss = model(**batch).loss
            if not gradients:
                continue
            if loss is None:
                raise ValueError("calibration_batches needs batches with labels, but the model returned no loss.")
            loss.backward()
            for param in params:
                # None where the batch did not pass through the layer: one that was dropped, an expert without a token
                grad = torch.zeros_like(param) if param.grad is None else param.grad.detach()
                square = grad.float().square()
                for name, dim in (("lp_row_sq", -1), ("lp_col_sq", -2)):
                    mean = whole(square.mean(dim, keepdim=True))
                    state = optimizer.state[param]
                    state[name] = mean + state[name] if name in state else mean
            model.zero_grad()
    model.train(training)
    if not taken:
        raise ValueError("calibration_batches needs at least one training batch, but there are none.")
    if gradients and several_processes():
        # Sums are as good as means: only ratios count.
        for param in params:
            for name in ("lp_row_sq", "lp_col_sq"):
                torch.distributed.all_reduce(optimizer.state[param][name])
