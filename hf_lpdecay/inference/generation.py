"""Generates text and says how fast: what `lpdecay generate` does."""

import os
import resource
import sys
import time
from typing import IO, Any

import torch
from torch import nn
from transformers import AutoTokenizer, TextStreamer

from ..artifacts.archive import MANIFEST
from ..evaluation.causal import check_length, load_causal
from .loading import find_folder, load_sparse


class _Printer(TextStreamer):
    """Prints to any stream."""

    def __init__(self, tokenizer: Any, stream: IO[str]):
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=self._stream, flush=True)


def generate_text(
    path: str | os.PathLike,
    prompt: str,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    dtype: str | None = None,
    sparse: bool = True,
    stream: IO[str] | None = None,
) -> dict[str, Any]:
    """Generate text with a saved causal language model.

    Args:
        path (`str` or `os.PathLike`): A folder, an archive (only with `sparse`), or a hub id.
        prompt (`str`): What to go on from.
        max_new_tokens (`int`, *optional*, defaults to 128): How much to generate at most.
        do_sample (`bool`, *optional*, defaults to `False`): Draw tokens, as the generation config says.
        dtype (`str`, *optional*): Of the model: `"float32"`, `"bfloat16"` or `"float16"`. Defaults to what is stored.
        sparse (`bool`, *optional*, defaults to `True`): Load it with [`load_sparse`], else with `from_pretrained`.
        stream (`IO[str]`, *optional*): Where the text is printed as it is made. Defaults to the standard output.

    Returns:
        `dict[str, Any]`: `text`, `new_tokens`, `seconds` of the generation, `tokens_per_second` (with the prompt's
            time), `weight_bytes` of the model and `peak_bytes` of the process.

    Raises:
        FileNotFoundError, ValueError: See [`load_sparse`].
        ValueError: If the model cannot generate, or has fewer positions than the prompt and the new tokens take.
    """
    kind = None if dtype is None else getattr(torch, dtype)
    if sparse:
        folder = find_folder(path)
        model = load_sparse(folder, dtype=kind)
    else:
        folder = path
        if os.path.isfile(os.path.join(path, MANIFEST)):
            raise ValueError(f"{path} is an archive: load it sparse, or unpack it first (lpdecay unpack {path} OUT).")
        model = load_causal(path, kind or "auto")
    if not model.can_generate():
        raise ValueError(f"{path} holds a {type(model).__name__}, which cannot generate: give a causal language model.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not model.config.is_encoder_decoder:
        tokens = inputs["input_ids"].shape[1]
        # The last new token is not read.
        check_length(model, tokens + max_new_tokens - 1, f"A prompt of {tokens} tokens and {max_new_tokens=}")
    started = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        streamer=_Printer(tokenizer, stream or sys.stdout),
    )
    seconds = time.perf_counter() - started
    new_tokens = output.shape[1] - inputs["input_ids"].shape[1]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "weight_bytes": memory(model),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def memory(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
