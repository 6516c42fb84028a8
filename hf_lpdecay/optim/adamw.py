"""`LpAdamW`: AdamW whose weight decay can make a weight exactly zero."""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import kernels, triton_kernel
from .functional import acts, adamw_, low_precision_lp_adamw_, lp_adamw_, random_bits
from .pieces import factors_of, local, matrices_of, pieces_of


# The one-pass kernels, and with them the devices that torch has a fused AdamW for.
KERNELS = {"cpu": kernels, "cuda": triton_kernel}
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
    stochastic rounding, without which most of the decay would be lost. DTensor parameters are updated shard by shard.

    On CUDA nothing in a step waits for the device. Unless `fused` is `False`, a step may be captured in a CUDA graph,
    after one that was not: the graph then counts the steps, and follows a learning rate that is a tensor on the device.
    All other hyperparameters and plans are those of the capture, and the plans' tensors must not be freed.

    Args:
        params (`Iterable`): Parameters, or dicts that define parameter groups.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`): Learning rate, ``>= 0``; a tensor is a scalar.
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
        fused (`bool`, *optional*): `None` takes torch's fused AdamW where the decay does not act, and the one-pass
            kernel where it does: on a CPU it needs a C++ compiler, on CUDA Triton; without them there is a warning, and
            the decay follows torch's fused AdamW. `False` takes neither. `True` raises where there is no kernel. A
            ``pattern``, `s_rate`, float64 and float16 weights and tensors that are not contiguous are updated without
            the one-pass kernel in any case, in pieces of a few MB.
        stochastic_rounding (`bool`, *optional*): How bfloat16 and float16 weights are written. `None` means `True`;
            other dtypes are never rounded.
        float32_moments (`bool`, *optional*, defaults to `True`): Keep the moments of bfloat16 and float16 weights in
            float32. `False` keeps them in bfloat16 for bfloat16 weights, which saves 4 bytes per weight.

    Raises:
        ValueError: If a hyperparameter is out of range, or a parameter is complex.
        RuntimeError: If a gradient is sparse, or `fused=True` meets a device without a kernel, or neither a C++
            compiler nor Triton.

    Example:

    ```python
    >>> optimizer = LpAdamW(model.parameters(), lr=1e-3, p=0.5, lp_lambda=1e-3)
    ```
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
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
        float32_moments: bool = True,
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
            "float32_moments": float32_moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking its hyperparameters."""
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                raise ValueError(f"LpAdamW takes real parameters, got one of dtype {param.dtype}.")
            if param.dtype == torch.float16 and not group["float32_moments"]:
                raise ValueError("float16 cannot hold the squares of small gradients: leave float32_moments at True.")
        for device in {param.device for param in group["params"]} if group["fused"] else ():
            kernel = KERNELS.get(device.type)
            if kernel is not None:  # otherwise the step will raise
                kernel.build(kernel.any_case(device))  # raises if it can't be had

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
        batches = {device: kernel.Batch() for device, kernel in KERNELS.items()}
        for group in self.param_groups:
            # Parameters that only AdamW acts on, without and with torch's fused kernel.
            plain: tuple[list, list] = ([], [])
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, batches, plain)
            for tensors, fused in zip(plain, (False, True)):
                if tensors:
                    adamw_(tensors, group, fused)
        for batch in batches.values():
            batch.run()
        return loss

    def _update(self, param: Tensor, group: dict[str, Any], batches: dict[str, Any], plain: tuple[list, list]) -> None:
        """Update a parameter, or put it on one of the lists of what is updated together."""
        if param.grad.is_sparse:
            raise RuntimeError("LpAdamW does not take sparse gradients; make the embedding with sparse=False.")
        fused = group["fused"]
        if fused is None:
            fused = param.device.type in KERNELS
        elif fused and param.device.type not in KERNELS:
            raise RuntimeError(f"fused=True has no kernel for a parameter on {param.device}; leave it at None.")
        low_precision = param.dtype in _LOW_PRECISION
        lr = group["lr"]
        # Asking for the value of a tensor on another device would wait for it.
        lr = lr if torch.is_tensor(lr) and lr.device.type != "cpu" else float(lr)
        state = self.state[param]
        lp_lambda = state.get("lp_lambda", group["lp_lambda"])
        decays = acts(lr, lp_lambda)
        freeze_zeros = group["freeze_zeros"] or state.get("lp_freeze_zeros", False)
        if "step" not in state:
            moment_dtype = torch.float32 if low_precision and group["float32_moments"] else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=_counted_on(param, group))
            state["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
        step = state["step"]
        tensors = tuple(map(local, (param, param.grad, state["exp_avg"], state["exp_avg_sq"])))
        # Fused kernels read memory in a row, whatever the strides, and the number of steps beside the weights.
        fused = fused and step.device == param.device and all(tensor.is_contiguous() for tensor in tensors)
        if not (decays or freeze_zeros or low_precision):
            plain[fused].append((*tensors, step))
            return
        options = {
            "lr": lr,
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "p": group["p"],
            "lp_lambda": lp_lambda,
            "freeze_zeros": freeze_zeros,
            "post_step": group["post_step"],
            "threshold": state.get("lp_threshold"),
        }
        factors, by_unit = factors_of(state, tensors[0]) if decays else (None, False)
        # Drawn on the CPU, from torch's global generator.
        stochastic = low_precision and group["stochastic_rounding"] is not False
        seed = int(torch.randint(1 << 32, (), device="cpu")) if stochastic else None
        eager_only = decays and (group["s_rate"] < 1 or "pattern" in group or by_unit)
        kernel = KERNELS[param.device.type] if fused and not eager_only else None
        parts = [] if kernel is None else matrices_of(tensors, factors)
        if parts and all(kernel.covers(part, its_factors, group["p"]) for part, its_factors, _ in parts):
            case = kernel.case_for(*parts[0][:2], options)
            if kernel.available(case):
                steps = [*(step.clone() for _ in parts[1:]), step]  # each counts its own
                for (part, its_factors, offset), its_step in zip(parts, steps):
                    its_seed = None if seed is None else (seed + offset) % (1 << 32)
                    batches[param.device.type].add(case, part, its_step, options, its_seed, its_factors)
                return
        if decays and group["s_rate"] < 1:
            if "lp_s" not in state:  # below zero: not set yet
                s_dtype = torch.float32 if low_precision else param.dtype
                state["lp_s"] = torch.full_like(param, -1.0, dtype=s_dtype, memory_format=torch.preserve_format)
            tensors += (local(state["lp_s"]),)
        options.update(
            pattern=group.get("pattern"),
            dim=state.get("lp_dim", 1),
            s_rate=group["s_rate"],
            by_unit=by_unit,
            fused=fused,
        )
        update = low_precision_lp_adamw_ if low_precision else lp_adamw_
        for pieces, (row, col), offset in pieces_of(tensors, factors, state.get("lp_rows", 1), group.get("pattern")):
            if low_precision:
                options["bits"] = None if seed is None else random_bits(pieces[0].numel(), seed, offset, param.device)
            update(*pieces[:4], step.clone(), *pieces[4:], row=row, col=col, **options)
        step += 1

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
        float32_moments = {param: group["float32_moments"] for group in self.param_groups for param in group["params"]}
        for saved_id, param in zip(saved_ids, params):
            if param.dtype in _LOW_PRECISION and saved_id in state_dict["state"]:
                for name, value in state_dict["state"][saved_id].items():
                    if torch.is_tensor(value) and name != "step":
                        kept = name in ("exp_avg", "exp_avg_sq") and not float32_moments[param]
                        dtype = param.dtype if kept else torch.float32
                        self.state[param][name] = value.detach().to(param.device, dtype, copy=True)
        keep_dtypes_of_plans(self, state_dict)
        # The base class leaves the numbers of steps where the checkpoint was read to.
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if "step" in state:
                    state["step"] = state["step"].to(_counted_on(param, group), torch.float32)


def keep_dtypes_of_plans(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a controller's plans once more, with their own dtypes: an optimizer casts its state to the parameters'.

    Args:
        optimizer (`torch.optim.Optimizer`): Has loaded `state_dict`.
        state_dict (`dict`): As returned by `state_dict()`.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    copies: dict[int, Tensor] = {}  # layers with the same input share a Hessian
    for saved_id, param in zip(saved_ids, params):
        for name, value in state_dict["state"].get(saved_id, {}).items():
            if str(name).startswith("lp_") and torch.is_tensor(value) and name != "lp_s":  # that is a moment
                if id(value) not in copies:
                    copies[id(value)] = value.detach().to(param.device, copy=True)
                optimizer.state[param][name] = copies[id(value)]


def _counted_on(param: Tensor, group: dict[str, Any]) -> torch.device | str:
    """Where the steps of a parameter are counted: fused kernels read it, others ask for its value."""
    return param.device if group["fused"] is not False and param.device.type in KERNELS else "cpu"


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "lp_lambda"):
        check_number(name, group[name])
    for beta in group["betas"]:
        if not is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"Invalid beta in betas: {beta} - should be >= 0 and < 1.")
    check_p(group["p"])
    if not is_number(group["s_rate"]) or not 0 < group["s_rate"] <= 1:
        raise ValueError(f"Invalid s_rate: {group['s_rate']!r} - should be > 0 and <= 1; 1 is no s-dynamics.")


def check_number(name: str, value: Any) -> None:
    """Raise a `ValueError` that names `name` if `value` is not a finite number ``>= 0``, or a tensor of one."""
    if torch.is_tensor(value):
        value = value.item()
    if not is_number(value) or value < 0:
        raise ValueError(f"Invalid {name}: {value} - should be a finite number >= 0.")


def check_p(p: Any) -> None:
    """Raise a `ValueError` if `p` is not a finite number."""
    if not is_number(p):
        raise ValueError(f"Invalid p: {p!r} - should be a finite number, such as 0.5.")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number (`True` and `False` are not)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
