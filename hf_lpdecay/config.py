"""`LpDecayConfig`: every knob of the method, checked where it is made."""

from dataclasses import dataclass, field
from typing import Literal

from .optim.adamw import is_number
from .sparsity.patterns import SemiStructured, Structured, parse_pattern
from .sparsity.schedule import RAMP_END


@dataclass
class LpDecayConfig:
    r"""How a model is made sparse in training.

    Give either `target_sparsity` (the strength is then planned, and the target hit exactly) or `lp_lambda` (the plain
    method of arXiv 2404.10824: constant strength, whatever sparsity comes of it), or `freeze_zeros=True` alone to
    fine-tune a model that is sparse already.

    With a target, training has three phases: dense, until `ramp_start` and the end of the learning rate's warm-up; the
    ramp, in which the weights of the smallest scores decay to zero along a cubic schedule (Zhu and Gupta, arXiv
    1710.01878); and from `ramp_end` on the recovery phase, with exactly the target sparsity and frozen zeros.

    Args:
        p (`float`, *optional*, defaults to `0.5`): The norm. Below 1 small weights become exactly zero. Must be below
            2 with a target. ``p <= 0`` is accepted, beyond the paper, and comes ever closer to a hard cut.
        p_start (`float`, *optional*): The norm at the start of the ramp, interpolated linearly to `p` at its end.
            Must be below 2 with a target.
        lp_lambda (`float`, *optional*): Strength of the decay, ``>= 0``, in the paper's convention; the authors' code
            has ``p * lambda`` in its place.
        lp_lambda_schedule (`str`, *optional*, defaults to `"constant"`): Whether `lp_lambda` holds throughout, or
            rises from zero over the ramp: `"linear"` or `"cubic"` (fast at first). With a target the strength is
            planned instead.
        post_step (`bool`, *optional*, defaults to `False`): Take a weight's size after AdamW's step, not before it.
        s_rate (`float`, *optional*, defaults to `1.0`): The paper's s-dynamics: the decay divides by an average of
            ``r ** (2 - p)`` with this rate, in (0, 1], instead of its present value. Below 1 it costs a state tensor.
        target_sparsity (`float`, *optional*): Fraction of the selected weights that shall be zero, in (0, 1).
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Which modules take part, as PEFT
            spells it: a list of name suffixes, a string that is a regular expression for the whole name, or
            `"all-linear"`: every linear layer, those of experts included, but the output head and routers. Experts'
            3-D parameters go by their own names, such as `"experts.gate_up_proj"`. Embeddings, norms and biases never
            take part, except an embedding that is tied to a head which is named: take `importance="activation"` then,
            since the others take the rows of rare tokens as a whole, from which no gradient recovers.
        exclude_modules (`list[str]` or `str`, *optional*): Which of them do not, spelt alike.
        pattern (`str`, *optional*, defaults to `"unstructured"`): What is pruned: single weights; `"n:m"`, such as
            `"2:4"`: n of any m consecutive weights along the input features remain, which implies the target;
            `"block:RxC"`: tiles of R output and C input features; `"neurons"`: the rows and the column of a
            feed-forward's hidden unit; `"heads"`: the rows and columns of an attention head, or those of a key/value
            group and its query heads; `"rank"`: a row of LoRA's A and the column of its B. The target is then the
            fraction of the tiles, of the neurons or heads of each layer (of the neurons of each expert), or of the
            ranks. All but the first need a target.
        require_shrinkable (`bool`, *optional*, defaults to `True`): Refuse `"neurons"` and `"heads"` before the first
            step where [`shrink`] could not cut them out. `False` trains zeros in this pattern for their own sake.
        scope (`str`, *optional*): `"layer"` makes every tensor equally sparse, `"global"` ranks all weights together.
            Only matters with a target. Defaults to `"global"`, and to `"layer"` with n:m, neurons and heads, and for
            the frozen base of a PEFT model with another importance than `"fisher"`.
        importance (`str`, *optional*): The score by which weights are pruned. `"magnitude"` is ``|w|``; `"adam"` is
            ``|w|`` times the root of AdamW's second moment, factored over rows and columns; `"activation"` is ``|w|``
            times the root mean square of its input feature in the batches before the ramp (as in Wanda); `"fisher"` is
            that times the root mean square of the loss's gradient at its output feature (the diagonal of K-FAC's
            factors), for weights without a gradient or a second moment. Defaults to `"adam"` with a target, to
            `"activation"` with n:m, to `"fisher"` for the frozen base of a PEFT model and for optimizers without a
            second moment, and to `"magnitude"` (the paper's, and the only choice) without a target.
        trim (`bool`, *optional*): Decay only the weights that the schedule prunes by the next plan, so that the
            remaining weights do not shrink. Defaults to `True` with a target; impossible without.
        hard_cut (`bool`, *optional*, defaults to `False`): Set the weights of each plan to zero at once instead of
            decaying them, as gradual magnitude pruning does; importance, pattern, schedule and compensation stay. It
            is the limit ``p -> -inf``, so that `p`, `p_start`, `post_step`, `s_rate` and `trim` have no effect.
            Impossible without a target.
        mask_swaps (`int`, *optional*, defaults to `0`): Rounds in which each plan of a hard cut exchanges weights that
            it prunes for remaining ones of the same row, where the reconstructed output comes nearer (as 1-swaps, arXiv
            2512.10922, many at a time). Each costs somewhat more than `compensate` alone. Needs `hard_cut` and
            `compensate`, and single weights or n:m.
        compensate (`bool`, *optional*): Update the remaining weights so that their layer's output changes least while
            others are pruned: optimal brain surgeon's update, with the Hessian of the input features of the last 5
            steps before the plan. In the ramp this costs a copy of the selected weights, and
            ``4 * d * min(d, 2048)`` bytes for each input of ``d`` features. Defaults to `True` with a target, except
            under DeepSpeed, where it is impossible, and `torch.compile`, where it has the model compiled several times;
            impossible without a target.
        hessians_on_cpu (`bool`, *optional*, defaults to `False`): Hold the Hessians of `compensate` in CPU memory. In
            each of the 5 steps before a plan a GPU then sends as much as they are large.
        calibration_batches (`int`, *optional*): Calibration batches, passed through the model before
            the first step: their gradients serve the `"adam"` and `"fisher"` importance, their features the
            `"activation"` and `"fisher"` importance and `compensate`. The ramp can then begin with the training.
            Otherwise it begins after the learning rate's warm-up, and not before step 5 where the importance needs some
            batches. Defaults to 64 with n:m and `importance="activation"`, else to 0.
        ramp_start (`float`, *optional*, defaults to `0.0`): Where the ramp starts, as a fraction of all steps. Only
            matters with a target or a schedule.
        ramp_end (`float`, *optional*): Where the ramp ends, as a fraction of all steps. Defaults to `0.7`; with n:m to
            `0.1` after `ramp_start`, but to ten steps at least and `0.7` at most.
        num_plans (`int`, *optional*): Number of plans (pruning steps) in the ramp, at most one per step. Defaults to
            20, and to 2 with n:m.
        freeze_zeros (`bool`, *optional*, defaults to `False`): Keep every weight that is exactly zero at zero, from
            the start.
        average_weights (`float`, *optional*, defaults to `0.0`): Over this fraction of all steps, the last ones, the
            mean of all trained weights is taken, with which the model ends. Meant for a learning rate that stays up to
            the end. Costs 4 bytes per trained weight from then on. At most ``1 - ramp_end``, from where zeros are
            frozen; impossible with an `lp_lambda`, under DeepSpeed and FSDP.
        embedding_learning_rate (`float`, *optional*): Learning rate of the embedding and the output head, ``>= 0``,
            scheduled like that of the others; for trainers with `LpDecayMixin` only. AdamW moves each token's row of
            the head by nearly the learning rate in every step, however small its gradient, so that a rate which is good
            for sparse layers is too high for the rows of rare tokens. A tenth of the others' is a good start.
        distill (`str`, *optional*): A dense teacher: `"self"` for the model as it was before the training, or the name
            or path of another one with the same vocabulary. Held in bfloat16; costs its memory and a forward pass.
        distill_weight (`float`, *optional*, defaults to `1.0`): The loss is the model's own plus this times the
            distance from the teacher, ``>= 0``.
        distill_temperature (`float`, *optional*, defaults to `1.0`): Of the softmax of both, ``> 0``.
        distill_hidden (`float`, *optional*, defaults to `0.0`): Weight of the hidden states' distance (SquareHead,
            arXiv 2310.06927) within the distance from the teacher, ``>= 0``.

    Raises:
        ValueError: If a value is out of range or two values contradict each other.
    """

    p: float = field(default=0.5, metadata={"help": "The norm; below 1 weights become exactly zero."})
    p_start: float | None = field(default=None, metadata={"help": "The norm at the start of the ramp, if not p."})
    lp_lambda: float | None = field(
        default=None, metadata={"help": "Constant strength of the decay (instead of target_sparsity)."}
    )
    lp_lambda_schedule: Literal["constant", "linear", "cubic"] = field(
        default="constant", metadata={"help": "Whether lp_lambda holds throughout or rises from zero over the ramp."}
    )
    post_step: bool = field(default=False, metadata={"help": "Take a weight's size after AdamW's step."})
    s_rate: float = field(default=1.0, metadata={"help": "Rate of the s-dynamics; 1 is without."})
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of the selected weights to make zero (instead of lp_lambda)."}
    )
    target_modules: list[str] | str = field(
        default="all-linear", metadata={"help": "Modules that take part: name suffixes, a regex, or 'all-linear'."}
    )
    # HfArgumentParser takes the type in front of None.
    exclude_modules: list[str] | None | str = field(  # noqa: RUF036
        default=None, metadata={"help": "Modules that do not take part, spelt like target_modules."}
    )
    pattern: str = field(
        default="unstructured",
        metadata={"help": "What is pruned: 'unstructured', 'n:m', 'block:RxC', 'neurons', 'heads' or 'rank'."},
    )
    require_shrinkable: bool = field(
        default=True, metadata={"help": "Refuse neurons and heads that shrink could not cut out."}
    )
    scope: Literal["layer", "global"] | None = field(
        default=None, metadata={"help": "Whether each tensor ('layer') or all together ('global') meet the target."}
    )
    importance: Literal["adam", "activation", "fisher", "magnitude"] | None = field(
        default=None,
        metadata={"help": "Score by which weights are pruned. Defaults to 'adam' with a target, else 'magnitude'."},
    )
    trim: bool | None = field(
        default=None, metadata={"help": "Decay only the weights that are pruned next. Defaults to True with a target."}
    )
    hard_cut: bool = field(default=False, metadata={"help": "Set weights to zero at once instead of decaying them."})
    mask_swaps: int = field(default=0, metadata={"help": "Rounds of exchanges that improve the masks of a hard cut."})
    compensate: bool | None = field(
        default=None,
        metadata={"help": "Update the remaining weights at each plan. Defaults to True with a target."},
    )
    hessians_on_cpu: bool = field(default=False, metadata={"help": "Hold the Hessians of compensate in CPU memory."})
    calibration_batches: int | None = field(
        default=None, metadata={"help": "Calibration batches for importance and compensation, before the first step."}
    )
    ramp_start: float = field(default=0.0, metadata={"help": "Start of the ramp, as a fraction of all steps."})
    ramp_end: float | None = field(default=None, metadata={"help": "End of the ramp, as a fraction of all steps."})
    num_plans: int | None = field(default=None, metadata={"help": "Number of plans (pruning steps) in the ramp."})
    freeze_zeros: bool = field(default=False, metadata={"help": "Keep every exact zero at zero from the start."})
    average_weights: float = field(
        default=0.0,
        metadata={"help": "End with the mean of the weights over this fraction of all steps, the last ones."},
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of embedding and output head; a tenth of learning_rate is good."}
    )
    distill: str | None = field(default=None, metadata={"help": "A dense teacher: 'self', or a model's name or path."})
    distill_weight: float = field(default=1.0, metadata={"help": "Weight of the distance from the teacher."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax in it."})
    distill_hidden: float = field(default=0.0, metadata={"help": "Weight of the hidden states in it (SquareHead)."})

    def __post_init__(self):
        # No field: a copy of this config is given what is resolved here.
        self.left_to_default: frozenset[str] = frozenset()
        for name in ("p", "p_start"):
            value = getattr(self, name)
            if not is_number(value) and not (value is None and name == "p_start"):
                raise ValueError(f"Invalid {name}: {value!r} - should be a finite number, such as 0.5.")
        if not is_number(self.s_rate) or not 0 < self.s_rate <= 1:
            raise ValueError(f"Invalid s_rate: {self.s_rate!r} - should be > 0 and <= 1, where 1 is no s-dynamics.")
        self._check_pattern()
        self._check_target_or_lambda()
        for name, choices in (
            ("scope", ("layer", "global", None)),
            ("importance", ("adam", "activation", "fisher", "magnitude", None)),
            ("lp_lambda_schedule", ("constant", "linear", "cubic")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Invalid {name}: {getattr(self, name)!r} - should be one of {choices}.")
        for name in ("ramp_start", "ramp_end"):
            value = getattr(self, name)
            if value is None and name == "ramp_end":
                continue
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"Invalid {name}: {value!r} - should be a fraction of all steps, between 0 and 1.")
        ramps = self.target_sparsity is not None or self.lp_lambda_schedule != "constant" or self.p_start is not None
        ramp_end = RAMP_END if self.ramp_end is None and ramps else self.ramp_end
        if ramp_end is not None and ramp_end <= self.ramp_start:
            raise ValueError(
                f"Invalid ramp: ramp_end={ramp_end}{' (the default)' if self.ramp_end is None else ''} - should be"
                f" greater than ramp_start={self.ramp_start}."
            )
        for name, least in (("num_plans", 1), ("calibration_batches", 0), ("mask_swaps", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Invalid {name}: {value!r} - should be a whole number >= {least}.")
        for name in ("distill_weight", "distill_temperature", "distill_hidden", "embedding_learning_rate"):
            value = getattr(self, name)
            if value is None and name == "embedding_learning_rate":
                continue
            if not is_number(value) or value < 0 or (value == 0 and name == "distill_temperature"):
                bound = "> 0" if name == "distill_temperature" else ">= 0"
                raise ValueError(f"Invalid {name}: {value!r} - should be a finite number {bound}.")
        for name in ("target_modules", "exclude_modules"):
            self._normalize_modules(name)
        self._check_average(0.0 if ramp_end is None else ramp_end)
        self._resolve_defaults()

    def _check_average(self, ramp_end: float):
        share = self.average_weights
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(
                f"Invalid average_weights: {share!r} - should be a fraction of all steps, between 0 and 1."
            )
        if share and self.lp_lambda:
            raise ValueError(
                f"average_weights={share} would fill zeros again that lp_lambda={self.lp_lambda} makes in these steps:"
                " give a target_sparsity, or leave it out."
            )
        if share > 1 - ramp_end + 1e-9 and self.target_sparsity is not None:
            raise ValueError(
                f"Invalid average_weights: {share} - should be at most {1 - ramp_end:g}, since the last cut is at"
                f" ramp_end={ramp_end} and weights from before it would fill zeros again."
            )

    def _check_pattern(self):
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, SemiStructured):
            if self.target_sparsity is None and self.lp_lambda is None:
                self.target_sparsity = pattern.sparsity
            if self.target_sparsity is not None and self.target_sparsity != pattern.sparsity:
                raise ValueError(
                    f"pattern={self.pattern!r} leads to a sparsity of {pattern.sparsity}, but"
                    f" target_sparsity={self.target_sparsity}: leave the target out, or take another pattern."
                )
        if self.pattern != "unstructured" and self.lp_lambda is not None:
            raise ValueError(f"pattern={self.pattern!r} needs a target_sparsity instead of lp_lambda={self.lp_lambda}.")
        if isinstance(pattern, Structured):
            if self.target_sparsity is None:
                raise ValueError(f"pattern={self.pattern!r} needs a target_sparsity, such as 0.5.")
            if self.scope == "global" and pattern.units != "rank":
                raise ValueError(
                    f"pattern={self.pattern!r} with scope='global' would leave the layers with different numbers of"
                    f" {self.pattern}, which a model's config.json cannot say: use scope='layer'."
                )

    def _check_target_or_lambda(self):
        target, lp_lambda = self.target_sparsity, self.lp_lambda
        if target is not None and lp_lambda is not None:
            raise ValueError(
                f"Both target_sparsity={target} and lp_lambda={lp_lambda} are given: with a target the strength is"
                " planned. Give only one of the two."
            )
        if target is None and lp_lambda is None:
            if not self.freeze_zeros:
                raise ValueError(
                    "Neither target_sparsity nor lp_lambda is given. Give target_sparsity, such as 0.5, to say how"
                    " sparse the model shall be, or lp_lambda for a decay of constant strength."
                )
            self.lp_lambda = 0.0
        if lp_lambda is not None and (not is_number(lp_lambda) or lp_lambda < 0):
            raise ValueError(f"Invalid lp_lambda: {lp_lambda!r} - should be a finite number >= 0.")
        if target is not None:
            if not is_number(target) or not 0 < target < 1:
                raise ValueError(
                    f"Invalid target_sparsity: {target!r} - should be a fraction between 0 and 1, such as 0.5 for half"
                    " of the weights."
                )
            for name in ("p", "p_start"):
                value = getattr(self, name)
                if value is not None and value >= 2:
                    raise ValueError(
                        f"Invalid {name}: {value} - should be below 2 with a target_sparsity, since no decay with"
                        " p >= 2 makes a weight zero. Take 0.5, or lp_lambda instead of a target."
                    )

    def _normalize_modules(self, name: str):
        value = getattr(self, name)
        if isinstance(value, (tuple, set)):
            value = sorted(value) if isinstance(value, set) else list(value)
        if name == "target_modules" and isinstance(value, list) and [str(v).lower() for v in value] == ["all-linear"]:
            value = "all-linear"  # as the command line gives it
        if isinstance(value, list) and (not value or not all(isinstance(v, str) and v for v in value)):
            raise ValueError(f"Invalid {name}: {value!r} - should be a list of module names such as ['q_proj'].")
        if not isinstance(value, (list, str)) and not (value is None and name == "exclude_modules"):
            raise ValueError(f"Invalid {name}: {value!r} - should be a list of names, a regular expression or None.")
        setattr(self, name, value)

    def _resolve_defaults(self):
        if self.target_sparsity is None:
            planned = {
                "importance": self.importance not in (None, "magnitude") and self.importance,
                "trim": self.trim,
                "hard_cut": self.hard_cut,
                "mask_swaps": self.mask_swaps,
                "compensate": self.compensate,
                "hessians_on_cpu": self.hessians_on_cpu,
                "calibration_batches": self.calibration_batches,
            }
            for name, value in planned.items():
                if value:
                    raise ValueError(
                        f"{name}={value!r} needs a target_sparsity: a decay of given strength is the paper's plain"
                        " method. Give target_sparsity instead of lp_lambda, or leave the option out."
                    )
            self.importance, self.trim, self.calibration_batches = "magnitude", False, 0
            return
        # A mask of n:m is better made early, from as many tokens as one-shot methods see.
        semi_structured = isinstance(parse_pattern(self.pattern), SemiStructured)
        self.left_to_default = frozenset(name for name in ("importance", "scope") if getattr(self, name) is None)
        defaults = {
            "scope": "layer" if semi_structured or self.pattern in ("neurons", "heads") else "global",
            "importance": "activation" if semi_structured else "adam",
            "trim": True,
            "num_plans": 2 if semi_structured else 20,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.calibration_batches is None:
            self.calibration_batches = 64 if semi_structured and self.importance == "activation" else 0
        if self.calibration_batches and self.importance == "magnitude" and self.compensate is False:
            raise ValueError(
                f"calibration_batches={self.calibration_batches} is used by importance='adam',"
                " 'activation' or 'fisher' and compensate: leave it out with importance='magnitude' and"
                " compensate=False."
            )
        if self.hessians_on_cpu and self.compensate is False:
            raise ValueError("hessians_on_cpu=True needs compensate, which alone has Hessians: leave one of them out.")
        weights = self.pattern == "unstructured" or semi_structured
        if self.mask_swaps and not (self.hard_cut and weights and self.compensate is not False):
            raise ValueError(
                f"mask_swaps={self.mask_swaps} needs hard_cut=True, compensate and single weights or n:m, but"
                f" hard_cut={self.hard_cut}, compensate={self.compensate} and pattern={self.pattern!r}: leave it out."
            )
        if self.lp_lambda_schedule != "constant":
            raise ValueError(
                f"lp_lambda_schedule={self.lp_lambda_schedule!r} needs lp_lambda: with a target_sparsity the strength"
                " is planned."
            )
