"""The whole step in one pass over the memory, for a CPU: builds and runs `one_pass.cpp`.

A step is bound by memory, so what counts is how often each tensor is read: once here, about ten times when written in
torch operations. The source needs nothing but a C++ compiler, and takes a fraction of a second to compile for one case
(`torch.compile` reaches the same speed after 14 s, and spends 25 us per tensor in every step on its guards).
"""

import ctypes
import functools
import logging
import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import load_library


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("one_pass.cpp")
_TASK = struct.Struct("=6q2q2I11f4x")  # one_pass.cpp's Task
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
# Below this a thread costs more than it saves.
_MIN_ELEMENTS_PER_THREAD = 1 << 15


class Case(NamedTuple):
    """What the source is compiled for.

    Args:
        norm (`int`): Twice p, where p has a short cut (0, 0.5, 1, 1.5, 2); -1 for any p.
        factors (`bool`): Whether the importance has row and column factors.
        post_step (`bool`): Whether the size is taken after AdamW's step.
        alone (`bool`): Whether there is only the decay: the place of the gradient then takes the weights from before
            the step (with `post_step` it is not looked at), and that of the moments is not looked at.
        ahead (`bool`): Whether another optimizer steps: [`Batch.run`] works out by what each weight will be divided,
            and [`Batch.apply`] does it after the step. The place of the first moment takes the factors, float32;
            `post_step` is impossible, and that of the gradient and the second moment is not looked at.
        weight, moment (`torch.dtype`): Of weights and gradients, and of the moments.
    """

    norm: int
    factors: bool
    post_step: bool
    alone: bool
    ahead: bool
    weight: torch.dtype
    moment: torch.dtype


def any_case(device: torch.device) -> Case:
    """What can be built at all can be built for this."""
    return Case(-1, False, False, False, False, torch.float32, torch.float32)


def covers(tensors: tuple[Tensor, ...], factors: tuple[Tensor, Tensor] | None, p: float) -> bool:
    """Whether the kernel can update a parameter.

    Args:
        tensors (`tuple[torch.Tensor, ...]`): Weights, gradient and the two moments, contiguous, of one shape.
        factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Importance of rows and columns.
        p (`float`): The norm; beyond +-1000 the kernel's arithmetic would overflow.
    """
    param, grad, exp_avg, _ = tensors
    if factors is not None:
        if param.dim() != 2 or [factor.shape for factor in factors] != [(param.shape[0], 1), (1, param.shape[1])]:
            return False
    return (
        all(tensor.device == param.device for tensor in tensors)
        and param.dtype in _TYPES
        and grad.dtype == param.dtype
        and exp_avg.dtype in (torch.float32, param.dtype)
        and abs(p) <= 1000
    )


class Kernel(NamedTuple):
    """A compiled kernel.

    Args:
        part (`Callable`): `part(tasks, number of tasks, number of this part, parts of each task, applying)` does one
            of them.
        together (`Callable`): `together(tasks, number of tasks, threads, applying)` does all, by the threads that torch
            has; returns 0 where it cannot be had, and nothing was done.
    """

    part: Callable[[bytes, int, int, int, bool], None]
    together: Callable[[bytes, int, int, bool], int]


def build(case: Case) -> Kernel:
    """Compile the kernel for a case, once in a process.

    Args:
        case (`Case`): What for.

    Returns:
        `Kernel`: What runs it.

    Raises:
        RuntimeError: If there is no C++ compiler, or it fails.
    """
    result = _build(case)
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def available(case: Case) -> bool:
    """Whether the kernel can be had for a case; if not, one warning says why."""
    result = _build(case)
    if isinstance(result, str):
        warn_once(result)
        return False
    return True


@functools.cache
def _build(case: Case) -> Kernel | str:
    """The kernel, or why there is none: a compiler that failed once is not asked again in the next step."""
    defines = {
        "NORM": case.norm,
        "FACTORS": int(case.factors),
        "POST_STEP": int(case.post_step),
        "ALONE": int(case.alone),
        "AHEAD": int(case.ahead),
        "WEIGHT": _TYPES[case.weight],
        "MOMENT": _TYPES[case.moment],
    }
    try:
        library = load_library("optimizer", (SOURCE,), defines)
    except RuntimeError as error:
        return str(error)
    library.run.argtypes = [ctypes.c_char_p] + [ctypes.c_int64] * 4
    library.run.restype = None
    library.run_together.argtypes = [ctypes.c_char_p] + [ctypes.c_int64] * 3
    return Kernel(library.run, library.run_together)


@functools.cache
def warn_once(reason: str) -> None:
    """Warn that there is no kernel, on one process and only the first time."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s LpAdamW works without its kernel, several times slower where the decay acts.", reason)


class Batch:
    """Parameters that are updated together, by as many threads as torch uses, and by torch's own where they can be had.

    Nothing happens before [`Batch.run`], which must come before any of the tensors changes.
    """

    def __init__(self):
        self._tasks: dict[Case, list[tuple[bytes, int]]] = {}
        self._alive: list[tuple[Tensor, ...]] = []

    def add(
        self,
        case: Case,
        tensors: tuple[Tensor, ...],
        step: Tensor | None,
        options: dict[str, Any],
        seed: int | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add a parameter that the kernel [`covers`].

        Args:
            case (`Case`): The kernel to use.
            tensors (`tuple[torch.Tensor, ...]`): Weights, gradient and the two moments.
            step (`torch.Tensor`, *optional*): Steps taken before this one, which adds one to it; not if the case is
                `alone` or `ahead`.
            options (`dict[str, Any]`): Keyword arguments of [`lp_adamw_`].
            seed (`int`, *optional*): Round bfloat16 stochastically, with these random bits; in [0, 2 ** 32).
            factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Importance of rows and columns.
        """
        if step is not None:
            step += 1
        scalars = _scalars_for(case, 1 if step is None else int(step), options)
        numel, cols, addresses = tensors[0].numel(), 1, [0, 0]
        if factors is not None:
            factors = tuple(factor.to(torch.float32).contiguous() for factor in factors)
            cols, addresses = factors[1].numel(), [factor.data_ptr() for factor in factors]
        addresses = [tensor.data_ptr() for tensor in tensors] + addresses
        task = _TASK.pack(*addresses, numel, cols, seed or 0, seed is not None, *scalars)
        self._tasks.setdefault(case, []).append((task, numel))
        self._alive.append((tensors, factors))

    def run(self) -> None:
        """Update all parameters."""
        self._run(False)

    def apply(self) -> None:
        """Decay all parameters whose case is `ahead`, after they were stepped."""
        self._run(True)

    def _run(self, applying: bool) -> None:
        for case, tasks in self._tasks.items():
            function, buffer = build(case), b"".join(task for task, _ in tasks)
            numel = sum(numel for _, numel in tasks)
            threads = max(1, min(torch.get_num_threads(), numel // _MIN_ELEMENTS_PER_THREAD))
            if threads > 1 and function.together(buffer, len(tasks), threads, applying):
                continue
            parts = [(buffer, len(tasks), part, threads, applying) for part in range(threads)]
            others = [_pool(threads - 1).submit(function.part, *part) for part in parts[1:]]
            function.part(*parts[0])
            for other in others:
                other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lp_adamw")


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def case_for(
    tensors: tuple[Tensor, ...],
    factors: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
    alone: bool = False,
    ahead: bool = False,
) -> Case:
    """The case that updates a parameter.

    Args:
        tensors, factors: See [`covers`].
        options (`dict[str, Any]`): Keyword arguments of [`lp_adamw_`].
        alone, ahead (`bool`, *optional*, defaults to `False`): See [`Case`].
    """
    p, strength = options["p"], options["lr"] * options["lp_lambda"]
    norm, post_step, has_factors = -1, options["post_step"], factors is not None
    if strength == 0:
        norm, post_step, has_factors = 4, False, False
    elif p == 2:
        norm = 4
    elif p in (0, 0.5, 1, 1.5) and 1e-20 <= strength < 1 and options["eps"] >= 1e-12:  # so that nothing underflows
        norm = int(2 * p)
    return Case(norm, has_factors, post_step, alone, ahead, tensors[0].dtype, tensors[2].dtype)


def _scalars_for(case: Case, step: int, options: dict[str, Any]) -> tuple[float, ...]:
    """The numbers that the kernel takes.

    Args:
        case (`Case`): From [`case_for`].
        step (`int`): Steps taken, this one included.
        options (`dict[str, Any]`): Keyword arguments of [`lp_adamw_`].
    """
    lr, p, lp_lambda, threshold = (options[name] for name in ("lr", "p", "lp_lambda", "threshold"))
    beta1, beta2 = options["betas"]
    if case.norm == 4:
        strength = 1.0 / (1.0 + lr * lp_lambda)
    elif case.norm >= 0:
        strength = lr * lp_lambda
    else:
        strength = math.log2(lr) + math.log2(lp_lambda)
    absorbed = -1.0
    if lr * lp_lambda > 0 and p < 2 and threshold != 0 and not case.post_step:
        # Up to here the decay would divide by 2 ** 126 and more, which the kernel takes for infinity.
        absorbed = 2.0 ** max(-126.0, min((math.log2(lr) + math.log2(lp_lambda) - 126.0) / (2.0 - p), 126.0))
        if threshold is not None:
            absorbed = min(absorbed, threshold * (1.0 - 1e-6))
    frozen = 0.0 if options["freeze_zeros"] else -1.0
    if not (case.factors or case.post_step):
        frozen = max(frozen, absorbed)
    return (
        1.0 - lr * options["weight_decay"],
        1.0 - beta1,
        1.0 - beta2,
        lr / (1.0 - beta1**step),
        1.0 / math.sqrt(1.0 - beta2**step),
        options["eps"],
        strength,
        p - 2.0,
        math.inf if threshold is None else threshold,
        absorbed,
        frozen,
    )
