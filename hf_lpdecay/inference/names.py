"""What the weights in a checkpoint's files are called in the model: Transformers renames them, and joins experts."""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)


class CheckpointNames:
    """Finds the place of each tensor of a checkpoint in a model.

    Args:
        model (`PreTrainedModel`): On any device, `meta` included. Its parameters and buffers of now are `own`, by name.
    """

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.own.update(model.named_buffers(remove_duplicate=False))
        self._prefix = model.base_model_prefix

    def find(self, name: str) -> tuple[str, tuple[int, int] | None] | None:
        """Where a tensor belongs.

        Args:
            name (`str`): In the file.

        Returns:
            `tuple[str, tuple[int, int] | None]`, *optional*: The model's name; and of a matrix that is a part of an
            experts' 3-D parameter, the number of the expert and of the part (0 for gate, 1 for up). `None` if the model
            has no such tensor, or Transformers makes it in another way than by putting such parts beside each other.
        """
        if name in self.own:
            return name, None
        own, source = rename_source_key(name, self._renamings, self._converters, self._prefix, self.own)
        if own not in self.own:
            return None
        if source is None:
            return own, None
        converter = next(each for each in self._converters if source in each.source_patterns)
        numbers = [part for part in name.split(".") if part.isdigit()]
        if not _joins_experts(converter) or "*" not in source or not numbers:
            return None
        return own, (int(numbers[-1]), converter.source_patterns.index(source))


def _joins_experts(converter: WeightConverter) -> bool:
    """Whether it stacks the experts, and puts their parts one below the other."""
    merge, *rest = converter.operations
    if type(merge) is not MergeModulelist or merge.dim != 0 or len(converter.target_patterns) != 1:
        return False
    if len(converter.source_patterns) == 1:
        return not rest
    return len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1
