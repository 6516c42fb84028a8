"""`shrink`: cut zero neurons and heads out of a model, and leave a smaller model of the same class."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..sparsity import find_units
from ..sparsity.shrinkable import check_norms, check_shapes, keep, numbers, smallest_valid


logger = logging.get_logger(__name__)

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
_LOW_PRECISION_TOLERANCE = 2e-2


@torch.no_grad()
def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """Cut out the neurons and heads that are zero.

    A neuron or head counts as zero if its column in the layer that writes to the residual stream is. Every layer of a
    standard model has equally many, so layers with fewer left keep zero ones to match the fullest; so do the experts
    of a mixture, each of which keeps its own neurons. The result is an ordinary model: `save_pretrained` writes a plain
    config.json, which needs no code of ours.

    Heads can be cut where the config holds the heads' width by itself (Llama, Qwen, Mistral, Phi-3 and their like).
    GPT-2, OPT, BERT, GPT-NeoX and others derive it from the number of heads, OLMo-2 normalizes over all heads, and in
    T5 all layers share one position bias per head: there only neurons are cut.

    Args:
        model (`PreTrainedModel`): Llama, Qwen, Mistral, Mixtral, GPT-2, OPT, BERT, RoBERTa, T5 or what is built like
            them, as trained with ``pattern="neurons"`` or ``"heads"``. Not changed.

    Returns:
        `PreTrainedModel`: A new model of the same class, with fewer neurons and heads.

    Raises:
        ValueError: If nothing can be cut.
        RuntimeError: If the outputs before and after differ on random input by more than 1e-5 of the largest (float32;
            1e-8 in float64, 2e-2 in 16 bits).

    Example:

    ```python
    >>> shrink(AutoModelForCausalLM.from_pretrained("outputs/neurons")).save_pretrained("outputs/neurons-small")
    ```
    """
    config = model.config
    kept: dict[str, dict[int, Tensor]] = {}
    stay = []  # why zero units stay
    for pattern in ("neurons", "heads"):
        try:
            found = find_units(model, pattern)
        except ValueError as error:
            logger.info(str(error))
            continue
        live = {units: units.live() for units in found}
        if all(mask.all() for mask in live.values()):
            continue
        try:
            check_norms(model, pattern, found)
            groups = numbers(model, pattern, found)
        except ValueError as error:
            stay.append(f"The zero {pattern} stay: {error}.")
            continue
        for number in groups:
            cut: dict[str, dict[int, Tensor]] = {}
            most = [int(live[units].sum(-1).max()) for units in number.units]
            size = number.covering(most)
            if size == number.value:
                continue
            try:
                smaller_config, size = smallest_valid(config, number, size)
                places = [size * units.count // number.value for units in number.units]
                for units, places_here in zip(number.units, places):
                    keep(units, _padded(live[units], places_here), cut)
                check_shapes(model, smaller_config, {**kept, **cut})
            except ValueError as error:
                stay.append(f"The zero {pattern} stay: {error}.")
                continue
            config, kept = smaller_config, {**kept, **cut}
            padded = [u.name for u, n in zip(number.units, places) if int(live[u].sum(-1).min()) < n]
            if padded:
                logger.warning_once(
                    f"{type(model).__name__}: {size} of {number.value} {pattern} stay in each layer, more than"
                    f" {', '.join(padded)} would need: a model's layers are equally wide."
                )
    for reason in stay:
        logger.warning_once(f"{type(model).__name__}: {reason}")
    if not kept:
        raise ValueError(
            f"Nothing of {type(model).__name__} can be cut out. {' '.join(stay)}"
            if stay
            else f"{type(model).__name__} has no zero neurons or heads in every layer to cut out. Train it with"
            " pattern='neurons' or 'heads'."
        )
    smaller = _build(model, config, kept)
    _check_equal(model, smaller)
    return smaller


def _padded(live: Tensor, size: int) -> Tensor:
    """The indices of live units, filled up to `size` with others; of each expert its own."""
    return (~live).byte().argsort(dim=-1, stable=True)[..., :size].sort().values


def _build(model: PreTrainedModel, config, kept: dict[str, dict[int, Tensor]]) -> PreTrainedModel:
    state = {}
    for name, tensor in model.state_dict().items():
        for dim, indices in kept.get(name, {}).items():
            if indices.dim() == 1:
                tensor = tensor.index_select(dim, indices)
            else:  # each expert's own
                tensor = torch.stack([one.index_select(dim - 1, own) for one, own in zip(tensor, indices)])
        state[name] = tensor
    smaller = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random inputs of a text, vision or audio model."""
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = None
    if getattr(text, "vocab_size", None):
        tokens = torch.randint(text.vocab_size, (2, 16), generator=generator).to(model.device)
    if name == "input_ids":
        inputs = {name: tokens}
    elif name == "pixel_values":
        sizes = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        inputs = {name: numbers(2, config.num_channels, *sizes)}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        inputs = {name: numbers(2, config.num_mel_bins, 2 * config.max_source_positions)}
    elif name == "input_values":
        inputs = {name: numbers(2, 4000)}
    else:
        inputs = {key: value.to(model.device) for key, value in model.dummy_inputs.items()}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


def _check_equal(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    inputs = example_inputs(model)
    outputs = []
    for each in (model, smaller):
        training = each.training
        outputs.append(each.eval()(**inputs)[0])
        each.train(training)
    difference = ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()).item()
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise RuntimeError(
            f"The smaller model's outputs differ by {difference:.2g} of the largest, more than {tolerance:g}, so"
            f" {type(model).__name__} is not built as its shapes suggest. Nothing was changed; keep the model as it is."
        )
