"""TRL's side: needs the optional extra `trl`. [`LpDecayMixin`] goes in front of TRL's other trainers as well."""

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        "hf_lpdecay.training.trl needs TRL: pip install 'hf_lpdecay[trl]' (or pip install trl)."
    ) from error

from .trainer import LpDecayMixin


class LpDecaySFTTrainer(LpDecayMixin, SFTTrainer):
    """TRL's `SFTTrainer` (chat templates, packing, completion-only loss, PEFT) that trains sparse.

    See [`~hf_lpdecay.LpDecayMixin`]. The other trainers of TRL take the mixin alike:
    `class LpDecayDPOTrainer(LpDecayMixin, DPOTrainer)`.

    Example:

    ```python
    >>> from hf_lpdecay.training.trl import LpDecaySFTTrainer

    >>> args = SFTConfig("out", model_init_kwargs={"dtype": "float32"})
    >>> config = LpDecayConfig(p=0.5, target_sparsity=0.5)
    >>> LpDecaySFTTrainer("HuggingFaceTB/SmolLM2-135M", args, train_dataset=data, lp_config=config).train()
    ```
    """
