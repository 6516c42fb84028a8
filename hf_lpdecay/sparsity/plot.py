"""One picture of a run: sparsity per layer and module, and sparsity and loss over the steps."""

import os
from typing import Any

from .report import SparsityReport


def plot_run(
    report: SparsityReport, path: str | os.PathLike, log_history: list[dict[str, Any]] = (), title: str = ""
) -> None:
    """Draw a report and, if there is one, the course of the training into a PNG file.

    Args:
        report (`SparsityReport`): From [`measure_sparsity`].
        path (`str` or `os.PathLike`): File to write, ending in `.png`.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history`.
        title (`str`, *optional*): Above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'hf_lpdecay[demo]'.") from error

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    steps = [entry for entry in log_history if "loss" in entry and "sparsity" in entry]
    axes = figure.subplots(2, 1, height_ratios=(3, 2)) if steps else [figure.subplots()]
    _draw_tensors(figure, axes[0], report)
    if steps:
        _draw_course(axes[1], steps)
    if title:
        figure.suptitle(title)
    temporary = f"{os.fspath(path)}.tmp"
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)


def _draw_tensors(figure, axes, report: SparsityReport) -> None:
    selected = [tensor for tensor in report.tensors if tensor.selected]
    modules = list(dict.fromkeys(tensor.module for tensor in selected))
    layers = sorted({tensor.layer for tensor in selected if tensor.layer is not None}) or [None]
    grid = [[float("nan")] * len(layers) for _ in modules]
    for tensor in selected:
        column = layers.index(tensor.layer) if tensor.layer in layers else 0
        grid[modules.index(tensor.module)][column] = tensor.zeros / tensor.numel
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    short = [module.rsplit(".", 2)[-2:] for module in modules]
    axes.set_yticks(range(len(modules)), [".".join(parts) for parts in short])
    axes.set_xticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers])
    axes.set_xlabel("layer")
    axes.set_title(
        f"exact zeros per layer and module ({report.sparsity:.1%} of the selected weights,"
        f" {report.model_sparsity:.1%} of the whole model)"
    )
    figure.colorbar(image, ax=axes, label="sparsity")


def _draw_course(axes, steps: list[dict[str, Any]]) -> None:
    x = [entry["step"] for entry in steps]
    axes.plot(x, [entry["loss"] for entry in steps], color="tab:blue", marker=".", label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color="tab:blue")
    twin = axes.twinx()
    twin.plot(x, [entry["sparsity"] for entry in steps], color="tab:orange", marker=".", label="sparsity")
    twin.set_ylabel("sparsity of the selected weights", color="tab:orange")
    twin.set_ylim(0, 1)
