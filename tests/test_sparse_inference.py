"""A sparse model where dense ones are used: pipelines, lm-eval, copies, compiled, exported; and what loading takes."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import same_bits, tiny_gpt2, tiny_llama, tiny_mixtral, trainer_for
from safetensors.torch import load_file, save_file
from test_experts import tiny_gpt_oss
from test_to_sparse import every_layer_is_faster, half_zero, outputs  # noqa: F401 (a fixture)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_lpdecay import LpDecayConfig, load_sparse, measure_sparsity, native, pack, to_semi_structured, to_sparse
from hf_lpdecay.evaluation import lm_eval_scores
from hf_lpdecay.inference import SparseLinear, kernels, names, to_dense
from hf_lpdecay.inference.experts import SparseExperts
from hf_lpdecay.sparsity import select_parameters


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_and_a_pipeline(language_model, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{a} plus 1 is", "choices": [str(a + 1), "x"], "answer": 0} for a in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "sums.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    scores, texts = [], []
    for convert in (nn.Module.eval, to_sparse):
        model = convert(half_zero(AutoModelForCausalLM.from_pretrained(language_model)))
        scores.append(lm_eval_scores(model, tokenizer, ["sums"], include_path=str(tmp_path), batch_size=2))
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts.append(generate("def main", max_new_tokens=4, do_sample=False)[0]["generated_text"])
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert scores[0]["sums"]["acc,none"] == scores[1]["sums"]["acc,none"] and texts[0] == texts[1]


def test_copied_compiled_and_exported():
    model = to_sparse(half_zero(tiny_llama()))
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    ids = torch.arange(20)[None]
    compiled = torch.compile(model, backend="eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(compiled, expected)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    program = torch.export.export(Logits(), (ids,), strict=False)
    assert "hf_lpdecay.sparse_linear" in program.graph_module.code
    torch.testing.assert_close(program.module()(ids), expected)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_expert_is_a_sparse_layer(make, implementation):
    model = half_zero(make())
    model.config._experts_implementation = implementation
    expected = outputs(model)
    to_sparse(model, dtype=torch.float16)
    experts = [module for module in model.modules() if isinstance(module, SparseExperts)]
    assert len(experts) == 4 and len(experts[0]) == model.config.num_local_experts
    assert not any(param.dim() == 3 for param in model.parameters())
    assert (outputs(model) - expected).abs().max() < 5e-3 * expected.abs().max()
    assert (outputs(copy.deepcopy(model)) == outputs(model)).all()
    with pytest.raises(TypeError, match="takes part in products only, not in add"):
        torch.add(torch.ones(2), experts[0][0])
    to_dense(model)
    assert model.config._experts_implementation == implementation
    assert sum(param.dim() == 3 and param.dtype == torch.float32 for param in model.parameters()) == 4


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral, tiny_gpt_oss])
def test_state_dicts_of_dense_and_sparse_models_are_loaded(make):
    first, second = half_zero(make()), half_zero(make(), share=0.4)
    expected, dense = outputs(second), second.state_dict()
    dense = {name: tensor.clone() for name, tensor in dense.items()}
    to_sparse(first)
    assert (outputs(first) - expected).abs().max() > 1e-3
    first.load_state_dict(dense)
    torch.testing.assert_close(outputs(first), expected, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(to_sparse(half_zero(make())))
    copied.load_state_dict(first.state_dict())
    assert torch.equal(outputs(copied), outputs(first)) and same_bits(copied.state_dict(), first.state_dict())
    name = next(name for name in dense if "down_proj" in name or "c_proj" in name)
    lacking = {key: tensor for key, tensor in dense.items() if key != name}
    with pytest.raises(RuntimeError, match="Missing key"):
        copied.load_state_dict(lacking)
    to_dense(copied).load_state_dict(dense)
    torch.testing.assert_close(outputs(copied), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_training_names_the_way_back(make):
    model = to_sparse(half_zero(make()))
    expected = outputs(model)
    model.train()  # the whole of it, and refused at its first layer: no dropout without a message
    assert all(module.training for module in model.modules())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"with model\.eval\(\), and cannot be trained"):
        outputs(model)
    assert torch.equal(outputs(model.eval()), expected)
    inputs = torch.zeros(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"to_dense\(model\) gives the dense model"):
        model.model.layers[0].mlp(inputs)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral, tiny_gpt_oss])
def test_a_sparse_model_is_measured_as_the_dense_one(make, tmp_path):
    model = half_zero(make())
    next(iter(select_parameters(model).values())).data.view(-1)[:3] = -0.0
    few = next(name for name in select_parameters(model) if "o_proj" in name or "c_proj" in name)
    model.get_parameter(few).data.fill_(1.0)  # which stays dense
    model.save_pretrained(tmp_path)
    by_name = lambda report: {tensor.name: tensor for tensor in report.tensors}  # noqa: E731
    expected = measure_sparsity(model)
    for sparse in (to_sparse(model), load_sparse(tmp_path), to_sparse(model)):  # the last a second time
        assert few in dict(sparse.named_parameters())
        found = measure_sparsity(sparse)
        assert by_name(found) == by_name(expected) and found.sparsity == expected.sparsity > 0.5
    modules = ["down_proj", "c_fc"]
    assert by_name(measure_sparsity(model, modules)) == by_name(measure_sparsity(to_dense(model), modules))


def test_a_sparse_model_is_left_alone_or_named(tmp_path):
    model = to_sparse(half_zero(tiny_llama()))
    kept, expected = list(model.modules()), outputs(model)
    assert list(to_sparse(model, dtype=torch.bfloat16).modules()) == kept and torch.equal(outputs(model), expected)
    for refused in (select_parameters, lambda model: trainer_for(tmp_path, LpDecayConfig(lp_lambda=0.1), model=model)):
        with pytest.raises(ValueError, match=r"matches sparse layers of to_sparse only, .*to_dense\(model\) gives"):
            refused(model)
    with pytest.raises(ValueError, match=r"matches no dense nn\.Linear, and only these can be 2:4"):
        to_semi_structured(model)
    with pytest.raises(ValueError, match=r"'up_prj'\] matches no linear layer\. Did you mean 'up_proj'"):
        measure_sparsity(model, ["up_prj"])


def test_experts_that_are_computed_otherwise_stay_dense(monkeypatch, caplog):
    monkeypatch.setattr("hf_lpdecay.inference.convert.has_eager", lambda module: False)
    model = to_sparse(half_zero(tiny_mixtral()))
    assert sum(param.dim() == 3 for param in model.parameters()) == 4
    assert "8 of 12 linear layers are sparse" in caplog.text and "4 of experts that are not computed" in caplog.text


def test_experts_one_by_one_in_the_files_are_joined(tmp_path, caplog, monkeypatch):
    model = half_zero(tiny_mixtral())
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    for folder in ("dense", "packed"):
        loaded = load_sparse(tmp_path / folder)
        assert sum(isinstance(module, SparseExperts) for module in loaded.modules()) == 4
        assert same_bits(loaded.state_dict(), model.state_dict())
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)
    half = load_sparse(tmp_path / "dense", dtype=torch.float16)
    assert half.model.layers[0].mlp.experts.down_proj[0].values.dtype == torch.float16
    assert "loaded dense first" not in caplog.text
    monkeypatch.setattr(names, "_joins_experts", lambda converter: False)
    loaded = load_sparse(tmp_path / "dense")
    assert "are not MixtralForCausalLM's own one by one, so the model is loaded dense first" in caplog.text
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_matrix_that_does_not_fit_its_experts(tmp_path):
    half_zero(tiny_mixtral()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"intermediate_size": 40}, "of its expert 0"),
        ({"num_local_experts": 3}, "has the shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_sparse(tmp_path)


def test_a_checkpoint_of_the_base_model(tmp_path, caplog):
    model = half_zero(tiny_gpt2())
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})  # as GPT-2 itself lies on the hub
    loaded = load_sparse(tmp_path)
    assert same_bits(loaded.state_dict(), model.state_dict()) and "loaded dense first" not in caplog.text


PEAK = """
import re, sys
from pathlib import Path
from hf_lpdecay.inference import loading
from hf_lpdecay.inference.generation import memory
loading.choose_encoding = lambda weight, sparsity: False if sparsity > 0.3 else None
loading.pack_head = lambda model, dtype: False
kib = lambda name: int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
loading.load_sparse(sys.argv[1])  # what is imported and compiled at the first time
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
model = loading.load_sparse(sys.argv[2])
print((kib("VmHWM") - before) * 1024 - memory(model))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="a peak that can be reset is Linux's")
def test_peak_memory_of_loading(tmp_path):
    for name, width in (("small", 64), ("large", 8192)):
        sizes = {"hidden_size": 1024, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 16}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        model = model.to_empty(device="cpu").to(torch.bfloat16)
        for param in model.parameters():
            param.data.fill_(1.0)[..., ::2] = 0.0
        model.save_pretrained(tmp_path / name / "dense")
        pack(tmp_path / name / "dense", tmp_path / name / "packed")
    for kind in ("dense", "packed"):
        command = [sys.executable, "-c", PEAK, tmp_path / "small" / kind, tmp_path / "large" / kind]
        above = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert above < 2 * 2 * 1024 * 8192, kind  # two of the largest tensors


def test_another_processors_kernel_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    for processor in ("one", "another", "one"):
        monkeypatch.setattr(native, "_processor", lambda name=processor: name)
        kernels.Kernel(torch.float32, "plain")
        built.append(sorted(path.name for path in (tmp_path / "hf_lpdecay").glob("*.so")))
    assert [len(names) for names in built] == [1, 2, 2]
