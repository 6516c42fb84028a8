"""One-shot Wanda or SparseGPT pruning with llm-compressor, saved as a plain dense checkpoint with exact zeros.

python oneshot.py METHOD SPARSITY MODEL TEXT OUTPUT, where METHOD is wanda or sparsegpt and SPARSITY is a number or 2:4.
"""

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


WINDOWS, LENGTH = 128, 512

method, sparsity, model_path, text, output = sys.argv[1:]
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
level = {"sparsity": 0.5, "mask_structure": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}

model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_path)
ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:WINDOWS]]

start = time.perf_counter()
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}),
    recipe=modifier(targets=["Linear"], ignore=["re:.*lm_head"], **level),
    num_calibration_samples=WINDOWS,
    max_seq_length=LENGTH,
    shuffle_calibration_samples=False,
)
print(f"{method} {sparsity}: {len(windows)} windows of {LENGTH} tokens, {time.perf_counter() - start:.0f} s")

# oneshot replaced model.save_pretrained by one that adds its own files and metadata; the class still has the plain one.
PreTrainedModel.save_pretrained(model, output)
tokenizer.save_pretrained(output)
