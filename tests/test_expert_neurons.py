"""Neurons of experts: equally many in each, cut out of their 3-D parameters."""

import pytest
import torch
from conftest import VOCAB, constant, tiny_mixtral, trainer_for
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_lpdecay import LpAdamW, LpDecayConfig, shrink
from hf_lpdecay.sparsity import Ramp, SparsityController, Units, find_units, participants
from hf_lpdecay.sparsity.units import UnitSlice


COMMON = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0},
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"moe_intermediate_size": 24, "intermediate_size": 48},
}
GPT_OSS = {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 8, "layer_types": ["full_attention"] * 2}
# Every model with the numbers of its config that say how wide something is.
MODELS = {
    "mixtral": ({"num_local_experts": 4, "intermediate_size": 48}, ["intermediate_size"]),
    "olmoe": ({"num_experts": 4, "intermediate_size": 24}, ["intermediate_size"]),
    # Beside the experts one that all tokens share, and layers without experts.
    "qwen2_moe": (
        {**QWEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
        ["moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"],
    ),
    "qwen3_moe": ({**QWEN, "head_dim": 8}, ["moe_intermediate_size"]),
    # Shared experts twice as wide as the others, by the same number.
    "deepseek_v3": (DEEPSEEK, ["moe_intermediate_size", "intermediate_size"]),
    # Input x output, with biases; gates between what they gate.
    "gpt_oss": (GPT_OSS, ["intermediate_size"]),
}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON, **MODELS[name][0]))
    for param_name, param in model.named_parameters():
        if param_name.endswith("bias"):  # that start at zero
            nn.init.normal_(param, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(3, 35).view(2, 16)).logits


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_neurons_of_each_expert_are_trained_to_zero_and_cut_out(name, tmp_path, capsys):
    config = LpDecayConfig(target_sparsity=0.5, pattern="neurons", calibration_batches=2)
    trainer = trainer_for(tmp_path, config, model=make(name), max_steps=16, logging_steps=16)
    trainer.train()
    order = "input x output" if name == "gpt_oss" else "output x input"
    assert f"The experts' matrices are stored as {order}." in capsys.readouterr().out
    model, fields = trainer.model, MODELS[name][1]
    found = find_units(model, "neurons")
    assert any(units.experts == 4 for units in found)
    for units in found:
        assert (2 * units.live().sum(-1) == units.count).all(), units.name
        for part in units.slices:  # what reads for a neuron is zero when what writes is
            assert torch.equal(part.along((part.param != 0).any(-1 - part.dim), units.count).any(-1), units.live())
    before = logits(model)
    smaller = shrink(model)
    for field in fields:
        assert 2 * getattr(smaller.config, field) == getattr(model.config, field), field
    torch.testing.assert_close(logits(smaller), before, rtol=1e-4, atol=1e-5)
    smaller.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(smaller))


def expert_units(tensors, interleaved, names):
    """The neurons of experts in weights of one or three dimensions."""
    up, down = tensors
    dim, width = (1, 2) if interleaved else (0, 1)
    starts = [0] if interleaved else [0, up.shape[-2] // 2]
    parts = [UnitSlice(names[0], up, dim, start, width) for start in starts]
    return Units("neurons", down.shape[-1 - dim], (*parts, UnitSlice(names[1], down, 1 - dim, 0, 1)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"hard_cut": True}, {"trim": False}])
def test_experts_in_one_parameter_become_what_each_would_alone(interleaved, options):
    """The slow twin: a parameter, and a ranking, for each expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 6, 32), (3, 16, 6)] if interleaved else [(3, 32, 6), (3, 6, 16)]
    scale = torch.tensor([1.0, 0.1, 5.0])[:, None, None]  # of the experts, so that one ranking would be another
    values = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    config = LpDecayConfig(target_sparsity=0.5, pattern="neurons", importance="magnitude", p=0.5, **options)
    results = []
    for together in (True, False):
        weights = [[value.clone()] if together else list(value.clone()) for value in values]
        weights = [[nn.Parameter(one) for one in each] for each in weights]
        params = {f"{kind}{i}": one for kind, each in zip(("up", "down"), weights) for i, one in enumerate(each)}
        optimizer = LpAdamW([{"params": list(params.values())}], lr=1e-2, p=0.5)
        units = [expert_units(pair, interleaved, (f"up{i}", f"down{i}")) for i, pair in enumerate(zip(*weights))]
        controller = SparsityController(config, params, optimizer, Ramp.from_config(config, 40), units=units)
        noise = torch.Generator().manual_seed(1)
        for step in range(1, 41):
            for each, shape in zip(weights, shapes):
                grads = torch.randn(shape, generator=noise)
                for param, grad in zip(each, [grads] if together else grads):
                    param.grad = grad.clone()
            controller.before_step()
            optimizer.step()
            controller.after_step(step, constant(1e-2))
        assert not any("lp_unit" in state for state in optimizer.state.values())
        results.append([each[0].detach() if together else torch.stack(list(each)).detach() for each in weights])
    for one, other in zip(*results):
        assert torch.equal(one == 0, other == 0) and (one == 0).sum() == one.numel() // 2
        # The thresholds are rounded, and differently.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_experts_whose_layout_is_not_known_are_refused():
    model = tiny_mixtral()
    for layer in model.model.layers:
        del layer.mlp.experts.is_concatenated
    with pytest.raises(ValueError, match="MixtralExperts has experts, and Transformers does not say"):
        participants(model, LpDecayConfig(target_sparsity=0.5, pattern="neurons"))


def test_only_one_of_an_experts_weights_is_not_enough():
    config = LpDecayConfig(target_sparsity=0.5, pattern="neurons", target_modules=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"neurons of each expert need all of .*gate_up_proj is not selected"):
        participants(tiny_mixtral(), config)
