"""A whole model made sparse, saved, loaded and made dense again."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from conftest import same_bits, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, weights
from peft import LoraConfig, get_peft_model
from test_experts import tiny_gpt_oss
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lpdecay import cli, load_sparse, mask_lora, merge_sparse, pack, to_sparse
from hf_lpdecay.inference import SparseLinear, convert, head, kernels, loading, speed, to_dense
from hf_lpdecay.sparsity import select_parameters


def half_zero(model, share=0.6):
    generator = torch.Generator().manual_seed(0)
    for i, param in enumerate(select_parameters(model).values()):
        zeros = 0.95 if i % 3 == 0 else share
        param.data[torch.rand(param.shape, generator=generator) < zeros] = 0.0
    return model.eval()


@pytest.fixture(autouse=True)
def every_layer_is_faster(monkeypatch):
    """Both encodings, whatever this machine is good at."""
    choose = lambda weight, sparsity: None if sparsity < 0.3 else sparsity > 0.9  # noqa: E731
    monkeypatch.setattr(convert, "choose_encoding", choose)
    monkeypatch.setattr(loading, "choose_encoding", choose)
    monkeypatch.setattr(head, "_is_faster", lambda *args: True)


def outputs(model):
    inputs = {"input_ids": torch.arange(20)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(5)[None]
    return model(**inputs).logits.detach()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5, tiny_mixtral, tiny_gpt_oss])
def test_outputs_checkpoint_and_the_way_back(make, tmp_path):
    model = half_zero(make())
    before, expected = weights(model), outputs(model)
    model.save_pretrained(tmp_path / "dense")
    assert to_sparse(model) is model
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) >= 8
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "sparse")
    digests = [hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("dense", "sparse")]
    assert digests[0] == digests[1]
    pack(tmp_path / "dense", tmp_path / "packed")
    for folder in ("dense", "packed"):
        loaded = load_sparse(tmp_path / folder)
        assert same_bits(model.state_dict(), loaded.state_dict())
        assert torch.equal(outputs(loaded), outputs(model))
    back = to_dense(model)
    assert same_bits(before, weights(back)) and all(param.requires_grad for param in back.parameters())
    inputs = {"input_ids": torch.arange(9)[None]}
    if back.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(3)[None]
    back.train()(**inputs).logits.sum().backward()


def test_bfloat16_values_keep_a_tied_head_tied(tmp_path):
    model = half_zero(tiny_llama(hidden_size=64))
    rounded = half_zero(tiny_llama(hidden_size=64))
    for name, param in rounded.named_parameters():
        if "proj" in name or "embed" in name:
            param.data = param.data.bfloat16().float()
    expected = outputs(rounded)
    to_sparse(model, dtype=torch.bfloat16)
    assert isinstance(model.lm_head, head.PackedHead) and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16 and outputs(model).dtype == torch.float32
    assert (outputs(model) - expected).abs().max() < 1e-3 * expected.abs().max()
    generated = model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, rounded.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(outputs(again), expected, rtol=1e-2, atol=1e-3)
    back = to_dense(model)
    assert back.lm_head.weight is back.model.embed_tokens.weight and back.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("packed", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_another_dtype_is_the_dense_models_too(make, packed):
    options = {"n_embd": 64} if make is tiny_gpt2 else {"hidden_size": 64}
    model = half_zero(make(**options))
    expected = to_dense(to_sparse(copy.deepcopy(model), dtype=packed)).to(torch.float16)
    other = to_sparse(model, dtype=packed).half()
    torch.testing.assert_close(outputs(other), outputs(expected), rtol=1e-2, atol=1e-2)
    back = to_dense(other)
    assert {param.dtype for param in back.parameters()} == {torch.float16} == {outputs(back).dtype}
    assert same_bits(weights(expected), weights(back))
    with pytest.raises(TypeError, match=r"cannot be made torch\.float64"):
        to_sparse(back).double()


def test_what_stays_dense_is_said(caplog, monkeypatch):
    model = half_zero(tiny_llama())
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    to_sparse(model, exclude_modules=["q_proj"])
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert "11 of 12 linear layers are sparse" in caplog.text and "1 with less than 30% zeros" in caplog.text
    monkeypatch.setenv("CXX", "/nowhere/c++")
    kernels.kernel_for.cache_clear()
    try:
        assert not any(isinstance(module, SparseLinear) for module in to_sparse(half_zero(tiny_llama())).modules())
    finally:
        kernels.kernel_for.cache_clear()
    assert "could not be compiled with /nowhere/c++" in caplog.text and "stay dense" in caplog.text


def test_bad_input_is_refused_and_nothing_changes():
    class Quantized(nn.Linear):
        def forward(self, x):
            return x

    model = half_zero(tiny_llama())
    with pytest.raises(ValueError, match=r"Invalid dtype=torch\.int8"):
        to_sparse(model, dtype=torch.int8)
    model.model.layers[1].mlp.up_proj = Quantized(32, 64, bias=False)
    with pytest.raises(ValueError, match=r"up_proj is a Quantized, which computes its product in a way of its own"):
        to_sparse(model)
    with pytest.raises(ValueError, match=r"is torch\.float64: load the model with"):
        to_sparse(half_zero(tiny_llama()).double())
    with pytest.raises(ValueError, match="q_proj is on meta"):
        to_sparse(tiny_llama().to("meta"))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_a_layer_with_an_adapter_is_refused_until_it_is_merged():
    options = {"r": 2, "init_lora_weights": False}
    experts = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], **options}
    for make, config, named in (
        (tiny_llama, LoraConfig(target_modules=["q_proj"], **options), r"q_proj\.base_layer is the base of a Linear"),
        (tiny_gpt2, LoraConfig(target_modules=["c_fc"], **options), r"c_fc\.base_layer is the base of a Linear"),
        (tiny_mixtral, LoraConfig(**experts), r"experts\.base_layer\.\S+ is the base of a ParamWrapper"),
    ):
        model = get_peft_model(half_zero(make()), config)
        with pytest.raises(ValueError, match=f"{named} of PEFT.*merge the adapter first"):
            to_sparse(model)
        with pytest.raises(ValueError, match=r"is the base of a Masked\w+ of PEFT"):
            to_sparse(mask_lora(model).get_base_model())
        assert not any(isinstance(module, SparseLinear) for module in model.modules())
        merged = merge_sparse(model)
        expected = outputs(merged)
        torch.testing.assert_close(outputs(to_sparse(merged)), expected, rtol=1e-4, atol=1e-5)
    model = get_peft_model(half_zero(tiny_llama()), LoraConfig(target_modules=["q_proj"], **options)).eval()
    expected = outputs(model)
    torch.testing.assert_close(outputs(to_sparse(model, exclude_modules=["q_proj"])), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_damaged_archive_and_a_missing_one(tmp_path):
    half_zero(tiny_llama()).save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    shard = tmp_path / "packed" / "packed-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_sparse(tmp_path / "packed")
    config = tmp_path / "packed" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "x": 1}))
    with pytest.raises(ValueError, match=r"the checksum of config\.json is wrong"):
        load_sparse(tmp_path / "packed")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="lacks packed-00001"):
        load_sparse(tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="neither a folder nor the id"):
        load_sparse(tmp_path / "nothing")


def test_the_choice_is_measured_once_for_each_shape():
    weight = torch.zeros(64, 64)
    assert speed.choose_encoding(weight, 0.1) is None
    speed._measured.cache_clear()
    assert {speed.choose_encoding(weight, share) for share in (0.95, 0.953, 0.99, 0.7, 0.749)} <= {None, False, True}
    assert speed._measured.cache_info().misses == 2


def test_only_what_is_clearly_faster_is_taken():
    choose = lambda dense, bits, columns=(9, 9): speed.fastest({None: dense, False: bits, True: columns})  # noqa: E731
    assert choose((2, 3), (1, 2)) is False
    assert choose((2, 3), (1, 2.9)) is None and choose((2, 3), (1.95, 2)) is None  # with eight rows, or one, hardly
    assert choose((2, 3), (1, 2), (0.8, 2)) is True and choose((2, 3), (1, 2), (0.95, 2)) is False
    assert choose((2, 3), (2, 2), (1.8, 2)) is True and speed.fastest({None: [1, 1], False: [2, 2]}) is None


def test_layers_are_timed_out_of_the_cache_in_turn(monkeypatch):
    monkeypatch.setattr(speed, "_CACHE_BYTES", 4 * 9000)  # of one layer: 64 x 64 bfloat16, and less than that packed
    order = []

    class Noted(nn.Linear):
        def forward(self, x):
            order.append(self.weight.data_ptr())
            return super().forward(x)

    dense = Noted(64, 64, bias=False, dtype=torch.bfloat16)
    sparse = SparseLinear.from_dense(dense.weight.detach())
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    seconds = speed.time_in_turn({"dense": (dense, x), "sparse": (sparse, x)}, 3)
    copies = len(set(order))
    assert copies >= 2 and order == order[:copies] * 4 and len(seconds["dense"]) == len(seconds["sparse"]) == 3 * copies
    copied = speed._copy(sparse)
    assert torch.equal(copied(x), sparse(x)) and copied.values.data_ptr() != sparse.values.data_ptr()


def test_generate_and_eval_on_the_command_line(language_model, tmp_path, capsys):
    model = half_zero(AutoModelForCausalLM.from_pretrained(language_model))
    shutil.copytree(language_model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed")
    results = []
    for path, flag in (("model", "--dense"), ("model", "--sparse"), ("packed", "--sparse")):
        flags = ["--prompt", "def main", "--max_new_tokens", "4", flag, "--json"]
        assert cli.main(["generate", str(tmp_path / path), *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert len({result["text"] for result in results}) == 1 and results[0]["new_tokens"] == 4
    assert results[2]["weight_bytes"] < 0.9 * results[0]["weight_bytes"] and results[2]["tokens_per_second"] > 0
    assert cli.main(["generate", str(tmp_path / "packed"), "--prompt", "x", "--dense"]) == 2
    assert "is an archive: load it sparse" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("def main(): return 1\n" * 40)
    losses = []
    for path, flags in (("model", []), ("packed", ["--sparse"])):
        arguments = ["--file", str(tmp_path / "text.txt"), "--context_length", "32", "--json", *flags]
        assert cli.main(["eval", str(tmp_path / path), *arguments]) == 0
        losses.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
