"""Train the paper's small language model from scratch to one sparsity in several ways, and print one table.

    python recipes/compare_paper.py --train_file shakespeare.txt --targets 0.9 0.99 --seeds 0 1 2

The methods are those of compare.py, with the options of `LpDecayConfig`; the model and its training are those of
reproduce_paper.py.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field

import compare
import reproduce_paper
import torch
from arguments import parse_recipe
from transformers import TrainingArguments

from hf_lpdecay import LpDecayConfig


# A teacher would have to be trained first.
METHODS = {name: changes for name, changes in compare.METHODS.items() if not name.endswith("-distill")}


@dataclass
class PaperCompareArguments(reproduce_paper.PaperArguments):
    """What is compared."""

    methods: list[str] = field(
        default_factory=lambda: ["dense", "gmp", "gmp-compensate", "lp"],
        metadata={"help": f"Which of {', '.join(METHODS)}."},
    )
    targets: list[float] = field(default_factory=lambda: [0.9], metadata={"help": "Target sparsities."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds to repeat everything with."})
    results_file: str = field(default="outputs/compare_paper.json", metadata={"help": "JSON file to write."})

    def __post_init__(self):
        super().__post_init__()
        compare.check_compared(self.methods, METHODS, [])


def main(argv: list[str]) -> int:
    try:
        (script, lp_config, args), given = parse_recipe(
            (PaperCompareArguments, LpDecayConfig, TrainingArguments),
            argv,
            {"use_cpu": not torch.accelerator.is_available(), "target_sparsity": 0.9},  # replaced below
            __doc__,
        )
        for name in ("target_sparsity", "lp_lambda"):
            if name in given:
                raise ValueError(f"{name}={given[name]}: name the sparsities with --targets.")
        configs = [dataclasses.replace(lp_config, target_sparsity=target) for target in script.targets]
    except (ValueError, OSError) as error:
        print(f"compare_paper.py: error: {error}", file=sys.stderr)
        return 2
    train, validation, vocab_size = reproduce_paper.load_characters(script)
    runs: list[dict] = []
    for config in configs:
        for method in script.methods:
            if method == "dense" and config is not configs[0]:  # the same for every target
                continue
            changed = dataclasses.replace(config, **METHODS[method])
            name = method if method == "dense" else f"{method} {config.target_sparsity:g}"
            for args.seed in script.seeds:
                started = time.monotonic()
                result = reproduce_paper.run(script, args, train, validation, vocab_size, changed)
                runs.append(
                    {
                        "method": name,
                        "seed": args.seed,
                        "loss": result["loss"],
                        "sparsity": result["sparsity"],
                        "seconds": time.monotonic() - started,
                    }
                )
                compare.record(runs, given, script.results_file)
    print(f"\n{compare.table(runs)}\n\nwritten to {script.results_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
