"""Two real processes, with DDP, FSDP2 and DeepSpeed's ZeRO; with the latter two each holds half of every parameter."""

import copy
import importlib.util
import json
import os
import time

import pytest
import torch
import worker
from conftest import tiny_llama, trainer_for
from processes import run_in_processes
from safetensors.torch import load_file

from hf_lpdecay import LpDecayConfig, load_masked_lora


def fails_in_one(message):
    if os.environ["RANK"] == "1":
        raise ValueError(message)


def test_what_fails_or_hangs_in_a_process_is_told_with_its_traceback():
    assert run_in_processes(print, 2, "hello") == ["hello\n"] * 2
    with pytest.raises(RuntimeError, match=r"(?s)fails_in_one failed.*process 0, exit code 0.*ValueError: a reason"):
        run_in_processes(fails_in_one, 2, "a reason")
    with pytest.raises(TimeoutError, match=r"sleep took more than 0.5 s in 1 processes"):
        run_in_processes(time.sleep, 1, 60, timeout=0.5)


GLOBAL = {"p": 0.5, "target_sparsity": 0.5, "scope": "global"}


def trained(folder, config, **options):
    run_in_processes(worker.train, 2, str(folder), config, **options)
    result = json.loads((folder / "result.json").read_text())
    assert result["parameters"] == ("DTensor" if "state_dict_type" in options else "Parameter")
    assert result["computed_in"] == ["torch.bfloat16" if "bf16" in options else "torch.float32"]
    return result["logs"]


def alone(folder, config, resume=None, **options):
    """The same in one process, on the same batches."""
    model = tiny_llama(tie_word_embeddings=False, attention_dropout=0.0, **options.pop("model", {}))
    trainer = trainer_for(folder, LpDecayConfig(**config), model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


SAVING = {"save_strategy": "steps", "save_steps": 12}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of two processes with DDP, and what it logged."""
    folder = tmp_path_factory.mktemp("ddp")
    return folder, trained(folder, GLOBAL, **SAVING)


def test_after_a_kill_the_run_is_resumed_to_the_bits_of_one_without(uninterrupted, tmp_path):
    folder, logs = uninterrupted
    with pytest.raises(RuntimeError, match="process 1, exit code -9"):
        trained(tmp_path, GLOBAL, **SAVING, kill_at=14)
    assert not (tmp_path / "model.safetensors").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    assert trained(tmp_path, GLOBAL, **SAVING, resume=True)[-1] == logs[-1]
    whole, resumed = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.parametrize("kind", ["dense", "plain", "experts", "frozen"])
def test_what_the_other_processes_collected_is_in_a_checkpoint(tmp_path, kind):
    # Plans are made at the steps 5, 13 and 21; the checkpoints lie between them, while features are collected.
    run_in_processes(worker.resume_everywhere, 2, str(tmp_path), kind, [3, 10, 18], max_steps=30)


def test_two_processes_go_on_as_one_and_one_as_two(uninterrupted, tmp_path):
    folder, logs = uninterrupted
    _, expected = alone(tmp_path / "one", GLOBAL, **SAVING)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], abs=1e-3)
    _, as_one = alone(tmp_path / "as_one", GLOBAL, resume=str(folder / "checkpoint-12"))
    as_two = trained(tmp_path / "as_two", GLOBAL, resume=str(tmp_path / "one" / "checkpoint-12"))
    for found in (as_one, as_two):
        assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=1e-3)
        assert found[-1]["sparsity"] == expected[-1]["sparsity"] == 0.5


NEURONS = {"p": 0.5, "target_sparsity": 0.3, "pattern": "neurons", "calibration_batches": 2}
SLOW = {**GLOBAL, "embedding_learning_rate": 1e-4}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}


@pytest.mark.parametrize(
    ("config", "options", "near"),
    [(SLOW, ACCUMULATED, 1e-3), (NEURONS, {}, 1e-3), (GLOBAL, {**ACCUMULATED, "bf16": True}, 2e-2)],
    ids=["accumulated and clipped", "neurons", "bf16"],
)
def test_two_shards_end_as_one_process_on_the_same_batches(tmp_path, config, options, near):
    logs = trained(tmp_path / "two", config, state_dict_type="FULL_STATE_DICT", **options)
    one, expected = alone(tmp_path / "one", config, **options)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], abs=near)
    assert any(log["grad_norm"] > 2 * options.get("max_grad_norm", 0.0) for log in logs)  # clipped, and much
    assert logs[-1]["sparsity"] == expected[-1]["sparsity"]
    saved = load_file(tmp_path / "two" / "model.safetensors")
    for name, param in one.model.named_parameters():
        assert (saved[name] == 0).sum() == pytest.approx(int((param == 0).sum()), abs=0.01 * param.numel()), name
    zeros = [sum(int((t == 0).sum()) for t in weights) for weights in (saved.values(), one.model.parameters())]
    assert zeros[0] == zeros[1] > 0


@pytest.mark.parametrize("cuts", [{}, {"hard_cut": True, "num_plans": 4}], ids=["decay", "hard cut"])
def test_a_resumed_run_of_shards_ends_as_one_that_was_not_interrupted(tmp_path, cuts):
    config = {**GLOBAL, "compensate": False, **cuts}
    options = {"state_dict_type": "FULL_STATE_DICT", **SAVING}
    whole = trained(tmp_path / "whole", config, **options)
    resumed = trained(tmp_path / "resumed", config, **options, resume=str(tmp_path / "whole" / "checkpoint-12"))
    for a, b in zip(whole[-4:], resumed[-4:]):
        assert all(a[name] == b[name] for name in ("step", "grad_norm", "sparsity", "lp_lambda"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all((a[name] == b[name]).all() for name in a)


def test_a_resumed_run_of_shards_goes_on_to_compensate(tmp_path):
    options = {"state_dict_type": "SHARDED_STATE_DICT", **SAVING}
    whole = trained(tmp_path / "whole", GLOBAL, **options)
    resumed = trained(tmp_path / "resumed", GLOBAL, **options, resume=str(tmp_path / "whole" / "checkpoint-12"))
    # Near, not the same: the Hessians are not in the checkpoint.
    assert [log["loss"] for log in resumed[-4:]] == pytest.approx([log["loss"] for log in whole[-4:]], abs=5e-2)
    assert resumed[-1]["sparsity"] == whole[-1]["sparsity"]


def test_a_pattern_whose_rows_lie_in_different_processes_is_refused(tmp_path):
    config = {"p": 0.5, "target_sparsity": 0.5, "pattern": "block:4x4"}
    message = "pattern='block:4x4' needs 4 rows of model.layers.0.self_attn.q_proj.weight in one process"
    with pytest.raises(RuntimeError, match=message):
        trained(tmp_path, config, state_dict_type="FULL_STATE_DICT")


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
# Weights that two processes cannot share equally: the second one's range begins within a row, and is filled up.
ODD = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 63}


def zero(stage):
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    settings = {**sizes, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    return {**settings, "zero_optimization": {"stage": stage}}


@needs_deepspeed
def test_zero_2_ends_as_one_process_on_the_same_batches(tmp_path):
    options = {**ACCUMULATED, "model": ODD}
    logs = trained(tmp_path / "two", SLOW, deepspeed=zero(2), **options)
    one, expected = alone(tmp_path / "one", {**SLOW, "compensate": False}, **options)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], abs=1e-3)
    assert [log["lp_lambda"] for log in logs] == pytest.approx([log["lp_lambda"] for log in expected], rel=1e-3)
    saved = load_file(tmp_path / "two" / "model.safetensors")
    for name, param in one.model.named_parameters():
        assert (saved[name] == 0).sum() == pytest.approx(int((param == 0).sum()), abs=0.01 * param.numel()), name
    zeros = [sum(int((t == 0).sum()) for t in weights) for weights in (saved.values(), one.model.parameters())]
    assert zeros[0] == zeros[1] and logs[-1]["sparsity"] == expected[-1]["sparsity"] == pytest.approx(0.5, abs=1e-4)


@needs_deepspeed
def test_zero_1_in_bfloat16_is_resumed_to_the_bits_of_a_run_without_interruption(tmp_path):
    config, options = {"p": 0.5, "target_sparsity": 0.5}, {"deepspeed": zero(1), "bf16": True, **SAVING}
    whole = trained(tmp_path / "whole", config, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-12")  # between two plans
    assert trained(tmp_path / "resumed", config, **options, resume=checkpoint)[-1] == whole[-1]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all((a[name] == b[name]).all() for name in a)
    _, expected = alone(tmp_path / "one", {**config, "compensate": False}, bf16=True)
    assert [log["loss"] for log in whole] == pytest.approx([log["loss"] for log in expected], abs=2e-2)
    assert whole[-1]["sparsity"] == expected[-1]["sparsity"] == 0.5
    with pytest.raises(ValueError, match="Nothing of the optimizer was loaded from the checkpoint at step 12"):
        alone(tmp_path / "one", config, resume=checkpoint)


@pytest.mark.parametrize("how", ["DDP", "FSDP2", pytest.param("ZeRO", marks=needs_deepspeed)])
def test_masked_lora_in_two_processes_learns_as_in_one(tmp_path, how):
    options = {"max_steps": 12, "logging_steps": 3}
    worker.train_masked_lora(str(tmp_path / "one"), "one", **options)
    options["per_device_train_batch_size"] = 2
    if how == "ZeRO":
        options["deepspeed"] = zero(2)
    run_in_processes(worker.train_masked_lora, 2, str(tmp_path / "two"), how, **options)
    expected, losses = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    assert losses == pytest.approx(expected, abs=1e-2) and losses[-1] < losses[0] - 0.1
    base = worker.masked_llama().unload()
    one, two = (load_masked_lora(copy.deepcopy(base), tmp_path / name) for name in ("one", "two"))
    ids = torch.arange(16)[None]
    assert torch.allclose(one(ids).logits, two(ids).logits, atol=0.1)
    before, zeros = two(ids).logits, {name: param == 0 for name, param in base.named_parameters()}
    merged = two.merge_and_unload()
    assert torch.allclose(merged(ids).logits, before, atol=1e-4)
    assert all(torch.equal(param == 0, zeros[name]) for name, param in merged.named_parameters())


def test_a_run_in_which_a_process_aborts_is_tried_once_more(tmp_path, capsys):
    run_in_processes(worker.abort_once, 2, str(tmp_path / "flag"))
    assert "exit codes [0, -6], once more" in capsys.readouterr().out
