"""`LpAdamW`: AdamW whose weight decay can make a weight exactly zero."""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .functional import lp_adamw_, stochastic_round


# Elements that are updated at a time: the scratch stays at a few MB whatever the size of the model.
CHUNK = 1 << 20

_FUSED_DEVICES = ("cpu", "cuda")
_LOW_PRECISION = (torch.bfloat16, torch.float16)
# What a checkpoint's groups do not decide: options that only torch.optim.AdamW has, and the choice of a kernel.
_NOT_LOADED = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay", "fused")


class LpAdamW(torch.optim.Optimizer):
    r"""AdamW with the decoupled p-norm weight decay of arXiv 2404.10824.

    With ``w_hat`` the weight after AdamW's own step, ``w' = w_hat / (1 + lr * lp_lambda * |w| ** (p - 2))``. For
    ``p < 1`` small weights become exactly zero within a few steps and stay there, since zero absorbs under any
    ``p < 2``. With ``lp_lambda=0`` this is `torch.optim.AdamW`, and its checkpoints can be loaded.

    Parameters without a gradient are left alone. Every hyperparameter lives in `param_groups`. A parameter may carry
    a plan of its own in its state, which [`~hf_lpdecay.sparsity.SparsityController`] writes: ``lp_lambda`` (in place
    of the group's), ``lp_freeze_zeros`` (beside the group's), ``lp_threshold`` (weights not below it are exempt),
    ``lp_row`` and ``lp_col`` (importance), ``lp_size`` (sizes of the units that the weights belong to, in place of
    their own), and for the pattern, if its group has a ``pattern``, ``lp_dim`` (the dimension of the input features)
    and ``lp_rows`` (how many rows must be seen together).

    bfloat16 and float16 weights are updated in float32 (moments are kept in float32 too) and written back with
    stochastic rounding, without which most of the decay would be lost.

    Args:
        params (`Iterable`): Parameters, or dicts that define parameter groups.
        lr (`float`, *optional*, defaults to `1e-3`): Learning rate, ``>= 0``.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Averaging of the moments, in ``[0, 1)``.
        eps (`float`, *optional*, defaults to `1e-8`): Added to AdamW's denominator.
        weight_decay (`float`, *optional*, defaults to `0.0`): AdamW's ordinary decoupled decay (L2), which adds to
            the p-norm's.
        p (`float`, *optional*, defaults to `0.8`): The norm. ``p <= 0`` is accepted, beyond the paper.
        lp_lambda (`float`, *optional*, defaults to `0.0`): Strength ``>= 0``, in the paper's convention.
        freeze_zeros (`bool`, *optional*, defaults to `False`): Keep every exact zero at zero, at any `lp_lambda`.
        post_step (`bool`, *optional*, defaults to `False`): Take the size of a weight after AdamW's step instead of
            before it. Zero does not absorb then: combine it with `freeze_zeros`.
        s_rate (`float`, *optional*, defaults to `1.0`): The s-dynamics of the paper: with a rate in (0, 1) the weight
            is divided by ``1 + lr * lp_lambda / s``, where ``s`` starts as ``|w| ** (2 - p)`` and, at the beginning
            of each decay, moves towards it: ``s += s_rate * (|w| ** (2 - p) - s)``. A state tensor ``lp_s`` for each
            parameter, and zero does not absorb. At 1 ``s`` is ``|w| ** (2 - p)``, and no state is kept.
        fused (`bool`, *optional*): Whether torch's fused AdamW kernel does the AdamW part. `None` uses it on a CPU or
            CUDA device; `True` raises where there is none. Tensors that are not contiguous go without.
        stochastic_rounding (`bool`, *optional*): How bfloat16 and float16 weights are written. `None` means `True`;
            other dtypes are never rounded.

    Raises:
        ValueError: If a hyperparameter is out of range, or a parameter is complex.
        RuntimeError: If a gradient is sparse, or `fused=True` meets a device that has no fused kernel.

    Example:

    ```python
    >>> optimizer = LpAdamW(model.parameters(), lr=1e-3, p=0.5, lp_lambda=1e-3)
    ```
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        p: float = 0.8,
        lp_lambda: float = 0.0,
        freeze_zeros: bool = False,
        post_step: bool = False,
        s_rate: float = 1.0,
        fused: bool | None = None,
        stochastic_rounding: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "p": p,
            "lp_lambda": lp_lambda,
            "freeze_zeros": freeze_zeros,
            "post_step": post_step,
            "s_rate": s_rate,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking its hyperparameters."""
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                raise ValueError(f"LpAdamW takes real parameters, got one of dtype {param.dtype}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure (`Callable`, *optional*): Re-evaluates the model and returns the loss.

        Returns:
            What `closure` returned, or `None`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        if param.grad.is_sparse:
            raise RuntimeError("LpAdamW does not take sparse gradients; make the embedding with sparse=False.")
        fused = group["fused"]
        if fused is None:
            fused = param.device.type in _FUSED_DEVICES
        elif fused and param.device.type not in _FUSED_DEVICES:
            raise RuntimeError(f"fused=True has no kernel for a parameter on {param.device}; leave it at None.")
        state = self.state[param]
        if "step" not in state:
            moment_dtype = torch.float32 if param.dtype in _LOW_PRECISION else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)

        lr = float(group["lr"])
        lp_lambda = state.get("lp_lambda", group["lp_lambda"])
        freeze_zeros = group["freeze_zeros"] or state.get("lp_freeze_zeros", False)
        pattern = group.get("pattern")
        if group["s_rate"] < 1 and lr > 0 and lp_lambda > 0 and "lp_s" not in state:
            # Below zero: not set yet.
            state["lp_s"] = torch.full_like(state["exp_avg"], -1.0)
        tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        if group["s_rate"] < 1 and "lp_s" in state:
            tensors += (state["lp_s"],)
        contiguous = all(tensor.is_contiguous() for tensor in tensors)
        hyperparameters = {
            "lr": lr,
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "p": group["p"],
            "lp_lambda": lp_lambda,
            "freeze_zeros": freeze_zeros,
            "post_step": group["post_step"],
            "s_rate": group["s_rate"],
            "threshold": state.get("lp_threshold"),
            "pattern": pattern,
            "dim": state.get("lp_dim", 1),
            "fused": fused and contiguous,  # the fused kernel reads memory in a row, whatever the strides
        }
        if param.dtype in _LOW_PRECISION:
            rounding = group["stochastic_rounding"] is not False
            for pieces, factors in _chunks(tensors, state, contiguous and pattern is None):
                weight = pieces[0].float()
                grad, exp_avg, exp_avg_sq, *s = pieces[1:]
                moments = (exp_avg, exp_avg_sq, state["step"].clone(), *s)
                lp_adamw_(weight, grad.float(), *moments, **factors, **hyperparameters)
                pieces[0].copy_(stochastic_round(weight, param.dtype) if rounding else weight)
            state["step"] += 1
        elif (lr > 0 and lp_lambda > 0) or freeze_zeros:
            for pieces, factors in _chunks(tensors, state, contiguous and pattern is None):
                moments = (*pieces[2:4], state["step"].clone(), *pieces[4:])
                lp_adamw_(*pieces[:2], *moments, **factors, **hyperparameters)
            state["step"] += 1
        else:  # nothing but AdamW, which needs no scratch
            lp_adamw_(*tensors[:4], state["step"], **hyperparameters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load an optimizer state, from this class or from `torch.optim.AdamW`.

        What a `torch.optim.AdamW` checkpoint does not say (`p`, `lp_lambda`, ...) keeps its present value, and
        so does `fused`.

        Args:
            state_dict (`dict`): As returned by `state_dict()`.

        Raises:
            ValueError: If the groups don't match, or the state was made with `amsgrad` or `maximize`.
        """
        saved_groups = state_dict["param_groups"]
        for option in ("amsgrad", "maximize"):
            if any(saved.get(option) for saved in saved_groups):
                raise ValueError(f"This state was made with {option}=True, which LpAdamW does not have.")
        if len(saved_groups) == len(self.param_groups):  # otherwise let the base class say so
            saved_groups = [
                {
                    **current,
                    **{name: value for name, value in saved.items() if name not in _NOT_LOADED},
                }
                for current, saved in zip(self.param_groups, saved_groups)
            ]
        super().load_state_dict({**state_dict, "param_groups": saved_groups})
        # The base class casts state to the parameter's dtype, which would round float32 moments to bfloat16.
        saved_ids = [i for saved in saved_groups for i in saved["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params):
            if param.dtype in _LOW_PRECISION and saved_id in state_dict["state"]:
                for name, value in state_dict["state"][saved_id].items():
                    if torch.is_tensor(value) and name != "step":
                        self.state[param][name] = value.detach().to(param.device, torch.float32, copy=True)


def _chunks(tensors: tuple[Tensor, ...], state: dict[str, Any], flat: bool):
    """Split equally shaped tensors into pieces of about `CHUNK` elements, with what broadcasts over each piece."""
    factors = {name: state[f"lp_{name}"] for name in ("row", "col", "size") if f"lp_{name}" in state}
    shape = tensors[0].shape
    if flat and not factors:
        for pieces in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors)):
            yield pieces, factors
    elif len(shape) < 2:
        yield tensors, factors
    else:  # whole rows, so that the factors of the columns and the groups of a pattern fit each piece
        unit = state.get("lp_rows", 1)
        rows = max(1, CHUNK // (tensors[0].numel() // shape[0] or 1) // unit) * unit
        for start, *pieces in zip(range(0, shape[0], rows), *(tensor.split(rows) for tensor in tensors)):
            own = {n: f[start : start + rows] if f.shape[0] == shape[0] else f for n, f in factors.items()}
            yield pieces, own


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "lp_lambda"):
        value = group[name]
        if torch.is_tensor(value):
            value = value.item()
        if not is_number(value) or value < 0:
            raise ValueError(f"Invalid {name}: {value} - should be a finite number >= 0.")
    for beta in group["betas"]:
        if not is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"Invalid beta in betas: {beta} - should be >= 0 and < 1.")
    if not is_number(group["p"]):
        raise ValueError(f"Invalid p: {group['p']!r} - should be a finite number, such as 0.5.")
    if not is_number(group["s_rate"]) or not 0 < group["s_rate"] <= 1:
        raise ValueError(f"Invalid s_rate: {group['s_rate']!r} - should be > 0 and <= 1; 1 is no s-dynamics.")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number (`True` and `False` are not)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
