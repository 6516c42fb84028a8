"""`shrink`: cut zero neurons and heads out of a model, and leave a smaller model of the same class."""

import copy

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..sparsity import Units, find_units


logger = logging.get_logger(__name__)

# What a config.json calls the width of the feed-forward.
_WIDTH_NAMES = ("intermediate_size", "ffn_dim", "d_ff", "n_inner")
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
_LOW_PRECISION_TOLERANCE = 2e-2


@torch.no_grad()
def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """Cut out the neurons and heads that are zero.

    A neuron or head counts as zero if its column in the layer that writes to the residual stream is. Every layer of a
    standard model has equally many, so layers with fewer left keep zero ones to match the fullest. The result is an
    ordinary model: `save_pretrained` writes a plain config.json, which needs no code of ours.

    Heads can be cut where the config holds the heads' width by itself (Llama, Qwen, Mistral and their like). GPT-2,
    OPT, BERT and RoBERTa derive it from the number of heads, and in T5 all layers share one position bias per head:
    there only neurons are cut.

    Args:
        model (`PreTrainedModel`): Llama, Qwen, Mistral, GPT-2, OPT, BERT, RoBERTa, T5 or what is built like them, as
            trained with ``pattern="neurons"`` or ``"heads"``. Not changed.

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
    for pattern in ("neurons", "heads"):
        try:
            found = find_units(model, pattern)
        except ValueError as error:
            logger.info(str(error))
            continue
        live = [_live(units) for units in found]
        count, size = found[0].count, max(len(indices) for indices in live)
        if size == count:
            continue
        if pattern == "heads" and not _heads_are_free(model):
            logger.warning_once(f"The zero heads stay: {type(model).__name__}'s config cannot say how wide fewer are.")
            continue
        while not _valid(_resized(config, pattern, count, size)):
            size += 1  # some configs want the hidden size to be a multiple of the heads; the present one is valid
        if size == count:
            logger.warning_once(f"The zero {pattern} stay: no smaller number is a valid {type(config).__name__}.")
            continue
        config = _resized(config, pattern, count, size)
        padded = [units.name for units, indices in zip(found, live) if len(indices) < size]
        if padded:
            logger.warning_once(
                f"{type(model).__name__}: {size} of {count} {pattern} stay in each layer, more than"
                f" {', '.join(padded)} would need: a model's layers are equally wide."
            )
        for units, indices in zip(found, live):
            _keep(units, _padded(indices, count, size), kept)
    if not kept:
        raise ValueError(
            f"{type(model).__name__} has no zero neurons or heads in every layer to cut out. Train it with"
            " pattern='neurons' or 'heads'."
        )
    smaller = _build(model, config, kept)
    _check_equal(model, smaller)
    return smaller


def _live(units: Units) -> Tensor:
    """Indices of the units that write something to the residual stream."""
    writer = units.slices[-1]
    return writer.of(writer.param, units.count).flatten(1).any(1).nonzero().view(-1)


def _padded(indices: Tensor, count: int, size: int) -> Tensor:
    """The indices, filled up to `size` with others."""
    taken = torch.zeros(count, dtype=torch.bool, device=indices.device)
    taken[indices] = True
    taken[(~taken).nonzero().view(-1)[: size - len(indices)]] = True
    return taken.nonzero().view(-1)


def _heads_are_free(model: PreTrainedModel) -> bool:
    """Whether the width of a head is a number of its own, so that there can be fewer of them."""
    return hasattr(model.config, "num_key_value_heads") and not model.config.is_encoder_decoder


def _resized(config: PreTrainedConfig, pattern: str, count: int, size: int) -> PreTrainedConfig:
    """A config with `size` of `count` neurons, or heads (key/value groups)."""
    config = copy.deepcopy(config)
    if pattern == "neurons":
        (name,) = (name for name in _WIDTH_NAMES if hasattr(config, name))
        setattr(config, name, size)
    else:
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads = config.num_attention_heads // count * size
        config.num_key_value_heads = size
    return config


def _valid(config: PreTrainedConfig) -> bool:
    try:
        config.validate()
    except StrictDataclassClassValidationError:
        return False
    return True


def _keep(units: Units, indices: Tensor, kept: dict[str, dict[int, Tensor]]) -> None:
    """Note which indices of which dimension stay, for each weight and for the biases of those that read."""
    for part in units.slices:
        own = (part.start + indices[:, None] * part.width + torch.arange(part.width, device=indices.device)).view(-1)
        names = [(part.name, part.dim)]
        if part is not units.slices[-1]:
            names.append((part.name.removesuffix("weight") + "bias", 0))
        for name, dim in names:
            before = kept.setdefault(name, {}).get(dim)
            kept[name][dim] = own if before is None else torch.cat([before, own])


def _build(model: PreTrainedModel, config, kept: dict[str, dict[int, Tensor]]) -> PreTrainedModel:
    state = {}
    for name, tensor in model.state_dict().items():
        for dim, indices in kept.get(name, {}).items():
            tensor = tensor.index_select(dim, indices)
        state[name] = tensor
    smaller = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def _check_equal(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=generator).to(model.device)
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
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
