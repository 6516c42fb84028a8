"""What the README says is true."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from conftest import token_rows

import hf_lpdecay
from hf_lpdecay import LpDecayConfig, LpDecayTrainer, measure_sparsity, push_to_hub
from hf_lpdecay.cli import COMMANDS


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_script_runs_and_its_model_can_be_packed_and_pushed(tmp_path, capsys, monkeypatch, language_model):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(language_model))
    code = code.replace("max_steps=1000", "max_steps=30, use_cpu=True, save_strategy='no'").replace("=50)", "=5)")
    namespace = {"dataset": token_rows()}
    exec(code, namespace)
    assert isinstance(namespace["trainer"], LpDecayTrainer)
    assert measure_sparsity(namespace["trainer"].model).sparsity == pytest.approx(0.5, abs=1e-4)
    assert "selected, in total" in capsys.readouterr().out
    print(hf_lpdecay.pack("out", "out-packed"), push_to_hub("out", "your-name/model", dry_run=True))
    printed = capsys.readouterr().out
    assert "packed_bytes" in printed and "would be pushed to your-name/model" in printed and "tokenizer.json" in printed


def test_what_it_names_exists():
    table = README[README.index("| I want |") : README.index("`lpdecay --help`")]
    called = set(re.findall(r"`(\w+)\(", table)) - {"class", "trainer"}
    assert called and called <= set(hf_lpdecay.__all__)
    assert "pattern=" in table and len(table.splitlines()) > 10
    listed = README[README.index("`lpdecay --help`") :].split(".\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {name for name, *_ in COMMANDS}
    for path in re.findall(r"(recipes/[\w./-]+\.(?:md|py|png))", README):
        assert (ROOT / path).is_file(), path
    assert README.count("\n") <= 150


def test_the_docstring_of_the_config_has_all_options_and_their_defaults():
    documented = dict(re.findall(r"^        (\w+) \((.+?)\): ", LpDecayConfig.__doc__, re.M))
    for field in fields(LpDecayConfig):
        assert field.name in documented, field.name
        stated = re.search(r"defaults to `?`?(.+?)`?`?$", documented[field.name])
        if stated:
            assert eval(stated.group(1)) == field.default, field.name
        else:
            assert field.default in (None, MISSING), field.name
    assert set(documented) == {field.name for field in fields(LpDecayConfig)}


def test_it_opens_with_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)
    assert "accelerate launch recipes/finetune.py" in blocks[0] and blocks[1].strip().endswith("pytest")
    assert README.index("```bash") < README.index("## ")
