"""LoRA that finds its own rank."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_mixtral, trainer_for
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from hf_lpdecay import LpDecayConfig, trim_rank
from hf_lpdecay.sparsity import participants


def with_lora(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 12, "lora_dropout": 0.0, **options}))


def layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def used(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    alive = (a != 0).any(1), (b != 0).any(0)
    assert torch.equal(*alive)  # a row and its column are pruned together
    return int(alive[0].sum())


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("make, targets", [(tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "c_fc"])])
def test_an_adapter_finds_its_rank_and_plain_peft_loads_it(tmp_path, make, targets, scope, rslora):
    model = with_lora(make(), target_modules=targets, use_rslora=rslora, fan_in_fan_out=make is tiny_gpt2)
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, pattern="rank", scope=scope, ramp_start=0.3)
    trainer = trainer_for(tmp_path / "run", config, model=model, max_steps=40)
    trainer.train()
    ranks = {name: used(layer) for name, layer in layers(model).items()}
    assert sum(ranks.values()) == 4 * len(ranks) and (scope == "global" or set(ranks.values()) == {4})
    assert all(layer.lora_B["default"].weight.any() for layer in layers(model).values() if used(layer))
    before = logits(model)
    assert not torch.allclose(before, logits(make()), atol=1e-4)  # B has left zero
    trim_rank(model)
    torch.testing.assert_close(logits(model), before)
    assert {name: layer.r["default"] for name, layer in layers(model).items()} == {
        name: max(1, rank) for name, rank in ranks.items()
    }
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), before)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_a_layer_without_any_rank_keeps_one_that_is_zero(tmp_path):
    model = with_lora(tiny_llama(), target_modules=["q_proj"], init_lora_weights=False)
    first = next(iter(layers(model).values()))
    first.lora_B["default"].weight.data.zero_()
    before = logits(model)
    trim_rank(model)
    assert first.r["default"] == 1 and not first.lora_B["default"].weight.any()
    torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), before)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"down_proj": 64}},
        {"rank_pattern": {"down_proj": 16}},
        {"rank_pattern": {r".*\.1\..*": 6}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 5}},
        {"rank_pattern": {"embed_tokens": 3}, "target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_the_users_own_patterns_do_not_reach_the_trimmed_layers(tmp_path, patterns):
    options = {"target_modules": "all-linear", "init_lora_weights": False, **patterns}
    model = with_lora(tiny_llama(tie_word_embeddings=False), **options)
    for name, layer in layers(model).items():
        if name.endswith("q_proj") or "0.mlp.down_proj" in name:  # the others stay as they are
            layer.lora_A["default"].weight.data[2:5] = 0.0
    before = logits(model)
    trim_rank(model)
    torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=False), tmp_path)
    torch.testing.assert_close(logits(loaded), before)
    assert all(layer.r == layers(model)[name].r for name, layer in layers(loaded).items())


def test_without_anything_to_trim_the_config_stays(tmp_path):
    model = with_lora(tiny_llama(), target_modules=["q_proj"], init_lora_weights=False, alpha_pattern={"q_proj": 3})
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))  # which is not active
    trim_rank(model)
    assert model.peft_config["default"].alpha_pattern == {"q_proj": 3}
    assert model.peft_config["default"].rank_pattern == {} == model.peft_config["second"].rank_pattern


def test_lora_on_experts_is_refused():
    model = with_lora(tiny_mixtral(), target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"experts has it on a parameter, .* leave it out of target_modules and"):
        trim_rank(model)
    with pytest.raises(ValueError, match="is for LoRA on linear layers"):
        participants(model, LpDecayConfig(target_sparsity=0.5, pattern="rank"))


def test_without_lora_it_is_refused():
    with pytest.raises(ValueError, match="pattern='rank' is for LoRA, and LlamaForCausalLM has no LoRA"):
        participants(tiny_llama(), LpDecayConfig(target_sparsity=0.5, pattern="rank"))
