"""What DeepSpeed's ZeRO hands out, and what it does not go together with; trained with it is in test_processes.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import tiny_llama, tiny_mixtral, trainer_for

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.sparsity import participants
from hf_lpdecay.training.zero import WeightRange, check_matrices


@pytest.mark.parametrize("shape", [(7, 5), (3, 16), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_ranges_make_the_whole(shape, processes):
    generator = torch.Generator().manual_seed(0)
    weight, row, col = (torch.rand(size, generator=generator) for size in (shape, (shape[0], 1), (1, shape[1])))
    alignment = 2 * processes  # as DeepSpeed fills up
    size = -(-weight.numel() // alignment) * 2
    filled = torch.cat([weight.view(-1), torch.full((processes * size - weight.numel(),), 9.0)])
    put_together, factors = torch.zeros(shape), []
    for rank, partition in enumerate(filled.split(size)):
        start = min(rank * size, weight.numel())
        numel = min(weight.numel() - start, size)
        one = WeightRange(weight, partition, start, numel, None)
        rows, values = one.by_row(partition)
        put_together[rows] += values
        factors.append(one.flat(row, col))
        assert factors[-1].shape == partition.shape and not factors[-1][numel:].any()
    assert torch.equal(put_together, weight)
    assert torch.equal(torch.cat(factors)[: weight.numel()], (row * col).view(-1))


TARGET = {"p": 0.5, "target_sparsity": 0.5}


@pytest.mark.parametrize(
    "stage, settings, config, message",
    [
        (3, {}, {}, "does not support DeepSpeed with ZeRO stage 3: use stage 2; .*, FSDP2"),
        (0, {}, {}, "does not support DeepSpeed with ZeRO stage 0: use stage 2; for stage 0 DDP"),
        (2, {"optimizer": {"type": "AdamW"}}, {}, "config has an optimizer block"),
        (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer"),
        (2, {}, {"pattern": "2:4"}, "pattern='2:4' needs whole rows .* FSDP2 or DDP, or pattern='unstructured'"),
        (1, {}, {"importance": "activation"}, "importance='activation' needs .*, or importance='adam'"),
        (2, {}, {"calibration_batches": 2}, "calibration_batches=2 needs"),
    ],
)
def test_what_needs_more_than_flat_ranges_is_refused(tmp_path, monkeypatch, stage, settings, config, message):
    trainer = trainer_for(tmp_path, LpDecayConfig(**TARGET, **config), model=tiny_llama())
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=settings)
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    monkeypatch.setattr(trainer.accelerator, "state", state)
    with pytest.raises(ValueError, match=message):
        trainer._check_can_decay()


def test_experts_are_refused():
    with pytest.raises(ValueError, match=r"do not hold experts' 3-D parameters such as model\.layers\.0\.mlp\.experts"):
        check_matrices(participants(tiny_mixtral(), LpDecayConfig(**TARGET)))
