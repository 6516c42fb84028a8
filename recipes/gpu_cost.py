"""Parts of gpu_check.py: the kernel's tests, and what steps, plans and inference cost."""

import copy
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import benchmark_optimizer
import torch
from benchmark_optimizer import BYTES_PER_PARAMETER, DEVICE, llama_1b, synchronize
from gpu_support import (
    TESTS,
    TOY,
    Check,
    Intervals,
    free,
    gigabytes,
    make_llama,
    random_tokens,
    trainer_arguments,
)
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    Trainer,
)

from hf_lpdecay import LpAdamW, LpDecayConfig, LpDecayTrainer, measure_sparsity, to_semi_structured
from hf_lpdecay.inference import SparseLinear
from hf_lpdecay.sparsity import Ramp, select_parameters


def kernel_tests(check: Check) -> dict[str, Any]:
    """`pytest -m gpu`."""
    import pytest

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0" if DEVICE == "cuda" else "")
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}

    class Counter:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or not report.passed:
                counts[report.outcome] += 1
            if report.failed:
                counts["failures"].append(report.nodeid)
            counts["rows"] = [
                ("`pytest -m gpu`", "{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
            ]
            check.record(counts)

    files = {path for path in TESTS.glob("test_*.py") if "gpu" in path.read_text(encoding="utf-8")}
    code = pytest.main(
        ["-o", "addopts=-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, sorted(files))], plugins=[Counter()]
    )
    if code or not counts["passed"] + check.rehearse * counts["skipped"]:
        raise RuntimeError(f"pytest ended with {code!r}; failed: {', '.join(counts['failures']) or 'none'}")
    return counts


def step_cost(check: Check) -> dict[str, Any]:
    """Time and memory of an optimizer step, beside torch's fused AdamW and a copy on the device."""
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    shapes = {
        "llama-1b": (LlamaForCausalLM, check.pick(llama_1b(), TOY)),
        "bert-base": (BertModel, check.pick(BertConfig(), BertConfig(vocab_size=64, **bert))),
    }
    result: dict[str, Any] = {"rows": [], "tables": []}
    for name, (model_class, config) in shapes.items():
        free()
        found = benchmark_optimizer.benchmark(name, (model_class, config), check.pick(11, 2), 0.0)
        print(benchmark_optimizer.table(found), flush=True)
        result["tables"].append(found)
        fused = found["rivals"]["torch AdamW, fused"]["ms"]
        result["rows"].append((f"{name}: a copy on the device", f"{found['copy_gb_per_s']:.0f} GB/s"))
        for rival, row in found["rivals"].items():
            speed = BYTES_PER_PARAMETER * found["parameters"] / row["ms"] / 1e6
            extra = row["extra_bytes_per_parameter"]
            cells = [f"{row['ms']:.2f} ms", f"{row['ms'] / fused:.2f} of fused AdamW", f"{speed:.0f} GB/s"]
            cells += [] if extra is None else [f"{extra:.2f} extra bytes per parameter"]
            result["rows"].append((f"{name}: {rival}", ", ".join(cells)))
        check.record(result)
    result["state_bytes"] = {}
    for optimizer_class in (torch.optim.AdamW, LpAdamW):
        param = torch.nn.Parameter(torch.ones(1024, 1024, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = optimizer_class([param], lr=1e-3)
        optimizer.step()
        tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
        bytes_per_parameter = sum(t.numel() * t.element_size() for t in tensors) / param.numel()
        result["state_bytes"][optimizer_class.__name__] = bytes_per_parameter
        row = (f"state of {optimizer_class.__name__}, float32", f"{bytes_per_parameter:.2f} bytes per parameter")
        result["rows"].append(row)
    return result


def plan_cost(check: Check) -> dict[str, Any]:
    """Steps of 16 x 1,024 tokens on a 1 B Llama: dense, with plans, and with compensation as well.

    In two parts of 8 rows, since the logits of 16 rows (128,256 tokens) would not fit beside 20 GB of weights,
    gradients and moments.
    """
    steps, batch, length = check.pick((20, 8, 1024), (16, 1, 16))
    config = check.pick(llama_1b(), TOY)
    lp_config = LpDecayConfig(p=0.5, target_sparsity=0.5, ramp_end=1.0, num_plans=2)
    ramp = Ramp.from_config(lp_config, steps)
    plans = {step for step in range(1, steps + 1) if ramp.next_plan(step) is not None or step == ramp.end}
    runs: dict[str, Any] = {}
    for name, options in {"dense": None, "plans": {"compensate": False}, "plans and compensation": {}}.items():
        free()
        model, intervals = make_llama(config), Intervals()
        arguments = trainer_arguments(
            check, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=2
        )
        extra = {} if options is None else {"lp_config": replace(lp_config, **options)}
        trainer = (Trainer if options is None else LpDecayTrainer)(
            model,
            arguments,
            train_dataset=random_tokens(2 * steps * batch, length, config.vocab_size),
            callbacks=[intervals],
            **extra,
        )
        trainer.train()
        seconds = intervals.seconds()
        # The first steps compile kernels and fill caches.
        ordinary = [s for step, s in enumerate(seconds, 1) if step not in plans and step > ramp.start]
        planned = [s for step, s in enumerate(seconds, 1) if step in plans and step > ramp.start]
        runs[name] = {
            "step_seconds": statistics.median(ordinary),
            "plan_step_seconds": statistics.median(planned),
            "mean_seconds": statistics.mean(ordinary + planned),
            "peak_gb": gigabytes(),
            "seconds": seconds,
        }
        del trainer, model
        check.record({"rows": _plan_rows(runs, 2 * batch, length), "runs": runs})
    return {"rows": _plan_rows(runs, 2 * batch, length), "runs": runs}


def _plan_rows(runs: dict[str, Any], batch: int, length: int) -> list[tuple[str, str]]:
    rows, dense = [], runs["dense"]["step_seconds"]
    for name, run in runs.items():
        peak = "" if run["peak_gb"] is None else f", peak {run['peak_gb']:.1f} GB"
        text = f"{1e3 * run['step_seconds']:.0f} ms a step ({run['step_seconds'] / dense:.3f} of dense)"
        if name != "dense":
            text += f", {(run['plan_step_seconds'] - run['step_seconds']) / dense:+.2f} dense steps more at a plan"
        rows.append((f"1 B Llama, {batch} x {length:,} tokens, {name}", text + peak))
    return rows


@torch.inference_mode()
def two_of_four(check: Check) -> dict[str, Any]:
    """Prefill and generation, dense against 2:4 on sparse tensor cores, bfloat16."""
    if check.model:
        dense = AutoModelForCausalLM.from_pretrained(check.model, dtype=torch.bfloat16).to(DEVICE)
    else:
        dense = make_llama(check.pick(llama_1b(), TOY), torch.bfloat16)
    dense.eval()
    for param in select_parameters(dense).values():
        groups = param.data.unflatten(1, (-1, 4))
        smallest = groups.abs().topk(2, dim=-1, largest=False).indices
        groups.scatter_(-1, smallest, 0.0)
    sparse = copy.deepcopy(dense)
    refused = None
    try:
        to_semi_structured(sparse)
    except RuntimeError as error:
        if DEVICE == "cuda":
            raise
        refused = str(error)  # on a CPU, where the rehearsal goes on with two dense models
    prompt_length, new, rounds = check.pick((512, 32, 5), (8, 2, 2))
    result: dict[str, Any] = {"rows": [], "seconds": {}, "refused": refused}
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 32):
        prompt = torch.randint(dense.config.vocab_size, (batch, prompt_length), generator=generator).to(DEVICE)
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name, model in (("dense", dense), ("2:4", sparse)):
                for kind, took in _infer(model, prompt, new).items():
                    if turn:  # the first one warms up
                        seconds.setdefault(f"{kind}, {name}", []).append(took)
        result["seconds"][batch] = seconds
        for kind, tokens in (("prefill", batch * prompt_length), ("generation", batch * new)):
            ratios = sorted(a / b for a, b in zip(seconds[f"{kind}, dense"], seconds[f"{kind}, 2:4"]))
            speeds = [tokens / statistics.median(seconds[f"{kind}, {name}"]) for name in ("dense", "2:4")]
            text = (
                f"{speeds[0]:.0f} tokens/s dense, {speeds[1]:.0f} as 2:4, {statistics.median(ratios):.2f} times as fast"
            )
            result["rows"].append((f"{kind}, batch {batch}", f"{text} ({ratios[0]:.2f} - {ratios[-1]:.2f})"))
        check.record(result)
    return result


@torch.inference_mode()
def bit_mask(check: Check) -> dict[str, Any]:
    """A linear layer with its non-zero values and a bit mask, decode, against the dense one; bfloat16."""
    outputs, inputs, rounds = check.pick((14336, 4096, 50), (64, 128, 3))
    result: dict[str, Any] = {"rows": [], "layers": []}
    generator = torch.Generator().manual_seed(0)
    for zeros in (0.5, 0.7, 0.9):
        weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float32).bfloat16()
        weight[torch.rand(outputs, inputs, generator=generator) < zeros] = 0.0
        dense = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=DEVICE)
        dense.weight.copy_(weight)
        sparse = SparseLinear.from_dense(weight).to(DEVICE)
        for tokens in (1, 8):
            x = torch.randn(tokens, inputs, generator=generator).bfloat16().to(DEVICE)
            seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
            for turn in range(rounds + 3):
                for name, layer in (("dense", dense), ("sparse", sparse)):
                    synchronize()
                    started = time.perf_counter()
                    y = layer(x)
                    synchronize()
                    if turn >= 3:  # the first ones compile and warm up
                        seconds[name].append(time.perf_counter() - started)
            error = (y - dense(x)).abs().max() / y.abs().max()
            ratios = sorted(a / b for a, b in zip(seconds["dense"], seconds["sparse"]))
            quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            result["layers"].append({"zeros": zeros, "tokens": tokens, "seconds": seconds, "error": error.item()})
            result["rows"].append(
                (
                    f"{outputs} x {inputs}, {zeros:.0%} zeros, {tokens} tokens",
                    f"{statistics.median(ratios):.2f} times as fast as dense ({quartiles[0]:.2f} - {quartiles[1]:.2f}),"
                    f" outputs within {error:.1e}",
                )
            )
            check.record(result)
    return result


def _infer(model, prompt: torch.Tensor, new: int) -> dict[str, float]:
    """Seconds for a prompt, and for generating tokens after its first 8."""
    synchronize()
    started = time.perf_counter()
    model(prompt, logits_to_keep=1)
    synchronize()
    between = time.perf_counter()
    short = prompt[:, :8]
    model.generate(
        short, attention_mask=torch.ones_like(short), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    synchronize()
    return {"prefill": between - started, "generation": time.perf_counter() - between}


def compile_and_bf16(check: Check) -> dict[str, Any]:
    """Ten steps with `torch_compile=True`, and with bfloat16 weights, each to exactly half zeros."""
    config, (batch, length) = check.pick(llama_1b(2), TOY), check.pick((4, 512), (2, 16))
    backend = check.pick("inductor", "eager")
    runs = {
        "bfloat16 weights": (torch.bfloat16, {"bf16": False}),
        f"torch_compile=True ({backend})": (torch.float32, {"torch_compile": True, "torch_compile_backend": backend}),
    }
    result: dict[str, Any] = {"rows": [], "runs": {}}
    for name, (dtype, options) in runs.items():
        free()
        trainer = LpDecayTrainer(
            make_llama(config, dtype),
            trainer_arguments(check, max_steps=10, per_device_train_batch_size=batch, **options),
            train_dataset=random_tokens(10 * batch, length, config.vocab_size),
            lp_config=LpDecayConfig(p=0.5, target_sparsity=0.5, importance="magnitude", ramp_end=1.0, num_plans=2),
        )
        loss = trainer.train().training_loss
        sparsity = measure_sparsity(trainer.accelerator.unwrap_model(trainer.model)).sparsity
        result["runs"][name] = {"loss": loss, "sparsity": sparsity, "peak_gb": gigabytes()}
        result["rows"].append((f"{name}, 10 steps", f"loss {loss:.3f}, {sparsity:.2%} zeros"))
        check.record(result)
        if not abs(sparsity - 0.5) < 1e-4 or loss != loss:
            raise RuntimeError(f"{name}: loss {loss}, {sparsity:.4%} zeros, where 50 % were asked for")
        del trainer
    return result
