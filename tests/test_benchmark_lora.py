"""The benchmark of adapters, on a tiny model."""

import benchmark_lora
from conftest import tiny_llama


def test_every_method_is_measured(monkeypatch, capsys):
    model = tiny_llama()
    monkeypatch.setattr(benchmark_lora, "SHAPES", {"tiny": (type(model), model.config)})
    monkeypatch.setattr(benchmark_lora, "in_own_process", lambda function, *args: function(*args))
    assert benchmark_lora.main(["--shape", "tiny", "--rank", "2", "--batch", "2", "8", "--steps", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(benchmark_lora.METHODS)
    times, _ = benchmark_lora.measure("frozen-base", "tiny", 2, (2, 8), 2)
    assert len(times) == benchmark_lora.RAMP
