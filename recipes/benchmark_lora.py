"""Time of a training step and peak memory: LoRA, masked LoRA and all weights, on a model with half of its weights zero.

python recipes/benchmark_lora.py
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import torch
from benchmark_optimizer import SHAPES
from peft import LoraConfig, get_peft_model

from hf_lpdecay import LpAdamW, mask_lora


METHODS = ("lora", "masked-lora", "masked-lora, dropout 0.1", "all-weights")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="Shapes of the model.")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapters, on all linear layers.")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="Sequences and tokens in each.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of each process, after a first one.")
    args = parser.parse_args(argv)
    print(f"{args.shape}, rank {args.rank}, batch {args.batch}, bf16 autocast, {torch.get_num_threads()} threads\n")
    print("| method | s per step (quartiles) | times LoRA | peak memory, MB |\n| --- | --- | --- | --- |")
    first = None
    for method in METHODS:
        # A process each, since memory is not given back.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times, peak = pool.apply(measure, (method, args.shape, args.rank, args.batch, args.steps))
        low, middle, high = statistics.quantiles(times, n=4)
        first = first or middle
        print(f"| {method} | {middle:.2f} ({low:.2f} - {high:.2f}) | {middle / first:.2f} | {peak:.0f} |", flush=True)
    return 0


def measure(method: str, shape: str, rank: int, batch: tuple[int, int], steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the process's peak memory in MB."""
    torch.manual_seed(0)
    model_class, config = SHAPES[shape]
    model = model_class(config).train()
    with torch.no_grad():
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.masked_fill_(torch.rand_like(module.weight) < 0.5, 0.0)
    if method != "all-weights":
        dropout = 0.1 if "dropout" in method else 0.0
        model = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear"))
        if method != "lora":
            mask_lora(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = LpAdamW(trained, lr=1e-4, freeze_zeros=method == "all-weights")
    ids = torch.randint(config.vocab_size, batch)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
