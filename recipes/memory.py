"""Memory of a training run in GB, worked out from the shapes of a model that is never made.

python recipes/memory.py
python recipes/memory.py --model_name_or_path path/to/a/config --lora_r 64 --dtype float32
"""

import argparse
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from hf_lpdecay.sparsity import match_parameters
from hf_lpdecay.sparsity.activations import hook_inputs
from hf_lpdecay.sparsity.compensation import block_size


LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
# Bytes for each number in float32: adapters, moments and Hessians.
FULL = 4
COLUMNS = ("weights", "gradients", "moments", "Hessians")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="Folder or hub id with a config; a Llama of 8 B without it.")
    parser.add_argument("--lora_r", type=int, default=16, help="Rank of the adapters on all linear layers.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="Of the model's weights.")
    args = parser.parse_args(argv)
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path) if args.model_name_or_path else LLAMA_8B
        print(table(memory(config, args.lora_r, getattr(torch, args.dtype))))
    except (OSError, ValueError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def memory(config: PreTrainedConfig, lora_r: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, int]]:
    """Bytes by method, and of what, with weights and their gradients in `dtype`.

    Activations are left out, and so is what one layer takes for a moment: they depend on the batch, and are alike.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numel = sum(param.numel() for param in model.parameters())
    hessians = FULL * hessian_numel(model)
    with torch.device("meta"):
        model = get_peft_model(model, LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = sum(param.numel() for param in model.parameters() if param.requires_grad)
    whole = dtype.itemsize * numel
    lora = {
        "weights": whole + FULL * adapters,
        "gradients": FULL * adapters,
        "moments": 2 * FULL * adapters,
        "Hessians": 0,
    }
    full = {"weights": whole, "gradients": whole, "moments": 2 * FULL * numel, "Hessians": 0}
    return {
        "LoRA": lora,
        "frozen base made sparse": {**lora, "Hessians": hessians},
        "frozen base made sparse, hessians_on_cpu": {**lora, "Hessians on the CPU": hessians},
        "full fine-tuning": full,
    }


def hessian_numel(model: Any) -> int:
    """Numbers in the Hessians of a model on the meta device: layers with the same input share one."""
    inputs: dict[int, Tensor] = {}
    weights = list(match_parameters(model).values())
    handles = hook_inputs(model.train(), weights, lambda weight, features: inputs.setdefault(id(features), features))
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
    for handle in handles:
        handle.remove()
    return sum(features.shape[-1] * block_size(features.shape[-1]) for features in inputs.values())


def table(found: dict[str, dict[str, int]]) -> str:
    """Markdown, in GB of 10^9 bytes."""
    lines = [f"| method | {' | '.join(COLUMNS)} | together, GB |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for method, parts in found.items():
        cells = [f"{parts[name] / 1e9:.1f}" for name in COLUMNS]
        if "Hessians on the CPU" in parts:
            cells[-1] = f"({parts['Hessians on the CPU'] / 1e9:.1f} on the CPU)"
        lines.append(f"| {method} | {' | '.join(cells)} | {sum(parts[name] for name in COLUMNS) / 1e9:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
