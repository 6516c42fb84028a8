"""The whole step in one pass over the memory, for a GPU: launches `one_pass.py` for all parameters of a device at once.

What is launched does not grow with the number of parameters: one kernel that works out their scalars, and one for each
[`Case`] among them. Nothing waits for the device. Counters of steps (and learning rates that are tensors) are read
there, so that a step may be captured in a CUDA graph, see [`Batch.run`].

Importing this file does not import Triton.
"""

import functools
import importlib
import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .functional import acts, low_precision_lp_adamw_, lp_decay_


_ROW = struct.Struct("=12q11d8x")  # of one_pass.py's table
_NUMBERS = 12
# Elements that one program of `update` takes, and parameters that one of `prepare` takes.
_BLOCK, _PREPARE_BLOCK = 2048, 64
_WARPS, _PREPARE_WARPS = 8, 2
# Uploaded tables that are kept. `LpDecay` has one for each 16 MB of weights.
_KEPT = 64


class Case(NamedTuple):
    """What the source is compiled for.

    Args:
        device (`torch.device`): Where.
        factors (`bool`): Whether the importance has row and column factors.
        post_step (`bool`): Whether the size is taken after AdamW's step.
        alone (`bool`): As in [`kernels.Case`].
        weight, moment (`torch.dtype`): Of weights and gradients, and of the moments.
        aligned (`bool`): Whether 16 bytes may be loaded at once.
    """

    device: torch.device
    factors: bool = False
    post_step: bool = False
    alone: bool = False
    weight: torch.dtype = torch.float32
    moment: torch.dtype = torch.float32
    aligned: bool = True


def any_case(device: torch.device) -> Case:
    """What can be built at all can be built for this."""
    return Case(device)


def covers(tensors: tuple[Tensor, ...], factors: tuple[Tensor, Tensor] | None, p: float) -> bool:
    """As [`kernels.covers`]."""
    # The kernel counts columns in 32 bits.
    return kernels.covers(tensors, factors, p) and (factors is None or factors[1].numel() < 1 << 30)


def case_for(
    tensors: tuple[Tensor, ...], factors: tuple[Tensor, Tensor] | None, options: dict[str, Any], alone: bool = False
) -> Case:
    """As [`kernels.case_for`]; the learning rate may be a tensor on the device."""
    decays = acts(options["lr"], options["lp_lambda"])
    return Case(
        tensors[0].device,
        decays and factors is not None,
        decays and options["post_step"],
        alone,
        tensors[0].dtype,
        tensors[2].dtype,
        tensors[0].numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
    )


def build(case: Case) -> None:
    """Compile the kernels for a case, once in a process.

    Args:
        case (`Case`): What for.

    Raises:
        RuntimeError: If there is no Triton, or it fails.
    """
    reason = _build(case)
    if reason is not None:
        raise RuntimeError(reason)


def available(case: Case) -> bool:
    """Whether the kernels can be had for a case; if not, one warning says why."""
    reason = _build(case)
    if reason is not None:
        kernels.warn_once(reason)
    return reason is None


@functools.cache
def _build(case: Case) -> str | None:
    """Why there is no kernel, if there is none."""
    try:
        source = _source()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install the version that this torch was built with."
    device = case.device
    try:
        with _on(device):
            # For a graph, on a parameter without elements; what runs without one `_agrees` compiles.
            table = torch.zeros(_ROW.size // 8, dtype=torch.int64, device=device)
            numbers = torch.empty(_NUMBERS, dtype=torch.float32, device=device)
            source.prepare[(1,)](table, numbers, 1, True, _PREPARE_BLOCK, num_warps=_PREPARE_WARPS)
        if not _agrees(case):
            return f"The optimizer's kernel goes wrong as Triton compiles it for {device} (please report it)."
    except Exception as error:  # Triton, its compiler, its assembler and its driver have one of their own each
        return f"The optimizer's kernel could not be compiled by Triton: {type(error).__name__}: {str(error)[-500:]}"
    return None


def _agrees(case: Case) -> bool:
    """Whether a step is the one in torch operations, on random numbers: not every GPU and compiler is tested."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 64) if case.aligned else (17, 61)

    def randn(std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(std).to(case.device, dtype)

    weight, grad = randn(0.1, case.weight), randn(0.01 if not case.alone else 0.1, case.weight)
    exp_avg, exp_avg_sq = randn(0.01, case.moment), randn(0.01, case.moment).square()
    row, col = (torch.linspace(0.5, 2.0, size, device=case.device) for size in shape)
    factors = (row[:, None], col[None]) if case.factors else None
    options = {"lr": 1e-2, "lp_lambda": 1.0, "p": 0.5, "threshold": 0.08}
    adamw = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
    adamw |= {"freeze_zeros": False, "post_step": case.post_step}
    ours = tuple(tensor.clone() for tensor in (weight, grad, exp_avg, exp_avg_sq))
    batch = Batch()
    step = None if case.alone else torch.zeros((), device=case.device)
    batch.add(case, ours, step, {**options, **adamw}, factors=factors)
    batch.run()
    broadcast = dict(zip(("row", "col"), factors or (None, None)))
    if case.alone:
        after = weight.float()
        lp_decay_(after, (weight if case.post_step else grad).float().abs(), **options, **broadcast)
        weight = after
    else:
        moments = (exp_avg, exp_avg_sq, torch.zeros(()))
        low_precision_lp_adamw_(weight, grad, *moments, bits=None, **options, **adamw, **broadcast)
    tolerance = 1e-3 if case.weight == torch.float32 else 2e-2
    return torch.allclose(ours[0].float(), weight.float(), rtol=tolerance, atol=tolerance * 1e-2)


def _source():
    return importlib.import_module(".one_pass", __package__)


def _constants(case: Case) -> tuple[bool | int, ...]:
    bf16 = case.weight == torch.bfloat16, case.moment == torch.bfloat16
    return (*bf16, case.factors, case.post_step, case.alone, case.aligned, _BLOCK)


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device; -1 changes nothing."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


class Batch:
    """Parameters that are updated together.

    Nothing happens before [`Batch.run`], which must come before any of the tensors changes.
    """

    def __init__(self):
        self._tasks: dict[Case, list[tuple[bytes, int]]] = {}
        self._alive: list[Any] = []

    def add(
        self,
        case: Case,
        tensors: tuple[Tensor, ...],
        step: Tensor | None,
        options: dict[str, Any],
        seed: int | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """As [`kernels.Batch.add`], with `step` on the device."""
        device, lr, numel = case.device, options["lr"], tensors[0].numel()
        if torch.is_tensor(lr):
            lr = lr.to(device, torch.float32, non_blocking=True)
            lr_address, lr_number = lr.data_ptr(), 0.0
        else:
            lr_address, lr_number = 0, lr
        cols, addresses = 1, (0, 0)
        if case.factors:
            factors = tuple(factor.to(device, torch.float32).contiguous() for factor in factors)
            cols, addresses = factors[1].numel(), tuple(factor.data_ptr() for factor in factors)
        threshold, (beta1, beta2) = options["threshold"], options["betas"]
        row = _ROW.pack(
            *(tensor.data_ptr() for tensor in tensors),
            *addresses,
            0 if step is None else step.data_ptr(),
            lr_address,
            numel,
            cols,
            seed or 0,
            seed is not None,
            lr_number,
            options["weight_decay"],
            _log2(beta1),
            1.0 - beta1,
            _log2(beta2),
            1.0 - beta2,
            options["eps"],
            _log2(options["lp_lambda"]),
            options["p"] - 2.0,
            math.inf if threshold is None else threshold,
            0.0 if options["freeze_zeros"] else -1.0,
        )
        self._tasks.setdefault(case, []).append((row, -(-numel // _BLOCK)))
        self._alive.append((tensors, step, factors, lr))

    def run(self) -> None:
        """Launch the update of all parameters, on the current streams of their devices.

        In a CUDA graph that is being captured, the addresses and numbers of this step are part of the graph, the values
        of `step` and of learning rates that are tensors are not. Random bits for rounding differ in each replay.
        """
        for device in {case.device: None for case in self._tasks}:
            cases = {case: tasks for case, tasks in self._tasks.items() if case.device == device}
            with _on(device):
                _launch(device, cases)


def _launch(device: torch.device, cases: dict[Case, list[tuple[bytes, int]]]) -> None:
    source, cuda = _source(), device.type == "cuda"
    captured = cuda and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    # A captured graph copies its tables anew in each replay, from memory that torch leaves to it.
    table_of, programs_of = (_table.__wrapped__, _programs.__wrapped__) if captured else (_table, _programs)
    rows = [row for tasks in cases.values() for row, _ in tasks]
    table = table_of(b"".join(rows), device, stream)
    numbers = torch.empty(len(rows) * _NUMBERS, dtype=torch.float32, device=device)
    grid = (-(-len(rows) // _PREPARE_BLOCK),)
    source.prepare[grid](table, numbers, len(rows), captured, _PREPARE_BLOCK, num_warps=_PREPARE_WARPS)
    first = 0
    for case, tasks in cases.items():
        blocks = tuple(number for _, number in tasks)
        if any(blocks):
            programs = programs_of(blocks, first, device, stream)
            source.update[(sum(blocks),)](programs, table, numbers, *_constants(case), num_warps=_WARPS)
        first += len(tasks)


# What was uploaded for one stream is not used on another, which would have to wait for it.
@functools.lru_cache(maxsize=_KEPT)
def _table(rows: bytes, device: torch.device, stream: int) -> Tensor:
    return _uploaded(torch.frombuffer(bytearray(rows), dtype=torch.int64), device)


@functools.lru_cache(maxsize=_KEPT)
def _programs(blocks: tuple[int, ...], first: int, device: torch.device, stream: int) -> Tensor:
    """Which parameter, and which block of it, each program takes: int32, shape (programs, 2)."""
    counts = torch.tensor(blocks, device="cpu")
    task = torch.arange(first, first + len(blocks), device="cpu").repeat_interleave(counts)
    block = torch.arange(len(task), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return _uploaded(torch.stack((task, block), 1).to(torch.int32), device)


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. From pinned memory, which torch does not use again before the copy is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _log2(x: float) -> float:
    return math.log2(x) if x > 0 else -math.inf
