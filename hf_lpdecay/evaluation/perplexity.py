"""Perplexity of causal language models."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Sequence[Sequence[int]], batch_size: int = 8, desc: str = "Perplexity"
) -> float:
    """Token-level perplexity over windows of equal length that are read independently of each other.

    In the model's own dtype, without autocast. The first token of a window has no context and is not predicted, so
    with windows of ``n`` tokens this is the mean over ``n - 1`` predictions each, of 1 to ``n - 1`` tokens of context.

    Args:
        model (`nn.Module`): A causal language model of Transformers, on any device.
        windows (`Sequence[Sequence[int]]`): Token ids, shape (windows, tokens).
        batch_size (`int`, *optional*, defaults to 8): Windows that are read at once.
        desc (`str`, *optional*, defaults to `"Perplexity"`): Title of the progress bar.

    Returns:
        `float`: ``exp`` of the mean negative log-likelihood in nats per token.

    Raises:
        ValueError: If there is no window, or they differ in length or have fewer than 2 tokens.
    """
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ValueError(
            f"{len(windows)} windows of lengths {lengths}: give at least one, all equally long and of 2 or more tokens."
        )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    try:
        for start in tqdm(range(0, len(windows), batch_size), desc=desc):
            input_ids = torch.tensor(windows[start : start + batch_size], device=device)
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            total += loss.double().item() * len(input_ids)
    finally:
        model.train(training)
    return math.exp(total / len(windows))
