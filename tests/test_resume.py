"""A run that goes on from a checkpoint ends where it would have ended."""

import shutil
from pathlib import Path

import pytest
from conftest import TARGET, same_bits, tiny_mixtral, trainer_for, weights
from safetensors.torch import load_file
from test_callback import plain as plain_trainer
from transformers import MixtralForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.training import last_whole_checkpoint
from hf_lpdecay.training.saved_names import accept_saved_names


@pytest.mark.parametrize(
    "config",
    [
        TARGET,
        LpDecayConfig(p=0.5, target_sparsity=0.6, scope="global", trim=False),
        LpDecayConfig(p=0.5, pattern="2:4"),
        LpDecayConfig(p=0.5, target_sparsity=0.5, importance="activation", ramp_start=0.2),
        LpDecayConfig(p=0.5, target_sparsity=0.5, pattern="neurons", calibration_batches=2, p_start=1.5),
        LpDecayConfig(p=0.5, target_sparsity=0.5, s_rate=0.5),
        LpDecayConfig(target_sparsity=0.5, hard_cut=True, num_plans=4),
        LpDecayConfig(
            p=0.5, lp_lambda=0.05, p_start=2.0, lp_lambda_schedule="cubic", freeze_zeros=True, post_step=True
        ),
    ],
)
def test_a_run_resumed_at_any_checkpoint_ends_in_the_same_bits(tmp_path, config):
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = trainer_for(tmp_path / "whole", config, **options)
    whole.train()
    final = weights(whole.model)
    checkpoints = sorted(tmp_path.glob("whole/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in checkpoints] == [f"checkpoint-{s}" for s in (4, 8, 12, 16, 20, 24, 28, 30)]
    for checkpoint in checkpoints[:-1]:
        resumed = trainer_for(tmp_path / "resumed", config, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same_bits(final, weights(resumed.model)), checkpoint.name
        logs = [t.state.log_history[-2] for t in (resumed, whole)]
        assert all(logs[0][name] == logs[1][name] for name in ("step", "grad_norm", "sparsity", "lp_lambda"))


def test_a_checkpoint_cut_off_in_the_middle_is_passed_over(tmp_path):
    trainer = trainer_for(tmp_path, TARGET, save_strategy="steps", save_steps=10)
    trainer.train()
    final = weights(trainer.model)
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"epoch": 1.')
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-25")
    (tmp_path / "checkpoint-25" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-30")
    assert Path(last_whole_checkpoint(tmp_path)).name == "checkpoint-10"
    resumed = trainer_for(tmp_path, TARGET, save_strategy="steps", save_steps=10)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(final, weights(resumed.model))
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="No whole checkpoint in"):
        trainer_for(tmp_path / "empty", TARGET).train(resume_from_checkpoint=True)


def test_resuming_with_another_config_is_refused(tmp_path):
    trainer_for(tmp_path, TARGET, save_strategy="steps", save_steps=10).train()
    other = trainer_for(tmp_path, LpDecayConfig(p=0.8, target_sparsity=0.5))
    with pytest.raises(ValueError, match=r"trained with p=0\.5 \(now 0\.8\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


@pytest.mark.parametrize("plain", [False, True], ids=["LpDecayTrainer", "Trainer with the callback"])
@pytest.mark.parametrize("config", [{}, {"pattern": "neurons"}, {"calibration_batches": 2}])
def test_experts_whose_weights_are_saved_apart_are_resumed_to_the_same_bits(tmp_path, plain, config):
    config = LpDecayConfig(**{"target_sparsity": 0.5, **config})
    make = plain_trainer if plain else trainer_for

    def trainer(folder):
        options = {"save_strategy": "steps", "save_steps": 8, "max_steps": 24, "learning_rate": 2e-3}
        return make(tmp_path / folder, config, model=tiny_mixtral(), **options)

    whole = trainer("whole")
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-8" / "model.safetensors")
    assert not any("gate_up_proj" in name for name in saved)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert same_bits(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_saved_experts_are_loaded_as_from_pretrained_does(tmp_path, shard_size):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    other = MixtralForCausalLM(model.config)
    accept_saved_names(other)
    if shard_size == "5GB":
        result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
    else:
        names = [set(load_file(path)) for path in tmp_path.glob("*.safetensors")]
        expert = "model.layers.0.block_sparse_moe.experts.0"  # whose two matrices make one weight
        assert not any({f"{expert}.w1.weight", f"{expert}.w3.weight"} <= shard for shard in names)
        load_sharded_checkpoint(other, tmp_path, strict=False)
    expected = MixtralForCausalLM.from_pretrained(tmp_path)
    assert same_bits(weights(expected), weights(other)) and not other._held_back
    own = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other.load_state_dict(own)
    assert same_bits(own, other.state_dict())


def test_restored_callbacks_go_on_driving_the_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 10, "restore_callback_states_from_checkpoint": True}
    whole = trainer_for(tmp_path, TARGET, **options)
    whole.train()
    resumed = trainer_for(tmp_path / "b", TARGET, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert same_bits(weights(whole.model), weights(resumed.model))
