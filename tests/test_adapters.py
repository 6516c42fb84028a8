"""PEFT adapters on a sparse base."""

import warnings

import pytest
import torch
from conftest import same_bits, tiny_gpt2, tiny_llama, token_rows, trainer_for, weights
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_lpdecay import LpDecayConfig, measure_sparsity, merge_sparse
from hf_lpdecay.training import merge_cost


LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def sparse(make=tiny_llama, dtype=torch.float32):
    """A model with half of its linear weights at zero."""
    model = make()
    with torch.no_grad():
        for param in (module.weight for name, module in model.named_modules() if name.endswith(SPARSE)):
            param.masked_fill_(param.abs() < param.abs().median(), 0.0)
    return model.to(dtype)


SPARSE = ("_proj", "c_attn", "c_proj", "c_fc")


def logits(model):
    ids = torch.tensor([row["input_ids"] for row in token_rows(4)])
    return model.eval()(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_merge_keeps_every_zero_and_is_exact_elsewhere(make, dtype):
    base = sparse(make, dtype)
    before = weights(base)
    model = get_peft_model(base, LoraConfig(**LORA, fan_in_fan_out=make is tiny_gpt2, use_rslora=True))
    cost = merge_cost(model)
    deltas = {
        name: module.get_delta_weight("default").double()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    merged = merge_sparse(model)
    assert type(merged) is type(base) and not any("lora" in name for name, _ in merged.named_parameters())
    dropped = whole = 0.0
    for name, delta in deltas.items():
        was, now = before[f"{name}.weight"], merged.get_parameter(f"{name}.weight")
        zero = was == 0
        assert zero.double().mean() == pytest.approx(0.5, abs=0.01) and now[zero].count_nonzero() == 0
        wanted = (was.double() + delta)[~zero]
        assert torch.allclose(now[~zero].double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
        lost = delta[zero].norm() / delta.norm()
        assert cost.layers[name] == pytest.approx(float(lost), rel=1e-6)
        dropped, whole = dropped + delta[zero].norm() ** 2, whole + delta.norm() ** 2
    assert len(cost.layers) == len(deltas) and cost.total == pytest.approx(float((dropped / whole).sqrt()), rel=1e-6)
    assert "total" in str(cost)


def test_training_an_adapter_keeps_the_base_and_a_merge_is_a_plain_sparse_model(tmp_path, capsys):
    base = sparse()
    zeros = {name: param == 0 for name, param in weights(base).items()}
    model = get_peft_model(base, LoraConfig(**{**LORA, "init_lora_weights": True, "modules_to_save": ["norm"]}))
    trainer_for(tmp_path, trainer_cls=Trainer, model=model, learning_rate=1e-2, weight_decay=0.1).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(sparse(), tmp_path / "adapter")
    merged = [merge_sparse(each) for each in (model, again)]
    assert "Merged 14 layers. Keeping their zeros dropped" in capsys.readouterr().out
    assert same_bits(*map(weights, merged))
    for name, param in weights(merged[0]).items():
        if name.startswith("model.layers") and "proj" in name:
            assert torch.equal(param == 0, zeros[name])
    assert not torch.equal(merged[0].model.norm.weight, base.model.layers[0].input_layernorm.weight)
    merged[0].save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged[0]))
    assert measure_sparsity(loaded).sparsity == pytest.approx(0.5, abs=0.01)


def test_without_zeros_it_is_the_ordinary_merge():
    models = [get_peft_model(tiny_llama(), LoraConfig(**LORA)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert merge_cost(models[0]).total == 0
    ours, theirs = merge_sparse(models[0]), models[1].merge_and_unload()
    assert same_bits(weights(ours), weights(theirs))


def test_what_cannot_be_merged_is_told():
    with pytest.raises(TypeError, match="got a LlamaForCausalLM, which has no adapters"):
        merge_sparse(tiny_llama())
    for config, message in (
        (LoraConfig(**LORA, use_dora=True), "type is DoRA, and only LoRA"),
        (LoHaConfig(r=4, target_modules=["q_proj"]), "type is LOHA, and only LoRA"),
        (LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}), "embed_tokens is a Embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_sparse(get_peft_model(tiny_llama(), config))
    merged = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already: call model\.unmerge_adapter"):
        merge_sparse(merged)


def test_the_decay_on_adapters_alone_is_refused(tmp_path):
    model = get_peft_model(sparse(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="none of them is trained"):
        trainer_for(tmp_path, LpDecayConfig(lp_lambda=0.1), model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_with_frozen_zeros_keeps_every_zero_under_weight_decay(tmp_path, dtype):
    model = sparse(dtype=dtype)
    zeros = {name: param == 0 for name, param in weights(model).items()}
    options = {"learning_rate": 1e-2, "weight_decay": 0.5, "bf16": dtype == torch.bfloat16}
    trainer_for(tmp_path, LpDecayConfig(freeze_zeros=True), model=model, **options).train()
    for name, mask in zeros.items():
        if name.startswith("model.layers") and "proj" in name:
            assert mask.any() and torch.equal(model.get_parameter(name) == 0, mask), name


def test_a_head_that_was_trained_as_a_module_is_tied_no_longer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the tied head
        model = get_peft_model(sparse(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    merged = merge_sparse(model)
    after = logits(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after)
