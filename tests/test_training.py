from pathlib import Path

import pytest
import torch
from conftest import (
    TARGET,
    arguments,
    same_bits,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_rows,
    trainer_for,
    weights,
)
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_lpdecay import (
    LpAdamW,
    LpDecayConfig,
    LpDecayMixin,
    LpDecaySeq2SeqTrainer,
    LpDecayTrainer,
    SparsityCallback,
    measure_sparsity,
)


def classified_rows():
    return [{**row, "labels": row["input_ids"][0] % 2} for row in token_rows()]


class Snapshots(TrainerCallback):
    """Zeros of the model after each step."""

    def __init__(self):
        self.zeros = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.zeros[state.global_step] = {name: param.detach() == 0 for name, param in model.named_parameters()}


def test_a_run_ends_at_the_target_and_its_zeros_stay_in_the_settle_phase(tmp_path):
    snapshots = Snapshots()
    trainer = trainer_for(tmp_path, TARGET, callbacks=[snapshots])
    trainer.train()
    report = measure_sparsity(trainer.model)
    assert report.sparsity == 0.5
    assert all(t.zeros == t.numel / 2 for t in report.tensors if t.selected)
    assert all(t.zeros == 0 for t in report.tensors if not t.selected)
    cut = round(0.7 * 30)
    for step in range(cut, 31):
        assert same_bits(snapshots.zeros[cut + 1], snapshots.zeros[max(step, cut + 1)])
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(weights(trainer.model), weights(loaded))


def test_logs_show_sparsity_lambda_and_phase_beside_the_loss_to_every_tracker(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = trainer_for(tmp_path, TARGET, callbacks=[Tracker()], eval_strategy="steps", eval_steps=10)
    trainer.train()
    losses = [logs for logs in seen if "loss" in logs]
    assert [logs["lp_phase"] for logs in losses] == [1, 1, 1, 1, 2, 2]
    assert [logs["sparsity"] for logs in losses] == sorted(logs["sparsity"] for logs in losses)
    assert losses[0]["lp_lambda"] > 0 and losses[-1]["lp_lambda"] == 0 and losses[-1]["sparsity"] == 0.5
    assert all(isinstance(value, (int, float)) for logs in losses for value in logs.values())
    assert sum("eval_loss" in logs for logs in seen) == 3
    assert [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry] == [
        x["sparsity"] for x in losses
    ]


def test_one_line_at_the_start_says_what_is_decayed_and_what_not(tmp_path, capsys):
    trainer_for(tmp_path, TARGET).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("p-norm decay")]
    assert len(lines) == 1
    assert "on 14 of 20 trained tensors" in lines[0] and "from step 5 to 21" in lines[0]
    assert "not on 6 others (model.embed_tokens.weight" in lines[0]


@pytest.mark.parametrize(
    "make, options",
    [
        (tiny_llama, {"save_strategy": "steps", "save_steps": 15, "eval_strategy": "steps", "eval_steps": 10}),
        (tiny_llama, {"optim": "adamw_torch", "label_smoothing_factor": 0.1}),
        (tiny_bert, {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_steps": -1, "num_train_epochs": 2}),
    ],
)
def test_without_lambda_and_target_it_is_trainer_bit_for_bit(tmp_path, make, options):
    trainers, logs, files = [], [], []
    for config, cls in ((LpDecayConfig(lp_lambda=0.0), LpDecayTrainer), (None, Trainer)):
        trainer = trainer_for(tmp_path / cls.__name__, config, trainer_cls=cls, model=make(), **options)
        trainers.append(trainer)
        if make is tiny_bert:
            trainer.train_dataset = trainer.eval_dataset = classified_rows()
        trainer.train()
        trainer.save_model()
        names = ("loss", "grad_norm", "eval_loss", "learning_rate")
        logs.append([{name: entry.get(name) for name in names} for entry in trainer.state.log_history])
        folder = Path(trainer.args.output_dir)
        paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
        files.append({name: name.endswith("safetensors") and path.read_bytes() for name, path in paths.items()})
    assert same_bits(weights(trainers[0].model), weights(trainers[1].model))
    assert logs[0] == logs[1] and files[0] == files[1]


def test_the_plain_method_runs_at_constant_lambda(tmp_path):
    trainer = trainer_for(tmp_path, LpDecayConfig(p=0.5, lp_lambda=0.05), max_steps=60)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["lp_lambda"] for entry in logs} == {0.05} and {entry["lp_phase"] for entry in logs} == {1}
    assert 0 < measure_sparsity(trainer.model).sparsity < 1
    assert all(t.zeros == 0 for t in measure_sparsity(trainer.model).tensors if not t.selected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_activation_importance_is_the_rms_of_the_input_features(tmp_path, make, scope):
    model = make()
    layers = {n: m for n, m in model.named_modules() if n.endswith((".0.mlp.up_proj", ".0.mlp.c_fc", ".1.mlp.c_fc"))}
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, x, name=name: seen[name].append((m.training, x[0].detach())))
    found = {}

    class Peek(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            for name, layer in layers.items():
                if state.global_step == 5:  # the first plan follows
                    found[name] = [len(seen[name])]
                if state.global_step == 6:
                    found[name].append(dict(optimizer.state[layer.weight]))

    config = LpDecayConfig(p=0.5, target_sparsity=0.5, importance="activation", scope=scope)
    options = {"eval_strategy": "steps", "eval_steps": 2, "callbacks": [Peek()]}
    trainer = trainer_for(tmp_path, config, model=model, **options)
    trainer.train()
    assert measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-4)
    assert len(found) >= 1
    for name, (calls, state) in found.items():
        features = torch.cat([x.flatten(0, 1) for training, x in seen[name][:calls] if training])
        rms = features.double().square().mean(0).sqrt()
        h = (state["lp_row"] * state["lp_col"]).double()
        h = h[0] if "up_proj" in name else h[:, 0]
        assert torch.allclose(h / h.mean(), rms / rms.mean(), rtol=1e-4)
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n not in layers)


def test_fine_tuning_a_sparse_model_with_frozen_zeros_keeps_every_zero(tmp_path):
    first = trainer_for(tmp_path, TARGET)
    first.train()
    zeros = {name: param == 0 for name, param in weights(first.model).items()}
    second = trainer_for(tmp_path / "b", LpDecayConfig(freeze_zeros=True), model=first.model, learning_rate=1e-2)
    second.train()
    for name, mask in zeros.items():
        assert torch.equal(second.model.get_parameter(name) == 0, mask)


class FakeQuantizedLinear(nn.Linear):
    """As torchao's of that name: weights as eight bits would hold them, with a straight-through gradient."""

    def forward(self, x):
        scale = self.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        error = (self.weight / scale).round() * scale - self.weight
        return nn.functional.linear(x, self.weight + error.detach(), self.bias)


def test_fine_tuning_aware_of_quantization_keeps_every_zero_too(tmp_path):
    first = trainer_for(tmp_path, TARGET)
    first.train()
    before = weights(first.model)
    for module in first.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FakeQuantizedLinear
    second = trainer_for(tmp_path / "b", LpDecayConfig(freeze_zeros=True), model=first.model, learning_rate=1e-2)
    second.train()
    for name, after in weights(second.model).items():
        if "proj" in name:
            assert torch.equal(before[name] == 0, after == 0) and not torch.equal(before[name], after)


def test_an_early_stop_is_said(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    trainer_for(tmp_path, TARGET, callbacks=[Stop()]).train()
    assert "Training stopped after step 10, before the ramp's end at step 21" in caplog.text


def test_groups_keep_the_trainers_weight_decay_and_mark_what_is_decayed(tmp_path):
    trainer = trainer_for(tmp_path, LpDecayConfig(p=0.5, lp_lambda=0.1), weight_decay=0.01, adam_beta2=0.95)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is LpAdamW and trainer.create_optimizer() is optimizer
    table = {}
    for group in optimizer.param_groups:
        table[(group["weight_decay"], group["lp_lambda"])] = len(group["params"])
        assert group["betas"] == (0.9, 0.95) and group["lr"] == 2e-3
    assert table == {(0.01, 0.1): 14, (0.01, 0.0): 1, (0.0, 0.0): 5}


def test_classifier_and_seq2seq_trainers(tmp_path):
    classifier = LpDecayTrainer(
        tiny_bert(), arguments(tmp_path / "a"), train_dataset=classified_rows(), lp_config=TARGET
    )
    classifier.train()
    assert measure_sparsity(classifier.model).sparsity == 0.5
    t5 = LpDecaySeq2SeqTrainer(
        tiny_t5(), arguments(tmp_path / "b", Seq2SeqTrainingArguments), train_dataset=token_rows(), lp_config=TARGET
    )
    t5.train()
    assert measure_sparsity(t5.model).sparsity == 0.5


def test_the_mixin_goes_in_front_of_any_trainer(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    class Sparse(LpDecayMixin, Weighted):
        pass

    trainer = trainer_for(tmp_path, TARGET, trainer_cls=Sparse)
    trainer.train()
    assert trainer.called and measure_sparsity(trainer.model).sparsity == 0.5


def test_bfloat16_weights_reach_the_target_and_the_loss_of_float32(tmp_path):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = trainer_for(tmp_path, TARGET, model=tiny_llama().to(dtype), max_steps=100)
        trainer.train()
        assert measure_sparsity(trainer.model).sparsity == 0.5
        assert all(param.dtype == dtype for param in trainer.model.parameters())
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] < 3.5 and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_early_stopping_and_best_model_work_beside_it(tmp_path):
    trainer = trainer_for(
        tmp_path,
        TARGET,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_metric is not None


class CountingRows(Dataset):
    """Notes whether training has begun."""

    def __init__(self):
        self.rows, self.read = token_rows(16), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read += 1
        return self.rows[index]


@pytest.mark.parametrize(
    "config, overrides, message",
    [
        (TARGET, {"max_steps": 12}, "needs 10"),
        (TARGET, {"max_steps": -1, "num_train_epochs": 2}, "ramp would have 1 optimizer steps"),
        (TARGET, {"max_steps": 30, "warmup_steps": 15}, "warm up for fewer"),
        (TARGET, {"optim": "lomo"}, "optim='lomo' has no p-norm decay"),
        (LpDecayConfig(lp_lambda=1.0, target_modules=["nope"]), {}, "matches no linear layer"),
        (LpDecayConfig(pattern="1:3"), {}, "q_proj.weight has 32 input features, not a multiple of 3"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, config, overrides, message):
    rows = CountingRows()
    with pytest.raises(ValueError, match=message):
        LpDecayTrainer(tiny_llama(), arguments(tmp_path, **overrides), train_dataset=rows, lp_config=config)
    assert rows.read == 0


def test_other_optimizers_are_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="optimizers= holds a SGD"):
        LpDecayTrainer(
            model,
            arguments(tmp_path),
            train_dataset=token_rows(),
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
            lp_config=TARGET,
        )
    with pytest.raises(ValueError, match="names AdamW"):
        LpDecayTrainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {}), lp_config=TARGET)


def test_callback_state_is_plain_json():
    callback = SparsityCallback(TARGET)
    again = SparsityCallback(**callback.state()["args"])
    assert again.lp_config == TARGET
