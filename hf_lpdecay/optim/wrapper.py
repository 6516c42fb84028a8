"""`LpDecay`: the p-norm decay around any other optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .adamw import check_number, check_p, keep_dtypes_of_plans
from .decay import LOW_PRECISION, Batches, decay_stepped_, options_of, prepare_decay
from .functional import acts
from .pieces import local


# Weights that are kept at a time: 4 MB in float32, which may stay in the cache beside all that is stepped with them.
KEPT = 1 << 20


class LpDecay(torch.optim.Optimizer):
    r"""The decoupled p-norm weight decay of arXiv 2404.10824 around another optimizer.

    With ``w`` a weight before the step and ``w_hat`` the one after the step of the optimizer inside,
    ``w' = w_hat / (1 + lr * lp_lambda * |w| ** (p - 2))``, as in [`LpAdamW`], whose kernel is faster: take that for
    AdamW. Groups and state are those of the optimizer inside, with this one's options and the plan of a
    [`~hf_lpdecay.sparsity.SparsityController`] in them; schedulers and `accelerate` are given the wrapper.

    What ``w_hat`` will be divided by, or ``w`` itself where there is no kernel to work that out, must be kept while the
    optimizer inside steps. The optimizers of `torch.optim` step each parameter for itself, so they are given a part of
    the parameters at a time, and what is kept is at most 4 MB or one parameter; on a CPU this buffer stays for the next
    step, since fresh memory takes ten times as long to fill. Of any other class (and of `LBFGS`, and where hooks are
    registered on the step) that is not known, and as much as the decayed weights is kept in each step. With `post_step`
    alone nothing is kept.

    Args:
        optimizer (`torch.optim.Optimizer`): Steps first. Its own weight decay adds up with this one.
        p (`float`, *optional*, defaults to `0.8`): The norm, see [`LpAdamW`].
        lp_lambda (`float`, *optional*, defaults to `0.0`): Strength ``>= 0``, in the paper's convention.
        freeze_zeros (`bool`, *optional*, defaults to `False`): Keep every exact zero at zero, at any `lp_lambda`.
        post_step (`bool`, *optional*, defaults to `False`): Take the size of a weight after the step. Zero does not
            absorb then: combine it with `freeze_zeros`.

    Raises:
        ValueError: If a hyperparameter is out of range, a parameter is complex, or a group has no learning rate.
        RuntimeError: If a gradient is sparse.

    Example:

    ```python
    >>> optimizer = LpDecay(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), p=0.5, lp_lambda=1e-3)
    ```
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        p: float = 0.8,
        lp_lambda: float = 0.0,
        freeze_zeros: bool = False,
        post_step: bool = False,
    ):
        options = {"p": p, "lp_lambda": lp_lambda, "freeze_zeros": freeze_zeros, "post_step": post_step}
        # Not the base class's __init__, which would make groups and a state of its own; this makes the hooks.
        self.__setstate__({"optimizer": optimizer})
        # With the defaults, groups that are added later get them.
        optimizer.defaults.update(options)
        for group in optimizer.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
            _check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # For each dtype the buffer of `_buffer`, and how much of it this part of the parameters uses.
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    def __repr__(self) -> str:
        return f"LpDecay({self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking this class's hyperparameters in it."""
        _check_group({**self.defaults, **param_group})
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, with this class's options in the groups."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, from this class or from a plain optimizer of the class inside.

        Options that the state does not hold keep their present value.

        Args:
            state_dict (`dict`): As returned by `state_dict()`.
        """
        names = ("p", "lp_lambda", "freeze_zeros", "post_step")
        present = [{name: group[name] for name in names} for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        keep_dtypes_of_plans(self.optimizer, state_dict)
        for group, options in zip(self.param_groups, present):
            for name, value in options.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer inside, then decay.

        Args:
            closure (`Callable`, *optional*): Re-evaluates the model and returns the loss.

        Returns:
            What `closure` returned, or `None`.
        """
        alone = self._steps_each_alone()
        loss = None
        if alone and closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._without_plans() as plans:
            if not alone:
                batches = Batches()
                wanted = [(param, group) for group in self.param_groups for param in group["params"]]
                if closure is None:
                    wanted = [(param, group) for param, group in wanted if param.grad is not None]
                # Which parameters a closure will give a gradient is not known before the step.
                ahead = batches if closure is None else None
                kept = [self._prepare(param, group, plans, ahead, _new) for param, group in wanted]
                self._copy(kept, _new)
                batches.run()
                with torch.enable_grad():
                    loss = self.optimizer.step(closure)
                self._decay(kept, batches)
            else:
                prepared = []  # all at once, while Python's own memory is in the cache
                for group, params in self._parts():
                    self._used, batches = {}, Batches()
                    kept = [self._prepare(param, group, plans, batches, self._buffer) for param in params]
                    prepared.append((group, params, batches, kept, self._used))
                for group, params, batches, kept, self._used in prepared:
                    self._copy(kept, self._buffer)
                    batches.run()
                    with _only(self.optimizer, group, params):
                        self.optimizer.step()
                    self._decay(kept, batches)
        return loss

    def _steps_each_alone(self) -> bool:
        inside = self.optimizer
        return (
            type(inside).__module__.startswith("torch.optim.")
            and not isinstance(inside, torch.optim.LBFGS)
            and not inside._optimizer_step_pre_hooks
            and not inside._optimizer_step_post_hooks
        )

    def _parts(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters that have gradients, of one group and about `KEPT` elements at a time."""
        for group in list(self.param_groups):
            params, numel = [], 0
            for param in list(group["params"]):
                if param.grad is None:
                    continue
                size = local(param).numel()
                if params and numel + size > KEPT:
                    yield group, params
                    params, numel = [], 0
                params.append(param)
                numel += size
            if params:
                yield group, params

    @contextmanager
    def _without_plans(self) -> Iterator[dict[Tensor, dict[str, Any]]]:
        """Take the plans out of the state, since an optimizer whose state is not empty believes it has been set up."""
        plans = {}
        for param, state in list(self.state.items()):
            plan = {name: state.pop(name) for name in list(state) if str(name).startswith("lp_")}
            if plan:
                plans[param] = plan
                if not state:
                    del self.state[param]
        try:
            yield plans
        finally:
            for param, plan in plans.items():
                self.state[param].update(plan)

    def _buffer(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor like a weight: on a CPU in a buffer, which the next part of the parameters uses again."""
        if weight.device.type != "cpu":  # its allocator keeps what is freed
            return _new(weight, dtype)
        used = self._used.get(dtype, 0)
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < used + weight.numel():
            # What lies in the old one stays alive there.
            buffer = self._buffers[dtype] = weight.new_empty(max(KEPT, used + weight.numel()), dtype=dtype)
        self._used[dtype] = used + weight.numel()
        return buffer[used : used + weight.numel()].view(weight.shape)

    def _prepare(
        self,
        param: Tensor,
        group: dict[str, Any],
        plans: dict[Tensor, dict[str, Any]],
        batches: Batches | None,
        room: Callable[[Tensor, torch.dtype], Tensor],
    ) -> dict[str, Any] | None:
        """Have a parameter's decay prepared in `batches`; what it needs otherwise, where that is not possible."""
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError("LpDecay does not take sparse gradients; make the embedding with sparse=False.")
        plan, lr = plans.get(param, {}), group["lr"]
        # Asking for the value of a tensor on another device would wait for it.
        lr = lr if torch.is_tensor(lr) and lr.device.type != "cpu" else float(lr)
        options = options_of(group, plan, lr)
        decays = acts(lr, options["lp_lambda"])
        if not (decays or options["freeze_zeros"]):
            return None
        weight, pattern = local(param), group.get("pattern")
        seed = int(torch.randint(1 << 32, (), device="cpu")) if param.dtype in LOW_PRECISION else None
        if batches is not None and prepare_decay(weight, plan, options, pattern, seed, batches, room):
            return None
        return {"param": param, "plan": plan, "options": options, "pattern": pattern, "seed": seed}

    def _copy(self, kept: list[dict[str, Any] | None], room: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        """Keep the weights from before the step where their decay needs them."""
        for this in filter(None, kept):
            weight = this["before"] = local(this["param"])
            if this["options"]["freeze_zeros"] or not this["options"]["post_step"]:
                this["before"] = room(weight, weight.dtype).copy_(weight)

    def _decay(self, kept: list[dict[str, Any] | None], batches: Batches) -> None:
        batches.apply()
        later = Batches()
        for this in filter(None, kept):
            if this["param"].grad is not None:
                weight, before = local(this["param"]), this["before"]
                decay_stepped_(weight, before, this["plan"], this["options"], this["pattern"], this["seed"], later)
        later.run()


def _new(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@contextmanager
def _only(optimizer: torch.optim.Optimizer, group: dict[str, Any], params: list[Tensor]) -> Iterator[None]:
    """Let an optimizer see nothing but some parameters of one group."""
    groups, all_params = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], params
    try:
        yield
    finally:
        optimizer.param_groups, group["params"] = groups, all_params


def _check_group(group: dict[str, Any]) -> None:
    check_number("lp_lambda", group["lp_lambda"])
    check_p(group["p"])
    if group.get("lr", 0) is None:
        raise ValueError("LpDecay needs a learning rate, got lr=None: give the optimizer inside one.")
    params = group["params"]
    for param in [params] if torch.is_tensor(params) else params:
        if torch.is_tensor(param) and param.is_complex():
            raise ValueError(f"LpDecay takes real parameters, got one of dtype {param.dtype}.")
