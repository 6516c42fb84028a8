"""LoRA that finds its own rank."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, trainer_for
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


def test_without_lora_it_is_refused():
    with pytest.raises(ValueError, match="pattern='rank' is for LoRA, and LlamaForCausalLM has no LoRA"):
        participants(tiny_llama(), LpDecayConfig(target_sparsity=0.5, pattern="rank"))
