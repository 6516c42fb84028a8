"""The benchmark of adapters, on a tiny model."""

import benchmark_lora
from conftest import tiny_llama


COMMAND = ["--shape", "tiny", "--rank", "2", "--batch", "2", "8", "--steps", "2"]


def test_every_method_is_measured(monkeypatch, capsys):
    model = tiny_llama()
    monkeypatch.setattr(benchmark_lora, "SHAPES", {"tiny": (type(model), model.config)})
    monkeypatch.setattr(benchmark_lora, "in_own_process", lambda function, *args: function(*args))
    assert benchmark_lora.main(COMMAND) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[2:]] == [*benchmark_lora.METHODS, benchmark_lora.AFTER]
    steps = list(benchmark_lora.steps_of("frozen-base", "tiny", 2, (2, 8), 2))
    assert [step[0] for step in steps] == ["frozen-base"] * benchmark_lora.RAMP + [benchmark_lora.AFTER] * 3
    assert [step[1] is None for step in steps] == [step[3] is not None for step in steps]
    assert sum(step[1] is None for step in steps) == 2


def count(first, last):
    for number in range(first, last):
        yield "row", number, 0.0, 0.0


def test_processes_take_their_steps_in_turns():
    runs = [benchmark_lora.in_own_process(count, 0, 3), benchmark_lora.in_own_process(count, 10, 11)]
    assert [step[1] for step in benchmark_lora.in_turns(runs)] == [0, 10, 1, 2]
