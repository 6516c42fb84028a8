"""The best checkpoint of a run is one that has its target, and early stopping waits for it: with the real `Trainer`."""

import json

import pytest
from conftest import arguments, tiny_llama, token_rows, trainer_for
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed

from hf_lpdecay import LpAdamW, LpDecayConfig, LpDecayTrainer, SparsityCallback, measure_sparsity


CONFIG = LpDecayConfig(target_sparsity=0.95, ramp_end=0.5, scope="layer", num_plans=20)  # ends at step 20 of 40
RAMP_END = 20


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model that is better dense than it can be with 5 % of its weights."""
    trainer = trainer_for(tmp_path_factory.mktemp("dense"), trainer_cls=Trainer, max_steps=80, learning_rate=1e-2)
    trainer.train()
    return trainer.model.state_dict()


def accuracy(prediction):
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


def run(folder, dense, way, stopping=(), resume=None, **overrides):
    set_seed(0)
    model = tiny_llama()
    model.load_state_dict(dense)
    options = {
        "max_steps": 40,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": True,
        "learning_rate": 2e-3,
    }
    args = arguments(folder, **{**options, **overrides})
    data = {"train_dataset": token_rows(), "eval_dataset": token_rows(8, seed=1), "compute_metrics": accuracy}
    if way == "trainer":
        trainer = LpDecayTrainer(model, args, callbacks=[*stopping], lp_config=CONFIG, **data)
    else:
        own = [SparsityCallback(CONFIG)]
        callbacks = [*own, *stopping] if way == "callback first" else [*stopping, *own]
        optimizer = (LpAdamW, {"lr": args.learning_rate})
        trainer = Trainer(model, args, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer, **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer, metric="eval_loss"):
    return {entry["step"]: entry[metric] for entry in trainer.state.log_history if metric in entry}


def strict_state(checkpoint):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((checkpoint / "trainer_state.json").read_text(), parse_constant=refuse)


WAYS = ["trainer", "callback first", "callback last"]


@pytest.mark.parametrize("way, metric, sign", [*((way, "loss", 1) for way in WAYS), ("callback first", "accuracy", -1)])
def test_the_best_model_at_the_end_has_the_target(tmp_path, dense, way, metric, sign, capsys):
    trainer = run(tmp_path, dense, way, metric_for_best_model=metric, greater_is_better=sign < 0)
    found = {step: sign * value for step, value in evaluations(trainer, f"eval_{metric}").items()}
    assert min(found, key=found.get) < RAMP_END  # which a plain comparison would have taken
    counted = {step: value for step, value in found.items() if step >= RAMP_END}
    assert trainer.state.best_global_step == min(counted, key=counted.get)
    assert trainer.state.best_metric == sign * min(counted.values())
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert measure_sparsity(trainer.model).sparsity == pytest.approx(0.95, abs=1e-3)
    line = f"metric_for_best_model={metric!r} counts from step {RAMP_END} on"
    assert capsys.readouterr().out.count(line) == 1
    for step in range(5, 41, 5):
        state = strict_state(tmp_path / f"checkpoint-{step}")
        assert (state["best_metric"] is None) == (step < RAMP_END)
    assert all(isinstance(entry.get("eval_loss", 0.0), float) for entry in trainer.state.log_history)


@pytest.mark.parametrize("way", WAYS)
def test_the_best_are_saved_from_the_target_on(tmp_path, dense, way):
    trainer = run(tmp_path, dense, way, save_strategy="best", metric_for_best_model="loss")
    best, expected = float("inf"), set()
    for step, loss in evaluations(trainer).items():
        if step >= RAMP_END and loss < best:
            best = loss
            expected.add(f"checkpoint-{step}")
    assert expected and {path.name for path in tmp_path.glob("checkpoint-*")} == expected


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("way", WAYS)
def test_early_stopping_waits_for_the_target_and_counts_from_there(tmp_path, dense, way):
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
    trainer = run(tmp_path, dense, way, [stopping])
    # From step 20 on the first one is the best, and two are not better by 100. Counted from step 5 it would be step 15.
    assert trainer.state.global_step == RAMP_END + 10
    assert measure_sparsity(trainer.model).sparsity == pytest.approx(0.95, abs=1e-3)
    counters = [
        strict_state(tmp_path / f"checkpoint-{step}")["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
        for step in (15, 25)
    ]
    assert [counter["early_stopping_patience_counter"] for counter in counters] == [0, 1]
    # Whoever stops for another reason is not held up.
    trainer = run(tmp_path / "b", dense, way, [Stops(10)], save_strategy="no", load_best_model_at_end=False)
    assert trainer.state.global_step == 10 and trainer.state.best_metric is None


def test_a_resumed_run_forgets_what_was_best_before_the_target(tmp_path, dense):
    whole = run(tmp_path, dense, "trainer")
    expected = (whole.state.best_global_step, whole.state.best_metric)
    for step in (10, 30):
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state = json.loads(path.read_text())
        # as a checkpoint has it that was written without this
        state |= {"best_metric": 0.0, "best_global_step": 5, "best_model_checkpoint": str(tmp_path / "checkpoint-5")}
        path.write_text(json.dumps(state))
        resumed = run(tmp_path, dense, "trainer", resume=str(path.parent))
        if step < RAMP_END:
            assert (resumed.state.best_global_step, resumed.state.best_metric) == expected
        assert resumed.state.best_global_step >= RAMP_END
        assert measure_sparsity(resumed.model).sparsity == pytest.approx(0.95, abs=1e-3)


def test_without_a_target_or_a_metric_nothing_changes(tmp_path, dense, capsys):
    trainer = trainer_for(
        tmp_path,
        LpDecayConfig(lp_lambda=1e-4),
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        save_strategy="steps",
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = evaluations(trainer)
    assert trainer.state.best_metric == min(losses.values())
    run(tmp_path / "b", dense, "trainer", load_best_model_at_end=False, save_strategy="no")
    assert "metric_for_best_model" not in capsys.readouterr().out
