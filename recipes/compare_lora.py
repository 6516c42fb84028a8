"""Compare ways to fine-tune a sparse model with adapters: LoRA merged by dropping, masked LoRA, all weights.

    accelerate launch recipes/compare_lora.py --init_from path/to/wanda-50 path/to/sparsegpt-50 --seeds 0 1 2

Beside them, the dense model whose frozen base becomes sparse while masked adapters learn:

    accelerate launch recipes/compare_lora.py --methods frozen-base --target_sparsity 0.5 --seeds 0 1 2
"""

import dataclasses
import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import finetune
from compare import check_compared, record
from peft import get_peft_model
from pypi_models import resolve_model
from tasks import Task
from transformers import Trainer, set_seed

from hf_lpdecay import LpDecayConfig, LpDecayTrainer, mask_lora, measure_sparsity, merge_sparse


ON_SPARSE = ("lora", "masked-lora", "all-weights")
# This one starts from the dense model.
METHODS = (*ON_SPARSE, "frozen-base")


@dataclass
class CompareLoraArguments(finetune.ScriptArguments):
    """What is compared."""

    init_from: list[str] = field(default_factory=list, metadata={"help": "Folders of sparse models."})
    methods: list[str] = field(default_factory=lambda: list(ON_SPARSE), metadata={"help": f"Of {', '.join(METHODS)}."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the adapters."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds to repeat everything with."})
    results_file: str = field(default="outputs/compare-lora.json", metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        check_compared(self.methods, METHODS, self.init_from)
        if self.task != "causal-lm":
            raise ValueError(f"task={self.task!r}: adapters are compared on language models; leave it out.")


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, given = finetune.parse(argv, CompareLoraArguments, __doc__)
        plan = runs_of(script)
        task = finetune.load_task(dataclasses.replace(script, model_name_or_path=plan[0][0]))
    except (ValueError, OSError) as error:
        print(f"compare_lora.py: error: {error}", file=sys.stderr)
        return 2
    args.save_strategy = "no"
    runs = []
    for seed in script.seeds:
        for folder, method in plan:
            found = run(script, lp_config, args, task, folder, method, seed)
            runs.append({"base": Path(folder).name, "method": method, "seed": seed, **found})
            record(runs, given, script.results_file)
    print(f"\n{table(runs)}\n\nwritten to {script.results_file}")
    return 0


def runs_of(script: CompareLoraArguments) -> list[tuple[str, str]]:
    """The model and the method of each run of a seed."""
    on_sparse = [method for method in script.methods if method in ON_SPARSE]
    if on_sparse and not script.init_from:
        raise ValueError(f"Which sparse models for {', '.join(on_sparse)}? Name their folders with --init_from.")
    plan = [(folder, method) for folder in script.init_from for method in on_sparse]
    return plan + [(script.model_name_or_path, method) for method in script.methods if method not in ON_SPARSE]


def run(script, lp_config: LpDecayConfig, args, task: Task, folder: str, method: str, seed: int) -> dict[str, float]:
    """Train one model in one way, and evaluate it in float32 before and after the merge."""
    set_seed(seed)
    model = task.load_model(resolve_model(folder))
    args = dataclasses.replace(args, seed=seed)
    options = {
        "train_dataset": task.train,
        "processing_class": task.tokenizer,
        "data_collator": task.collator(model),
    }
    if method == "all-weights":
        trainer = LpDecayTrainer(model=model, args=args, lp_config=LpDecayConfig(freeze_zeros=True), **options)
    else:
        args.learning_rate = script.lora_learning_rate
        model = get_peft_model(model, script.lora_config("CAUSAL_LM"))
        if method == "frozen-base":
            trainer = LpDecayTrainer(model=model, args=args, lp_config=lp_config, **options)
        else:
            trainer = Trainer(model=mask_lora(model) if method == "masked-lora" else model, args=args, **options)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    # Without the autocast that the Trainer wrapped around the model's forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    found = {"unmerged": finetune.evaluate_model(model, task, args, "unmerged")["perplexity"]}
    found["merged"] = found["unmerged"]
    if method != "all-weights":
        model = merge_sparse(model)
        found["merged"] = finetune.evaluate_model(model, task, args, "merged")["perplexity"]
    found |= {"sparsity": measure_sparsity(model).sparsity, "seconds": round(seconds, 1)}
    del trainer, model
    gc.collect()
    return found


def table(runs: list[dict]) -> str:
    """One row per base and method: mean over the seeds, smallest and largest."""
    lines = [
        "| base | method | sparsity | unmerged | merged | smallest - largest | seeds | seconds |",
        "| --- " * 8 + "|",
    ]
    for base, method in dict.fromkeys((run["base"], run["method"]) for run in runs):
        own = [run for run in runs if (run["base"], run["method"]) == (base, method)]
        mean = {
            name: statistics.mean(run[name] for run in own) for name in ("sparsity", "unmerged", "merged", "seconds")
        }
        merged = [run["merged"] for run in own]
        lines.append(
            f"| {base} | {method} | {mean['sparsity']:.2%} | {mean['unmerged']:.2f} | {mean['merged']:.2f} |"
            f" {min(merged):.2f} - {max(merged):.2f} | {len(own)} | {mean['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
