"""Masked LoRA with PEFT's options and beside its other adapters: what works, and what is refused with which words."""

import functools

import pytest
import torch
from conftest import tiny_llama, weights
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from test_adapters import LORA, logits, sparse
from test_masked_lora import masked, masked_layers, zeros

from hf_lpdecay import load_masked_lora, mask_lora, merge_sparse
from hf_lpdecay.training import masked_lora, merge_cost


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which changes the base's weights"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights='olora', which changes the base's weights"),
        ({"lora_bias": True}, r"lora_bias=True has given model\.layers\.0\.self_attn\.q_proj a bias that it has none"),
        ({"alora_invocation_tokens": [1]}, "has a ALoraLinearVariant: only plain LoRA adds to a weight"),
    ],
    ids=["pissa", "olora", "lora_bias", "alora"],
)
def test_lora_that_could_not_be_merged_exactly_is_refused(options, message):
    model = get_peft_model(sparse(), LoraConfig(**{**LORA, **options}))
    for function in (mask_lora, merge_sparse):
        with pytest.raises(ValueError, match=message):
            function(model)


def test_a_second_masked_adapter_is_loaded_beside_the_first(tmp_path):
    for name, factor in (("first", 1.0), ("second", 2.0)):
        made = masked()
        with torch.no_grad():
            for layer in masked_layers(made).values():
                layer.lora_B["default"].weight.mul_(factor)
        made.save_pretrained(tmp_path / name)
    expected = {name: logits(load_masked_lora(sparse(), tmp_path / name)) for name in ("first", "second")}
    assert not torch.equal(*expected.values())
    model = load_masked_lora(sparse(), tmp_path / "first")
    frozen = weights(model)
    assert load_masked_lora(model, tmp_path / "second", adapter_name="second") is model
    assert model.active_adapters == ["default"] and torch.equal(logits(model), expected["first"])
    assert not any(param.requires_grad for param in model.parameters()) and frozen.keys() < weights(model).keys()
    model.set_adapter("second")
    assert torch.equal(logits(model), expected["second"])
    records = [config.lp_masked_layers for config in model.peft_config.values()]
    assert len(records) == 2 and records[0] == records[1] and len(records[0]) == 14
    model.save_pretrained(tmp_path / "both")
    again = load_masked_lora(sparse(), tmp_path / "both" / "second", is_trainable=True)
    assert torch.equal(logits(again), expected["second"])
    load_masked_lora(again, tmp_path / "first", adapter_name="first", is_trainable=True)
    assert torch.equal(logits(again), expected["second"])
    assert torch.allclose(logits(again.merge_and_unload()), expected["second"], atol=1e-5)


def test_a_second_masked_adapter_of_another_base_is_refused_and_gone(tmp_path):
    masked().save_pretrained(tmp_path / "other")
    get_peft_model(sparse(), LoraConfig(**LORA)).save_pretrained(tmp_path / "plain")
    base = sparse()
    base.model.layers[0].mlp.up_proj.weight.data[0].zero_()
    model = mask_lora(get_peft_model(base, LoraConfig(**LORA)))
    before = logits(model)
    for folder, options, message in (
        ("other", {"adapter_name": "b"}, r"The adapter 'b' was trained on a base with other zeros: in 1 of 14"),
        ("plain", {"adapter_name": "b"}, "was not saved masked"),
        ("other", {}, "The model has an adapter 'default': give the new one another name, with adapter_name"),
    ):
        with pytest.raises(ValueError, match=message):
            load_masked_lora(model, tmp_path / folder, **options)
        assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


def test_a_base_that_cannot_be_dequantized_is_named(monkeypatch):
    def only_on_a_gpu(module):
        raise NotImplementedError("no kernel for the CPU")

    monkeypatch.setattr(masked_lora, "dequantize_module_weight", only_on_a_gpu)
    with pytest.raises(ValueError, match=r"type Parameter cannot be dequantized here.*\(no kernel for the CPU\)"):
        mask_lora(get_peft_model(sparse(), LoraConfig(**LORA)))


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_are_named(config):
    with pytest.raises(ValueError, match=f"The adapter's type is {config.peft_type.value}, and only LoRA"):
        mask_lora(get_peft_model(sparse(), config))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [1, 2]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ],
    ids=str,
)
def test_options_of_lora_that_go_with_a_mask(options):
    torch.manual_seed(0)
    make = functools.partial(tiny_llama, attention_bias=True, mlp_bias=True)
    model = mask_lora(get_peft_model(sparse(make), LoraConfig(**{**LORA, **options})))
    pruned = zeros(sparse(make))
    untrained = logits(model)
    with torch.no_grad():
        for param in (param for param in model.parameters() if param.requires_grad):
            param.add_(torch.randn_like(param), alpha=0.02)
    before = logits(model)
    assert (before - untrained).abs().max() > 1e-4
    merged = model.merge_and_unload()
    assert torch.allclose(before, logits(merged), atol=1e-5)
    for name, zero in pruned.items():
        if "_proj" in name:
            assert torch.equal(zero, merged.get_parameter(name) == 0), name


@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_a_sum_of_masked_adapters_is_masked(kind):
    model = masked()
    pruned = zeros(sparse())
    model.add_adapter("second", model.active_peft_config)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type=kind)
    model.set_adapter("sum")
    assert merge_cost(model).total == 0
    before = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(before, logits(merged), atol=1e-5)
    assert all(torch.equal(zero, merged.get_parameter(name) == 0) for name, zero in pruned.items() if "_proj" in name)
    for function, verb in ((mask_lora, "mask"), (merge_sparse, "merge")):
        with pytest.raises(ValueError, match=f"no adapted layer to {verb}: its adapters were merged and unloaded"):
            function(model)
