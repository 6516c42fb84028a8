"""Compare ways to a sparse model at one budget: same model, data, steps and seeds, one table.

    accelerate launch recipes/compare.py --target_sparsity 0.7 --seeds 0 1 2
    accelerate launch recipes/compare.py --methods dense gmp lp --config recipes/configs/minilm/sst2.yaml

Checkpoints that were pruned elsewhere (Wanda, SparseGPT) get the same budget with their zeros frozen:

    accelerate launch recipes/compare.py --methods lp --init_from path/to/wanda path/to/sparsegpt
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import finetune
from tasks import Task

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.files import write_text


NO_TARGET = {
    "target_sparsity": None,
    "lp_lambda": 0.0,
    "importance": None,
    "trim": None,
    "compensate": None,
    "hard_cut": False,
    "mask_swaps": 0,
    "hessians_on_cpu": False,
    "pattern": "unstructured",
    "calibration_batches": None,
}
# What each method changes in the LpDecayConfig. Gradual pruning ("gmp", Zhu and Gupta, arXiv 1710.01878) cuts.
METHODS = {
    "dense": NO_TARGET,
    "gmp": {"hard_cut": True, "importance": "magnitude", "compensate": False},
    "gmp-adam": {"hard_cut": True, "importance": "adam", "compensate": False},
    "gmp-compensate": {"hard_cut": True},  # as `lp`, but cut
    "gmp-swaps": {"hard_cut": True, "mask_swaps": 4},
    "gmp-adam-distill": {"hard_cut": True, "importance": "adam", "compensate": False},
    "lp-plain": {"hard_cut": False, "importance": "magnitude", "trim": False, "compensate": False},
    "lp-trim": {"hard_cut": False, "importance": "magnitude", "trim": True, "compensate": False},
    "lp-adam": {"hard_cut": False, "importance": "adam", "trim": True, "compensate": False},
    "lp": {"hard_cut": False},
    "lp-distill": {"hard_cut": False},
}
FROZEN = {**NO_TARGET, "freeze_zeros": True}


@dataclass
class CompareArguments(finetune.ScriptArguments):
    """What is compared."""

    methods: list[str] = field(
        default_factory=lambda: ["dense", "gmp", "gmp-adam", "lp-plain", "lp-trim", "lp-adam", "lp", "lp-distill"],
        metadata={"help": f"Which of {', '.join(METHODS)}."},
    )
    init_from: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of pruned models, each trained likewise with its zeros frozen."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds to repeat everything with."})
    results_file: str = field(default="outputs/compare.json", metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        check_compared(self.methods, METHODS, self.init_from)


def check_compared(methods: list[str], known: Collection[str], folders: list[str]) -> None:
    """Raise a `ValueError` for a method that is not known, or a folder without a model."""
    for method in methods:
        if method not in known:
            raise ValueError(f"Invalid method in methods: {method!r} - should be one of {', '.join(known)}.")
    for folder in folders:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"Invalid folder in init_from: {folder!r} - there is no config.json in it.")


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, given = finetune.parse(argv, CompareArguments, __doc__)
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    args.save_strategy = "no"
    runs = []
    try:
        task = finetune.load_task(script)
        for seed in script.seeds:
            for method in (*script.methods, *script.init_from):
                runs.append({"method": method, "seed": seed, **run(script, lp_config, args, task, method, seed)})
                record(runs, given, script.results_file)
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(runs)}\n\nwritten to {script.results_file}")
    return 0


def run(script, lp_config: LpDecayConfig, args, task: Task, method: str, seed: int) -> dict[str, float]:
    """Train with one method (or from one pruned folder) and seed, and evaluate in float32."""
    if method not in METHODS:
        script = dataclasses.replace(script, model_name_or_path=method)
    teacher = (lp_config.distill or "self") if method.endswith("-distill") else None
    config = dataclasses.replace(lp_config, **METHODS.get(method, FROZEN), distill=teacher)
    args.seed = seed
    trainer = finetune.make_trainer(script, config, args, task)
    before = finetune.evaluate_model(trainer.model, task, args, "before")
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    # Without the autocast that the Trainer wrapped around the model's forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = finetune.evaluate_model(model, task, args, "after")
    sparsity = measure_sparsity(model, trainer.lp_modules).sparsity
    metric, value = next(iter(after.items()))  # the most important one
    del trainer, model
    gc.collect()
    return {metric: value, "before": before[metric], "sparsity": sparsity, "seconds": round(seconds, 1)}


def record(runs: list[dict], given: dict, path: str) -> None:
    """Print the last run, and write all of them: after each one, so that nothing is lost."""
    print(json.dumps(runs[-1]), flush=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"options": given, "runs": runs}, indent=2) + "\n")


def table(runs: list[dict]) -> str:
    """One row per method: mean over the seeds, smallest and largest."""
    metric = next(name for name in runs[0] if name not in ("method", "seed"))
    lines = [f"| method | sparsity | {metric} | smallest - largest | seeds | seconds |", "| --- " * 6 + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        values = [run[metric] for run in own]
        lines.append(
            f"| {method} | {statistics.mean(run['sparsity'] for run in own):.2%} | {statistics.mean(values):.4g} |"
            f" {min(values):.4g} - {max(values):.4g} | {len(own)} |"
            f" {statistics.mean(run['seconds'] for run in own):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
