"""`write_record`: what is known of a trained model, beside its weights in sparsity.json."""

import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..sparsity import SparsityReport, match_parameters, measure_sparsity
from ..sparsity.report import TensorSparsity
from ..sparsity.selection import Modules


if TYPE_CHECKING:
    from .trainer import LpDecayTrainer

logger = logging.get_logger(__name__)

RECORD_FILE = "sparsity.json"
# Entries of a stored tensor that are read at a time.
_SLICE = 1 << 24
PICTURE_FILE = "sparsity.png"
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


def measure_folder(
    model: PreTrainedModel, folder: str | os.PathLike, target_modules: Modules = "all-linear"
) -> SparsityReport:
    """Count the exact zeros of a saved model in its files, one tensor at a time.

    What lies on the disk is what others will load, and a model that several processes hold in pieces cannot be counted
    by one of them.

    Args:
        model (`PreTrainedModel`): A model of the same architecture, on any device, `meta` included. Only the names and
            shapes of its parameters matter.
        folder (`str` or `os.PathLike`): Where it was saved.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in `measure_sparsity`.

    Returns:
        `SparsityReport`: As `measure_sparsity` gives it for the loaded model.

    Raises:
        FileNotFoundError: If there are no safetensors in the folder.
    """
    stored = {tensor.name: tensor for tensor in stored_tensors(folder)}
    names = [name for name, _ in model.named_parameters()]
    if not all(name in stored for name in names):
        # Some architectures rename their weights on the way to the disk and back.
        return measure_sparsity(type(model).from_pretrained(folder, dtype="auto"), target_modules)
    selected = match_parameters(model, target_modules)
    return SparsityReport([TensorSparsity(**{**asdict(stored[name]), "selected": name in selected}) for name in names])


def measure_checkpoint(folder: str | os.PathLike) -> SparsityReport:
    """Count the exact zeros of a saved model without making it: its config says which layers are linear.

    Args:
        folder (`str` or `os.PathLike`): With config.json and safetensors.

    Returns:
        `SparsityReport`: As `measure_sparsity` gives it for the loaded model.

    Raises:
        OSError: If config.json or safetensors are missing.
        ValueError: If the config names no architecture that Transformers has.
    """
    return measure_folder(meta_model(folder), folder)


def meta_model(folder: str | os.PathLike) -> PreTrainedModel:
    """A saved model without its weights, for the names and shapes of its parameters.

    Raises:
        OSError, ValueError: See [`model_class`].
    """
    cls, config = model_class(folder)
    with torch.device("meta"):
        return cls(config)


def model_class(folder: str | os.PathLike) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of a saved model, and its config.

    Raises:
        OSError: If config.json is missing.
        ValueError: If the config names no architecture that Transformers has.
    """
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["no architecture"])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"The config in {folder} names {name}, and Transformers has no such class to tell which layers are linear:"
            " load the model with its own code, and use measure_sparsity(model)."
        )
    return getattr(transformers, name), config


def stored_tensors(folder: str | os.PathLike) -> Iterator[TensorSparsity]:
    """Read the weights of a folder, one after the other.

    Args:
        folder (`str` or `os.PathLike`): With model.safetensors, or with the shards that its index names.

    Yields:
        `TensorSparsity`: One for each tensor in the files, none of them `selected`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in tqdm(names, desc=f"Counting zeros in {path.name}", leave=False):
                # Opened anew for each: what has been read of a mapped file counts as memory until it is closed.
                with safe_open(path, framework="pt") as file:
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    rows = max(1, _SLICE // max(1, math.prod(shape[1:])))
                    pieces = (
                        (part[i : i + rows] for i in range(0, shape[0], rows)) if shape else [file.get_tensor(name)]
                    )
                    nonzeros = sum(int(piece.count_nonzero()) for piece in pieces)
                numel = math.prod(shape)
                yield TensorSparsity(name, shape, numel, numel - nonzeros, selected=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): save the model again.") from error


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files that hold a folder's model, and all of them.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the index of the shards is damaged.
    """
    folder = Path(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read ({error!r}): save the model again.") from error
    else:
        names = [SAFE_WEIGHTS_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"There is no {', '.join(missing)} in {folder}: save the model there with save_pretrained or"
            " trainer.save_model."
        )
    return [folder / name for name in names]


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
