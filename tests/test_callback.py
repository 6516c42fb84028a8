"""The decay without a subclass: a plain `Trainer`, its optimizer and a callback."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import TARGET, arguments, same_bits, tiny_llama, token_rows, trainer_for, weights
from transformers import Trainer, set_seed

from hf_lpdecay import LpAdamW, LpDecayConfig, LpDecayTrainer, SparsityCallback, measure_sparsity


def plain(folder, config, model=None, optimizer=LpAdamW, options=None, **overrides):
    set_seed(0)
    args = arguments(folder, **overrides)
    return Trainer(
        model=model or tiny_llama(),
        args=args,
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(optimizer, {"lr": args.learning_rate, **(options or {})}),
        callbacks=[SparsityCallback(config)],
    )


@pytest.mark.parametrize(
    "config",
    [
        TARGET,
        LpDecayConfig(p=0.5, lp_lambda=0.05),
        LpDecayConfig(p=0.5, pattern="2:4", scope="layer", importance="activation"),
        LpDecayConfig(p=0.5, target_sparsity=0.6, scope="global", trim=False),
    ],
)
def test_the_callback_alone_gives_the_bits_of_the_trainer_and_resumes_to_them(tmp_path, config):
    options = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 8}
    ours = trainer_for(tmp_path / "a", config, **options)
    ours.train()
    final = weights(ours.model)
    theirs = plain(tmp_path / "b", config, **options)
    theirs.train()
    assert same_bits(final, weights(theirs.model))
    assert all(t.zeros == 0 for t in measure_sparsity(theirs.model).tensors if not t.selected)
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs)]
    assert logs[0] == logs[1] and "sparsity" in logs[0][0]
    for step in (16, 24):  # in the ramp and behind the cut
        resumed = plain(tmp_path / "c", config, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
        assert same_bits(final, weights(resumed.model)), step


def test_the_callback_keeps_the_zeros_of_the_selected_weights_and_no_others(tmp_path):
    first = trainer_for(tmp_path, TARGET, model=tiny_llama(attention_bias=True))
    first.train()
    zeros = {name: param == 0 for name, param in weights(first.model).items()}
    with torch.no_grad():
        for name, param in first.model.named_parameters():
            if name.endswith("bias"):
                zeros[name] = param.zero_() != 0
    second = plain(tmp_path / "b", LpDecayConfig(freeze_zeros=True), model=first.model, learning_rate=1e-2)
    second.train()
    for name, mask in zeros.items():
        assert torch.equal(second.model.get_parameter(name) == 0, mask), name


def test_a_resumed_run_goes_on_with_the_weights_it_chose(tmp_path):
    """Even where one of them is all zero by now."""
    options = {"save_strategy": "steps", "save_steps": 10}
    plain(tmp_path, TARGET, **options).train()
    checkpoint = tmp_path / "checkpoint-10"
    names = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SparsityCallback"]
    assert len(names["args"]["names"]) == 14
    resumed = plain(tmp_path / "b", TARGET)
    load = resumed._load_from_checkpoint

    def load_and_prune(*args):
        load(*args)
        resumed.model.model.layers[0].mlp.up_proj.weight.data.zero_()

    resumed._load_from_checkpoint = load_and_prune
    resumed.train(resume_from_checkpoint=str(checkpoint))
    report = {t.name: t for t in measure_sparsity(resumed.model).tensors if t.selected}
    assert len(report) == 14 and report.pop("model.layers.0.mlp.up_proj.weight").zeros == 32 * 64
    assert all(t.zeros == t.numel / 2 for t in report.values())


def test_what_cannot_be_driven_is_refused_before_the_first_step(tmp_path):
    for config, changes, message in (
        (TARGET, {"optimizer": torch.optim.AdamW}, r"drives an LpAdamW, but got a AdamW.*LpAdamW, {'lr'"),
        (TARGET, {"options": {"lp_lambda": 0.1}}, r"lp_lambda=0\.1 for all parameters"),
        (TARGET, {"options": {"freeze_zeros": True}}, "freeze_zeros=True for all parameters"),
        (TARGET, {"max_steps": 12}, "needs 10"),
        (LpDecayConfig(lp_lambda=1.0, target_modules=["nope"]), {}, "matches no linear layer"),
    ):
        trainer = plain(tmp_path, config, **changes)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert same_bits(before, weights(trainer.model))
    with pytest.raises(ValueError, match="distill='self' needs the loss, which a SparsityCallback does not see"):
        SparsityCallback(LpDecayConfig(target_sparsity=0.5, distill="self"))
    with pytest.raises(ValueError, match="LpDecayTrainer adds its own"):
        LpDecayTrainer(tiny_llama(), arguments(tmp_path), callbacks=[SparsityCallback(TARGET)], lp_config=TARGET)


def test_a_checkpoint_without_the_decay_is_not_gone_on_with(tmp_path):
    trainer_for(tmp_path, trainer_cls=Trainer, save_strategy="steps", save_steps=10).train()
    for make in (plain, trainer_for):
        with pytest.raises(ValueError, match="checkpoint at step 10 was not written with one SparsityCallback"):
            make(tmp_path / "b", TARGET).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_with(tmp_path):
    trainer_for(tmp_path, TARGET, save_strategy="steps", save_steps=15, save_only_model=True).train()
    with pytest.raises(ValueError, match="Nothing of the optimizer was loaded from the checkpoint at step 15"):
        trainer_for(tmp_path, TARGET).train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))


@pytest.mark.parametrize(
    "kind, version, message",
    [
        (DistributedType.FSDP, 1, r"does not support FSDP1, .* use FSDP2 \(fsdp_version: 2\), or DDP"),
        (DistributedType.MULTI_CPU, 2, "FSDP was asked for, but accelerate has set up MULTI_CPU"),
        (DistributedType.MEGATRON_LM, None, "does not support MEGATRON_LM"),
    ],
)
def test_sharding_that_is_not_supported_is_refused_by_both_ways(tmp_path, monkeypatch, kind, version, message):
    trainer, ours = plain(tmp_path, TARGET), trainer_for(tmp_path, TARGET)
    optimizer = trainer.create_optimizer()
    plugin = None if version is None else SimpleNamespace(fsdp_version=version)
    # What AcceleratorState asks: after `accelerate launch`, or a look at the plugin.
    state = SimpleNamespace(distributed_type=kind, fsdp_plugin=plugin)
    monkeypatch.setattr("hf_lpdecay.training.checks.AcceleratorState", lambda: state)
    monkeypatch.setattr(ours.accelerator, "state", state)
    with pytest.raises(ValueError, match=message):
        trainer.callback_handler.callbacks[-2].on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer
        )
    with pytest.raises(ValueError, match=message):
        ours._check_can_decay()
