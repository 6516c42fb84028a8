"""A run that ends with the mean of its last weights."""

import pytest
import torch
from conftest import frozen_llama, same_bits, tiny_llama, trainer_for, weights
from test_sparsifier import STEPS, Loop, no_accelerator  # noqa: F401
from transformers import TrainerCallback

from hf_lpdecay import LpDecayConfig, measure_sparsity


CONFIG = LpDecayConfig(target_sparsity=0.5, average_weights=0.3)
OPTIONS = {"lr_scheduler_type": "constant_with_warmup", "learning_rate": 2e-3}


class Record(TrainerCallback):
    """The trained weights after each step, before they are averaged."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, frozen_llama])
def test_the_model_ends_with_the_mean_of_its_weights_and_with_its_zeros(tmp_path, make, dtype):
    seen = Record()
    model = make(dtype=dtype) if make is frozen_llama else make().to(dtype)
    trainer = trainer_for(
        tmp_path, CONFIG, model=model, callbacks=[seen], save_strategy="steps", save_steps=30, **OPTIONS
    )
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(seen)))
    trainer.train()
    ends = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for name, param in ends.items():
        mean = torch.stack([step[name].double() for step in seen.steps[21:]]).mean(0)
        tolerance = 1e-6 if param.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(param.double(), mean, rtol=tolerance, atol=1e-9)
    base = model.get_base_model() if make is frozen_llama else model
    assert measure_sparsity(base, trainer.lp_modules).sparsity == 0.5
    state = torch.load(tmp_path / "checkpoint-30" / "optimizer.pt")["state"]
    assert not any("lp_mean" in of_param for of_param in state.values())


def test_a_run_resumed_within_the_mean_ends_in_the_same_bits(tmp_path):
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 5}
    whole = trainer_for(tmp_path, CONFIG, model=tiny_llama().bfloat16(), **options)
    whole.train()
    for step in (20, 25):
        again = trainer_for(tmp_path / "again", CONFIG, model=tiny_llama(seed=1).bfloat16(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same_bits(weights(whole.model), weights(again.model))


def test_a_loop_of_ones_own_ends_with_the_mean_too():
    ends = []
    for config in (CONFIG, LpDecayConfig(target_sparsity=0.5)):
        ends.append(weights(Loop(config).run(STEPS).model))
    masks = [{name: param == 0 for name, param in end.items()} for end in ends]
    assert same_bits(*masks) and not same_bits(*ends)


def test_a_run_that_is_stopped_keeps_its_last_weights(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 25

    trainer = trainer_for(tmp_path, CONFIG, callbacks=[Stop()], **OPTIONS)
    trainer.train()
    assert "stopped after step 25 of 30: the weights are those of that step" in caplog.text
    assert not any("lp_mean" in state for state in trainer.optimizer.state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_sparsity": 0.5, "average_weights": 0.4},
            r"average_weights: 0.4 - should be at most 0.3, .*ramp_end=0.7",
        ),
        ({"target_sparsity": 0.5, "average_weights": -1}, "average_weights: -1 - should be a fraction"),
        ({"lp_lambda": 0.1, "average_weights": 0.2}, "would fill zeros again that lp_lambda=0.1 makes"),
    ],
)
def test_a_mean_over_weights_that_are_cut_later_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LpDecayConfig(**options)
