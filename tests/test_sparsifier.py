"""The decay in a loop without a Trainer."""

import shutil
import sys
from pathlib import Path

import finetune_no_trainer
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TARGET, same_bits, tiny_llama, token_rows, trainer_for, weights
from processes import launch, run_in_processes, succeed
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_scheduler, set_seed

from hf_lpdecay import LpAdamW, LpDecayConfig, Sparsifier, measure_sparsity


STEPS, WARMUP, LR = 30, 2, 2e-3
RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def no_accelerator():
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


class Loop:
    """What Transformers' examples without a Trainer do."""

    def __init__(self, config, accumulate=1, before_prepare=False, model=None):
        set_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = tiny_llama() if model is None else model
        data = DataLoader(token_rows(), 4, shuffle=True, collate_fn=default_data_collator)
        optimizer = LpAdamW(model.parameters(), lr=LR)
        scheduler = get_scheduler("cosine", optimizer, WARMUP, STEPS)
        options = {"num_warmup_steps": WARMUP, "lr_scheduler": scheduler, "calibration_batches": data}
        if before_prepare:
            self.sparsifier = Sparsifier(model, optimizer, config, STEPS, **options)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )
        if not before_prepare:
            self.sparsifier = Sparsifier(
                self.model, self.optimizer, config, STEPS,
                **{**options, "lr_scheduler": self.scheduler, "calibration_batches": self.data},
            )  # fmt: skip
        self.accelerator.register_for_checkpointing(self.sparsifier)
        self.done, self.logs = 0, []

    def run(self, steps, save=None):
        self.model.train()
        for epoch in range(1000):
            self.data.set_epoch(epoch) if hasattr(self.data, "set_epoch") else None
            for batch in self.data:
                if self.done >= steps:
                    return self
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch).loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.sparsifier.step()
                    self.optimizer.zero_grad()
                self.done += self.accelerator.sync_gradients
                self.logs.append(self.sparsifier.metrics())
        return self


CONFIGS = {
    "decay": TARGET,
    "2:4": LpDecayConfig(p=0.5, pattern="2:4", importance="activation", calibration_batches=2, ramp_end=0.5),
    "neurons": LpDecayConfig(p=0.5, target_sparsity=0.5, pattern="neurons"),
    "plain": LpDecayConfig(p=0.5, lp_lambda=0.05),
}


@pytest.mark.parametrize("before_prepare", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_loaded_in_the_middle_a_loop_ends_in_the_same_bits(tmp_path, config, before_prepare):
    model = tiny_llama(attention_dropout=0.0)
    data = [{name: torch.tensor([row[name]] * 2) for name in row} for row in token_rows(STEPS)]

    def go(loop, first, last):
        loop.data = data[first:last]
        for batch in loop.data:
            loop.model.train()
            loop.accelerator.backward(loop.model(**batch).loss)
            loop.optimizer.step()
            loop.scheduler.step()
            loop.sparsifier.step()
            loop.optimizer.zero_grad()
        return weights(loop.accelerator.unwrap_model(loop.model))

    whole = Loop(config, before_prepare=before_prepare, model=model)
    go(whole, 0, 14)
    whole.accelerator.save_state(str(tmp_path / "state"))
    final = go(whole, 14, STEPS)
    metrics = whole.sparsifier.metrics()
    if config.target_sparsity:
        assert metrics["sparsity"] == pytest.approx(0.5, abs=1e-6) and metrics["lp_phase"] == 2
        assert measure_sparsity(model, whole.sparsifier.lp_modules).sparsity == metrics["sparsity"]
    resumed = Loop(config, before_prepare=before_prepare, model=tiny_llama(seed=7, attention_dropout=0.0))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert same_bits(final, go(resumed, 14, STEPS))


def test_steps_that_accumulate_do_not_count():
    loop = Loop(TARGET, accumulate=2).run(STEPS)
    assert loop.sparsifier.state_dict()["step"] == STEPS
    assert loop.sparsifier.metrics()["sparsity"] == 0.5
    assert [log["lp_phase"] for log in loop.logs[::2]] == sorted(log["lp_phase"] for log in loop.logs[::2])


def test_what_cannot_be_driven_is_refused_with_the_cure(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"drives an LpAdamW, but got a AdamW: make it LpAdamW\(model"):
        Sparsifier(model, torch.optim.AdamW(model.parameters()), TARGET, STEPS)
    optimizer = LpAdamW(model.parameters())
    with pytest.raises(ValueError, match="distill='self' needs the loss, which a Sparsifier does not see"):
        Sparsifier(model, optimizer, LpDecayConfig(target_sparsity=0.5, distill="self"), STEPS)
    with pytest.raises(ValueError, match="needs 10"):
        Sparsifier(model, optimizer, TARGET, 12)
    with pytest.raises(ValueError, match="needs at least one training batch"):
        Sparsifier(model, optimizer, LpDecayConfig(target_sparsity=0.5, calibration_batches=2), STEPS)
    sparsifier = Sparsifier(model, LpAdamW(tiny_llama().parameters(), lr=1e-3), TARGET, STEPS)
    with pytest.raises(ValueError, match=r"does not step model\.layers\.0\.self_attn\.q_proj\.weight"):
        sparsifier._optimizer.step()
    other = {**sparsifier.state_dict(), "lp_config": {**sparsifier.state_dict()["lp_config"], "p": 0.1}}
    with pytest.raises(ValueError, match=r"trained with p=0\.1 \(now 0\.5\)"):
        sparsifier.load_state_dict(other)


def test_a_loop_that_ends_early_says_so(caplog):
    sparsifier = Loop(TARGET).run(8).sparsifier
    sparsifier.finish()
    assert "Training stopped after step 8, before the ramp's end at step 21" in caplog.text


@pytest.fixture(scope="module")
def launched(tmp_path_factory, language_model, texts):
    """The recipe, in two processes by `accelerate launch`, and resumed from its first checkpoint."""
    folder = tmp_path_factory.mktemp("no_trainer")
    # Accelerate restores the random numbers before a dataloader that starts anew draws one: no dropout.
    shutil.copytree(language_model, model := folder / "model")
    tiny_llama(vocab_size=512, attention_dropout=0.0).save_pretrained(model)
    for split, rows in zip(("train", "validation"), texts):
        (folder / f"{split}.txt").write_text("".join(rows["text"][:40]))
    options = {
        "model_name_or_path": model, "train_file": folder / "train.txt", "block_size": 32,
        "validation_file": folder / "validation.txt", "max_train_steps": 24, "learning_rate": 2e-3,
        "max_train_samples": 64, "max_eval_samples": 8, "use_cpu": "true", "bf16": "false",
        # In the middle of the five steps in which the Hessians for the cut at step 17 are collected.
        "num_plans": 1, "checkpointing_steps": 14,
    }  # fmt: skip
    given = [str(part) for option, value in options.items() for part in (f"--{option}", value)]
    outputs = ["--output_dir", str(folder / "whole")], ["--output_dir", str(folder / "resumed")]
    how = ["--config_file", str(RECIPES / "accelerate" / "ddp.yaml"), str(RECIPES / "finetune_no_trainer.py")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, *given, *outputs[0]]
    done = launch(command, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = [*given, *outputs[1], "--resume_from_checkpoint", str(folder / "whole" / "step_14")]
    for printed in (done.stdout, run_in_processes(succeed, 2, finetune_no_trainer.main, resumed)[0]):
        assert "50.00%" in printed and "perplexity after" in printed
    return folder, model


def test_the_recipe_ends_at_the_weights_of_the_trainer_in_two_processes_also_resumed(launched, tmp_path):
    from data import blocks_of_tokens
    from data import load_file as load_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = launched
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = blocks_of_tokens(load_text(folder / "train.txt", None), "text", tokenizer, 32).select(range(64))
    trainer = trainer_for(
        tmp_path, LpDecayConfig(target_sparsity=0.5, num_plans=1), model=AutoModelForCausalLM.from_pretrained(model),
        data=(rows, rows), max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        warmup_steps=5, adam_beta2=0.99, dataloader_drop_last=True,
    )  # fmt: skip
    trainer.train()
    found = [load_file(folder / name / "model.safetensors") for name in ("whole", "resumed")]
    assert same_bits(*found)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)
        assert (found[0][name] == 0).sum() == (value == 0).sum()
