"""One picture of a run: sparsity per layer and module, and sparsity and loss over the steps."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files import written_aside


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_run(
    tensors: Sequence[Any],
    path: str | os.PathLike,
    log_history: Sequence[dict[str, Any]] = (),
    title: str = "",
) -> None:
    """Draw the tensors of a [`SparsityReport`], see there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'hf_lpdecay[demo]'.") from error

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    steps = [entry for entry in log_history if "loss" in entry and "sparsity" in entry]
    axes = figure.subplots(2, 1, height_ratios=(3, 2)) if steps else [figure.subplots()]
    _draw_tensors(figure, axes[0], [tensor for tensor in tensors if tensor.selected])
    if steps:
        _draw_course(axes[1], steps)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: str | os.PathLike, dpi: int = 110) -> None:
    """Write a figure into a PNG file whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi)


def _draw_tensors(figure, axes, selected: list[Any]) -> None:
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
    zeros, numel = sum(tensor.zeros for tensor in selected), sum(tensor.numel for tensor in selected)
    axes.set_title(f"exact zeros per layer and module: {zeros / numel:.1%} of the selected weights")
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
