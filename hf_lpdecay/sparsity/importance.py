"""Importance of weights: factors ``h`` over the rows and columns of each tensor, for the scores ``r = |w| * h``.

Kept as `lp_row` and `lp_col` in the optimizer's state, where plan and step read them.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from .sharding import placed_like, whole


logger = logging.get_logger(__name__)

# The second moment of Adam, RMSprop and Adagrad in the optimizer's state.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
_BNB_BLOCK = 256
LEAST_FACTOR = 1e-10
# What is collected by hooks on the layers, before the ramp.
FROM_HOOKS = ("activation", "fisher")


def importance_from_adam(params: list[Tensor], state: dict, together: bool) -> None:
    """Factor AdamW's second moment, the expected squared gradient, into rows and columns.

    ``h = sqrt(row mean * column mean) / mean`` estimates the root of the second moment from far fewer numbers than it
    has, as Adafactor does (arXiv 1804.04235); ``(|w| * h) ** 2`` is then the optimal brain damage saliency of a weight
    with the empirical Fisher for the curvature.

    Args:
        params (`list[torch.Tensor]`): The selected weights.
        state (`dict`): The optimizer's.
        together (`bool`): Whether the weights of different tensors are compared, or only those within each.
    """
    means = {}
    for param in params:
        of_param = state[param]
        if "exp_avg_sq_row" in of_param:  # Adafactor's is factored already
            means[param] = of_param["exp_avg_sq_row"].unsqueeze(-1), of_param["exp_avg_sq_col"].unsqueeze(-2)
        elif (moment := second_moment(of_param)) is not None:
            means[param] = whole(moment.mean(-1, keepdim=True)), whole(moment.mean(-2, keepdim=True))
    write_factors(means, state, together)


def second_moment(state: dict) -> Tensor | None:
    """The second moment in an optimizer's state of one parameter, if it is there under a name that is known.

    That of bitsandbytes' Adam is `state2`: in 8 bits it holds places in the table `qmap2`, and `absmax2` is the scale
    of each 256 of them.
    """
    if "state2" not in state:
        return next((state[name] for name in _SECOND_MOMENTS if name in state), None)
    moment = state["state2"]
    if moment.dtype != torch.uint8:
        return moment
    values = state["qmap2"][moment.flatten().int()]
    return (values * state["absmax2"].repeat_interleave(_BNB_BLOCK)[: moment.numel()]).view(moment.shape)


def importance_from_calibration(params: list[Tensor], state: dict, together: bool) -> None:
    """The same from the squared gradients of [`calibrate`], before AdamW's second moment says much."""
    means = {param: (state[param]["lp_row_sq"], state[param]["lp_col_sq"]) for param in params}
    write_factors(means, state, together)


def importance_from_activations(dims: dict[Tensor, int], state: dict, together: bool) -> None:
    """``h`` is the root mean square of a weight's input feature, as in Wanda (arXiv 2306.11695).

    Where the gradients of the outputs were collected it is times that of its output feature's gradient: the square is
    then the diagonal of the Fisher information's Kronecker factors (K-FAC, arXiv 1503.05671), and ``(|w| * h) ** 2`` a
    saliency that can be compared between layers, without a gradient of any weight.

    Args:
        dims (`dict[torch.Tensor, int]`): The selected weights, and the dimension of the input features of each.
        state (`dict`): The optimizer's.
        together (`bool`): Whether the weights of different tensors are compared, or only those within each.
    """
    means = {}
    for param in dims:
        if "lp_feature_sq" in state[param]:
            count = state[param]["lp_feature_count"]
            if torch.is_tensor(count):  # one for each expert
                count = count.masked_fill(count == 0, 1.0)[:, None]
            square = state[param]["lp_feature_sq"] / count
            outputs = state[param].get("lp_output_sq")
            if outputs is None:  # every output feature has the same share
                outputs = square.mean(-1, keepdim=True).expand(*square.shape[:-1], param.shape[-2:][1 - dims[param]])
            else:
                outputs, square = outputs * square.mean(), square * outputs.mean()
            rows, columns = (outputs, square) if dims[param] == 1 else (square, outputs)
            dtype = torch.promote_types(param.dtype, torch.float32)  # float16 could not hold the squares
            means[param] = rows.unsqueeze(-1).to(dtype), columns.unsqueeze(-2).to(dtype)
    write_factors(means, state, together)


def write_factors(means: dict[Tensor, tuple[Tensor, Tensor]], state: dict, together: bool) -> None:
    """From the mean squares of rows (n, 1) and columns (1, m) to the factors.

    The factors are relative to the mean square of the tensor or, where tensors are compared, of all of them. Tensors
    without statistics are ranked by magnitude.

    Args:
        means (`dict[torch.Tensor, tuple]`): Mean squares by weight; of experts (e, n, 1) and (e, 1, m).
        state (`dict`): Where the factors go, by weight.
        together (`bool`): Whether the weights of different tensors are compared.

    Raises:
        RuntimeError: If there are no statistics at all.
    """
    if not means:
        raise RuntimeError(
            "The importance found no statistics of any selected weight: an optimizer without a second moment has none"
            " for importance='adam', and a model whose layers are not called has none of their features. Take"
            " importance='magnitude', or another of them."
        )
    seen = {param: mean for param, (rows, _) in means.items() if (mean := rows.mean()) > 0}
    if together:
        total = sum(mean * param.numel() for param, mean in seen.items())
        units = dict.fromkeys(seen, total / max(1, sum(param.numel() for param in seen)))
    else:
        units = seen
    for param, unit in units.items():
        rows, columns = means[param]
        own = seen[param]
        if param.dim() == 3:  # an expert without a token is ranked by magnitude
            own = rows.mean(-2, keepdim=True)
            unused = own == 0
            rows, columns = rows.masked_fill(unused, 1.0), columns.masked_fill(unused, 1.0)
            rows, own = torch.where(unused, unit, rows), own.masked_fill(unused, 1.0)
            if unused.any():
                logger.warning_once(
                    f"{int(unused.sum())} of {len(unused)} experts got no token before a plan was made; their weights"
                    " are ranked by magnitude."
                )
        # Not zero, as the weights of a feature that is never used would be taken for those that are pruned.
        state[param]["lp_row"] = placed_like((rows / unit).sqrt().clamp_(min=LEAST_FACTOR), param)
        state[param]["lp_col"] = placed_like((columns / own).sqrt().clamp_(min=LEAST_FACTOR), param)
