"""What goes wrong is noticed, before anything is lost."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import finetune
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TARGET, same_bits, tiny_llama, trainer_for, weights
from processes import limit_files, run_in_processes, run_into_a_full_disk
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lpdecay import LpDecayConfig, LpDecayMixin, LpDecayTrainer, measure_sparsity
from hf_lpdecay.training import FullDiskError, last_whole_checkpoint


class Fault:
    """A loss that goes wrong at the steps it is told."""

    def __init__(self, steps, factor):
        self.steps, self.factor = steps, factor

    def __call__(self, outputs, labels, num_items_in_batch=None):
        loss = outputs.logits.float().logsumexp(-1).mean()
        fault = self.trainer.state.global_step + 1 in self.steps
        return loss * self.factor if fault else loss


def faulty(folder, steps, factor, **options):
    trainer = trainer_for(folder, TARGET, **options)
    trainer.compute_loss_func = Fault(steps, factor)
    trainer.compute_loss_func.trainer = trainer
    return trainer


class Watch(TrainerCallback):
    """Weights before and after each step, and which steps were skipped."""

    def __init__(self):
        self.before, self.weights, self.skipped = {}, {}, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step + 1] = weights(model)  # with what the last step's plan did to them

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights[state.global_step] = weights(model)
        if optimizer.step_was_skipped:
            self.skipped.append(state.global_step)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_weight_is_touched(tmp_path, factor, options):
    watch = Watch()
    trainer = faulty(tmp_path, [14], factor, callbacks=[watch], save_strategy="steps", save_steps=6, **options)
    with pytest.raises(FloatingPointError, match=r"not finite at step 14 .* checkpoint is .*checkpoint-12\. .*0\.00"):
        trainer.train()
    assert max(watch.weights) == 13 and same_bits(watch.before[14], weights(trainer.model))


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    trainer = trainer_for(tmp_path, TARGET)
    param = next(trainer.model.parameters())
    param.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), math.inf))
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match=r"not finite at step 1 .*norm (inf|nan).* No checkpoint was written"):
        trainer.train()
    assert same_bits(before, weights(trainer.model))


@pytest.fixture
def scaled(monkeypatch):
    """fp16 with a gradient scaler, which accelerate does not set up on a CPU by itself."""

    def prepare(trainer, scale):
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        return trainer

    return prepare


def test_a_step_that_the_scaler_skips_skips_the_decay_and_the_target_is_still_hit(tmp_path, scaled):
    watch = Watch()
    # At step 10 a plan follows, at 21 the cut.
    trainer = scaled(faulty(tmp_path, [1, 2, 10, 15, 21], math.inf, callbacks=[watch]), 2.0**12)
    trainer.train()
    assert watch.skipped == [1, 2, 10, 15, 21]
    still = {step for step in range(1, 31) if same_bits(watch.before[step], watch.weights[step])}
    assert still == {1, 2, 3, 10, 15, 21}  # step 3 is the first that is taken, at learning rate 0
    assert measure_sparsity(trainer.model).sparsity == 0.5
    sparsity = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert sparsity == sorted(sparsity) and sparsity[-1] == 0.5


def test_with_a_scaler_the_run_stops_once_no_scaling_is_left_to_blame(tmp_path, scaled):
    watch = Watch()
    trainer = scaled(faulty(tmp_path, range(10, 31), math.nan, callbacks=[watch]), 2.0**4)
    with pytest.raises(FloatingPointError, match="not finite at step 15"):
        trainer.train()
    assert watch.skipped == [10, 11, 12, 13, 14]
    assert all(same_bits(watch.before[step], watch.weights[step]) for step in watch.skipped)
    assert same_bits(watch.before[15], weights(trainer.model))


def test_a_checkpoint_that_cannot_be_finished_never_appears(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 6}
    whole = trainer_for(tmp_path / "whole", TARGET, **options)
    whole.train()
    trainer = trainer_for(tmp_path / "a", TARGET, **options)
    save = trainer._save_rng_state

    def full_disk(folder):
        if trainer.state.global_step == 18:
            assert Path(folder, "model.safetensors").is_file()
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    assert last_whole_checkpoint(tmp_path / "a") == str(tmp_path / "a" / "checkpoint-12")
    resumed = trainer_for(tmp_path / "a", TARGET, **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(weights(whole.model), weights(resumed.model))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {f"checkpoint-{s}" for s in (6, 12, 18, 24, 30)}
    files = [{path.name for path in (tmp_path / run / "checkpoint-18").iterdir()} for run in ("whole", "a")]
    assert files[0] == files[1]


class FillDisk(TrainerCallback):
    """From a step on, no file can be longer than so many bytes."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            limit_files(self.limit)


def train_until_the_disk_is_full(folder, limit):
    options = {"save_strategy": "steps", "save_steps": 6, "callbacks": [FillDisk(14, limit)]}
    with pytest.raises(FullDiskError) as raised:
        trainer_for(folder, TARGET, **options).train()
    print("RAISED", raised.value, "FROM", type(raised.value.__cause__).__name__)


@pytest.mark.parametrize("limit, library", [(20_000, "SafetensorError"), (100_000, "RuntimeError")])
def test_a_full_disk_is_named_with_the_checkpoint_to_resume_from(tmp_path, limit, library):
    sizes = [weight.numel() * 4 for weight in weights(tiny_llama()).values()]
    assert 20_000 < sum(sizes) < 100_000 < 2 * sum(sizes)  # the model, and the optimizer's state
    (printed,) = run_in_processes(train_until_the_disk_is_full, 1, tmp_path, limit)
    said = printed.partition("RAISED")[2]
    assert f"not enough space to write {tmp_path}/_unfinished/checkpoint-18 (" in said and " MB are free" in said
    assert f"the run can be resumed from {tmp_path}/checkpoint-12. FROM {library}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-12"}


def test_a_recipe_whose_last_save_finds_the_disk_full_keeps_its_checkpoint(command, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError) as raised:
        run_in_processes(run_into_a_full_disk, 1, finetune.main, command)
    message = f"There is not enough space to write {out} \\(.* the run can be resumed from {out}/checkpoint-30\\."
    assert re.search(message, str(raised.value)) and "finetune ended with code 1" in str(raised.value)
    assert not (out / "model.safetensors").exists()


def test_rotation_and_the_best_model_are_those_of_trainer(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the best is not the last
        "save_total_limit": 2,
        "max_steps": 36,
    }
    states, left = [], []
    for name, config, cls in (("ours", LpDecayConfig(lp_lambda=0.0), LpDecayTrainer), ("theirs", None, Trainer)):
        folder = tmp_path / name
        trainer = trainer_for(folder, config, trainer_cls=cls, **options)
        trainer.train()
        state = json.loads((folder / "checkpoint-36" / "trainer_state.json").read_text())
        best = state["best_model_checkpoint"]
        assert Path(best).is_dir() and best == trainer.state.best_model_checkpoint
        states.append((Path(best).relative_to(folder), state["best_metric"], state["best_global_step"]))
        left.append({str(path.relative_to(folder)) for path in folder.rglob("*")})
    assert states[0] == states[1] and states[0][2] < 36
    assert left[0] == left[1]


def test_a_checkpoint_of_an_earlier_run_is_replaced_as_a_whole(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 15}
    first = trainer_for(tmp_path, TARGET, **options)
    first.train()
    stale = tmp_path / "checkpoint-15" / "stale"
    stale.touch()
    shutil.copytree(tmp_path / "checkpoint-15", tmp_path / "_unfinished" / "checkpoint-9")
    trainer_for(tmp_path, TARGET, **options).train()
    assert not stale.exists() and {path.name for path in tmp_path.iterdir()} == {"checkpoint-15", "checkpoint-30"}


def train_with_faults_of_one_rank(folder):
    rank = int(os.environ["RANK"])
    options = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 2}
    said = []
    for trainer in (
        trainer_for(folder, LpDecayConfig(p=0.5 + rank / 10, lp_lambda=0.1), **options),
        faulty(folder, [8] if rank == 1 else [], math.nan, **options),
    ):
        try:
            trainer.train()
        except (ValueError, FloatingPointError) as error:
            said.append(f"{type(error).__name__}: {error}")
    total = sum(float(w.double().sum()) for w in weights(trainer.model).values())
    (folder / f"{rank}.json").write_text(json.dumps({"said": said, "step": trainer.state.global_step, "total": total}))


def test_two_processes_agree_on_what_is_wrong_and_write_checkpoints_together(tmp_path):
    run_in_processes(train_with_faults_of_one_rank, 2, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1] and results[0]["step"] == 7
    different, not_finite = results[0]["said"]
    assert "ValueError: Rank 1 has an LpDecayConfig with p=0.6 (rank 0: 0.5)" in different
    assert "FloatingPointError" in not_finite and "not finite at step 8" in not_finite
    assert not_finite.count("checkpoint-5.") == 1
    files = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= files
    assert not (tmp_path / "_unfinished").exists()


@pytest.mark.parametrize("compiled_by", ["the caller", "the Trainer"])
def test_compiled_models_are_selected_and_driven_alike(tmp_path, compiled_by, capsys):
    uncompensated = LpDecayConfig(p=0.5, target_sparsity=0.5, compensate=False)
    plain = trainer_for(tmp_path / "a", uncompensated, model=tiny_llama(tie_word_embeddings=False))
    plain.train()
    capsys.readouterr()
    model, options = tiny_llama(tie_word_embeddings=False), {}
    if compiled_by == "the caller":
        model = torch.compile(model, backend="eager")
        options = {"remove_unused_columns": False, "label_names": ["labels"]}  # its signature says nothing
    else:
        options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = trainer_for(tmp_path / "b", TARGET, model=model, **options)
    compiled.train()
    assert "compensate=False" in capsys.readouterr().out
    inner = getattr(compiled.model, "_orig_mod", compiled.model)
    report = measure_sparsity(inner)
    assert report.sparsity == 0.5
    assert sum(t.zeros for t in report.tensors if not t.selected) == 32  # the embedding's row of the padding token
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-3)


def test_activation_checkpointing_and_clipping_change_no_zero(tmp_path):
    masks = []
    # Its name before transformers 5.23, where it is an alias that warns.
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if new else "gradient_checkpointing"
    for name, options in (("a", {}), ("b", {checkpointing: True})):
        config = LpDecayConfig(p=0.5, target_sparsity=0.5, importance="activation", ramp_start=0.2)
        trainer = trainer_for(tmp_path / name, config, max_grad_norm=0.1, **options)
        trainer.train()
        masks.append({name: param == 0 for name, param in weights(trainer.model).items()})
    assert measure_sparsity(trainer.model).sparsity == 0.5
    assert same_bits(*masks)


def test_the_mixin_reaches_trainers_that_replace_the_loss(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss * (math.nan if self.state.global_step == 4 else 1.0)

    class Sparse(LpDecayMixin, Own):
        pass

    with pytest.raises(FloatingPointError, match="at step 5"):
        trainer_for(tmp_path, TARGET, trainer_cls=Sparse).train()
