"""Time of a training step and peak memory: LoRA, masked LoRA, a frozen base made sparse, and all weights.

The base of the others has half of its weights zero; that of the frozen base becomes so, and its steps are those of the
ramp, in which it decays.

python recipes/benchmark_lora.py
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_optimizer import SHAPES
from peft import LoraConfig, get_peft_model

from hf_lpdecay import LpAdamW, LpDecayConfig, mask_lora
from hf_lpdecay.sparsity import SparsityDriver
from hf_lpdecay.training.frozen import FrozenBase, find_frozen_base
from hf_lpdecay.training.learning_rates import learning_rates_of


METHODS = ("lora", "masked-lora", "masked-lora, dropout 0.1", "frozen-base", "all-weights")
# The shortest ramp, and the steps before it in which the importance is measured.
BEFORE, RAMP = 5, 10
# Its Hessians are collected in the second half of the ramp.
ONE_PLAN = LpDecayConfig(target_sparsity=0.5, num_plans=1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="Shapes of the model.")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="The first is compared with.")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapters, on all linear layers.")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="Sequences and tokens in each.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of each process, after a first one.")
    args = parser.parse_args(argv)
    print(f"{args.shape}, rank {args.rank}, batch {args.batch}, bf16 autocast, {torch.get_num_threads()} threads\n")
    print(f"| method | s per step (quartiles) | times {args.methods[0]} | peak memory, MB |\n| --- | --- | --- | --- |")
    first = None
    for method in args.methods:
        times, peak = in_own_process(measure, method, args.shape, args.rank, args.batch, args.steps)
        low, middle, high = statistics.quantiles(times, n=4)
        first = first or middle
        print(f"| {method} | {middle:.2f} ({low:.2f} - {high:.2f}) | {middle / first:.2f} | {peak:.0f} |", flush=True)
    return 0


def in_own_process(function: Callable, *args: Any) -> Any:
    """Call a function in a process of its own, since memory is not given back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure(method: str, shape: str, rank: int, batch: tuple[int, int], steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the process's peak memory in MB."""
    torch.manual_seed(0)
    model_class, config = SHAPES[shape]
    model = model_class(config).train()
    frozen, skip = None, 1
    if method != "frozen-base":
        _prune(model)
    if method != "all-weights":
        dropout = 0.1 if "dropout" in method else 0.0
        model = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear"))
        if method == "frozen-base":
            frozen, skip, steps = find_frozen_base(model, ONE_PLAN), BEFORE, RAMP
        elif method != "lora":
            mask_lora(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = LpAdamW(trained, lr=1e-4, freeze_zeros=method == "all-weights")
    after_step = _decay_of(frozen, optimizer) if frozen else lambda step: None
    ids = torch.randint(config.vocab_size, batch)
    times = []
    for step in range(skip + steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times[skip:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def _prune(model: torch.nn.Module) -> None:
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.masked_fill_(torch.rand_like(module.weight) < 0.5, 0.0)


def _decay_of(frozen: FrozenBase, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    """What follows each step of the adapters."""
    config, rates = frozen.config, learning_rates_of(optimizer)
    total = round((BEFORE + RAMP) / 0.7) + 1  # the ramp's longest end
    driver = SparsityDriver(config, frozen.model, frozen.params, frozen, total)
    driver.start(rates)

    def after_step(step: int) -> None:
        frozen.step(optimizer.param_groups[0]["lr"], step)
        driver.after_step(step + 1, rates)

    return after_step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
