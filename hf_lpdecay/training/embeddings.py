"""A learning rate of their own for the embedding and the output head of a model."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def trained_embeddings(model: nn.Module) -> list[Tensor]:
    """The trained parameters of the model's input embedding and output head, each once.

    Args:
        model (`nn.Module`): Any model; the heads of classifiers are none of words, and left out.

    Returns:
        `list[torch.Tensor]`: Empty where the model has neither, or both are frozen.
    """
    params = {}
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = None
        with contextlib.suppress(NotImplementedError):  # models of speech have none
            module = getattr(model, name, lambda: None)()
        if module is not None:
            params |= {id(param): param for param in module.parameters() if param.requires_grad}
    return list(params.values())


def check_embeddings(model: nn.Module, learning_rate: float | None) -> None:
    """Raise a `ValueError` where a learning rate is given for embeddings that are not trained."""
    if learning_rate is not None and not trained_embeddings(model):
        raise ValueError(
            f"embedding_learning_rate={learning_rate}: {type(model).__name__} has no embedding or output head that is"
            " trained. Leave it out, or unfreeze them (PEFT: modules_to_save)."
        )


def split_embeddings(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], learning_rate: float) -> None:
    """Give `params` groups with that learning rate, behind all others, since the `Trainer` logs the first one's."""
    chosen = {id(param) for param in params}
    groups: tuple[list[dict], list[dict]] = ([], [])
    for group in optimizer.param_groups:
        for inside, options in ((False, {}), (True, {"lr": learning_rate})):
            part = [param for param in group["params"] if (id(param) in chosen) == inside]
            if part:
                groups[inside].append({**group, **options, "params": part})
    optimizer.param_groups[:] = [*groups[False], *groups[True]]
