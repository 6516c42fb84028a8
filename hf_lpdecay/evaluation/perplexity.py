"""Perplexity of causal language models, with all that must be said beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..sparsity.sharding import several_processes
from .causal import check_causal, check_length


@dataclass(frozen=True)
class TextLoss:
    """What a causal language model makes of a text.

    Args:
        losses (`torch.Tensor`): Negative log-likelihood of each window's counted tokens, in nats, summed; float64,
            shape (windows,).
        tokens (`torch.Tensor`): How many tokens of each window are counted, shape (windows,).
        words (`int`): Words of the counted tokens: of those of the text that was read, split at white space, as large a
            share as of its tokens, since the first token of a window may be the middle of a word.
        context_length (`int`): Tokens per window.
        stride (`int`): Tokens from the start of one window to the next.
    """

    losses: Tensor
    tokens: Tensor
    words: int
    context_length: int
    stride: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss per token. Depends on the tokenizer."""
        return math.exp(self.losses.sum().item() / self.tokens.sum().item())

    @property
    def word_perplexity(self) -> float:
        """``exp`` of the loss per word, which models with different tokenizers can be compared by."""
        return math.exp(self.losses.sum().item() / self.words)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python, ready for JSON."""
        return {
            "perplexity": self.perplexity,
            "perplexity_interval": list(self.interval()),
            "word_perplexity": self.word_perplexity,
            "tokens": int(self.tokens.sum()),
            "words": self.words,
            "windows": len(self.losses),
            "context_length": self.context_length,
            "stride": self.stride,
        }

    def interval(self, level: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the perplexity: windows drawn anew, with replacement.

        Args:
            level (`float`, *optional*, defaults to `0.95`): Share of the samples inside.
            samples (`int`, *optional*, defaults to 1000): How often to draw.
            seed (`int`, *optional*, defaults to 0): Of the drawing, so that models are compared on the same samples.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.losses), (samples, len(self.losses)), generator=generator)
        perplexities = (self.losses[drawn].sum(1) / self.tokens[drawn].sum(1)).exp()
        low, high = perplexities.quantile(perplexities.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
        return low, high


def text_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 8,
    desc: str = "Text",
) -> TextLoss:
    """Read a text in windows and add up what each token costs, every token once.

    Args:
        model (`nn.Module`): A causal language model of Transformers, on any device.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): What to read; special tokens are not added.
        context_length (`int`, *optional*, defaults to 1024): Tokens per window.
        stride (`int`, *optional*): Tokens from the start of one window to the next. Defaults to `context_length`, so
            that windows do not overlap and the first token of each is not predicted. With less, only the last `stride`
            tokens of all but the first window are counted, each with ``context_length - stride`` tokens of context or
            more: slower, and nearer to what the model is capable of.
        max_windows (`int`, *optional*): Read that many windows at most.
        batch_size (`int`, *optional*, defaults to 8): Windows that are read at once.
        desc (`str`, *optional*, defaults to `"Text"`): Title of the progress bar.

    Returns:
        `TextLoss`: Losses, and all that a perplexity needs to be said with.

    Raises:
        ValueError: If the text is shorter than a window, the stride does not fit, the model is no causal language model
            or has fewer positions than a window has tokens.
    """
    stride = context_length if stride is None else stride
    if not 0 < stride <= context_length or context_length < 2:
        raise ValueError(
            f"Invalid stride={stride} for context_length={context_length}: should be between 1 and the context length,"
            " which should be 2 or more."
        )
    check_causal(model)
    check_length(model, context_length, f"context_length={context_length}")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = list(range(0, len(tokens) - context_length + 1, stride))[:max_windows]
    if not starts:
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than a window of context_length={context_length}: give a longer"
            " text, or a smaller context_length."
        )
    windows = [tokens[start : start + context_length] for start in starts]
    counted = [context_length - 1] + [min(stride, context_length - 1)] * (len(starts) - 1)
    losses = window_losses(model, windows, counted, batch_size, desc)
    read = tokens[: starts[-1] + context_length]
    words = max(1, round(len(tokenizer.decode(read).split()) * sum(counted) / len(read)))
    return TextLoss(losses, torch.tensor(counted), words, context_length, stride)


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
        ValueError: If there is no window, or they differ in length, have fewer than 2 tokens or more than the model
            has positions.
    """
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ValueError(
            f"{len(windows)} windows of lengths {lengths}: give at least one, all equally long and of 2 or more tokens."
        )
    check_length(model, lengths[0], f"A window of {lengths[0]} tokens")
    losses = window_losses(model, windows, [lengths[0] - 1] * len(windows), batch_size, desc)
    return math.exp(losses.sum().item() / (len(windows) * (lengths[0] - 1)))


@torch.no_grad()
def window_losses(
    model: nn.Module, windows: Sequence[Sequence[int]], counted: Sequence[int], batch_size: int, desc: str
) -> Tensor:
    """Negative log-likelihood of the last `counted` tokens of each window, summed, in nats.

    Where several processes are at work, each holding the whole model, they share the windows.

    Args:
        model (`nn.Module`): A causal language model of Transformers, on any device.
        windows (`Sequence[Sequence[int]]`): Token ids, shape (windows, tokens).
        counted (`Sequence[int]`): For each window how many tokens at its end count.
        batch_size (`int`): Windows that are read at once.
        desc (`str`): Title of the progress bar.

    Returns:
        `torch.Tensor`: float64, shape (windows,), on the CPU.
    """
    rank, processes = 0, 1
    if several_processes():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = range(rank, len(windows), processes)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = torch.zeros(len(windows), dtype=torch.float64)
    try:
        for start in tqdm(range(0, len(mine), batch_size), desc=desc, disable=rank > 0):
            batch = mine[start : start + batch_size]
            input_ids = torch.tensor([windows[i] for i in batch], device=device)
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
            each = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").double()
            for i, row in zip(batch, each.cpu()):
                losses[i] = row[len(row) - counted[i] :].sum()
    finally:
        model.train(training)
    if processes > 1:
        gathered: list[Tensor] = [None] * processes
        torch.distributed.all_gather_object(gathered, losses)
        losses = torch.stack(gathered).sum(0)
    return losses
