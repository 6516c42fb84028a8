"""`write_record`: what is known of a trained model, beside its weights in sparsity.json."""

import json
import math
import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..sparsity import SparsityReport, measure_checkpoint, measure_folder
from ..sparsity.report import PICTURE_FILE, RECORD_FILE


if TYPE_CHECKING:
    from .trainer import LpDecayTrainer

logger = logging.get_logger(__name__)

# What the Trainer logs beside the metrics of an evaluation.
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def write_record(trainer: "LpDecayTrainer", folder: str | os.PathLike, **facts: Any) -> SparsityReport:
    """Write sparsity.json, and sparsity.png where matplotlib is installed, beside a model that a trainer has saved.

    The model card is made from this file. It holds the sparsity of the weights in the folder, the `LpDecayConfig`, the
    hyperparameters, versions, the log, the metrics of the last evaluation, and what `facts` adds or says better:

    - `base_model` (`str`), `datasets` (`list[str]`): ids on the hub; `trained_on` (`str`): the data in words;
    - `license`, `language`, `tags`, `pipeline_tag`: as in a model card's metadata;
    - `results` (`dict[str, dict[str, float]]`): metrics of the model `"before"` the training, `"after"` it and, if it
      is known, of a model that was trained alike and stayed `"dense"`;
    - `lm_eval` (`dict[str, dict[str, dict[str, float]]]`): likewise, the metrics of each task of lm-eval;
    - `evaluated_on` (`dict`): `name`, `type`, `config` and `split` of the data, number of `examples`, `block_size`,
      `dtype`.

    Args:
        trainer (`LpDecayTrainer`): After its `save_model`.
        folder (`str` or `os.PathLike`): Where the model was saved.
        facts (`Any`): Kept in `trainer.lp_facts`, so that a later record of the same trainer holds them as well.

    Returns:
        `SparsityReport`: Of the weights in the folder.

    Raises:
        FileNotFoundError: If there are no safetensors in the folder.
    """
    folder = Path(folder)
    trainer.lp_facts.update(facts)
    report = measure_folder(trainer.model, folder, trainer.lp_modules)
    known = {**_trainer_facts(trainer), **trainer.lp_facts}
    base_model = known.get("base_model")
    if base_model:
        known["base_model"] = without_path(base_model)
    report.to_json(folder / RECORD_FILE, **known)
    picture, history = folder / PICTURE_FILE, trainer.state.log_history
    try:
        report.plot(picture, history, title=known.get("base_model", "").replace("$", "\\$"))
    except ImportError as error:
        picture.unlink(missing_ok=True)  # it would be of an earlier run
        logger.warning_once(f"No {PICTURE_FILE}: {error}")
    return report


def update_record(folder: str | os.PathLike, **facts: Any) -> None:
    """Put what a later evaluation has found into a saved model's sparsity.json, which its card is made from.

    Args:
        folder (`str` or `os.PathLike`): The model's. Its zeros are counted anew.
        facts (`Any`): `results` and `evaluated_on`, `lm_eval`, and others of [`write_record`], each in place of the
            one that is there.

    Raises:
        OSError, ValueError: If the folder holds no model, or a damaged sparsity.json.
    """
    path = Path(folder) / RECORD_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to have it written anew.") from error
    measure_checkpoint(folder).to_json(path, **{**known, **facts})


def card_facts(arguments: dict[str, Any]) -> dict[str, Any]:
    """Give what `Trainer.create_model_card` takes the names that it has in the record.

    Raises:
        TypeError: If there is an argument that it does not take.
    """
    names = {
        "language": "language",
        "license": "license",
        "tags": "tags",
        "finetuned_from": "base_model",
        "tasks": "pipeline_tag",
        "dataset": "datasets",
        "dataset_name": "datasets",
        "dataset_tags": "datasets",  # the ids, where `dataset` has names for people
    }
    unknown = set(arguments) - set(names) - {"dataset_args"}
    if unknown:
        raise TypeError(f"create_model_card got {', '.join(sorted(unknown))}, but takes {', '.join(names)}.")
    return {new: arguments[old] for old, new in names.items() if arguments.get(old)}


def without_path(name: str) -> str:
    """A model's or data set's name as others may see it: a local folder is `./` and its last name only."""
    name = str(name)
    return f"./{Path(name).resolve().name}" if os.path.isabs(name) or os.path.isdir(name) else name


def _trainer_facts(trainer: "LpDecayTrainer") -> dict[str, Any]:
    """What a trainer knows without being told."""
    args, state = trainer.args, trainer.state
    lp_config = asdict(trainer.lp_config)
    if lp_config["distill"] is not None:
        lp_config["distill"] = without_path(lp_config["distill"])
    training = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(args.lr_scheduler_type.value),
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "adam_betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        "bf16_autocast": args.bf16,
        "fp16_autocast": args.fp16,
        "processes": args.world_size,
    }
    runtimes = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    if runtimes:
        training["seconds"] = round(runtimes[-1], 1)
    facts: dict[str, Any] = {
        "lp_config": lp_config,
        "training": training,
        "versions": _versions(),
        "log_history": state.log_history,
    }
    if trainer.model.name_or_path:
        facts["base_model"] = trainer.model.name_or_path
    results = _results(trainer)
    if results:
        facts["results"] = results
        facts["evaluated_on"] = {"dtype": _precision(trainer)}
        if not isinstance(trainer.eval_dataset, dict) and has_length(trainer.eval_dataset):
            facts["evaluated_on"]["examples"] = len(trainer.eval_dataset)
    return facts


def _results(trainer: "LpDecayTrainer") -> dict[str, dict[str, float]]:
    """The metrics of evaluations of the model before the training and of the one that was kept."""
    state = trainer.state
    kept = state.global_step
    if trainer.args.load_best_model_at_end and state.best_global_step:
        kept = state.best_global_step
    results: dict[str, dict[str, float]] = {}
    for entry in state.log_history:
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(_NOT_METRICS) and _is_finite(value)
        }
        when = {0: "before", kept: "after"}.get(entry.get("step"))
        if metrics and when:
            results.setdefault(when, {}).update(metrics)
    return results if "after" in results else {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _precision(trainer: "LpDecayTrainer") -> str:
    if trainer.args.bf16 or trainer.args.fp16:
        return f"{'bfloat16' if trainer.args.bf16 else 'float16'} autocast"
    return str(trainer.model.dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        versions["hf_lpdecay"] = version("hf_lpdecay")
    except PackageNotFoundError:  # run from a checkout that is not installed
        pass
    return versions
