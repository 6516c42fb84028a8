"""Every architecture of the table in recipes/README.md: what works must work, and what does not is refused at once."""

import architectures
import pytest
import torch
from transformers import logging


# What the table says, beside "yes" everywhere.
FIXED_WIDTH = (
    *("gpt2", "gptj", "gpt_neox", "falcon", "opt", "bert", "roberta", "deberta-v2", "distilbert", "albert"),
    *("electra", "modernbert", "t5", "bart", "vit"),
)
EXPERTS = {"neurons": "no: 3-D experts"}
REFUSED = {
    **{name: {"heads": "no: width not free"} for name in FIXED_WIDTH},
    "bloom": {"heads": "no: width not free", "neurons": "no: width not in config", "shrink": "nothing to cut"},
    "olmo2": {"heads": "no: norm over heads"},
    "stablelm": {"heads": "no: config cannot say"},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": {**EXPERTS, "heads": "no: norm over heads", "shrink": "nothing to cut"},
    "gpt_oss": {**EXPERTS, "heads": "no: config cannot say", "shrink": "nothing to cut"},
    "deepseek_v3": {
        **EXPERTS,
        "heads": "no: unknown layout",
        "shrink": "nothing to cut",
    },
}


@pytest.mark.parametrize("name", architectures.MODELS)
def test_architecture(name):
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    expected = dict.fromkeys(architectures.COLUMNS, "yes") | REFUSED.get(name, {})
    assert architectures.check(name) == expected
