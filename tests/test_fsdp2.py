"""FSDP2: two real processes that each hold half of every parameter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama, trainer_for
from safetensors.torch import load_file

from hf_lpdecay import LpDecayConfig


HERE = Path(__file__).parent
GLOBAL = {"p": 0.5, "target_sparsity": 0.5, "scope": "global"}


def launch(folder, lp_config, **options):
    options = {"output_dir": str(folder), "lp_config": lp_config, "per_device_train_batch_size": 2, **options}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(HERE), str(HERE.parent / "recipes"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, str(HERE / "fsdp2_worker.py"), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
    )
    return done


def trained(folder, lp_config, **options):
    done = launch(folder, lp_config, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert result["parameters"] == "DTensor"
    return result["logs"]


@pytest.mark.parametrize(
    "config", [GLOBAL, {"p": 0.5, "target_sparsity": 0.3, "pattern": "neurons", "calibration_batches": 2}]
)
def test_two_shards_end_as_one_process_on_the_same_batches(tmp_path, config):
    logs = trained(tmp_path / "two", config)
    model = tiny_llama(tie_word_embeddings=False, attention_dropout=0.0)
    one = trainer_for(tmp_path / "one", LpDecayConfig(**config), model=model, save_strategy="no")
    one.train()
    expected = [log for log in one.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], abs=1e-3)
    assert logs[-1]["sparsity"] == expected[-1]["sparsity"]
    saved = load_file(tmp_path / "two" / "model.safetensors")
    for name, param in one.model.named_parameters():
        assert (saved[name] == 0).sum() == pytest.approx(int((param == 0).sum()), abs=0.01 * param.numel()), name
    zeros = [sum(int((tensor == 0).sum()) for tensor in weights) for weights in (saved.values(), model.parameters())]
    assert zeros[0] == zeros[1] > 0


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, kind):
    options = {"state_dict_type": kind, "save_strategy": "steps", "save_steps": 12}
    whole = trained(tmp_path / "whole", GLOBAL, **options)
    resumed = trained(tmp_path / "resumed", GLOBAL, **options, resume=str(tmp_path / "whole" / "checkpoint-12"))
    for a, b in zip(whole[-4:], resumed[-4:]):
        assert all(a[name] == b[name] for name in ("step", "grad_norm", "sparsity", "lp_lambda"))
    if kind == "FULL_STATE_DICT":
        a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
        assert all((a[name] == b[name]).all() for name in a)


def test_a_pattern_whose_rows_lie_in_different_processes_is_refused(tmp_path):
    done = launch(tmp_path, {"p": 0.5, "target_sparsity": 0.5, "pattern": "block:4x4"})
    assert done.returncode != 0
    assert "pattern='block:4x4' needs 4 rows of model.layers.0.self_attn.q_proj.weight in one process" in done.stderr
