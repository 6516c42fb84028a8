"""Which weights take part."""

import pytest
from conftest import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from peft import LoraConfig, get_peft_model

from hf_lpdecay import measure_sparsity
from hf_lpdecay.sparsity import match_parameters, select_parameters


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def kinds(params):
    return sorted({name.split(".")[-2] for name in params})


def test_all_linear_leaves_out_embeddings_head_norms_and_biases():
    assert kinds(select_parameters(tiny_llama(tie_word_embeddings=False))) == sorted(ATTENTION + MLP)
    assert kinds(select_parameters(tiny_llama())) == sorted(ATTENTION + MLP)
    assert kinds(select_parameters(tiny_gpt2())) == ["c_attn", "c_fc", "c_proj"]
    assert kinds(select_parameters(tiny_bert())) == ["dense", "key", "query", "value"]
    assert kinds(select_parameters(tiny_t5())) == ["k", "o", "q", "v", "wi", "wo"]
    assert not any("classifier" in name for name in select_parameters(tiny_bert()))
    assert all(param.ndim == 2 for param in select_parameters(tiny_bert()).values())


def test_suffixes_regex_and_exclusion():
    model = tiny_llama()
    assert kinds(select_parameters(model, ["q_proj", "mlp.up_proj"])) == ["q_proj", "up_proj"]
    assert list(select_parameters(model, r".*\.1\.mlp\.(up|gate)_proj")) == [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert kinds(select_parameters(model, "all-linear", MLP)) == sorted(ATTENTION)
    assert len(select_parameters(model, "all-linear", r".*layers\.0.*")) == 7


def test_tied_weights_count_once_under_the_name_they_are_saved_by():
    model = tiny_llama()
    assert list(select_parameters(model, ["lm_head"])) == ["model.embed_tokens.weight"]
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = list(select_parameters(model, ["up_proj"]))
    assert names == ["model.layers.0.mlp.up_proj.weight"]
    report = measure_sparsity(model)
    assert sum(t.numel for t in report.tensors) == sum(p.numel() for p in model.parameters())


def test_what_starts_at_zero_is_refused_by_name_and_left_out_of_all_linear():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: all zero.*exclude_modules"):
        select_parameters(model, ["down_proj"])
    assert len(select_parameters(model)) == 13
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with pytest.raises(ValueError, match=r"lora_B.* and 1 more: all zero"):
        select_parameters(lora, r".*lora_B.*")
    with pytest.raises(ValueError, match="requires_grad"):
        select_parameters(lora)


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda: tiny_llama(tie_word_embeddings=False), {"target_modules": ["q_proj"]}),
        (lambda: tiny_llama(tie_word_embeddings=False), {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: tiny_llama(tie_word_embeddings=False), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_fc"], "fan_in_fan_out": True}),
        (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        (tiny_bert, {"target_modules": ["query", "classifier"]}),
    ],
)
def test_the_head_of_a_peft_model_is_left_out_too(make, options):
    model = get_peft_model(make(), LoraConfig(r=2, **options))
    names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in match_parameters(model)}
    assert names == set(match_parameters(make()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_modules": ["q_prj"]}, r"matches no linear layer. Did you mean 'q_proj'\?"),
        ({"target_modules": "q_proj"}, "regular expression for the whole name; give a list"),
        ({"target_modules": ["input_layernorm"]}, "end in: down_proj, gate_proj"),
        ({"exclude_modules": ["qproj"]}, r"exclude_modules=\['qproj'\] matches no linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves nothing"),
    ],
)
def test_patterns_that_match_nothing_say_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_parameters(tiny_llama(), **arguments)
