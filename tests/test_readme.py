"""What the README says is true."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import transformers
from conftest import arguments, tiny_llama, token_rows
from peft import LoraConfig, get_peft_model
from test_shrink import with_dead

import hf_lpdecay
from hf_lpdecay import LpDecayConfig, LpDecayMixin, LpDecayTrainer, measure_sparsity


README = (Path(__file__).parent.parent / "README.md").read_text()
PUBLIC = {name: getattr(hf_lpdecay, name) for name in hf_lpdecay.__all__}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_five_steps_run(tmp_path, capsys, monkeypatch, language_model, texts):
    pytest.importorskip("zstandard")
    train, evaluate, smaller, push = PYTHON[:4]
    monkeypatch.chdir(tmp_path)
    train = train.replace("HuggingFaceTB/SmolLM2-135M", str(language_model))
    train = train.replace("max_steps=1000", "max_steps=30, use_cpu=True, save_strategy='no'").replace("=50)", "=5)")
    namespace = {"dataset": token_rows(), "text": "".join(texts[1]["text"][:20])}
    for code in (train, evaluate, smaller, push.replace("private=True", "dry_run=True")):
        exec(code, namespace)
    assert isinstance(namespace["trainer"], LpDecayTrainer)
    assert measure_sparsity(namespace["trainer"].model).sparsity == pytest.approx(0.5, abs=1e-4)
    printed = capsys.readouterr().out
    assert "selected, in total" in printed and "packed_bytes" in printed
    assert "would be pushed to your-name/smollm2-sparse" in printed and "tokenizer.json" in printed


def test_the_other_ways_run(tmp_path):
    mixin, callback, adapters, small = PYTHON[4:]
    names = {**vars(transformers), **PUBLIC, "DPOTrainer": transformers.Trainer}
    exec(mixin, names)
    assert issubclass(names["LpDecayDPOTrainer"], LpDecayMixin)
    model, args = tiny_llama(), arguments(tmp_path)
    names = {**vars(transformers), **PUBLIC, "model": model, "args": args, "dataset": token_rows()}
    exec(callback, names)
    names["trainer"].train()
    assert measure_sparsity(model).sparsity == 0.5
    names["peft_model"] = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    exec(adapters.replace('"merged"', repr(str(tmp_path / "merged"))), names)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert measure_sparsity(merged).sparsity == 0.5
    names["model"] = with_dead(tiny_llama(), "neurons", [16, 16])
    exec(small.replace('"small"', repr(str(tmp_path / "small"))), names)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "small").intermediate_size == 48


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
