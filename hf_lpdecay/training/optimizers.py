"""Which optimizers of `TrainingArguments` train sparse, and what the importance takes from them."""

import dataclasses

import torch
from torch import nn
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..config import LpDecayConfig
from ..optim import LpDecay
from ..sparsity.experts import expert_modules
from ..sparsity.patterns import SemiStructured, parse_pattern


logger = logging.get_logger(__name__)

# What LpAdamW itself is; anything else is wrapped in LpDecay.
ADAMW = ("adamw_torch", "adamw_torch_fused")
# Those whose second moment `importance_from_adam` finds, beside AdamW's: names in `optim`, and of classes.
_SECOND_MOMENT = (
    *("adafactor", "rmsprop", "adagrad"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
)
_SECOND_MOMENT_CLASSES = (
    *("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adafactor"),
    *("Adam8bit", "AdamW8bit", "PagedAdam", "PagedAdamW", "PagedAdam8bit", "PagedAdamW8bit"),
)


def check_optim(optim: str, config: LpDecayConfig) -> None:
    """Raise if an optimizer cannot be wrapped.

    Args:
        optim (`str`): Of `TrainingArguments`.
        config (`LpDecayConfig`): How the model is made sparse.

    Raises:
        ValueError: With the reason.
    """
    name = OptimizerNames(optim).value
    reason = None
    if "layerwise" in name or "lomo" in name:
        reason = "it steps in the backward pass, layer by layer, where no decay can follow the step"
    elif name.startswith("schedule_free"):
        reason = "it trains at points between two sets of weights, and zeros of one are none of the other"
    elif name not in ADAMW and config.s_rate != 1:
        reason = f"s_rate={config.s_rate} is an option of LpAdamW alone"
    if reason is not None:
        raise ValueError(f"optim={name!r} has no p-norm decay: {reason}. Take 'adamw_torch_fused', or 'adafactor'.")


def config_for(optim: str, config: LpDecayConfig, model: nn.Module) -> LpDecayConfig:
    """The config with an importance that the optimizer can give.

    Args:
        optim (`str`): Of `TrainingArguments`.
        config (`LpDecayConfig`): As the user made it.
        model (`nn.Module`): The model that is trained.

    Returns:
        `LpDecayConfig`: With another importance where `"adam"` would find no second moment.
    """
    name = OptimizerNames(optim).value
    return config if name in (*ADAMW, *_SECOND_MOMENT) else _without_moment(f"optim={name!r}", config, model)


def config_for_optimizer(optimizer: torch.optim.Optimizer, config: LpDecayConfig, model: nn.Module) -> LpDecayConfig:
    """The config with an importance that an optimizer which was made elsewhere can give.

    Args:
        optimizer (`LpAdamW` or `LpDecay`): Steps the weights.
        config (`LpDecayConfig`): As the user made it.
        model (`nn.Module`): The model that is trained.

    Returns:
        `LpDecayConfig`: See [`config_for`].
    """
    if not isinstance(optimizer, LpDecay):
        return config
    classes = [cls.__name__ for cls in type(optimizer.optimizer).__mro__]
    known = any(name in _SECOND_MOMENT_CLASSES for name in classes)
    return config if known else _without_moment(classes[0], config, model)


def _without_moment(optimizer: str, config: LpDecayConfig, model: nn.Module) -> LpDecayConfig:
    if config.target_sparsity is None or config.importance != "adam":
        return config
    importance = importance_without_moment(config, experts=next(expert_modules(model), None) is not None)
    logger.warning_once(
        f"{optimizer} keeps no second moment that importance='adam' could use: importance={importance!r} is used."
    )
    return with_importance(config, importance)


def importance_without_moment(config: LpDecayConfig, experts: bool) -> str:
    """The default importance of weights without a second moment; `experts` do not show their outputs' gradients."""
    return "activation" if experts or isinstance(parse_pattern(config.pattern), SemiStructured) else "fisher"


def with_importance(config: LpDecayConfig, importance: str) -> LpDecayConfig:
    """The config with another importance than that of Adam, and a default scope in which it can be compared."""
    scope = config.scope
    if importance != "fisher" and "scope" in config.left_to_default:
        scope = "layer"  # the scores differ too much from layer to layer: whole layers would be pruned
    return dataclasses.replace(config, importance=importance, scope=scope)
