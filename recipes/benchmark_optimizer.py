"""Time one optimizer step of LpAdamW beside its rivals, on the shapes of real models and within a Trainer.

On a GPU if there is one, where a step's time is that until the device is done.

python recipes/benchmark_optimizer.py
python recipes/benchmark_optimizer.py --shapes bert-base --rounds 20 --trainer_steps 0 --zeros 0.5
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_lpdecay import LpAdamW, LpDecay, LpDecayConfig, LpDecayTrainer
from hf_lpdecay.files import write_text
from hf_lpdecay.sparsity import Ramp, SparsityController


SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def llama_1b(num_hidden_layers: int = 16) -> LlamaConfig:
    """The shapes of Llama 3.2 1B, with all of its layers or some."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


SHAPES = {
    "smollm2-135m": (LlamaForCausalLM, SMOLLM2),
    "bert-base": (BertModel, BertConfig()),
    # Two of the sixteen layers, to fit a small machine's memory.
    "llama-1b-2-layers": (LlamaForCausalLM, llama_1b(2)),
    "llama-1b": (LlamaForCausalLM, llama_1b()),
}
SMALL = ["smollm2-135m", "bert-base", "llama-1b-2-layers"]
# Small enough that the weights stay what they are during the measurement, large enough for the decay to act.
ADAMW = {"lr": 1e-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = {"lp_lambda": 1e-3}
# Longer matrices are embeddings.
LONGEST = 1 << 14
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What one pass must read and write of a float32 weight, its gradient and its two moments.
BYTES_PER_PARAMETER = 28


class Naive:
    """The published rule in its plainest form: a clone of all weights, AdamW, `pow`, `mul`."""

    def __init__(self, params: list[Tensor], p: float):
        self.optimizer, self.p = torch.optim.AdamW(params, **ADAMW), p
        self.state = self.optimizer.state

    @torch.no_grad()
    def step(self) -> None:
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        before = [param.clone() for param in params]
        self.optimizer.step()
        for param, w in zip(params, before):
            param.mul_(1 / (1 + ADAMW["lr"] * DECAY["lp_lambda"] * w.abs().pow(self.p - 2)))


class Pass:
    """One pass over the weights: each is read and written."""

    def __init__(self, params: list[Tensor]):
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.param_groups = [{"params": params, "fused": False}]

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.mul_(1.0)


class Planner:
    """A plan instead of a step, which a run makes every so many steps: thresholds and strengths of all matrices."""

    def __init__(self, params: list[Tensor], scope: str):
        config = LpDecayConfig(p=0.5, target_sparsity=0.5, scope=scope)
        self.optimizer = LpAdamW(params, **ADAMW)
        self.state = self.optimizer.state
        self.ramp = Ramp.from_config(config, 1000)
        matrices = {str(i): param for i, param in enumerate(params) if param.dim() == 2}
        self.controller = SparsityController(config, matrices, self.optimizer, self.ramp)

    def step(self) -> None:
        self.controller.after_step(self.ramp.start, lambda first, last: [[1.0] * (last - first)])


def rivals(params: list[Tensor]) -> dict[str, Any]:
    """The optimizers to compare, all over the same weights, gradients and moments."""
    optimizers = {
        "torch AdamW, fused": torch.optim.AdamW(params, **ADAMW, fused=True),
        "torch AdamW, foreach": torch.optim.AdamW(params, **ADAMW, foreach=True),
    }
    for p in (0.3, 0.5, 0.8, 1, 2):
        optimizers[f"LpAdamW, p = {p}"] = LpAdamW(params, **ADAMW, **DECAY, p=p, fused=True)
    trimmed = LpAdamW(params, **ADAMW, **DECAY, p=0.8, freeze_zeros=True, fused=True)
    optimizers["LpAdamW, p = 0.8, trimmed, importance"] = trimmed
    optimizers["LpAdamW, zeros frozen, no decay"] = LpAdamW(params, **ADAMW, freeze_zeros=True)
    optimizers["LpAdamW, p = 0.8, fused=False"] = LpAdamW(params, **ADAMW, **DECAY, p=0.8, fused=False)
    optimizers["LpDecay(AdamW), p = 0.8"] = LpDecay(torch.optim.AdamW(params, **ADAMW, fused=True), **DECAY, p=0.8)
    matrices = [param for param in params if param.dim() == 2 and len(param) <= LONGEST]
    others = [param for param in params if not any(param is matrix for matrix in matrices)]
    groups = [{"params": matrices, "freeze_zeros": True, **DECAY}, {"params": others}]
    wrapped = LpDecay(torch.optim.AdamW(groups, **ADAMW, fused=True), p=0.5)
    optimizers["LpDecay(AdamW), p = 0.5, trimmed, importance, no embedding"] = wrapped
    optimizers["one pass over the weights"] = Pass(params)
    optimizers["naive: clone, AdamW, pow, mul"] = Naive(params, p=0.8)
    for scope in ("layer", "global"):
        optimizers[f"a plan, scope={scope}"] = Planner(params, scope)
    for param in params:
        kept = param.detach() != 0
        moments = {"exp_avg": torch.randn_like(param) * 1e-3 * kept, "exp_avg_sq": torch.rand_like(param) * 1e-6 * kept}
        for optimizer in optimizers.values():
            step = torch.tensor(10.0, device=DEVICE if counts_on_device(optimizer) else "cpu")
            optimizer.state[param] = {"step": step, **moments}
        for optimizer in (trimmed, wrapped):
            optimizer.state[param]["lp_threshold"] = 0.02
            if param.dim() == 2:
                row = torch.rand(len(param), 1, device=DEVICE) + 0.5
                col = torch.rand(1, param.shape[1], device=DEVICE) + 0.5
                optimizer.state[param].update(lp_row=row, lp_col=col)
    return optimizers


def counts_on_device(optimizer: Any) -> bool:
    """Whether an optimizer keeps the number of steps on the device, as the fused ones do."""
    fused = getattr(optimizer, "optimizer", optimizer).param_groups[0]["fused"]
    return isinstance(optimizer, LpAdamW) if fused is None else fused


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def memory_of(function: Callable[[], Any]) -> int | None:
    """How many bytes a function took at the most, of the device or of the process; `None` where Linux does not say."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        forget_peak()
        before = process_bytes("VmRSS")
        function()
        return max(0, process_bytes("VmHWM") - before)
    except OSError:
        return None


def forget_peak() -> None:
    """Have Linux measure this process's peak memory from now on. Raises an `OSError` elsewhere."""
    Path("/proc/self/clear_refs").write_text("5")


def process_bytes(name: str) -> int:
    """What Linux says of this process's memory, now (VmRSS) or at its peak (VmHWM). Raises an `OSError` elsewhere."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def benchmark(name: str, shapes: tuple[type, Any], rounds: int, zeros: float) -> dict[str, Any]:
    """One table: every rival steps once in each round, on the weights of a model class with a config."""
    model_class, config = shapes
    with torch.device("meta"):
        shapes = [param.shape for param in model_class(config).parameters()]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE) * 0.02) for shape in shapes]
    for param in params:
        param.data.masked_fill_(torch.rand_like(param) < zeros, 0.0)
        # Zero gradients and moments where the weight is zero, so that no rival moves it from there.
        param.grad = torch.randn_like(param) * 1e-3 * (param.detach() != 0)
    optimizers, numel = rivals(params), sum(param.numel() for param in params)
    largest = max(params, key=torch.numel).detach()
    target = torch.zeros_like(largest)
    first = {rival: milliseconds(optimizer.step) for rival, optimizer in optimizers.items()}
    memory = {rival: memory_of(optimizer.step) for rival, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {rival: [] for rival in optimizers}
    copies = []
    for _ in tqdm(range(rounds), desc=name):
        copies.append(milliseconds(lambda: target.copy_(largest)))
        for rival, optimizer in optimizers.items():
            times[rival].append(milliseconds(optimizer.step))
    return {
        "shapes": name,
        "parameters": numel,
        "zeros": zeros,
        "tensors": len(params),
        "copy_gb_per_s": 8 * largest.numel() / statistics.median(copies) / 1e6,
        "rivals": {
            rival: {
                "ms": statistics.median(times[rival]),
                "quartiles": statistics.quantiles(times[rival], n=4)[::2],
                "first_ms": first[rival],
                "extra_bytes_per_parameter": None if memory[rival] is None else memory[rival] / numel,
            }
            for rival in optimizers
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    fused = result["rivals"]["torch AdamW, fused"]["ms"]
    lines = [
        f"{result['shapes']}: {result['parameters']:,} parameters in {result['tensors']} tensors, {result['zeros']:.0%}"
        f" zeros, on {DEVICE}; a copy runs at {result['copy_gb_per_s']:.0f} GB/s",
        "",
        "| step | ms (quartiles) | to fused AdamW | GB/s | extra bytes per parameter | first step, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rival, row in result["rivals"].items():
        low, high = row["quartiles"]
        speed = BYTES_PER_PARAMETER * result["parameters"] / row["ms"] / 1e6
        extra = row["extra_bytes_per_parameter"]
        lines.append(
            f"| {rival} | {row['ms']:.1f} ({low:.1f} to {high:.1f}) | {row['ms'] / fused:.2f} | {speed:.0f}"
            f" | {'?' if extra is None else format(extra, '.2f')} | {row['first_ms']:.0f} |"
        )
    return "\n".join(lines)


class StepTimes(TrainerCallback):
    """Seconds of each step, from batch to batch."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def benchmark_trainer(steps: int, batch: int = 4, length: int = 128) -> dict[str, float]:
    """Tokens per second in a Trainer on SmolLM2-135M's shapes (random weights and tokens, bf16 autocast)."""
    rows = torch.randint(SMOLLM2.vocab_size, (steps * batch, length)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    runs = {
        "Trainer, AdamW": (Trainer, {}),
        "LpDecayTrainer, plain": (LpDecayTrainer, {"lp_config": LpDecayConfig(p=0.8, lp_lambda=1e-3)}),
        "LpDecayTrainer, to a target": (
            LpDecayTrainer,
            {"lp_config": LpDecayConfig(p=0.5, target_sparsity=0.5, ramp_end=1.0)},
        ),
    }
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (trainer_class, options) in runs.items():
            torch.manual_seed(0)
            times = StepTimes()
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=1e-5,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                bf16=True,
                use_cpu=DEVICE == "cpu",
            )
            trainer_class(
                LlamaForCausalLM(SMOLLM2), arguments, train_dataset=data, callbacks=[times], **options
            ).train()
            # Of all GPUs, which a Trainer uses if there are several.
            tokens = arguments.train_batch_size * length
            speeds[name] = tokens / statistics.median(times.seconds[1:])
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SMALL, choices=list(SHAPES), help="Which models.")
    parser.add_argument("--rounds", type=int, default=7, help="Steps of each rival, interleaved.")
    parser.add_argument("--zeros", type=float, default=0.0, help="Share of the weights that are zero, as in a ramp.")
    parser.add_argument("--trainer_steps", type=int, default=16, help="Steps in the Trainer; 0 leaves it out.")
    parser.add_argument("--results_file", type=Path, help="Where the numbers go as JSON.")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quartiles need at least 2.")
    if not 0 <= arguments.zeros <= 1:
        parser.error(f"--zeros {arguments.zeros}: a share between 0 and 1.")
    if arguments.trainer_steps and arguments.trainer_steps < 16:
        parser.error(f"--trainer_steps {arguments.trainer_steps}: a ramp needs at least 16, or 0 to leave it out.")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    results: dict[str, Any] = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    results["shapes"] = []
    for name in arguments.shapes:
        result = benchmark(name, SHAPES[name], arguments.rounds, arguments.zeros)
        results["shapes"].append(result)
        tqdm.write(table(result) + "\n")
    if arguments.trainer_steps:
        results["tokens_per_second"] = benchmark_trainer(arguments.trainer_steps)
        tqdm.write("\n".join(f"| {name} | {speed:.0f} |" for name, speed in results["tokens_per_second"].items()))
    if arguments.results_file:
        arguments.results_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.results_file, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
