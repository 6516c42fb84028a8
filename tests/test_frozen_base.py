"""A frozen base that becomes sparse while masked adapters learn."""

import json

import pytest
import torch
import worker
from accelerate.utils import DistributedType
from conftest import (
    frozen_llama,
    make_params,
    same_bits,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    token_rows,
    trainer_for,
    weights,
)
from peft import LoHaConfig, LoraConfig, get_peft_model
from processes import run_in_processes
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_lpdecay import LpAdamW, LpDecayConfig, load_masked_lora, measure_sparsity
from hf_lpdecay.optim import decay as decay_module
from hf_lpdecay.optim.decay import Batches, decay_
from hf_lpdecay.sparsity import participants
from hf_lpdecay.training.frozen import check_whole


HALF = {"target_sparsity": 0.5, "scope": "layer"}
IDS = torch.arange(16)[None]


def logits(model):
    return model.eval()(IDS).logits.detach()


def some_weights(dtype, shapes):
    params = make_params(dtype, shapes)
    for param in params:
        param.data.view(-1)[::7] = 0.0
    return params


def decayed(params, group, plans, steps=3):
    for step in range(steps):
        batches = Batches()
        for number, param in enumerate(params):
            decay_(param.data, group, plans[number], 1e-2, 7 * step + number, batches)
        batches.run()
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.5, 0.7, -3, 1.9])
def test_the_decay_is_lp_adamws_without_a_proposal_and_agrees_with_its_eager_twin(monkeypatch, dtype, p):
    group = {"p": p, "lp_lambda": 0.0, "freeze_zeros": True, "post_step": False}
    shapes = [(30, 20), (7, 5), (3, 4, 6)]
    threshold = 0.4
    plans = [
        {
            "lp_lambda": threshold ** (2 - p) * 20,
            "lp_threshold": threshold,
            "lp_row": torch.linspace(0.5, 2, shape[-2])[:, None].expand(*shape[:-1], 1),
            "lp_col": torch.linspace(2, 0.5, shape[-1]).expand(*shape[:-2], 1, shape[-1]),
        }
        for shape in shapes
    ]
    ours = decayed(some_weights(dtype, shapes), group, plans)
    theirs = some_weights(dtype, shapes)
    optimizer = LpAdamW(theirs, lr=1e-2, p=p, freeze_zeros=True)
    for param, plan in zip(theirs, plans):
        param.grad = torch.zeros_like(param)
        optimizer.state[param].update(plan)
    for _ in range(3):
        optimizer.step()
    monkeypatch.setattr(decay_module, "KERNELS", {})
    twin = decayed(some_weights(dtype, shapes), group, plans)
    low_precision = dtype in (torch.bfloat16, torch.float16)
    for a, b, c, start in zip(ours, twin, theirs, some_weights(dtype, shapes)):
        assert (a[start == 0] == 0).all() and (a == start).double().mean() > 0.3 and not torch.equal(a, start)
        if low_precision:  # the same random bits, and float32's last places seldom decide
            assert (a != b).double().mean() < 0.01
            # LpAdamW draws others.
            spacing = torch.finfo(dtype).eps * start.abs().clamp_min(1e-3)
            assert ((a - c).abs() <= 4 * spacing + 1e-3).double().mean() > 0.9
        else:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6) and torch.allclose(a, c, rtol=1e-3, atol=1e-6)


def test_what_decays_stochastically_decays_as_in_float32_on_average():
    group = {"p": 0.5, "lp_lambda": 1e-2, "freeze_zeros": False, "post_step": False}
    exact, rounded = torch.full((20000,), 0.5), torch.full((20000,), 0.5, dtype=torch.bfloat16)
    decayed([torch.nn.Parameter(exact)], group, [{}], steps=20)
    decayed([torch.nn.Parameter(rounded)], group, [{}], steps=20)
    assert exact[0] < 0.5 and rounded.float().mean() == pytest.approx(exact[0].item(), rel=1e-4)


SPARSE = {
    "fp32": (torch.float32, HALF),
    "fp32, global": (torch.float32, {"target_sparsity": 0.3, "scope": "global"}),
    "bf16": (torch.bfloat16, HALF),
    "bf16, magnitude": (torch.bfloat16, {**HALF, "importance": "magnitude", "compensate": False}),
    "bf16, 2:4": (torch.bfloat16, {"pattern": "2:4", "calibration_batches": 4, "ramp_end": 0.5}),
    "bf16, hard cut": (torch.bfloat16, {**HALF, "hard_cut": True, "num_plans": 3}),
    "fp16": (torch.float16, HALF),
    "fp16, tiles": (torch.float16, {**HALF, "pattern": "block:4x4"}),
}


@pytest.mark.parametrize(("dtype", "config"), SPARSE.values(), ids=SPARSE)
def test_it_ends_at_the_target_and_a_merge_changes_nothing(tmp_path, dtype, config, capsys):
    config = LpDecayConfig(**config)
    model = frozen_llama(dtype)
    dense = weights(model.get_base_model())
    trainer = trainer_for(tmp_path, config, model=model, learning_rate=1e-2)
    assert capsys.readouterr().out.count("trainer.merge_adapters()") == 1
    trainer.train()
    assert not any(group.get("lp_lambda") for group in trainer.optimizer.param_groups)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {"sparsity", "lp_lambda", "lp_phase"} <= logs[0].keys() and logs[-1]["loss"] < logs[0]["loss"] - 0.1
    assert logs[-1]["sparsity"] == pytest.approx(config.target_sparsity, abs=1e-4)
    now = weights(model.get_base_model())
    left_out = [name for name in dense if not ("_proj" in name and "base_layer" in name) and "lora" not in name]
    assert len(left_out) == 6 and all(torch.equal(dense[name], now[name]) for name in left_out)
    before = logits(trainer.model)
    merged = trainer.merge_adapters()
    assert type(merged) is type(tiny_llama())
    assert torch.allclose(logits(merged), before, atol=1e-4 if dtype == torch.float32 else 0.05)
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert same_bits(weights(again), weights(merged)) and not (tmp_path / "base").exists()
    numel = sum(param.numel() for name, param in again.named_parameters() if "_proj" in name)
    assert measure_sparsity(again, trainer.lp_modules).sparsity == pytest.approx(
        config.target_sparsity, abs=1.0 / numel
    )
    if config.pattern == "2:4":
        groups = again.model.layers[0].mlp.up_proj.weight.unflatten(1, (-1, 4))
        assert ((groups == 0).sum(-1) == 2).all()


def test_nothing_of_the_weights_size_is_kept_but_the_hessians(tmp_path):
    model = frozen_llama()
    trainer = trainer_for(tmp_path, LpDecayConfig(**HALF), model=model)
    frozen, names = trainer._frozen, set()

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            names.update(name for own in frozen.state.values() for name in own)

    trainer.add_callback(Look())
    trainer.train()
    assert "lp_gram" in names and not names & {"lp_move", "exp_avg", "exp_avg_sq", "lp_s"}
    assert all(param.grad is None for param in frozen.params.values())


RESUMED = {
    "fp32": (torch.float32, HALF),
    "bf16": (torch.bfloat16, {"target_sparsity": 0.3}),
    "fp16, 2:4": (torch.float16, {"pattern": "2:4", "calibration_batches": 2, "ramp_end": 0.6, "num_plans": 4}),
    "hard cut": (torch.bfloat16, {**HALF, "hard_cut": True, "num_plans": 4}),
}


@pytest.mark.parametrize("dtype, config", RESUMED.values(), ids=RESUMED)
def test_a_run_resumed_at_any_checkpoint_ends_in_the_same_bits(tmp_path, dtype, config):
    options = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    whole = trainer_for(tmp_path / "whole", LpDecayConfig(**config), model=frozen_llama(dtype), **options)
    whole.train()
    final = weights(whole.model)
    for step in (4, 8, 12, 20):
        resumed = trainer_for(
            tmp_path / "resumed",
            LpDecayConfig(**config),
            model=frozen_llama(dtype),
            **options,
            restore_callback_states_from_checkpoint=step == 12,
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same_bits(final, weights(resumed.model)), step
        logs = [trainer.state.log_history[-2] for trainer in (resumed, whole)]
        assert all(logs[0][name] == logs[1][name] for name in ("step", "grad_norm", "sparsity", "lp_lambda"))
    (tmp_path / "whole" / "checkpoint-8" / "frozen_base.safetensors").unlink()
    with pytest.raises(ValueError, match=r"There is no frozen_base\.safetensors in .*checkpoint-8"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))


def test_a_saved_adapter_has_its_sparse_base_beside_it(tmp_path):
    trainer = trainer_for(tmp_path, LpDecayConfig(**HALF), model=frozen_llama(), learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert measure_sparsity(base).sparsity == 0.5
    assert torch.allclose(logits(load_masked_lora(base, tmp_path)), expected, atol=1e-6)
    entry = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(entry["lp_masked_layers"]) == 14
    with pytest.raises(ValueError, match="was trained on a base with other zeros"):
        load_masked_lora(tiny_llama(), tmp_path)


def test_two_processes_have_the_same_weights_and_resume_to_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 15, "per_device_train_batch_size": 2}
    for run, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-15"))):
        folder = str(tmp_path / run)
        run_in_processes(worker.train_frozen_base, 2, folder, HALF, "bfloat16", resume, **options)
    first, *others = (torch.load(tmp_path / run / f"rank-{rank}.pt") for run in ("whole", "resumed") for rank in (0, 1))
    assert all(same_bits(first, other) for other in others)
    assert measure_sparsity(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "base")).sparsity == 0.5


def test_two_shards_are_refused(tmp_path):
    options = {"state_dict_type": "FULL_STATE_DICT"}
    with pytest.raises(RuntimeError, match="Under FSDP a process holds parts of the frozen base only"):
        run_in_processes(worker.train_frozen_base, 2, str(tmp_path), HALF, "float32", **options)


def test_conv1d_and_experts(tmp_path):
    conv1d = get_peft_model(
        tiny_gpt2(initializer_range=0.2), LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)
    )
    experts = get_peft_model(
        tiny_mixtral(initializer_range=0.2),
        LoraConfig(
            r=4,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )
    for name, model in (("conv1d", conv1d), ("experts", experts)):
        trainer = trainer_for(tmp_path / name, LpDecayConfig(**HALF), model=model, learning_rate=1e-2)
        assert len(trainer.lp_modules) == (8 if name == "conv1d" else 12)
        trainer.train()
        before = logits(trainer.model)
        trainer.save_model()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name / "base")
        assert torch.allclose(logits(load_masked_lora(base, tmp_path / name)), before, atol=1e-5)
        merged = trainer.merge_adapters()
        assert torch.allclose(logits(merged), before, atol=1e-4)
        assert measure_sparsity(merged, trainer.lp_modules).sparsity == measure_sparsity(merged).sparsity == 0.5


def test_what_cannot_be_made_sparse_is_refused_before_training(tmp_path):
    def refused(message, config=None, model=None, **options):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, LpDecayConfig(**{**HALF, **(config or {})}), model=model or frozen_llama(), **options)

    trainer = trainer_for(tmp_path, LpDecayConfig(target_sparsity=0.5), model=frozen_llama())
    assert (trainer.lp_config.importance, trainer.lp_config.scope) == ("fisher", "global")
    refused("importance='adam' needs the second moment", {"importance": "adam"})
    refused("pattern='neurons' takes units", {"pattern": "neurons"})
    refused("s_rate=0.5 would keep a number", {"s_rate": 0.5})
    refused("type is DoRA, and only LoRA", model=frozen_llama(use_dora=True))
    refused("type is LOHA, and only", model=get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"])))
    refused("embed_tokens is a Embedding", model=frozen_llama(target_modules=["embed_tokens", "q_proj"]))
    partly = frozen_llama()
    partly.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    refused("1 of the selected weights are trained, such as .*up_proj", model=partly)
    quantized = frozen_llama()
    quantized.get_base_model().quantization_method = "bitsandbytes"
    refused("is quantized, and a decay needs values", model=quantized)
    with pytest.raises(ValueError, match="made sparse by LpDecayTrainer"):
        participants(frozen_llama(), LpDecayConfig(**HALF))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        for changes, cure in ((True, "train with DDP"), (False, "keep the zeros in a plain Trainer")):
            with pytest.raises(ValueError, match=f"Under {kind.value} a process holds parts of the frozen.*{cure}"):
                check_whole(kind, changes)
    with pytest.raises(TypeError, match="has no adapters to merge"):
        trainer_for(tmp_path, LpDecayConfig(**HALF), data=(token_rows(8), token_rows(8))).merge_adapters()
