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
REFUSED = {
    **{name: {"heads": "no: width not free"} for name in FIXED_WIDTH},
    "bloom": {"heads": "no: width not free", "neurons": "no: width not in config", "shrink": "nothing to cut"},
    "olmo2": {"heads": "no: norm over heads"},
    "stablelm": {"heads": "no: config cannot say"},
    "olmoe": {"heads": "no: norm over heads"},
    "gpt_oss": {"heads": "no: config cannot say"},
    "deepseek_v3": {"heads": "no: unknown layout"},
}


@pytest.mark.parametrize("name", architectures.MODELS)
def test_architecture(name):
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    expected = dict.fromkeys(architectures.COLUMNS, "yes") | REFUSED.get(name, {})
    assert architectures.check(name) == expected
