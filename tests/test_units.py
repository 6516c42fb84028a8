"""Neurons and heads: found by shape, decayed and cut as a whole."""

import copy

import pytest
import torch
from conftest import VOCAB, constant, controlled, drive, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.sparsity import find_units, participants


SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}


def from_config(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    return auto.from_config(config)


# Every model, its neurons per block and its heads (or key/value groups) per attention.
MODELS = {
    "llama": (tiny_llama, 64, 2),
    "llama-square": (lambda: tiny_llama(intermediate_size=32, num_key_value_heads=4), 32, 4),
    "qwen2": (lambda: from_config(Qwen2Config(**LLAMA_LIKE)), 48, 2),
    "qwen3": (lambda: from_config(Qwen3Config(**LLAMA_LIKE, head_dim=16)), 48, 2),
    "mistral": (lambda: from_config(MistralConfig(**LLAMA_LIKE)), 48, 2),
    "gpt2": (tiny_gpt2, 128, 4),
    "opt": (lambda: from_config(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)), 48, 4),
    "bert": (tiny_bert, 64, 4),
    "roberta": (lambda: from_config(RobertaConfig(**SHAPE, intermediate_size=48), AutoModelForMaskedLM), 48, 4),
    "t5": (tiny_t5, 64, 4),
}


def outputs(model):
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB, (2, 12))
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(0)
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("pattern", ["neurons", "heads"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_columns_of_a_unit_belong_together(name, pattern):
    """Without its columns a unit has no effect: its rows then make no difference, and those of another one would."""
    make, neurons, heads = MODELS[name]
    model = make()
    for param in model.parameters():  # biases too
        nn.init.normal_(param, std=0.3)
    found = find_units(model, pattern)
    blocks = 4 if name == "t5" else 2
    assert len(found) == (6 if (name, pattern) == ("t5", "heads") else blocks)
    assert {units.count for units in found} == {neurons if pattern == "neurons" else heads}
    reference = outputs(model)
    without = copy.deepcopy(model)
    params = dict(without.named_parameters())
    for units in found:
        pruned = torch.zeros(units.count)
        pruned[::2] = 1.0
        for part in units.slices[-1:]:
            part.of(params[part.name].data, units.count)[pruned > 0] = 0.0
    columns_only = outputs(without)
    assert not torch.allclose(columns_only, reference, atol=1e-2)
    for units in found:
        for part in units.slices:
            part.of(params[part.name].data, units.count)[::2] = 0.0
    torch.testing.assert_close(outputs(without), columns_only)
    for part in found[0].slices[:-1]:  # what stays does make a difference
        part.of(params[part.name].data, found[0].count)[1::2] = 0.0
    assert not torch.allclose(outputs(without), columns_only, atol=1e-3)


@pytest.mark.parametrize("importance", ["adam", "magnitude"])
@pytest.mark.parametrize("pattern, target", [("neurons", 0.5), ("neurons", 0.3), ("heads", 0.5)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_units_die_as_one_and_equally_many_per_layer(make, pattern, target, importance):
    model = make()
    params, optimizer, controller = controlled(
        target,
        pattern=pattern,
        importance=importance,
        model=model,
        ramp_end=0.7,
        num_plans=20,
        require_shrinkable=False,
    )
    found = find_units(model, pattern)
    assert {id(param) for param in params.values()} == {id(part.param) for units in found for part in units.slices}

    def live(units):
        return sum(part.of(part.param, units.count).flatten(1).count_nonzero(1) for part in units.slices)

    drive(params, optimizer, controller, controller.ramp.end - 1)
    for units in found:
        whole = sum(part.of(part.param, units.count).flatten(1).shape[1] for part in units.slices)
        dead = round(target * units.count)
        # The decay has done nearly all of it before the cut, and nothing to the others.
        assert dead - 1 - dead // 8 <= int((live(units) < whole / 2).sum()) <= dead
        assert int((live(units) == whole).sum()) >= units.count - dead
    controller.after_step(controller.ramp.end, constant(0.0))
    for units in found:
        assert sorted(set(live(units).tolist())) == [0, whole] and int((live(units) == 0).sum()) == dead
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params.values())
    drive(params, optimizer, controller, 5)  # well after the end
    assert all(int((live(units) == 0).sum()) == dead for units in found)


def test_the_size_of_a_unit_is_the_root_mean_square_of_its_weights():
    (units, _) = find_units(tiny_llama(), "neurons")
    gate, up, down = (part.param.detach() for part in units.slices)
    by_hand = torch.stack([torch.cat([gate[i], up[i], down[:, i]]).double().square().mean().sqrt() for i in range(64)])
    torch.testing.assert_close(units.score(lambda param: param.detach().abs()).double(), by_hand)
    for param, values in units.spread(torch.arange(64.0)):
        assert torch.equal(
            values.expand(param.shape)[:, 5] if param is units.slices[-1].param else values[5],
            values.new_full((32,) if param is units.slices[-1].param else (1,), 5.0),
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["up_proj"]}, r"layers\.0: neurons need all of .*gate_proj.* is not selected: widen"),
        ({"target_modules": ["q_proj", "k_proj"]}, "belongs to a unit of this pattern: widen target_modules"),
        ({"pattern": "heads", "target_sparsity": 0.9}, "0.9 of the 2 model.layers.0: heads would be 2 of them"),
    ],
)
def test_units_that_cannot_be_had_are_refused(options, message):
    config = LpDecayConfig(**{"pattern": "neurons", "target_sparsity": 0.5, **options})
    with pytest.raises(ValueError, match=message):
        participants(tiny_llama(), config)


def test_an_unknown_order_of_queries_keys_and_values_is_refused_with_what_was_seen():
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=48))
    assert len(find_units(model, "heads")) == 2
    model.config.model_type = "of_unknown_order"
    with pytest.raises(ValueError, match=r"in gpt_neox.layers.0 .*attention.query_key_value \(32 -> 96\)"):
        find_units(model, "heads")
    with pytest.raises(ValueError, match="Sequential has no list of blocks"):
        find_units(nn.Sequential(nn.Linear(4, 4)), "neurons")


@pytest.mark.parametrize("pattern", ["neurons", "heads"])
def test_several_models_in_one_are_refused(pattern):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=tiny_llama().config, vision_config=vision))
    with pytest.raises(
        ValueError, match=r"LlavaForConditionalGeneration has no hidden_size, .* the inner one by itself"
    ):
        find_units(model, pattern)


def test_a_layer_can_be_left_out_as_a_whole():
    options = {"pattern": "neurons", "target_sparsity": 0.5, "exclude_modules": r".*layers\.0\..*"}
    with pytest.raises(
        ValueError, match=r"the width of model\.layers\.1: neurons alone: intermediate_size is that of model\.layers\.0"
    ):
        participants(tiny_llama(), LpDecayConfig(**options))
    config = LpDecayConfig(**options, require_shrinkable=False)
    assert all("layers.1.mlp" in name for name in participants(tiny_llama(), config))
