"""The model card: what sparsity.json says, for people and for the hub."""

import json
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import httpx
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..files import write_text
from ..sparsity import SparsityReport
from ..sparsity.report import PICTURE_FILE, RECORD_FILE, TensorSparsity
from . import sections
from .markdown import plain


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
MARKER = "<!-- Made by hf_lpdecay"
_MARKER_LINE = f"{MARKER} from sparsity.json, anew at every push. Delete this line to keep what you write here. -->"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# Auto class, the architectures it loads, and the hub's name of their task, None where that depends on the model.
_AUTO_CLASSES = (
    ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text-generation"),
    (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "text-classification",
    ),
    ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, None),
    ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "fill-mask"),
    (
        "AutoModelForTokenClassification",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "token-classification",
    ),
    ("AutoModelForQuestionAnswering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "question-answering"),
    (
        "AutoModelForImageClassification",
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification",
    ),
)


def write_card(
    folder: str | os.PathLike, repo_id: str | None = None, title: str | None = None, packed: bool | str = False
) -> Path:
    """Write the model card, README.md, of a model that has a sparsity.json beside it.

    A README.md that hf_lpdecay did not make is left as it is. If the record names no licence, the base model's is asked
    for on the hub.

    Args:
        folder (`str` or `os.PathLike`): The model's.
        repo_id (`str`, *optional*): Where it is pushed to, for the line that loads it.
        title (`str`, *optional*): Defaults to the repository's name, or the folder's.
        packed (`bool` or `str`, *optional*, defaults to `False`): As in [`~hf_lpdecay.push_to_hub`].

    Returns:
        `Path`: The README.md.

    Raises:
        FileNotFoundError, ValueError: See [`make_card`].
    """
    path = Path(folder) / CARD_FILE
    if is_hand_written(path):
        logger.warning_once(f"{path} was not made by hf_lpdecay and stays as it is. Delete it to get one made.")
        return path
    facts = read_record(folder)
    if not facts.get("license") and sections.is_repo_id(facts.get("base_model")):
        facts["license"] = _license_on_hub(facts["base_model"])
    write_text(path, str(make_card(folder, facts, repo_id, title, packed)))
    return path


def is_hand_written(path: Path) -> bool:
    """Whether there is a card that is not ours to overwrite."""
    return path.is_file() and MARKER not in path.read_text(encoding="utf-8", errors="replace")


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """Read sparsity.json.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not what [`~hf_lpdecay.SparsityReport.to_json`] writes.
    """
    path = Path(folder) / RECORD_FILE
    anew = f"Write it anew: measure_sparsity(model).to_json({str(path)!r})."
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}, which the model card is made from. {anew}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        _report(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a sparsity report ({error!r}). {anew}") from error
    return facts


def make_card(
    folder: str | os.PathLike,
    facts: dict[str, Any],
    repo_id: str | None = None,
    title: str | None = None,
    packed: bool | str = False,
) -> ModelCard:
    """Make the model card. What is not known is left out of it.

    Args:
        folder (`str` or `os.PathLike`): The model's: config.json, safetensors, perhaps a tokenizer and sparsity.png.
        facts (`dict[str, Any]`): The content of its sparsity.json, see [`~hf_lpdecay.training.write_record`].
        repo_id (`str`, *optional*): Where it is pushed to.
        title (`str`, *optional*): Defaults to the repository's name, or the folder's.
        packed (`bool` or `str`, *optional*, defaults to `False`): As in [`~hf_lpdecay.push_to_hub`].

    Returns:
        `ModelCard`: With metadata that the hub accepts.

    Raises:
        FileNotFoundError: If config.json or safetensors are missing.
    """
    folder = Path(folder)
    report = _report(facts)
    title = title or (repo_id or folder.resolve().name).rsplit("/", 1)[-1]
    auto_class, task = _auto_class(folder)
    lp_config = facts.get("lp_config") or {}
    structured = report.sparsity and lp_config.get("pattern") in ("neurons", "heads")
    return ModelCard.from_template(
        _metadata(facts, report, title, facts.get("pipeline_tag") or task),
        template_path=str(_TEMPLATE),
        marker=_MARKER_LINE,
        record=RECORD_FILE,
        title=plain(title),
        summary=sections.summary(facts, report),
        method=sections.method(lp_config, report),
        usage=None if packed == "only" else _usage(folder, auto_class, repo_id),
        packed=packed,
        name=json.dumps(repo_id or str(folder.resolve().name)),
        results=sections.results_table(facts, report),
        evaluated_on=sections.evaluated_on(facts),
        sparsity=sections.sparsity_table(report),
        picture=PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None,
        size=sections.size_table(folder, report),
        units=lp_config["pattern"] if structured else None,
        zeros=sections.is_sparse(report),
        lp_config=sections.config_code(lp_config),
        strength=sections.strength(lp_config, facts.get("log_history") or []),
        training=sections.training_table(facts.get("training") or {}),
        versions=sections.versions(facts.get("versions") or {}),
    )


def _metadata(facts: dict[str, Any], report: SparsityReport, title: str, task: str | None) -> ModelCardData:
    base_model, results = facts.get("base_model"), _eval_results(facts, task)
    tags = ["sparsity"] if sections.is_sparse(report) else []
    tags += ["pruning"] if tags or facts.get("parameters_before_cut") else []
    if sections.decays(facts.get("lp_config") or {}):
        tags += ["lp-weight-decay", "arxiv:2404.10824"]
    return ModelCardData(
        library_name="transformers",
        license=facts.get("license") or None,
        language=facts.get("language") or None,
        base_model=base_model if sections.is_repo_id(base_model) else None,
        datasets=[name for name in sections.listed(facts.get("datasets")) if sections.is_repo_id(name)] or None,
        pipeline_tag=task,
        tags=[*tags, *sections.listed(facts.get("tags"))] or None,
        model_name=" ".join(title.split()) if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: dict[str, Any], task: str | None) -> list[EvalResult]:
    """For the hub's model-index, which takes a result only with its task and data set."""
    if not task:
        return []
    data, results = facts.get("evaluated_on") or {}, []
    for metric, value in sections.metrics(facts, "after").items() if data.get("name") else ():
        dataset = {f"dataset_{name}": data.get(name) for name in ("name", "config", "split")}
        dataset["dataset_type"] = data.get("type") or data["name"]
        results.append(EvalResult(task, metric_type=metric, metric_name=metric, metric_value=value, **dataset))
    for (name, metric), value in sections.task_metrics(facts, "after").items():
        dataset = {"dataset_type": name, "dataset_name": name}
        results.append(EvalResult(task, metric_type=metric, metric_name=metric, metric_value=value, **dataset))
    return results


def _usage(folder: Path, auto_class: str | None, repo_id: str | None) -> str | None:
    if auto_class is None:
        return None
    name = json.dumps(repo_id or str(folder.resolve().name))
    preprocessor = None
    if (folder / "tokenizer_config.json").is_file():
        preprocessor = "AutoTokenizer"
    elif (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        preprocessor = "AutoProcessor"
    names = ", ".join(filter(None, [auto_class, preprocessor]))
    lines = [f"from transformers import {names}", "", f"model = {auto_class}.from_pretrained({name})"]
    if preprocessor:
        variable = preprocessor.removeprefix("Auto").lower()
        lines.append(f"{variable} = {preprocessor}.from_pretrained({name})")
    return "\n".join(lines)


def _auto_class(folder: Path) -> tuple[str | None, str | None]:
    """The class that loads the model, and the hub's name for what it does."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = (config.get("architectures") or [None])[0]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read ({error}): save the model again.") from error
    for auto_class, architectures, task in _AUTO_CLASSES:
        if architecture in architectures.values():
            return auto_class, task
    known = isinstance(architecture, str) and hasattr(transformers, architecture)
    return (architecture if known else None), None


def _report(facts: dict[str, Any]) -> SparsityReport:
    return SparsityReport([TensorSparsity(**tensor) for tensor in facts["tensors"]])


def _license_on_hub(repo_id: str) -> str | None:
    try:
        data = HfApi().model_info(repo_id).card_data
    except (httpx.HTTPError, OSError):  # offline, or a private model: the card goes without
        return None
    return data.license if data else None
