"""The learning rates of the steps around the present one, which a plan needs."""

from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from torch.optim.lr_scheduler import LambdaLR

from ..sparsity.driver import LearningRates


def learning_rates_of(optimizer: torch.optim.Optimizer, scheduler: Any = None) -> LearningRates:
    """Look up learning rates: exact where the scheduler is a function of the step, else the present ones.

    Args:
        optimizer (`torch.optim.Optimizer`): What is stepped.
        scheduler (`LRScheduler` or `AcceleratedScheduler`, *optional*): What sets its learning rates.

    Returns:
        `Callable[[int, int], list[list[float]]]`: For each of the optimizer's groups the learning rates from one step
            to another (exclusive), where 0 is the next step.
    """
    stride = 1
    if isinstance(scheduler, AcceleratedScheduler):
        # Accelerate steps it once for each process, since its length counts the batches of one process.
        if scheduler.step_with_optimizer and not scheduler.split_batches:
            stride = PartialState().num_processes
        scheduler = scheduler.scheduler

    def rates(first: int, last: int) -> list[list[float]]:
        if isinstance(scheduler, LambdaLR):
            steps = [scheduler.last_epoch + stride * i for i in range(first, last)]
            return [[lr * factor(i) for i in steps] for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        return [[float(group["lr"])] * (last - first) for group in optimizer.param_groups]

    return rates
