"""What was made zero is cut out, and nothing else changes."""

import sys

import pytest
import torch
from conftest import tiny_llama, trainer_for
from test_units import MODELS, outputs
from torch import nn
from transformers import AutoConfig, Trainer

from hf_lpdecay import LpDecayConfig, shrink
from hf_lpdecay.sparsity import find_units, participants


def with_dead(model, pattern, per_layer):
    """Zero so many units of each layer, others in each."""
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    for layer, (units, dead) in enumerate(zip(find_units(model, pattern), per_layer)):
        for part in units.slices:
            view = part.of(part.param.data, units.count)
            for i in range(dead):
                view[(3 * i + layer) % units.count] = 0.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_neurons_are_cut_out_with_equal_outputs(name, tmp_path, caplog):
    make, neurons, _ = MODELS[name]
    model = with_dead(make(), "neurons", [10, 7, 9, 10])
    before = outputs(model)
    smaller = shrink(model)
    assert {units.count for units in find_units(smaller, "neurons")} == {neurons - 7}
    assert f"{neurons - 7} of {neurons} neurons stay in each layer, more than" in caplog.text
    torch.testing.assert_close(outputs(smaller), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    # A plain folder, read with no code of ours.
    smaller.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(loaded), outputs(smaller))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(model).__name__]


@pytest.mark.parametrize("name", ["llama", "llama-square", "qwen2", "qwen3", "mistral"])
def test_heads_are_cut_out_with_equal_outputs(name, tmp_path):
    make, _, heads = MODELS[name]
    dead = 1 if heads == 2 else 2
    model = with_dead(make(), "heads", [dead, dead])
    before = outputs(model)
    smaller = shrink(model)
    assert smaller.config.num_key_value_heads == heads - dead
    assert smaller.config.num_attention_heads == 4 // heads * (heads - dead)
    torch.testing.assert_close(outputs(smaller), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    smaller.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(smaller))
    if name == "llama":
        assert smaller.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] > 2


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "t5"])
def test_heads_that_the_config_cannot_drop_are_left(name, caplog):
    model = with_dead(MODELS[name][0](), "heads", [1] * 6)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} can be cut out. The zero heads stay: .*fewer heads are"
    ):
        shrink(model)
    assert "The zero heads stay" in caplog.text
    config = LpDecayConfig(pattern="heads", target_sparsity=0.5)
    with pytest.raises(ValueError, match=r"how wide fewer heads are. .* set require_shrinkable=False"):
        participants(MODELS[name][0](), config)


def test_a_number_of_heads_that_the_config_refuses_is_rounded_up():
    model = with_dead(tiny_llama(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8), "heads", [5])
    before = outputs(model)
    smaller = shrink(model)  # 3 heads do not divide a hidden size of 32
    assert smaller.config.num_attention_heads == 4
    torch.testing.assert_close(outputs(smaller), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    with pytest.raises(ValueError, match="no smaller number of heads is a valid LlamaConfig"):
        shrink(with_dead(tiny_llama(num_key_value_heads=4), "heads", [1, 1]))


def test_a_trained_model_with_neurons_at_half_is_half_as_wide(tmp_path):
    trainer = trainer_for(tmp_path, LpDecayConfig(p=0.5, target_sparsity=0.5, pattern="neurons"))
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    smaller = shrink(trainer.model)
    assert smaller.config.intermediate_size == 32 and trainer.model.config.intermediate_size == 64
    after = trainer_for(tmp_path, trainer_cls=Trainer, model=smaller).evaluate()["eval_loss"]
    assert after == pytest.approx(before, rel=1e-5)


def test_a_model_in_bfloat16_and_one_without_zeros():
    model = with_dead(tiny_llama(), "neurons", [32, 32]).to(torch.bfloat16)
    smaller = shrink(model)
    assert smaller.dtype == torch.bfloat16 and smaller.config.intermediate_size == 32
    with pytest.raises(ValueError, match="no zero neurons or heads in every layer to cut out"):
        shrink(tiny_llama())


def test_a_wrong_cut_is_noticed(monkeypatch):
    module = sys.modules["hf_lpdecay.artifacts.shrink"]
    model = with_dead(tiny_llama(), "neurons", [32, 32])
    real = module._padded
    monkeypatch.setattr(module, "_padded", lambda live, size: real(live, size).roll(1))
    smaller = shrink(model)  # another order of the same neurons is the same model
    assert smaller.config.intermediate_size == 32
    monkeypatch.setattr(module, "_padded", lambda live, size: torch.arange(size))
    with pytest.raises(RuntimeError, match="outputs differ by"):
        shrink(model)
