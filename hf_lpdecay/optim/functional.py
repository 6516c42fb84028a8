"""The arithmetic of one AdamW step with the decoupled p-norm decay: functions of tensors, no state, no bookkeeping.

Reference: "Decoupled Weight Decay for Any p Norm", Outmezguine and Levi, arXiv 2404.10824. With the learning rate
``alpha``, the strength ``lambda`` and AdamW's update ``u``::

    w_hat = w - alpha * u
    w_new = w_hat / (1 + alpha * lambda * r ** (p - 2))          r = |w|, or |w| times an importance

A subnormal result becomes zero at once. Two variations that the authors name: `post_step` takes r from ``|w_hat|``, and
s-dynamics puts ``1 / s`` in place of ``r ** (p - 2)``, with an s that follows ``r ** (2 - p)``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def decay_denominator_(r: Tensor, lr: float | Tensor, lp_lambda: float, p: float) -> Tensor:
    """Turn ``r`` into ``1 + lr * lp_lambda * r ** (p - 2)``, the number that a decayed weight is divided by, in place.

    ``lr * lp_lambda`` goes into the exponent, ``exp2((p - 2) * log2(r) + log2(lr * lp_lambda))``: cheaper than `pow`,
    free of overflow in the product, and right without a special case at ``r = 0`` (where ``p < 2`` gives infinity:
    zero absorbs).

    Args:
        r (`torch.Tensor`): Size of each weight, finite and ``>= 0``, float32 or float64, any shape. Overwritten.
        lr (`float` or `torch.Tensor`): Learning rate ``alpha >= 0``; a tensor is a scalar on `r`'s device.
        lp_lambda (`float`): Strength ``lambda >= 0`` in the paper's convention (the authors' code has ``p * lambda``).
        p (`float`): The norm. ``p < 1`` makes weights exactly zero, ``p = 2`` is AdamW's decay in implicit form,
            ``p <= 0`` (beyond the paper) comes ever closer to a hard cut.

    Returns:
        `torch.Tensor`: `r` itself, every entry ``>= 1``; all ones if ``lr * lp_lambda`` is zero.
    """
    if torch.is_tensor(lr):
        strength = lr.to(r.dtype) * lp_lambda
        if p == 2:
            return r.copy_(1.0 + strength)
        r.log2_().mul_(p - 2).add_(strength.log2()).exp2_().add_(1.0)
        return r.masked_fill_(strength == 0, 1.0)
    if lr == 0 or lp_lambda == 0:
        return r.fill_(1.0)
    log2_strength = math.log2(lr) + math.log2(lp_lambda)
    if p == 2:  # 0 * log2(0) would be NaN
        return r.fill_(1.0 + 2.0 ** min(log2_strength, 1023.0))
    return r.log2_().mul_(p - 2).add_(log2_strength).exp2_().add_(1.0)


def follow_size_(s: Tensor, r: Tensor, p: float, rate: float) -> None:
    """Move ``s`` towards ``r ** (2 - p)``, in place: ``s += rate * (r ** (2 - p) - s)``, the s-dynamics of the paper.

    Args:
        s (`torch.Tensor`): What the decay acts by, float32 or float64, any shape, ``>= 0``; an entry below zero is
            taken as not set yet, and becomes ``r ** (2 - p)``. Overwritten.
        r (`torch.Tensor`): Size of each weight, finite or infinite and ``>= 0``, shaped and typed like `s`.
        p (`float`): The norm.
        rate (`float`): In (0, 1].
    """
    target = torch.full_like(r, 1.0) if p == 2 else r.log2().mul_(2 - p).exp2_()
    # An infinite s would never come back.
    target.clamp_max_(torch.finfo(r.dtype).max)
    s.copy_(torch.where(s < 0, target, s.lerp(target, rate)))


def structured_size(r: Tensor, pattern: str, dim: int = 1) -> Tensor:
    """What "small" means for weights that become zero in a pattern.

    Args:
        r (`torch.Tensor`): Size of each weight, ``>= 0``, shape (out, in), or (in, out) with `dim=0`; with the
            experts in front, each matrix is for itself.
        pattern (`str`): `"n:m"` keeps at least n of any m consecutive weights along the input features: the n largest
            of each group of m are out of reach, their size is infinite. Among equals the first are the smaller ones.
            `"block:RxC"` prunes whole tiles of R output and C input features: each weight's size is the root
            mean square of its tile.
        dim (`int`, *optional*, defaults to 1): The dimension of the input features.

    Returns:
        `torch.Tensor`: A new tensor, shaped like `r`.
    """
    if r.dim() == 3:  # one by one, so that a step, which takes them so, rounds alike
        return torch.stack([structured_size(matrix, pattern, dim) for matrix in r])
    by_output = r if dim == 1 else r.t()
    if pattern.startswith("block:"):
        rows, cols = map(int, pattern.removeprefix("block:").split("x"))
        tiles = by_output.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        size = tiles.square().mean((1, 3), keepdim=True).sqrt_().expand(tiles.shape).reshape(by_output.shape)
    else:
        keep, group = map(int, pattern.split(":"))
        # One plane per place in the group, so that each comparison runs over memory in a row.
        planes = by_output.unflatten(1, (-1, group)).permute(2, 0, 1).contiguous()
        rank = torch.zeros(planes.shape, dtype=torch.int8, device=r.device)
        for first in range(group):
            for second in range(first + 1, group):
                smaller = (planes[second] < planes[first]).view(torch.int8)
                rank[first] += smaller
                rank[second] += 1 - smaller
        size = planes.masked_fill_(rank >= group - keep, math.inf).permute(1, 2, 0).reshape(by_output.shape)
    return size if dim == 1 else size.t()


def lp_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    s: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    p: float,
    lp_lambda: float,
    freeze_zeros: bool,
    post_step: bool = False,
    s_rate: float = 1.0,
    threshold: float | None = None,
    row: Tensor | None = None,
    col: Tensor | None = None,
    by_unit: bool = False,
    pattern: str | None = None,
    dim: int = 1,
    fused: bool = False,
) -> None:
    """One AdamW step with p-norm decay, in place: sticky zero, AdamW, size, trim test, decay.

    The AdamW part is torch's own functional, so that without decay the bits are those of `torch.optim.AdamW`.

    Args:
        param (`torch.Tensor`): Weights, float32 or float64. Scratch of two more tensors of its size is used, so
            callers pass large parameters in pieces.
        grad, exp_avg, exp_avg_sq (`torch.Tensor`): Gradient and moments, shaped and typed like `param`.
        step (`torch.Tensor`): Number of steps taken before this one, a scalar; incremented.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`.
        p, lp_lambda (`float`): See [`decay_denominator_`].
        freeze_zeros (`bool`): Keep every exact zero at zero, whatever the decay does.
        post_step (`bool`, *optional*, defaults to `False`): Take the size from the weight after AdamW's step.
        s (`torch.Tensor`, *optional*): State of the s-dynamics, shaped like `param`, see [`follow_size_`]. It is moved
            first and then used: the denominator is ``1 + lr * lp_lambda / s``.
        s_rate (`float`, *optional*, defaults to `1.0`): Rate of the s-dynamics; only matters with `s`.
        threshold (`float`, *optional*): Trim: weights with ``r >= threshold`` are exempt from the decay.
        row, col (`torch.Tensor`, *optional*): Importance factors that broadcast over `param`, ``r = |w| * row * col``.
        by_unit (`bool`, *optional*, defaults to `False`): The size is ``r = row * col``, that of the unit that a weight
            belongs to.
        pattern (`str`, *optional*): Who competes with whom, see [`structured_size`].
        dim (`int`, *optional*, defaults to 1): The dimension of the input features.
        fused (`bool`, *optional*, defaults to `False`): Use torch's fused AdamW kernel.
    """
    decays = acts(lr, lp_lambda)
    # The decay itself then keeps zeros at zero.
    absorbs = decays and p < 2 and threshold != 0 and pattern is None and not (by_unit or post_step) and s is None
    size = param.abs() if decays and not post_step else None
    zero = param == 0 if freeze_zeros and not absorbs else None
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    adamw_([(param, grad, exp_avg, exp_avg_sq, step)], options, fused)
    if decays:
        size = param.abs() if size is None else size
        lp_decay_(
            param,
            size,
            s,
            lr=lr,
            lp_lambda=lp_lambda,
            p=p,
            s_rate=s_rate,
            threshold=threshold,
            row=row,
            col=col,
            by_unit=by_unit,
            pattern=pattern,
            dim=dim,
        )
    if zero is not None:
        param.masked_fill_(zero, 0.0)


def low_precision_lp_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    s: Tensor | None = None,
    *,
    bits: Tensor | None,
    **options: Any,
) -> None:
    """[`lp_adamw_`] for weights in bfloat16 or float16, computed in float32.

    Args:
        param, grad (`torch.Tensor`): Weights and gradient, bfloat16 or float16.
        exp_avg, exp_avg_sq (`torch.Tensor`): Moments, float32 or typed like `param`.
        step, s, options: See [`lp_adamw_`].
        bits (`torch.Tensor`, *optional*): Random bits for each weight, int32: the weights and, if it is not float32,
            the second moment are then rounded stochastically; the first moment, which moves faster, to nearest.
    """
    weight, moments = param.float(), (exp_avg.float(), exp_avg_sq.float())  # no copy if they are float32
    lp_adamw_(weight, grad.float(), *moments, step, s, **options)
    if exp_avg.dtype != torch.float32:
        exp_avg.copy_(moments[0])
        exp_avg_sq.copy_(moments[1] if bits is None else stochastic_round(moments[1], param.dtype, bits >> 16))
    param.copy_(weight if bits is None else stochastic_round(weight, param.dtype, bits))


def adamw_(tensors: list[tuple[Tensor, ...]], group: dict[str, Any], fused: bool) -> None:
    """torch's AdamW step for many parameters at once, in place.

    Args:
        tensors (`list[tuple[torch.Tensor, ...]]`): For each parameter the weights, the gradient, the two moments and
            the number of steps.
        group (`dict[str, Any]`): With `lr`, `betas`, `eps` and `weight_decay`.
        fused (`bool`): Whether torch's fused kernel is used.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*tensors))
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=params[0].is_cuda and not fused and not torch.is_tensor(group["lr"]),  # which it does not take
        fused=fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def acts(lr: float | Tensor, lp_lambda: float) -> bool:
    """Whether the decay does anything. A learning rate on another device is not asked: that would wait for it."""
    return lp_lambda > 0 and (torch.is_tensor(lr) or lr > 0)


def lp_decay_(
    param: Tensor,
    size: Tensor,
    s: Tensor | None = None,
    *,
    lr: float | Tensor,
    lp_lambda: float,
    p: float,
    s_rate: float = 1.0,
    threshold: float | None = None,
    row: Tensor | None = None,
    col: Tensor | None = None,
    by_unit: bool = False,
    pattern: str | None = None,
    dim: int = 1,
) -> None:
    """The decay alone, in place: importance, pattern, trim test, division. A subnormal result becomes zero.

    Args:
        param (`torch.Tensor`): Weights after the step of the optimizer inside, float32 or float64.
        size (`torch.Tensor`): ``|w|``, shaped and typed like `param`. Overwritten.
        s, lr, lp_lambda, p, s_rate, threshold, row, col, by_unit, pattern, dim: See [`lp_adamw_`].
    """
    if by_unit:
        size.fill_(1.0)
    r = size if row is None else size.mul_(row).mul_(col)
    if pattern is not None:
        r = structured_size(r, pattern, dim)
    exempt = r >= threshold if threshold is not None else None
    if s is not None:
        follow_size_(s, r, p, s_rate)
        r, p = s.clone(), 1.0  # 1 / s is s ** (1 - 2)
    denominator = decay_denominator_(r, lr, lp_lambda, p)
    if exempt is not None:
        denominator.masked_fill_(exempt, 1.0)
    param.div_(denominator)
    # A model that computes with subnormal weights takes several times as long, and the next step makes them zero.
    subnormal = param.abs() < torch.finfo(param.dtype).tiny
    param.masked_fill_(subnormal.logical_and_(denominator > 1), 0.0)


def random_bits(numel: int, seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of some consecutive elements, from a hash of their position ("lowbias32").

    The kernels draw the same ones, and any split of a tensor into pieces gives the same ones.

    Args:
        numel (`int`): How many.
        seed (`int`): In [0, 2 ** 32).
        offset (`int`, *optional*, defaults to 0): Position of the first.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where they are needed.

    Returns:
        `torch.Tensor`: int32, shape (numel,).
    """
    x = torch.arange(offset + seed, offset + seed + numel, device=device).to(torch.int32)  # which wraps
    # Shifts of an int32 repeat its sign: the masks make them the shifts of an unsigned number.
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 values to one of their two neighbours in `dtype`, to each with the probability that keeps the mean.

    A bfloat16 weight has 8 significant bits, so nearest rounding swallows any relative change below 0.2 %: most of a
    decay's (and of AdamW's) work. Values that `dtype` holds exactly stay as they are.

    Args:
        x (`torch.Tensor`): float32 values, any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        bits (`torch.Tensor`): 16 random bits for each value, in the lower half of an int32, any shape.

    Returns:
        `torch.Tensor`: A new tensor in `dtype`.
    """
    up, pattern = bits.view(x.shape) & 0xFFFF, x.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:  # the upper half of a float32: what the random bits carry over into it rounds up
        rounded = ((pattern + up) & -0x10000).view(torch.float32)
    else:
        rounded = ((pattern + (up & 0x1FFF)) & -0x2000).view(torch.float32)
        # Below its smallest normal number float16 has steps of 2 ** -24.
        steps = (x * 2.0**24).add_(up * 2.0**-16).floor_().mul_(2.0**-24)
        rounded = torch.where(x.abs() < torch.finfo(dtype).tiny, steps, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
