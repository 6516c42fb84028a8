"""The check for a GPU, rehearsed on a CPU, and what it does with parts that go wrong."""

import json
import os
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import PARTS, Part
from processes import run_in_processes, succeed


RECIPES = Path(__file__).parent.parent / "recipes"


def test_the_rehearsal_runs_every_part(tmp_path):
    # In a process of its own: parts are forks, and this one has threads.
    printed = run_in_processes(succeed, 1, gpu_check.main, ["--rehearse", "--output_dir", str(tmp_path)])[0]
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert all(record["status"] == "passed" and record["result"]["rows"] for record in records.values())
    assert "A rehearsal at toy size, whose figures say nothing" in printed and "torch" in printed
    assert all(f"| `{name}` |" in printed for name in PARTS)
    runs = records["train"]["result"]["runs"]
    assert [run["method"] for run in runs] == ["dense", "lp", "gmp-compensate", "lp", "gmp-compensate"]
    assert [run["sparsity"] for run in runs] == pytest.approx([0.0, 0.7, 0.7, 0.5, 0.5], abs=1e-4)
    assert "only faster on sparse tensor cores" in records["two_of_four"]["result"]["refused"]


def hangs(check):
    check.record({"rows": [("before", "kept")]})
    time.sleep(60)


def fails(check):
    raise ValueError("a reason")


def crashes(check):
    os.abort()


def works(check):
    return {"rows": [("this", "1 ms")]}


def test_a_part_that_hangs_fails_or_crashes_is_recorded_and_the_next_one_runs(tmp_path, capsys):
    parts = {function.__name__: Part(function, 1) for function in (hangs, fails, crashes, works)}
    flags = ["--rehearse", "--output_dir", str(tmp_path), "--minutes", "0.1"]
    assert gpu_check.main(flags, parts) == 1
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert [record["status"] for record in records.values()] == ["out of time", "failed", "crashed", "passed"]
    assert records["hangs"]["result"] == {"rows": [["before", "kept"]]}
    printed = capsys.readouterr().out
    assert "| `hangs` | before | kept |" in printed and "| `works` | this | 1 ms |" in printed
    assert "| `fails` | - | failed: ValueError: a reason |" in printed and "exit code -6" in printed
    assert "a reason" in (tmp_path / "fails.log").read_text()
    assert gpu_check.main([*flags, "--only", "works"], parts) == 0


def test_the_limits_add_up_and_wrong_options_are_refused(capsys):
    assert sum(part.seconds for part in PARTS.values()) <= 480
    for flags, reason in (
        ([], "There is no CUDA device"),
        (["--model", "nowhere"], "there is no such file or folder"),
        (["--minutes", "0"], "should be > 0"),
        (["--train_file", __file__], "Give both"),
        (["--only", "nothing"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            gpu_check.main(flags)
        assert reason in capsys.readouterr().err
