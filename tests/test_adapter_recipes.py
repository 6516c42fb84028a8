"""The recipes that train adapters: on a sparse model, and on a frozen base that becomes sparse."""

from pathlib import Path

import finetune
import pytest
from transformers import AutoModelForCausalLM

from hf_lpdecay import measure_sparsity


CONFIGS = Path(__file__).parent.parent / "recipes" / "configs" / "smollm2-135m"


def sparsity_of(folder):
    return measure_sparsity(AutoModelForCausalLM.from_pretrained(folder)).sparsity


def test_a_language_model_by_masked_lora_and_on_a_frozen_base(command, language_model, tmp_path, capsys):
    # Two steps of the adapters on a sparse model, and as few as a ramp needs on a dense one.
    for name, steps in (("frozen-base", "24"), ("masked-lora", "2")):
        folder = tmp_path / name
        flags = ["--output_dir", str(folder), "--max_steps", steps, "--warmup_steps", "0"]
        if name == "masked-lora":  # on what the first one has written
            flags += ["--model_name_or_path", str(tmp_path / "frozen-base")]
        assert finetune.main([*command, "--config", str(CONFIGS / f"{name}.yaml"), *flags]) == 0
        assert sparsity_of(folder) == pytest.approx(0.5, abs=1e-4)
        assert "by masked LoRA of rank 16" in capsys.readouterr().out
