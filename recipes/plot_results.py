"""Draw measured results: perplexity against sparsity, or the ratio to dense fine-tuning against the tokens trained on.

python recipes/plot_results.py recipes/results/wikitext2.json recipes/results/perplexity.png
python recipes/plot_results.py recipes/results/budgets.json recipes/results/budgets.png
"""

import argparse
import json
import sys
from pathlib import Path

from hf_lpdecay.sparsity.plot import save_figure


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file with the measured rows")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        draw(results, args.picture)
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"plot_results.py: error: {args.results}: {error!r}", file=sys.stderr)
        return 2
    print(f"written to {args.picture}")
    return 0


def draw(results: dict, path: Path) -> None:
    """Perplexity against sparsity, or, of results with several numbers of tokens, its ratio to dense against these."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    (draw_budgets if isinstance(results["dense"], dict) else draw_sparsity)(axes, results)
    axes.set_title(f"{results['model']} on {results['data'].split(',')[0]}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def draw_sparsity(axes, results: dict) -> None:
    """One line for each method, with the range of its seeds, and one for the dense model."""
    rows = results["rows"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["sparsity"])
        x, y = [100 * row["sparsity"] for row in own], [row["perplexity"] for row in own]
        low = [row["perplexity"] - row["smallest"] for row in own]
        high = [row["largest"] - row["perplexity"] for row in own]
        axes.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=method)
    axes.axhline(results["dense"], color="gray", linestyle="--", label="dense, same fine-tuning")
    axes.set_yscale("log")
    label(axes.yaxis, [20, 30, 40, 60, 100, 200])
    axes.set_xticks(sorted({100 * row["sparsity"] for row in rows}))
    axes.set_xlabel("zeros in the linear layers of the blocks, %")
    axes.set_ylabel("perplexity")


def draw_budgets(axes, results: dict) -> None:
    """One line for each method: its perplexity divided by the lowest of a dense model after at most as many tokens."""
    rows = results["rows"]
    dense = {int(tokens): perplexity for tokens, perplexity in results["dense"].items()}
    best = {tokens: min(dense[fewer] for fewer in dense if fewer <= tokens) for tokens in dense}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["tokens"])
        axes.plot(
            [row["tokens"] for row in own],
            [row["perplexity"] / best[row["tokens"]] for row in own],
            marker="o",
            label=method,
        )
    axes.set_xscale("log")
    label(axes.xaxis, list(dense))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("perplexity, times that of dense fine-tuning")


def label(axis, ticks: list[int]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_ticks([], minor=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
