"""What a masked adapter's file says of the base: the flag, and a record of the zeros that it was trained with."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor


# For each layer with zeros: how many, and a digest of where they are.
MaskRecord = dict[str, list]


@dataclass
class MaskedLoraConfig(LoraConfig):
    """A `LoraConfig` of an adapter that is masked by the base's zeros.

    In adapter_config.json it has one field more than PEFT's. PEFT alone warns of it when it loads the adapter.

    Args:
        lp_masked_layers (`dict[str, list]`, *optional*): For each adapted layer with zeros their number and a digest of
            their positions.
    """

    lp_masked_layers: MaskRecord | None = field(default=None)

    @classmethod
    def from_peft_type(cls, **kwargs) -> "MaskedLoraConfig":
        """As PEFT's, which would choose a class by the adapter's type and drop the record."""
        return cls(**kwargs)


@torch.no_grad()
def record_of(weight: Tensor) -> list | None:
    """The number of a weight's zeros and a digest of their positions, or nothing if there are none."""
    zeros = weight == 0
    count = int(zeros.sum())
    if not count:
        return None
    bits = np.packbits(zeros.flatten().cpu().numpy())
    return [count, hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest()]


def check_record(saved: MaskRecord, present: MaskRecord, adapter: str) -> None:
    """Raise if an adapter was trained on other zeros than the base has.

    Args:
        saved (`dict[str, list]`): The adapter's record.
        present (`dict[str, list]`): That of the base.
        adapter (`str`): The adapter's name, for the message.

    Raises:
        ValueError: With the number of layers and the least number of weights that differ.
    """
    # Sorted, so that the message is the same in every process.
    changed = sorted(name for name in saved.keys() | present.keys() if saved.get(name) != present.get(name))
    if not changed:
        return
    counts = {name: (saved.get(name, [0])[0], present.get(name, [0])[0]) for name in changed}
    # The same number at other positions: at least one zero was lost and one is new.
    least = sum(max(abs(was - now), 2 if was == now else 1) for was, now in counts.values())
    name = changed[0]
    raise ValueError(
        f"The adapter {adapter!r} was trained on a base with other zeros: in {len(changed)} of"
        f" {len(saved.keys() | present.keys())} masked layers, at least {least:,} weights differ ({name}:"
        f" {counts[name][0]:,} zeros then, {counts[name][1]:,} now). Load the base that it was trained on."
    )
