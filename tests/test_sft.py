"""The recipe that puts the decay into TRL's supervised fine-tuning."""

import json
from pathlib import Path

import pytest
from peft import PeftModel
from processes import run_in_processes, run_into_a_full_disk
from stdlib_text import load_stdlib_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lpdecay import measure_sparsity


pytest.importorskip("trl")

import sft


CONFIGS = Path(__file__).parent.parent / "recipes" / "configs" / "smollm2-135m"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"

# TRL's configs still spell it the old way.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture
def flags(language_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(language_model).save_pretrained(tmp_path / "model")
    chats = tmp_path / "chats.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "completion": [{"role": "assistant", "content": word}],
        }
        for i, word in enumerate(("one", "two", "three") * 8)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"),
        *("--train_file", str(chats), "--validation_file", str(chats), "--max_length", "64", "--max_steps", "40"),
        *("--max_eval_samples", "8", "--warmup_steps", "0", "--disable_tqdm", "true", "--num_plans", "4"),
    ]


def test_the_model_becomes_sparse_and_plain_transformers_loads_it(flags, tmp_path, capsys):
    assert sft.main(["--config", str(CONFIGS / "sft.yaml"), *flags]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-4)
    facts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert facts["results"]["after"]["loss"] > 0 and facts["evaluated_on"]["examples"] == 8
    assert "mean_token_accuracy: " in capsys.readouterr().out
    assert sft.main(["--config", str(CONFIGS / "sft.yaml"), *flags, "--p", "0.8"]) == 2
    assert "holds a run with p=None (now 0.8)" in capsys.readouterr().err


def test_a_full_disk_at_the_last_save_keeps_the_checkpoint(flags, tmp_path):
    arguments = ["--config", str(CONFIGS / "sft.yaml"), *flags]
    with pytest.raises(RuntimeError, match=r"not enough space to write .*out \(.* resumed from .*checkpoint-40\."):
        run_in_processes(run_into_a_full_disk, 1, sft.main, arguments)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_lora_finds_its_ranks_and_plain_peft_loads_it(flags, tmp_path, capsys):
    assert sft.main(["--config", str(CONFIGS / "lora-rank.yaml"), *flags]) == 0
    facts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert len(facts["ranks"]) == 14 and 14 * 8 <= sum(facts["ranks"].values()) <= 14 * 8 + 13
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path / "out")
    first = next(iter(facts["ranks"]))
    assert adapter.get_base_model().get_submodule(first).lora_A["default"].weight.shape[0] == facts["ranks"][first]
    assert "ranks in 14 layers, of 224" in capsys.readouterr().out


def test_masked_lora_on_a_frozen_base_and_on_the_sparse_model_of_it(flags, tmp_path):
    for name, steps in (("frozen-base", "24"), ("masked-lora", "2")):
        folder = tmp_path / name
        options = ["--output_dir", str(folder), "--max_steps", steps]
        if name == "masked-lora":  # on what the first one has written
            options += ["--model_name_or_path", str(tmp_path / "frozen-base")]
        assert sft.main(["--config", str(CONFIGS / f"sft-{name}.yaml"), *flags, *options]) == 0
        assert measure_sparsity(AutoModelForCausalLM.from_pretrained(folder)).sparsity == pytest.approx(0.5, abs=1e-4)


def test_wrong_arguments_end_with_a_message(flags, capsys):
    assert sft.main(["--config", str(CONFIGS / "sft.yaml"), *flags, "--pattern", "rank"]) == 2
    assert "pattern='rank' finds the ranks of a LoRA: add --use_peft" in capsys.readouterr().err
    assert sft.main([*flags, "--train_file", "nowhere.jsonl"]) == 2
    assert "train_file='nowhere.jsonl': there is no such file" in capsys.readouterr().err


def test_the_built_in_chats_are_split_by_their_answers():
    train, validation = load_stdlib_chats()
    answers = [{row[0]["content"] for row in split["completion"]} for split in (train, validation)]
    assert len(answers[0]) == len(train) > 9 * len(validation) * 0.8 and not answers[0] & answers[1]
    assert train[0]["prompt"][0]["content"].startswith("What does `") and train[0]["prompt"][0]["role"] == "user"
