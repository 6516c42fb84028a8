"""Time of a training step and memory: LoRA, masked LoRA, a frozen base made sparse, and all weights with the decay.

Each method runs in a process of its own, and they take their steps in turns. The base of the others has half of its
weights zero; that of the frozen base becomes so. Its steps are those of the ramp, in which it decays and its Hessians
are collected in the second half, and those after it. "Held" is what the process holds between the backward pass and the
step beyond what it held without a model, in a further step whose time does not count; beside it what memory.py says.

python recipes/benchmark_lora.py
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmark_optimizer import SHAPES, forget_peak, process_bytes
from memory import COLUMNS, memory
from peft import LoraConfig, get_peft_model

from hf_lpdecay import LpAdamW, LpDecayConfig, mask_lora
from hf_lpdecay.inference.malloc import trim_memory
from hf_lpdecay.sparsity import SparsityDriver, participants
from hf_lpdecay.training.frozen import FrozenBase, find_frozen_base
from hf_lpdecay.training.learning_rates import learning_rates_of


# What each holds, as memory.py calls it.
METHODS = {
    "lora": "LoRA",
    "masked-lora": "LoRA",
    "masked-lora, dropout 0.1": "LoRA",
    "frozen-base": "frozen base made sparse",
    "all-weights": "full fine-tuning",
}
AFTER = "frozen-base, after the ramp"
# The shortest ramp, and the steps before it in which the importance is measured.
BEFORE, RAMP = 5, 10
# Its Hessians are collected in the second half of the ramp.
ONE_PLAN = LpDecayConfig(target_sparsity=0.5, num_plans=1)
# Of one step: which row it belongs to, its seconds, the process's peak memory during it in MB, and what it held in MB.
# The seconds or what it held are not known: the one disturbs the other.
Step = tuple[str, float | None, float, float | None]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="Shapes of the model.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="LoRA is compared with.")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapters, on all linear layers.")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="Sequences and tokens in each.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of each process, after a first one.")
    args = parser.parse_args(argv)
    print(f"{args.shape}, rank {args.rank}, batch {args.batch}, bf16 autocast, {torch.get_num_threads()} threads\n")
    runs = [in_own_process(steps_of, method, args.shape, args.rank, args.batch, args.steps) for method in args.methods]
    steps = in_turns(runs)
    print(table(steps, {**METHODS, AFTER: "LoRA"}, memory(SHAPES[args.shape][1], args.rank, torch.float32)))
    return 0


def in_turns(runs: list[Iterator[Step]]) -> list[Step]:
    """Let all runs take a step each, again and again, until every one has ended."""
    steps = []
    while runs:
        for run in list(runs):
            step = next(run, None)
            runs.remove(run) if step is None else steps.append(step)
    return steps


def in_own_process(function: Callable[..., Iterator[Step]], *args: Any) -> Iterator[Step]:
    """Run a generator in a process of its own, which goes on only when it is asked for the next step."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # ready
    return iter(lambda: _ask(ours), None)


def _ask(connection: Any) -> Step | None:
    connection.send(True)
    return connection.recv()


def _serve(connection: Any, function: Callable[..., Iterator[Step]], args: tuple) -> None:
    steps = function(*args)
    connection.send(True)
    while True:
        connection.recv()
        step = next(steps, None)
        connection.send(step)
        if step is None:
            return


def table(steps: list[Step], kinds: dict[str, str], worked_out: dict[str, dict[str, int]]) -> str:
    """Markdown, a row for each method."""
    rows: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        rows[step[0]].append(step)
    times = {name: [seconds for _, seconds, *_ in own if seconds is not None] for name, own in rows.items()}
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = medians.get("lora", next(iter(medians.values())))
    lines = [
        f"| method | s per step (quartiles) | times {'LoRA' if 'lora' in medians else next(iter(medians))} |"
        " peak memory, MB | held, MB | worked out, MB |",
        "| --- " * 6 + "|",
    ]
    for name, own in rows.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        peak, held = max(step[2] for step in own), max(step[3] for step in own if step[3] is not None)
        expected = sum(worked_out[kinds[name]].get(column, 0) for column in COLUMNS) / 1e6
        lines.append(
            f"| {name} | {medians[name]:.2f} ({low:.2f} - {high:.2f}) | {medians[name] / first:.2f} | {peak:.0f} |"
            f" {held:.0f} | {expected:.0f} |"
        )
    return "\n".join(lines)


def steps_of(method: str, shape: str, rank: int, batch: tuple[int, int], steps: int) -> Iterator[Step]:
    """Take the steps of a method, one for each that is asked for."""
    torch.manual_seed(0)
    model_class, config = SHAPES[shape]
    ids = torch.randint(config.vocab_size, batch)
    empty = _megabytes("VmRSS")
    model = model_class(config).train()
    frozen, skip = None, 1
    if method != "frozen-base":
        _prune(model)
    if method != "all-weights":
        dropout = 0.1 if "dropout" in method else 0.0
        model = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear"))
        if method == "frozen-base":
            frozen, skip = find_frozen_base(model, ONE_PLAN), BEFORE
        elif method != "lora":
            mask_lora(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = LpAdamW(trained, lr=1e-4, freeze_zeros=method == "all-weights")
    if method == "all-weights":
        _plan_decay(optimizer, model)
    after_step = _decay_of(frozen, optimizer) if frozen else lambda step: None
    total = skip + steps + (RAMP if frozen else 0) + 1
    for step in range(total):
        # When the Hessians are complete, and in the end.
        looks = step == total - 1 or (frozen is not None and step == BEFORE + RAMP - 2)
        with contextlib.suppress(OSError):  # otherwise the peak is that of all steps
            forget_peak()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if looks:
            trim_memory()  # what glibc keeps of freed memory
            held = _megabytes("VmRSS") - empty
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if step >= skip:
            after = frozen is not None and step >= BEFORE + RAMP
            name = AFTER if after else method
            yield name, None if looks else seconds, _megabytes("VmHWM"), held if looks else None


def _megabytes(name: str) -> float:
    """The process's memory as [`process_bytes`] names it; where Linux does not say always the peak."""
    try:
        return process_bytes(name) / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@torch.no_grad()
def _prune(model: torch.nn.Module) -> None:
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.masked_fill_(torch.rand_like(module.weight) < 0.5, 0.0)


def _plan_decay(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """A decay of the linear layers' small weights, as in a ramp, too weak to change them much."""
    for param in participants(model, ONE_PLAN).values():
        row, col = torch.ones(len(param), 1), torch.ones(1, param.shape[1])
        optimizer.state[param].update(lp_lambda=1e-6, lp_threshold=0.02, lp_row=row, lp_col=col)


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
