"""Masked LoRA: an update that is zero where the base is."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from conftest import same_bits, tiny_gpt2, tiny_llama, trainer_for, weights
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from test_adapters import LORA, logits, sparse
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    TorchAoConfig,
    Trainer,
)

from hf_lpdecay import load_masked_lora, mask_lora, merge_sparse
from hf_lpdecay.training import merge_cost
from hf_lpdecay.training.masked_lora import Masked, base_weight


def masked(make=tiny_llama, dtype=torch.float32, **options):
    config = LoraConfig(**{**LORA, "fan_in_fan_out": make is tiny_gpt2, **options})
    return mask_lora(get_peft_model(sparse(make, dtype), config))


def masked_layers(model):
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, Masked)}


def zeros(model):
    return {name: param == 0 for name, param in weights(model).items() if param.ndim == 2}


def plain_forward(layer, x, adapter="default"):
    """The slow twin: the effective weight in ordinary operations."""
    base, a, b = layer.get_base_layer(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = base.weight.T if layer.fan_in_fan_out else base.weight
    update = layer.scaling[adapter] * (b @ a) * (weight != 0)
    return F.linear(x, weight, base.bias) + F.linear(layer.lora_dropout[adapter](x), update)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained_base", [False, True])
def test_a_layer_and_its_gradients_agree_with_plain_autograd(make, dropout, trained_base):
    model = masked(make, torch.float64, lora_dropout=dropout).double().train()
    layer = next(iter(masked_layers(model).values()))
    layer.get_base_layer().weight.requires_grad_(trained_base)
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves = [x, *factors] + [layer.get_base_layer().weight] * trained_base
    results = []
    for forward in (layer, lambda x: plain_forward(layer, x)):
        torch.manual_seed(0)
        out = forward(x)
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), leaves)])
    if trained_base and not dropout:  # straight through the mask: a frozen zero is not this layer's matter
        results = [result[:-1] for result in results]
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("merge", [lambda model: model.merge_and_unload(), merge_sparse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merging_changes_no_output_and_keeps_every_zero(make, dtype, merge):
    model = masked(make, dtype, use_rslora=True)
    was = zeros(sparse(make, dtype))
    assert merge_cost(model).total == 0
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(sparse(make, dtype)))
    before = logits(model)
    assert (before - base).abs().max() > 1e-2
    after = logits(merge(model))
    assert torch.allclose(before, after, atol=1e-5 if dtype == torch.float32 else 0)
    merged = model.get_base_model()
    assert all(torch.equal(was[name], now) for name, now in zeros(merged).items() if name in was)


def test_a_weight_that_cancels_with_its_update_does_not_become_a_zero():
    model = masked(dtype=torch.bfloat16)
    layer = next(iter(masked_layers(model).values()))
    weight = layer.get_base_layer().weight
    was = weight.detach().clone()
    with torch.no_grad():  # the first row's update is its negative in the first place
        layer.lora_A["default"].weight.zero_()[0, 0] = 1
        layer.lora_B["default"].weight.zero_()[:, 0] = -was[:, 0].float() / layer.scaling["default"]
    model.merge_adapter()
    assert torch.equal(weight == 0, was == 0)
    model.unmerge_adapter()
    assert torch.equal(weight == 0, was == 0) and torch.allclose(weight, was, atol=1e-6)


def test_the_product_is_not_kept_for_the_backward_pass():
    layer = next(iter(masked_layers(masked()).values()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, layer.in_features))
    own = {id(param) for param in layer.parameters()}
    assert [tensor.shape for tensor in saved if id(tensor) not in own] == [(2, layer.in_features)]


def test_several_adapters_one_of_them_plain():
    model = masked()
    model.add_adapter("second", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    mixed = logits(model)
    mask_lora(model)
    assert not torch.equal(mixed, logits(model))
    both = logits(model)
    model.merge_adapter()
    assert torch.allclose(both, logits(model), atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(both, logits(model), atol=1e-5)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.allclose(logits(model), logits(copy.deepcopy(model)))
    pickle.loads(pickle.dumps(next(iter(masked_layers(model).values()))))


def test_mixed_batches_and_gradient_checkpointing_and_autocast():
    model = masked()
    ids = torch.arange(16).view(2, 8)
    mixed = model.eval()(ids, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed[0], model(ids).logits[0], atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(mixed[1], model(ids).logits[1], atol=1e-5)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():  # of the newer name that the oldest supported version lacks
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # attention dropout
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters() if param.requires_grad})
        model.zero_grad()
    assert same_bits(*gradients) and all(grad.abs().sum() > 0 for grad in gradients[0].values())


def test_training_saving_and_loading(tmp_path):
    model = masked(init_lora_weights=True)
    trainer_for(tmp_path, trainer_cls=Trainer, model=model, learning_rate=1e-2).train()
    model.save_pretrained(tmp_path / "adapter")
    entry = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert entry["peft_type"] == "LORA" and len(entry["lp_masked_layers"]) == 14
    again = load_masked_lora(sparse(), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(again)) and again.active_peft_config.lp_masked_layers
    with pytest.warns(UserWarning, match="Unexpected keyword arguments.*lp_masked_layers"):
        plain = PeftModel.from_pretrained(sparse(), tmp_path / "adapter")
    assert not torch.equal(logits(plain), logits(again))
    assert torch.equal(logits(mask_lora(plain)), logits(again))
    other = sparse()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0].zero_()
    message = r"in 1 of 14 masked layers, at least \d+ weights differ \(model.layers.0.self_attn.q_proj: \d+ zeros"
    with pytest.raises(ValueError, match=message):
        load_masked_lora(other, tmp_path / "adapter")


def test_an_adapter_that_was_not_masked_is_not_loaded_as_one(tmp_path):
    get_peft_model(sparse(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved masked: load it with PeftModel"):
        load_masked_lora(sparse(), tmp_path)


@pytest.mark.parametrize("merge", [lambda model: model.merge_and_unload(), merge_sparse])
@pytest.mark.parametrize("mask", [True, False])
def test_a_tied_head_is_merged_into_a_copy(tmp_path, merge, mask):
    if not mask and merge is not merge_sparse:
        pytest.skip("PEFT's own matter")
    base = tiny_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with torch.no_grad():
        base.lm_head.weight.masked_fill_(base.lm_head.weight.abs() < 0.01, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]}))
    embedding = base.model.embed_tokens.weight.detach().clone()
    if mask:
        mask_lora(model)
    before = logits(model)
    merged = merge(model)
    assert not merged.config.tie_word_embeddings and torch.equal(merged.model.embed_tokens.weight, embedding)
    after = logits(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after)
    if mask:
        assert torch.allclose(before, after, atol=1e-5)


def test_what_cannot_be_masked_is_told():
    with pytest.raises(TypeError, match="got a LlamaForCausalLM, which has no adapters to mask"):
        mask_lora(tiny_llama())
    for config, message in (
        (LoraConfig(**LORA, use_dora=True), "type is DoRA, and only LoRA"),
        (LoHaConfig(r=4, target_modules=["q_proj"]), "type is LOHA, and only LoRA"),
        (LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}), "embed_tokens is a Embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_lora(get_peft_model(tiny_llama(), config))
    merged = masked()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already: call model\.unmerge_adapter"):
        mask_lora(merged)
    dense = tiny_llama()
    with pytest.warns(UserWarning, match="there is nothing to mask"):
        mask_lora(get_peft_model(dense, LoraConfig(**LORA)))


def tiny_mixtral():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 64, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(**options, **more))


@pytest.mark.parametrize("merge", [lambda model: model.merge_and_unload(), merge_sparse])
def test_experts_parameters(tmp_path, merge):
    def base():
        model = tiny_mixtral()
        with torch.no_grad():
            for param in (param for name, param in model.named_parameters() if ".experts." in name):
                param.masked_fill_(param.abs() < param.abs().median(), 0.0)
        return model

    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    config = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = mask_lora(get_peft_model(base(), config))
    assert merge_cost(model).total == 0 and len(merge_cost(model).layers) == 2
    before = logits(model)
    assert (before - logits(base())).abs().max() > 1e-3
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(param.grad.abs().sum() > 0 for param in model.parameters() if param.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_masked_lora(base(), tmp_path)), before, atol=1e-6)
    merged = merge(model)
    assert torch.allclose(logits(merged), before, atol=1e-5)
    for name, param in base().named_parameters():
        assert torch.equal(param == 0, merged.get_parameter(name) == 0), name


def quantization(kind):
    if kind == "torchao int8":
        quantize = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantize.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    options = {"bnb_4bit_quant_type": kind.split()[1], "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes fp4", "bitsandbytes int8", "torchao int8"])
def test_a_quantized_base_is_masked_and_a_merge_gives_the_dequantized_sparse_model(tmp_path, kind):
    config = quantization(kind)
    base = sparse(lambda: tiny_llama(hidden_size=64, intermediate_size=128))
    pruned = zeros(base)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model = mask_lora(get_peft_model(base, LoraConfig(**LORA)))
    own = {name: base_weight(layer) == 0 for name, layer in masked_layers(model).items()}
    assert len(own) == 14 and merge_cost(model).total == 0
    assert all((zero | ~pruned[f"{name}.weight"]).all() for name, zero in own.items())  # at least the base's
    before = logits(model)
    model.train()(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(param.grad.abs().sum() > 0 for param in model.parameters() if param.requires_grad)
    merged = merge_sparse(model)
    after = logits(merged)
    # What bitsandbytes computes in bfloat16 or with 8-bit inputs, the merged model does not.
    assert torch.allclose(before, after, atol=1e-5 if kind == "torchao int8" else 2e-2)
    for name, zero in own.items():
        assert torch.equal(zero, merged.get_parameter(f"{name}.weight") == 0)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), after) and not hasattr(again.config, "quantization_config")
