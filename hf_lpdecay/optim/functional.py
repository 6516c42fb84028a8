"""The arithmetic of one AdamW step with the decoupled p-norm decay: functions of tensors, no state, no bookkeeping.

Reference: "Decoupled Weight Decay for Any p Norm", Outmezguine and Levi, arXiv 2404.10824. With the learning rate
``alpha``, the strength ``lambda`` and AdamW's update ``u``::

    w_hat = w - alpha * u
    w_new = w_hat / (1 + alpha * lambda * r ** (p - 2))          r = |w|, or |w| times an importance

Two variations that the authors name: `post_step` takes r from ``|w_hat|``, and s-dynamics puts ``1 / s`` in place of
``r ** (p - 2)``, with an s that follows ``r ** (2 - p)``.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def decay_denominator_(r: Tensor, lr: float, lp_lambda: float, p: float) -> Tensor:
    """Turn ``r`` into ``1 + lr * lp_lambda * r ** (p - 2)``, the number that a decayed weight is divided by, in place.

    ``lr * lp_lambda`` goes into the exponent, ``exp2((p - 2) * log2(r) + log2(lr * lp_lambda))``: cheaper than `pow`,
    free of overflow in the product, and right without a special case at ``r = 0`` (where ``p < 2`` gives infinity:
    zero absorbs).

    Args:
        r (`torch.Tensor`): Size of each weight, finite and ``>= 0``, float32 or float64, any shape. Overwritten.
        lr (`float`): Learning rate ``alpha >= 0``.
        lp_lambda (`float`): Strength ``lambda >= 0`` in the paper's convention (the authors' code has ``p * lambda``).
        p (`float`): The norm. ``p < 1`` makes weights exactly zero, ``p = 2`` is AdamW's decay in implicit form,
            ``p <= 0`` (beyond the paper) comes ever closer to a hard cut.

    Returns:
        `torch.Tensor`: `r` itself, every entry ``>= 1``; all ones if ``lr * lp_lambda`` is zero.
    """
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
        r (`torch.Tensor`): Size of each weight, ``>= 0``, shape (out, in), or (in, out) with `dim=0`.
        pattern (`str`): `"n:m"` keeps at least n of any m consecutive weights along the input features: the n largest
            of each group of m are out of reach, their size is infinite. Among equals the first are the smaller ones.
            `"block:RxC"` makes tiles of R output and C input features zero as one: each weight's size is the root
            mean square of its tile.
        dim (`int`, *optional*, defaults to 1): The dimension of the input features.

    Returns:
        `torch.Tensor`: A new tensor, shaped like `r`.
    """
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
    lr: float,
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
    size: Tensor | None = None,
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
        size (`torch.Tensor`, *optional*): Sizes that broadcast over `param`, in place of ``r``.
        pattern (`str`, *optional*): Who competes with whom, see [`structured_size`].
        dim (`int`, *optional*, defaults to 1): The dimension of the input features.
        fused (`bool`, *optional*, defaults to `False`): Use torch's fused AdamW kernel.
    """
    decays = lr > 0 and lp_lambda > 0
    # The decay itself then keeps zeros at zero.
    own_size = pattern is None and size is None
    absorbs = decays and p < 2 and threshold != 0 and own_size and not post_step and s is None
    r = param.abs() if decays and not post_step else None
    zero = param == 0 if freeze_zeros and not absorbs else None
    adamw(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=param.is_cuda and not fused,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if decays:
        if post_step:
            r = param.abs()
        if row is not None:
            r.mul_(row).mul_(col)
        if pattern is not None:
            r = structured_size(r, pattern, dim)
        if size is not None:
            r.copy_(size)
        exempt = r >= threshold if threshold is not None else None
        if s is not None:
            follow_size_(s, r, p, s_rate)
            r, p = s.clone(), 1.0  # 1 / s is s ** (1 - 2)
        denominator = decay_denominator_(r, lr, lp_lambda, p)
        if exempt is not None:
            denominator.masked_fill_(exempt, 1.0)
        param.div_(denominator)
    if zero is not None:
        param.masked_fill_(zero, 0.0)


def stochastic_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to one of their two neighbours in `dtype`, to each with the probability that keeps the mean.

    A bfloat16 weight has 8 significant bits, so nearest rounding swallows any relative change below 0.2 %: most of a
    decay's (and of AdamW's) work. Values that `dtype` holds exactly stay as they are.

    Args:
        x (`torch.Tensor`): float32 values, any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.

    Returns:
        `torch.Tensor`: A new tensor in `dtype`, drawn with torch's global generator of `x`'s device.
    """
    info = torch.finfo(dtype)
    mantissa_bits = -round(math.log2(info.eps))
    _, exponent = torch.frexp(x)
    smallest = round(math.log2(info.tiny))
    ulp = torch.exp2((exponent - 1).clamp_min(smallest).sub(mantissa_bits).to(x.dtype))
    return (x / ulp).add_(torch.rand_like(x)).floor_().mul_(ulp).to(dtype)
