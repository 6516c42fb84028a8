"""The command line, on saved models."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from test_shrink import with_dead
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lpdecay import cli, measure_sparsity
from hf_lpdecay.evaluation import text_loss
from hf_lpdecay.sparsity import checkpoint, select_parameters


with contextlib.suppress(ImportError):  # it logs to stdout once, which would be in the first test's JSON
    from deepspeed.accelerator import get_accelerator

    get_accelerator()


def sparse(model, share=4):
    for param in select_parameters(model).values():
        param.data.view(-1)[::share] = 0.0
    return model


def as_json(capsys, *argv):
    code = cli.main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_report_from_the_files_is_that_of_the_loaded_model(make, dtype, tmp_path, capsys):
    model = sparse(make()).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    code, found = as_json(capsys, "report", tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert code == 0 and found == measure_sparsity(loaded).to_dict() and found["sparsity"] == 0.25
    assert cli.main(["report", str(tmp_path), "--by", "tensor"]) == 0
    assert measure_sparsity(loaded).table() in capsys.readouterr().out


def test_what_a_library_prints_is_not_in_the_json(tmp_path, capsys, monkeypatch):
    sparse(tiny_llama()).save_pretrained(tmp_path)
    measure = checkpoint.measure_checkpoint
    monkeypatch.setattr(checkpoint, "measure_checkpoint", lambda folder: print("hello") or measure(folder))
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["sparsity"] == 0.25 and "hello" in printed.err


def test_two_reports_say_what_was_gained_and_lost(tmp_path, capsys):
    model = sparse(tiny_llama())
    model.save_pretrained(tmp_path / "base")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.view(-1)[0] = 1.0
    weight.view(-1)[1:3] = 0.0
    model.save_pretrained(tmp_path / "tuned")
    code, found = as_json(capsys, "report", tmp_path / "base", tmp_path / "tuned")
    assert code == 0 and (found["lost"], found["gained"]) == (1, 2)
    assert found["after"] == found["before"] + 1
    (changed,) = [t for t in found["tensors"] if t["lost"] or t["gained"]]
    assert changed["name"] == "model.layers.0.mlp.up_proj.weight" and changed["numel"] == weight.numel()
    assert cli.main(["report", str(tmp_path / "tuned"), "--against", str(tmp_path / "base")]) == 1
    assert "1 zeros of" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "base"), "--against", str(tmp_path / "base")]) == 0
    assert "No zero of" in capsys.readouterr().out
    bert = sparse(tiny_bert())
    bert.save_pretrained(tmp_path / "bert")
    bert.bert.encoder.layer[0].output.dense.bias.data.fill_(1.0)  # they begin at zero, and learn
    bert.save_pretrained(tmp_path / "learned")
    assert cli.main(["report", str(tmp_path / "learned"), "--against", str(tmp_path / "bert")]) == 0
    capsys.readouterr()
    tiny_gpt2().save_pretrained(tmp_path / "other")
    assert cli.main(["report", str(tmp_path / "base"), str(tmp_path / "other")]) == 2
    assert "they are not the same model" in capsys.readouterr().err


def test_eval_is_the_text_loss_in_float32(language_model, text_files, capsys):
    flags = ["--file", text_files[3], "--context_length", "32", "--max_windows", "9", "--stride", "8"]
    code, found = as_json(capsys, "eval", language_model, *flags)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(language_model),
        AutoTokenizer.from_pretrained(language_model),
    )
    expected = text_loss(model, tokenizer, open(text_files[3]).read(), 32, 8, 9)
    assert code == 0 and found["perplexity"] == expected.perplexity
    assert found["perplexity_interval"] == list(expected.interval()) and found["windows"] == 9
    assert cli.main(["eval", str(language_model), *flags]) == 0
    assert "9 windows of 32, stride 8" in capsys.readouterr().out


def test_shrink_writes_a_plain_smaller_model_and_nothing_else(language_model, tmp_path, capsys):
    model = with_dead(tiny_llama(vocab_size=512), "neurons", [20, 20])
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "model")
    code, found = as_json(capsys, "shrink", tmp_path / "model", tmp_path / "small")
    assert code == 0 and found["parameters_before"] - found["parameters_after"] == 2 * 3 * 20 * 32
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.intermediate_size == 44 and AutoTokenizer.from_pretrained(tmp_path / "small").vocab_size == 512
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert cli.main(["shrink", str(tmp_path / "model"), str(tmp_path / "small")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert cli.main(["shrink", str(tmp_path / "small"), str(tmp_path / "smaller")]) == 2
    assert "no zero neurons or heads" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]


def test_push_lists_in_a_dry_run(tmp_path, capsys):
    sparse(tiny_llama()).save_pretrained(tmp_path)
    code, found = as_json(capsys, "push", tmp_path, "me/sparse", "--dry_run")
    assert code == 0 and found["url"] is None and "model.safetensors" in found["files"]


def test_wrong_input_is_refused_with_exit_code_2(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "lpdecay report: error:" in capsys.readouterr().err
    sparse(tiny_llama()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["reprot"])
    assert stop.value.code == 2


def test_a_model_that_is_too_short_or_of_another_task_is_refused(language_model, text_files, tmp_path, capsys):
    def refused(command, *flags):
        options = ["--prompt", "def"] if command == "generate" else ["--file", text_files[3], "--max_windows", "2"]
        assert cli.main([command, str(tmp_path), *options, *flags]) == 2
        return capsys.readouterr().err

    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path)
    tiny_gpt2(vocab_size=512).save_pretrained(tmp_path)
    limit = "positions, and the model has embeddings for 64 (max_position_embeddings): take less"
    assert f"context_length=65 takes 65 {limit}" in refused("eval", "--context_length", "65")
    for flag in ("--sparse", "--dense"):
        found = refused("generate", flag, "--max_new_tokens", "65")
        assert f"A prompt of 1 tokens and max_new_tokens=65 takes 65 {limit}" in found
        assert cli.main(["generate", str(tmp_path), "--prompt", "def", flag, "--max_new_tokens", "64"]) == 0
    tiny_bert(vocab_size=512).save_pretrained(tmp_path)
    assert "BertForSequenceClassification does not predict the next" in refused("eval", "--sparse")
    assert "holds a BertForSequenceClassification, which cannot generate" in refused("generate", "--sparse")
    for command, flag in (("eval", "--json"), ("generate", "--dense")):
        found = refused(command, flag)
        assert "lacks 6 weights of a BertLMHeadModel, such as cls.predictions.bias, which would be random" in found


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--help"])
    assert not stop.value.code and "lpdecay report outputs/tuned --against outputs/sparse" in capsys.readouterr().out


def test_the_help_and_a_report_do_not_wait_for_transformers(tmp_path):
    sparse(tiny_llama()).save_pretrained(tmp_path)
    report = measure_sparsity(tiny_llama().from_pretrained(tmp_path))
    report.to_json(tmp_path / "sparsity.json")
    code = (
        "import sys, hf_lpdecay\n"
        "from hf_lpdecay import cli\n"
        "assert cli.main(['report', sys.argv[1]]) == 0\n"
        "assert not {'transformers', 'peft', 'accelerate'} & set(sys.modules)\n"
        "assert hf_lpdecay.evaluation.text_loss and set(hf_lpdecay.__all__) < set(dir(hf_lpdecay))\n"
        "assert all(getattr(hf_lpdecay, name) for name in hf_lpdecay.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == report.table(by="module").strip()
