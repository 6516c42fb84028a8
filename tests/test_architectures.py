"""Every architecture of the table in recipes/README.md: what works must work, and what does not is refused at once."""

import architectures
import pytest
import torch
from transformers import logging


# What the table says, beside "yes" everywhere.
REFUSED: dict[str, dict[str, str]] = {}


@pytest.mark.parametrize("name", architectures.MODELS)
def test_architecture(name):
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    expected = dict.fromkeys(architectures.COLUMNS, "yes") | REFUSED.get(name, {})
    assert architectures.check(name) == expected
