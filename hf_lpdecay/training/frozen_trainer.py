"""What a `Trainer` does for a frozen base that becomes sparse: save it, load it, merge the adapters into it."""

import shutil
from pathlib import Path

import torch
from torch import nn

from ..files import written_aside
from ..sparsity.selection import own_name
from .adapters import merge_sparse, update_mask_record
from .callbacks import SparsityCallback, unwrapped
from .frozen import FrozenBase


# In the folder of a saved adapter: the sparse model that it belongs to.
BASE_FOLDER = "base"


class FrozenBaseMixin:
    """The frozen base of a `Trainer`'s PEFT model in its checkpoints, and its end as a plain sparse model.

    A checkpoint holds the base's present weights beside the adapter. `save_model` writes the adapter, and the sparse
    base as a plain model into its subfolder `base`: `load_masked_lora(AutoModel....from_pretrained("out/base"), "out")`
    loads both. After `merge_adapters` it writes the merged model alone.
    """

    _frozen: FrozenBase | None = None

    @property
    def has_frozen_base(self) -> bool:
        """Whether masked adapters are trained on a frozen base, so that [`merge_adapters`] loses nothing."""
        return self._frozen is not None

    @torch.no_grad()
    def merge_adapters(self) -> nn.Module:
        """Merge the adapters into the base: the trainer's model is a plain sparse model afterwards.

        Masked adapters, such as those on a frozen base that became sparse, lose nothing by it, and every zero stays.

        Returns:
            `nn.Module`: The merged model, which is the trainer's from now on.

        Raises:
            TypeError, ValueError: If the model has no adapters, or none that can be merged; see [`merge_sparse`].
        """
        self.model = self.model_wrapped = merge_sparse(unwrapped(self.model))
        self._frozen = None
        self._lp_names = list(map(own_name, self._lp_names))
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does, and with an adapter the base that became sparse for it."""
        folder = output_dir or self.args.output_dir
        if self._base_changes() and self.args.should_save:
            update_mask_record(unwrapped(self.model))
            Path(folder).mkdir(parents=True, exist_ok=True)
            if _internal_call:
                self._frozen.save(folder)
            else:  # before it may be pushed
                self._save_base(Path(folder))
        super().save_model(output_dir, _internal_call)

    def _base_changes(self) -> bool:
        return self._frozen is not None and self._frozen.changes

    def _save_base(self, folder: Path) -> None:
        with written_aside(folder / BASE_FOLDER) as aside:
            self._frozen.save_model(aside)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(aside)
            shutil.rmtree(folder / BASE_FOLDER, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._base_changes():
            self._frozen.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self) -> None:
        before = self._sparsity_callback()
        super()._load_callback_state()
        self._sparsity_callback().take_over(before)  # one that was restored from a checkpoint begins with nothing

    def _sparsity_callback(self) -> SparsityCallback:
        """Looked up, since a checkpoint's callbacks may have replaced the first one."""
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, SparsityCallback))
