"""The decay without an optimizer's own step: what follows the step in `LpDecay`, and what acts on frozen weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .adamw import KERNELS
from .functional import acts, lp_decay_, random_bits, stochastic_round
from .pieces import factors_of, local, matrices_of, pieces_of


# What the kernel would need for an AdamW step.
_NO_ADAMW = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Batches:
    """What the kernels of all devices update together."""

    def __init__(self):
        self.of_device = {device: kernel.Batch() for device, kernel in KERNELS.items()}
        self.ahead = kernels.Batch()

    def run(self) -> None:
        """Update everything that was added; must come before any of the tensors changes."""
        for batch in (*self.of_device.values(), self.ahead):
            batch.run()

    def apply(self) -> None:
        """Decay what [`prepare_decay`] has added, after it was stepped."""
        self.ahead.apply()


def decay_(param: Tensor, group: dict[str, Any], plan: dict[str, Any], lr: float, seed: int, batches: Batches) -> None:
    """Decay a weight that no optimizer steps, in place: [`LpAdamW`]'s update with a proposal of zero.

    Args:
        param (`torch.Tensor`): The weight, of any floating point type. bfloat16 and float16 are rounded stochastically.
        group (`dict[str, Any]`): As in [`LpAdamW`]: with `p`, `lp_lambda` and perhaps `pattern`.
        plan (`dict[str, Any]`): The parameter's own options, as in [`LpAdamW`]'s state.
        lr (`float`): The learning rate ``>= 0``.
        seed (`int`): Of the rounding, in [0, 2 ** 32).
        batches (`Batches`): Where the kernel is available nothing happens before they are run.
    """
    options = options_of(group, plan, lr)
    if acts(lr, options["lp_lambda"]):
        # The size before the step is the size after it, and a zero stays one.
        options.update(post_step=True, freeze_zeros=False)
        weight = local(param)
        decay_stepped_(weight, weight, plan, options, group.get("pattern"), seed, batches)


def options_of(group: dict[str, Any], plan: dict[str, Any], lr: float | Tensor) -> dict[str, Any]:
    """The hyperparameters of a parameter's decay: its plan's, else its group's."""
    return {
        "lr": lr,
        "lp_lambda": plan.get("lp_lambda", group["lp_lambda"]),
        "p": group["p"],
        "freeze_zeros": group["freeze_zeros"] or plan.get("lp_freeze_zeros", False),
        "post_step": group["post_step"],
        "threshold": plan.get("lp_threshold"),
        **_NO_ADAMW,
    }


def decay_stepped_(
    weight: Tensor,
    before: Tensor,
    plan: dict[str, Any],
    options: dict[str, Any],
    pattern: str | None,
    seed: int | None,
    batches: Batches,
) -> None:
    """Decay a weight that was stepped, in place.

    Args:
        weight (`torch.Tensor`): After the optimizer's step; this process's part.
        before (`torch.Tensor`): Before it, shaped alike; the same tensor if only `post_step` is asked for.
        plan (`dict[str, Any]`): See [`decay_`].
        options (`dict[str, Any]`): From [`options_of`].
        pattern (`str`, *optional*): See [`~.functional.structured_size`].
        seed (`int`, *optional*): Of the rounding of bfloat16 and float16 weights.
        batches (`Batches`): See [`decay_`].
    """
    decays, low_precision = acts(options["lr"], options["lp_lambda"]), weight.dtype in LOW_PRECISION
    factors, by_unit = factors_of(plan, weight) if decays else (None, False)
    pattern = pattern if decays else None
    kernel = KERNELS.get(weight.device.type) if pattern is None and not by_unit else None
    if kernel is not None:
        tensors, batch = (weight, before, weight, weight), batches.of_device[weight.device.type]
        if _add_to_batch(kernel, batch, tensors, factors, options, seed, alone=True):
            return
    for pieces, (row, col), offset in pieces_of((weight, before), factors, plan.get("lp_rows", 1), pattern):
        piece = pieces[0].float() if low_precision else pieces[0]
        frozen = pieces[1] == 0 if options["freeze_zeros"] else None
        if decays:
            lp_decay_(
                piece,
                (piece if options["post_step"] else pieces[1].to(piece.dtype)).abs(),
                lr=options["lr"],
                lp_lambda=options["lp_lambda"],
                p=options["p"],
                threshold=options["threshold"],
                row=row,
                col=col,
                by_unit=by_unit,
                pattern=pattern,
                dim=plan.get("lp_dim", 1),
            )
        if frozen is not None:
            piece.masked_fill_(frozen, 0.0)
        if low_precision:
            bits = random_bits(piece.numel(), seed, offset, piece.device)
            pieces[0].copy_(stochastic_round(piece, weight.dtype, bits))


def prepare_decay(
    weight: Tensor,
    plan: dict[str, Any],
    options: dict[str, Any],
    pattern: str | None,
    seed: int | None,
    batches: Batches,
    room: Callable[[Tensor, torch.dtype], Tensor],
) -> bool:
    """Have the factors of a weight's decay worked out before another optimizer steps it, where the kernel can do that.

    Run `batches` before the step, and apply them after it.

    Args:
        weight (`torch.Tensor`): Before the step; this process's part.
        plan, options, pattern, seed, batches: See [`decay_stepped_`].
        room (`Callable[[torch.Tensor, torch.dtype], torch.Tensor]`): Makes a tensor like a given one in a dtype.

    Returns:
        `bool`: Whether it is done so; otherwise a copy of the weight must be kept for [`decay_stepped_`].
    """
    decays = acts(options["lr"], options["lp_lambda"])
    factors, by_unit = factors_of(plan, weight) if decays else (None, False)
    if options["post_step"] or by_unit or (decays and pattern is not None):
        return False
    if KERNELS.get(weight.device.type) is not kernels:  # that of a GPU, where copies are cheap
        return False
    place = room(weight, torch.float32)
    return _add_to_batch(kernels, batches.ahead, (weight, weight, place, place), factors, options, seed, ahead=True)


def _add_to_batch(
    kernel: Any,
    batch: Any,
    tensors: tuple[Tensor, ...],
    factors: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
    seed: int | None,
    **kind: bool,
) -> bool:
    """Add a weight to what a kernel updates, if that can; `kind` is `alone` or `ahead`."""
    parts = matrices_of(tensors, factors) if all(tensor.is_contiguous() for tensor in tensors) else []
    if not parts or not all(kernel.covers(part, its_factors, options["p"]) for part, its_factors, _ in parts):
        return False
    case = kernel.case_for(*parts[0][:2], options, **kind)
    if not kernel.available(case):
        return False
    for part, its_factors, offset in parts:
        its_seed = None if seed is None else (seed + offset) % (1 << 32)
        batch.add(case, part, None, options, its_seed, its_factors)
    return True
