"""Cut a model to its target at once, without a training, with masks that are improved by more and more rounds of swaps.

python recipes/compare_masks.py --target_sparsity 0.7 --rounds 0 2 4

The masks are those of `LpDecayConfig(hard_cut=True, mask_swaps=...)`, from the calibration batches alone; everything is
compensated. What a training makes of them is compared by compare.py (`gmp-compensate` and `gmp-swaps`).
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field

import compare
import finetune

from hf_lpdecay import LpAdamW, LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import SparsityDriver, participants


@dataclass
class MaskArguments(finetune.ScriptArguments):
    """What is compared."""

    rounds: list[int] = field(default_factory=lambda: [0, 2, 4], metadata={"help": "Rounds of swaps to compare."})
    results_file: str = field(default="outputs/compare_masks.json", metadata={"help": "JSON file to write."})


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, given = finetune.parse(argv, MaskArguments, __doc__)
        configs = [
            dataclasses.replace(
                lp_config, hard_cut=True, mask_swaps=rounds, calibration_batches=lp_config.calibration_batches or 64
            )
            for rounds in script.rounds
        ]
        args.save_strategy = "no"
        task = finetune.load_task(script)
        runs = []
        for config in configs:
            runs.append(run(script, config, args, task))
            compare.record(runs, given, script.results_file)
    except (ValueError, OSError) as error:
        print(f"compare_masks.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{compare.table(runs)}\n\nwritten to {script.results_file}")
    return 0


def run(script: MaskArguments, config: LpDecayConfig, args, task) -> dict:
    """Calibrate, cut once, and evaluate; the seconds are those of the cut."""
    trainer = finetune.make_trainer(script, config, args, task)
    model = trainer.model.to(args.device)
    params = participants(model, config)
    driver = SparsityDriver(config, model, params, LpAdamW(list(params.values())), total_steps=1000)
    batches = ({name: x.to(args.device) for name, x in batch.items()} for batch in trainer.get_train_dataloader())
    with trainer.compute_loss_context_manager():  # the autocast of a training
        driver.start(no_rates, batches)
    started = time.monotonic()
    driver.after_step(driver.ramp.end, no_rates)
    seconds = time.monotonic() - started
    metric, value = next(iter(finetune.evaluate_model(model, task, args, "after").items()))
    return {
        "method": f"mask_swaps={config.mask_swaps}",
        "seed": args.seed,
        metric: value,
        "sparsity": measure_sparsity(model, trainer.lp_modules).sparsity,
        "seconds": seconds,
    }


def no_rates(first: int, last: int) -> list[list[float]]:
    return [[0.0] * (last - first)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
