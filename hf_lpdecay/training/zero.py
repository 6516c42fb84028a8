"""DeepSpeed's ZeRO, stages 1 and 2, where every process steps one flat range of each parameter group, in float32.

With every selected weight in a group of its own a range belongs to one weight, and the decay, which works on each
element by itself, needs nothing else. What looks at weights as a whole is here: counting, the cut, the importance.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from ..config import LpDecayConfig
from ..sparsity import SparsityController
from ..sparsity.importance import write_factors
from ..sparsity.sharding import summed


@dataclass(frozen=True, eq=False)
class WeightRange:
    """What a process holds of a weight.

    Args:
        weight (`nn.Parameter`): The whole weight, shape (n, m), as the model has it.
        partition (`torch.Tensor`): What the optimizer steps, one-dimensional, filled up with zeros.
        start (`int`): Position of its first element in the weight; the weight's end if it holds nothing of it.
        numel (`int`): How many elements of the weight it holds; the others only fill it up.
        group (`ProcessGroup`): The processes that hold the other ranges.
    """

    weight: nn.Parameter
    partition: Tensor
    start: int
    numel: int
    group: torch.distributed.ProcessGroup

    def by_row(self, values: Tensor) -> tuple[slice, Tensor]:
        """Put values of the elements, shape (partition,), into the rows that they are from, which are filled up with
        zeros: which rows of the weight, and the values, shape (rows, m)."""
        rows, inside = self._rows()
        width, height = self.weight.shape[1], rows.stop - rows.start
        padded = F.pad(values[: self.numel], (inside, height * width - inside - self.numel))
        return rows, padded.view(height, width)

    def flat(self, row: Tensor, col: Tensor) -> Tensor:
        """What factors of rows (n, 1) and columns (1, m) make for the elements, shape (partition,), with zeros at the
        end."""
        rows, inside = self._rows()
        mine = (row[rows] * col).view(-1)[inside : inside + self.numel]
        return F.pad(mine, (0, self.partition.numel() - self.numel))

    def _rows(self) -> tuple[slice, int]:
        """The rows that are touched, and the position of the first element in them."""
        width = self.weight.shape[1]
        return slice(self.start // width, math.ceil((self.start + self.numel) / width)), self.start % width


class ZeroController(SparsityController):
    """A controller of the ranges that this process holds.

    Args:
        ranges (`dict[str, WeightRange]`): From [`find_ranges`].
        config, params, args: As for a [`SparsityController`].
        optimizer (`AcceleratedOptimizer`): Wraps DeepSpeed's, with the LpAdamW inside.
    """

    def __init__(
        self,
        ranges: dict[str, WeightRange],
        config: LpDecayConfig,
        params: dict[str, Tensor],
        optimizer: AcceleratedOptimizer,
        *args: Any,
    ):
        self._ranges = {ranges[name].partition: ranges[name] for name in params}
        super().__init__(config, {name: ranges[name].partition for name in params}, optimizer.optimizer, *args)

    def cut(self, sparsity: float, last: bool = False) -> None:
        super().cut(sparsity, last)
        self.optimizer.update_lp_params()  # the model's own weights, which otherwise follow with the next step

    def _numel(self, param: Tensor) -> int:
        return self._ranges[param].weight.numel()

    def _process_groups(self, pool: list[Tensor]) -> list[torch.distributed.ProcessGroup]:
        return [self._ranges[pool[0]].group]

    def _score(self, param: Tensor) -> Tensor:
        score = super()._score(param)
        score[self._ranges[param].numel :] = math.inf  # padding is never among the smallest
        return score

    def _update_importance(self, step: int) -> None:
        """As [`importance_from_adam`] does it, from the sums of all ranges over rows and columns."""
        state = self.optimizer.state
        seen = [one for one in self._ranges.values() if "exp_avg_sq" in state[one.partition]]
        if self.config.importance != "adam" or not seen:
            return
        sums = []
        for one in seen:
            rows, moment = one.by_row(state[one.partition]["exp_avg_sq"])
            row_sums = moment.new_zeros(one.weight.shape[0])
            row_sums[rows] = moment.sum(1)
            sums += [row_sums, moment.sum(0)]
        parts = iter(summed(torch.cat(sums), [seen[0].group]).split([part.numel() for part in sums]))
        means, factors = {}, {one.weight: {} for one in seen}
        for one in seen:
            height, width = one.weight.shape
            means[one.weight] = next(parts)[:, None] / width, next(parts)[None] / height
        write_factors(means, factors, self.config.scope == "global")
        for one in seen:
            if factor := factors[one.weight]:
                flat = one.flat(factor["lp_row"], factor["lp_col"])
                state[one.partition].update(lp_row=flat, lp_col=flat.new_ones(1))


def find_ranges(optimizer: AcceleratedOptimizer, params: dict[str, nn.Parameter]) -> dict[str, WeightRange]:
    """Find what this process holds of some weights.

    Args:
        optimizer (`AcceleratedOptimizer`): DeepSpeed's, as accelerate wraps it.
        params (`dict[str, nn.Parameter]`): Weights of the model, by name.

    Raises:
        ValueError: If DeepSpeed has set up something other than ZeRO-1/2 in float32 or bfloat16, or weights share a
            group.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    check_matrices(params)
    zero = optimizer.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer):
        raise ValueError(
            f"DeepSpeed has set up a {type(zero).__name__}, whose pieces hf_lpdecay does not know: use ZeRO-2, and"
            " leave data_types.grad_accum_dtype out."
        )
    if zero.dtype == torch.float16:
        raise ValueError(
            "DeepSpeed keeps the model in float16, in which small weights are zero that are not so in its float32 copy:"
            " use bf16."
        )
    names, found = {param: name for name, param in params.items()}, {}
    for weights, partition, size, group in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.partition_size, zero.real_dp_process_group
    ):
        for weight in filter(names.get, weights):
            if len(weights) > 1:
                raise ValueError(
                    f"{names[weight]} shares its optimizer group with other parameters, so that DeepSpeed mixes them:"
                    " use LpDecayTrainer or LpDecayMixin, which give it one of its own."
                )
            start = min(torch.distributed.get_rank(group) * size, weight.numel())
            numel = min(weight.numel() - start, size)
            found[names[weight]] = WeightRange(weight, partition, start, numel, group)
    return {name: found[name] for name in params}


def check_matrices(params: dict[str, nn.Parameter]) -> None:
    """Raise a `ValueError` if there are weights of experts among those that become sparse."""
    experts = [name for name, param in params.items() if param.dim() == 3]
    if experts:
        raise ValueError(
            f"DeepSpeed's flat partitions do not hold experts' 3-D parameters such as {experts[0]} as matrices: use"
            " FSDP2 or DDP, or leave them out with exclude_modules."
        )


def check_zero(plugin: DeepSpeedPlugin, config: LpDecayConfig) -> None:
    """Check that DeepSpeed and the decay go together.

    Args:
        plugin (`DeepSpeedPlugin`): What accelerate was given.
        config (`LpDecayConfig`): How the model shall be made sparse.

    Raises:
        ValueError: If they do not, with what to use instead.
    """
    settings = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise ValueError(
            f"hf_lpdecay does not support DeepSpeed with ZeRO stage {plugin.zero_stage}: use stage 2; for stage 0 DDP,"
            " and for stage 3, whose model has no weights to look at, FSDP2."
        )
    if "optimizer" in settings:
        raise ValueError(
            "DeepSpeed's config has an optimizer block, so that its own optimizer would be stepped: leave it out, the"
            " Trainer makes an LpAdamW."
        )
    zero = settings.get("zero_optimization", {})
    for option, given in (
        ("offload_optimizer", (zero.get("offload_optimizer") or {}).get("device", "none") != "none"),
        ("elastic_checkpoint", zero.get("elastic_checkpoint")),
        ("load_universal", settings.get("checkpoint", {}).get("load_universal")),
    ):
        if given:
            raise ValueError(
                f"hf_lpdecay does not support DeepSpeed's {option}, which moves what the optimizer steps away from"
                " where the decay counts it: leave it out, or use FSDP2."
            )
    for option, value, works in (
        ("pattern", config.pattern, ("unstructured",)),
        ("importance", config.importance, (None, "magnitude", "adam")),
        ("calibration_batches", config.calibration_batches, (0,)),
        ("compensate", config.compensate, (None, False)),
    ):
        if value not in works:
            raise ValueError(
                f"{option}={value!r} needs whole rows and columns, and ZeRO hands out flat ranges of weights: use FSDP2"
                f" or DDP, or {option}={works[-1]!r}."
            )
