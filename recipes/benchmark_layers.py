"""How fast sparse linear layers are beside dense ones, shape by shape, in interleaved rounds of one run on a CPU.

    python recipes/benchmark_layers.py
    HF_LPDECAY_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python recipes/benchmark_layers.py

The second command shows a machine with AVX2 alone: without the last two variables torch's dense products would still
use what this machine has.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

from hf_lpdecay.files import write_text
from hf_lpdecay.inference import SparseLinear
from hf_lpdecay.inference.kernels import kernel_for
from hf_lpdecay.inference.speed import COLUMNS_FROM, choose_encoding, time_in_turn


SHAPES = ("4096x4096", "14336x4096", "4096x14336", "2048x2048", "1536x576", "576x576", "192x576")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="Outputs x inputs of the layers.")
    parser.add_argument("--zeros", nargs="+", type=float, default=(0.5, 0.7, 0.9), help="Shares of zeros.")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 8, 512), help="Rows of x (tokens at a time).")
    parser.add_argument("--rounds", type=int, default=9, help="Timed rounds, after one that is not (default: 9).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--results_file", default="outputs/benchmark_layers.json", help="JSON file to write.")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    kernel = kernel_for(torch.bfloat16)
    if isinstance(kernel, str):
        print(f"benchmark_layers.py: error: {kernel}", file=sys.stderr)
        return 2
    names = {name: os.environ.get(name) for name in ("HF_LPDECAY_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    print(f"{kernel.instruction_set}, AMX: {bool(kernel.amx)}, {options.threads} threads, {names}\n")
    titles = (
        "shape",
        "zeros",
        "rows",
        "fp32, ms",
        "bf16, ms",
        "sparse, ms",
        "against the faster",
        "memory of bf16",
        "kept as",
    )
    print(f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|")
    results = []
    for shape in options.shapes:
        rows, cols = map(int, shape.split("x"))
        for zeros in options.zeros:
            for result in measure(rows, cols, zeros, options.rows, options.rounds):
                results.append({"shape": shape, "zeros": zeros, **result})
                print(line(results[-1]), flush=True)
    Path(options.results_file).parent.mkdir(parents=True, exist_ok=True)
    write_text(options.results_file, json.dumps({"options": vars(options), "layers": results}, indent=2) + "\n")
    return 0


@torch.inference_mode()
def measure(outputs: int, inputs: int, zeros: float, row_counts: list[int], rounds: int) -> list[dict]:
    """Time a layer, dense in float32 and bfloat16 and sparse in bfloat16, for several numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(inputs, outputs, bias=False)
    dense.weight[torch.rand(outputs, inputs, generator=generator) < zeros] = 0.0
    low = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    low.weight.copy_(dense.weight)
    chosen = choose_encoding(low.weight, zeros)
    columns = zeros >= COLUMNS_FROM if chosen is None else chosen  # `to_sparse` would leave the layer dense
    sparse = SparseLinear.from_dense(low.weight, columns=columns)
    results = []
    for n in row_counts:
        x = torch.randn(n, inputs, generator=generator)
        calls = {"float32": (dense, x), "bfloat16": (low, x.bfloat16()), "sparse": (sparse, x.bfloat16())}
        seconds = time_in_turn(calls, rounds)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        rival = min(("float32", "bfloat16"), key=medians.get)
        results.append(
            {
                "rows": n,
                "encoding": "columns" if columns else "bits",
                "converted": chosen is not None,
                "seconds": medians,
                "speedups": sorted(a / b for a, b in zip(seconds[rival], seconds["sparse"])),
                "speedup": medians[rival] / medians["sparse"],
                "memory": sum(tensor.nbytes for tensor in sparse.packed[:3]) / low.weight.nbytes,
            }
        )
    return results


def line(result: dict) -> str:
    """One row of the table."""
    seconds, spread = result["seconds"], result["speedups"]
    times = [f"{1e3 * seconds[name]:.3g}" for name in ("float32", "bfloat16", "sparse")]
    quartiles = spread[len(spread) // 4], spread[-1 - len(spread) // 4]
    ratio = f"{result['speedup']:.2f} ({quartiles[0]:.2f} - {quartiles[1]:.2f})"
    cells = [result["shape"], f"{result['zeros']:.0%}", str(result["rows"]), *times, ratio, f"{result['memory']:.2f}"]
    cells.append(result["encoding"] if result["converted"] else "stays dense")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
