"""The mixin in front of TRL's trainers, with their own configs."""

import subprocess
import sys

import pytest
from conftest import arguments, same_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lpdecay import LpDecayConfig, LpDecayMixin, measure_sparsity


trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from hf_lpdecay.training.trl import LpDecaySFTTrainer  # noqa: E402


# TRL's configs still spell it the old way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning", "ignore:`return_outputs=True`:FutureWarning"
)

CONFIG = LpDecayConfig(p=0.5, target_sparsity=0.5, importance="magnitude", ramp_end=1.0)


class LpDecayDPOTrainer(LpDecayMixin, trl.DPOTrainer):
    pass


class LpDecayGRPOTrainer(LpDecayMixin, trl.GRPOTrainer):
    pass


def shorter_is_better(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


DATA = {
    "text": [f"The {word} of the list is {word}." for word in ("first", "second", "third", "last")] * 4,
    "prompt": ["import ", "class ", "def ", "for x in "] * 4,
}


def trl_trainer(kind, folder, language_model, config=CONFIG, **overrides):
    cls, options, columns = {
        "sft": (LpDecaySFTTrainer, {"args": trl.SFTConfig, "max_length": 32}, ["text"]),
        "dpo": (LpDecayDPOTrainer, {"args": trl.DPOConfig, "max_length": 32}, ["prompt", "chosen", "rejected"]),
        "grpo": (
            LpDecayGRPOTrainer,
            {"args": trl.GRPOConfig, "num_generations": 2, "max_completion_length": 4, "beta": 0.0},
            ["prompt"],
        ),
    }[kind]
    data = Dataset.from_dict({**DATA, "chosen": ["os"] * 16, "rejected": ["something else"] * 16})
    args = arguments(folder, options.pop("args"), **{"max_steps": 12, "save_steps": 8, **options, **overrides})
    extra = {"reward_funcs": shorter_is_better} if kind == "grpo" else {}
    return cls(
        AutoModelForCausalLM.from_pretrained(language_model),
        args=args,
        train_dataset=data.select_columns(columns),
        processing_class=AutoTokenizer.from_pretrained(language_model),
        lp_config=config,
        **extra,
    )


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trainers_of_trl_end_at_the_target_with_their_own_configs(tmp_path, language_model, kind):
    trainer = trl_trainer(kind, tmp_path, language_model, save_strategy="steps")
    trainer.train()
    assert measure_sparsity(trainer.model).sparsity == 0.5
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lp_phase"] for entry in logs] == [1, 1]
    assert {"sft": "mean_token_accuracy", "dpo": "rewards/margins", "grpo": "reward"}[kind] in logs[-1]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_supervised_fine_tuning_resumes_to_the_same_bits(tmp_path, language_model):
    whole = trl_trainer("sft", tmp_path / "a", language_model, save_strategy="steps")
    whole.train()
    resumed = trl_trainer("sft", tmp_path / "b", language_model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert same_bits(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_distillation_is_refused_where_the_loss_is_not_one_of_logits_against_labels(tmp_path, language_model, kind):
    config = LpDecayConfig(lp_lambda=0.0, distill="self")
    with pytest.raises(ValueError, match="distill='self' compares the teacher's and the student's logits"):
        trl_trainer(kind, tmp_path, language_model, config).train()


def test_trl_is_imported_only_where_it_is_asked_for():
    code = (
        "import sys, hf_lpdecay, hf_lpdecay.training\n"
        "assert 'trl' not in sys.modules\n"
        "sys.modules['trl'] = None\n"  # as if it were not installed
        "try:\n    import hf_lpdecay.training.trl\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs TRL: pip install 'hf_lpdecay[trl]'" in done.stdout
