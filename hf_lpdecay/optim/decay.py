"""The decay without an optimizer's own step: what follows the step in `LpDecay`, and what acts on frozen weights."""

from typing import Any

import torch
from torch import Tensor

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

    def run(self) -> None:
        """Update everything that was added; must come before any of the tensors changes."""
        for batch in self.of_device.values():
            batch.run()


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
    tensors = (weight, before, weight, weight)
    contiguous = weight.is_contiguous() and before.is_contiguous()
    kernel = KERNELS.get(weight.device.type) if contiguous and pattern is None and not by_unit else None
    parts = [] if kernel is None or before.dtype != weight.dtype else matrices_of(tensors, factors)
    if parts and all(kernel.covers(part, its_factors, options["p"]) for part, its_factors, _ in parts):
        case = kernel.case_for(*parts[0][:2], options, alone=True)
        if kernel.available(case):
            for part, its_factors, offset in parts:
                its_seed = (seed + offset) % (1 << 32) if low_precision else None
                batches.of_device[weight.device.type].add(case, part, None, options, its_seed, its_factors)
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
