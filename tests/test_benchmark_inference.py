"""The inference benchmark, on tiny models."""

import json
import statistics

import benchmark_inference
import benchmark_layers
import pytest
from conftest import tiny_llama
from test_shrink import with_dead

from hf_lpdecay import shrink
from hf_lpdecay.sparsity import select_parameters


def test_models_side_by_side(tmp_path, capsys):
    model = with_dead(tiny_llama(intermediate_size=4096), "neurons", [2048, 2048])
    model.save_pretrained(tmp_path / "before")
    shrink(model).save_pretrained(tmp_path / "after")
    flags = ["--prompt_tokens", "16", "--new_tokens", "4", "--repeats", "2", "--threads", "1"]
    flags += ["--batch_size", "3", "--results_file", str(tmp_path / "results.json")]
    assert benchmark_inference.main([str(tmp_path / "before"), str(tmp_path / "after"), *flags]) == 0
    before, after = json.loads((tmp_path / "results.json").read_text())["models"]
    assert before["parameters"] - after["parameters"] == 2 * 3 * 2048 * 32
    assert before["file_bytes"] - after["file_bytes"] > 2 * 3 * 2048 * 32 * 4 * 0.99
    assert after["generate_tokens_per_second"] * statistics.median(after["generate_seconds"]) == pytest.approx(3 * 4)
    assert before["prefill_speedups"] == before["generate_speedups"] == [1.0, 1.0]
    assert all(len(each["generate_seconds"]) == 2 and each["memory_bytes"] > 0 for each in (before, after))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| before |") and rows[3].startswith("| after |")
    assert benchmark_inference.main([str(tmp_path), *flags]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_sparse_layers_beside_the_dense_ones(tmp_path, capsys):
    model = tiny_llama(hidden_size=256, intermediate_size=2048)
    for param in select_parameters(model).values():
        param.data.view(-1)[::2] = 0.0
    model.save_pretrained(tmp_path / "sparse")
    flags = ["--prompt_tokens", "4", "--new_tokens", "2", "--repeats", "1", "--threads", "1"]
    flags += ["--results_file", str(tmp_path / "results.json"), "--sparse", str(tmp_path / "sparse")]
    flags += ["--other_dtype", str(tmp_path / "sparse")]
    assert benchmark_inference.main([str(tmp_path / "sparse"), *flags]) == 0
    dense, sparse, low = json.loads((tmp_path / "results.json").read_text())["models"]
    assert sparse["model"] == f"{dense['model']} (sparse)" and len(sparse["generate_seconds"]) == 1
    assert dense["logits_off"] == 0 and sparse["logits_off"] < 1e-4 < low["logits_off"] < 0.1
    assert low["linear_bytes"] == dense["linear_bytes"] // 2 and sparse["parameters"] == dense["parameters"]
    assert "| sparse (sparse) |" in capsys.readouterr().out


def test_layers_shape_by_shape(tmp_path, capsys):
    flags = ["--shapes", "64x32", "--zeros", "0.5", "0.9", "--rows", "1", "9", "--rounds", "2", "--threads", "1"]
    assert benchmark_layers.main([*flags, "--results_file", str(tmp_path / "results.json")]) == 0
    layers = json.loads((tmp_path / "results.json").read_text())["layers"]
    assert len(layers) == 4 and all(each["speedup"] > 0 and each["memory"] > 0 for each in layers)
    assert "| 64x32 | 50% | 1 |" in capsys.readouterr().out
