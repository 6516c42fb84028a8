"""What the README says is true."""

import re
from dataclasses import fields
from pathlib import Path

from conftest import tiny_llama, token_rows

from hf_lpdecay import LpDecayConfig, LpDecayTrainer, measure_sparsity


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    tiny_llama().save_pretrained(tmp_path / "model")
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(tmp_path / "model")).replace(
        '"out"', repr(str(tmp_path / "out"))
    )
    code = code.replace("max_steps=1000", "max_steps=30, use_cpu=True, save_strategy='no'").replace("=50)", "=5)")
    namespace = {"dataset": token_rows()}
    exec(code, namespace)
    assert isinstance(namespace["trainer"], LpDecayTrainer)
    assert measure_sparsity(namespace["trainer"].model).sparsity == 0.5
    assert "selected, in total" in capsys.readouterr().out


def test_the_table_of_options_is_the_config():
    table = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.M))
    defaults = {field.name: field.default for field in fields(LpDecayConfig)}
    assert {name: eval(default) for name, default in table.items()} == {n: defaults[n] for n in table}
    assert set(defaults) == set(table)


def test_it_opens_with_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)
    assert "accelerate launch recipes/finetune.py" in blocks[0] and blocks[1].strip().endswith("pytest")
    assert README.index("```bash") < README.index("## ")
