"""A second run in the same process: after an interruption, with a model made anew, with another compiled model."""

import pytest
import torch
from conftest import TARGET, arguments, frozen_llama, same_bits, tiny_llama, token_rows, trainer_for, weights
from transformers import TrainerCallback

from hf_lpdecay import LpDecayConfig, LpDecayTrainer, measure_sparsity
from hf_lpdecay.training.frozen import FrozenBase


class Interrupt(TrainerCallback):
    """Raises once, after a step."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = None
            raise self.error


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_a_run_after_an_interrupted_one_begins_with_its_own_dense_phase(tmp_path):
    trainer = trainer_for(tmp_path, TARGET, callbacks=[Interrupt(12, KeyboardInterrupt())], logging_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = measure_sparsity(trainer.model).sparsity
    assert before > 0 and hooks(trainer.model) > 0
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "sparsity" in log}
    assert [logs[step]["sparsity"] for step in (1, 4)] == pytest.approx([before, before])  # its zeros stay
    assert all(logs[step]["lp_lambda"] == 0 for step in range(1, 5))
    assert logs[30]["sparsity"] == 0.5 and hooks(trainer.model) == 0


@pytest.mark.parametrize("restore", [False, True])
def test_an_interrupted_run_is_resumed_by_the_same_trainer_to_the_same_bits(tmp_path, restore):
    options = {"save_strategy": "steps", "save_steps": 10, "restore_callback_states_from_checkpoint": restore}
    whole = trainer_for(tmp_path / "whole", TARGET, **options)
    whole.train()
    again = trainer_for(tmp_path / "again", TARGET, callbacks=[Interrupt(14, KeyboardInterrupt())], **options)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.train(resume_from_checkpoint=True)
    assert same_bits(weights(whole.model), weights(again.model)) and hooks(again.model) == 0
    states = [torch.load(tmp_path / name / "checkpoint-30" / "optimizer.pt")["state"] for name in ("whole", "again")]
    assert [set(state) for state in states[0].values()] == [set(state) for state in states[1].values()]


def test_a_batch_size_that_is_halved_starts_over(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    trainer = trainer_for(tmp_path, TARGET, callbacks=[Interrupt(12, error)], auto_find_batch_size=True)
    trainer.train()
    assert measure_sparsity(trainer.model).sparsity == 0.5 and hooks(trainer.model) == 0


@pytest.mark.parametrize("make", [tiny_llama, frozen_llama])
def test_a_model_that_is_made_anew_is_the_one_that_becomes_sparse(tmp_path, make):
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = LpDecayTrainer(
        model_init=lambda: make(),
        args=arguments(tmp_path, **options),
        train_dataset=token_rows(),
        lp_config=LpDecayConfig(target_sparsity=0.5, distill="self"),
    )
    for rate in (2e-3, 1e-4):
        trainer.args.learning_rate = rate
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] == rate
        base = trainer.model.get_base_model() if make is frozen_llama else trainer.model
        zeros = sum(int((param == 0).sum()) for name, param in base.named_parameters() if "_proj" in name)
        assert zeros == 18432 // 2
        assert not isinstance(trainer._frozen, FrozenBase) or trainer._frozen.model is base
        teacher = trainer._distiller.teacher
        assert all((param != 0).any() for name, param in teacher.named_parameters() if "_proj.weight" in name)
    if make is frozen_llama:
        assert measure_sparsity(trainer.merge_adapters()).sparsity == 0.5


def test_a_second_compiled_model_has_its_features_collected_too(tmp_path):
    config = LpDecayConfig(target_sparsity=0.5, importance="activation", compensate=False)
    found = []
    for i, compiled in enumerate((False, True, True)):
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = trainer_for(tmp_path / str(i), config, **options)
        trainer.train()
        found.append({name: param == 0 for name, param in weights(trainer.model).items()})
    assert all(same_bits(found[0], other) for other in found[1:])
