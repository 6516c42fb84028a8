"""A bit mask and packed values times up to 8 tokens, on a GPU. Importing this file does not import Triton."""

import functools

from torch import Tensor

from .kernels import Weight


# Rows of the weight for one program, and columns at a time.
_ROWS, _COLS = 16, 128


@functools.cache
def available() -> bool:
    """Whether Triton can be imported."""
    try:
        _functions()
    except ImportError:
        return False
    return True


def linear(weight: Weight, bias: Tensor | None, x: Tensor) -> Tensor:
    """`x W^T + bias`, in float32 inside.

    Args:
        weight (`Weight`): With a bit mask, on the device of `x`.
        bias (`torch.Tensor`, *optional*): Shape (rows of the weight,).
        x (`torch.Tensor`): Shape (..., cols), of 1 to 8 rows.

    Returns:
        `torch.Tensor`: Shape (..., rows of the weight), of the type of `x`.
    """
    flat = x.reshape(-1, weight.cols).contiguous()
    y = flat.new_empty(len(flat), weight.rows)
    grid = (-(-weight.rows // _ROWS),)
    bias = None if bias is None else bias.to(x.dtype)
    _functions()[grid](
        flat, weight.positions, weight.values, weight.starts, bias, y, weight.rows, weight.cols, len(flat), _ROWS, _COLS
    )
    return y.view(*x.shape[:-1], weight.rows)


@functools.cache
def _functions():
    from .bit_mask import multiply

    return multiply
