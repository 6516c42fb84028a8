"""What models are worth, side by side with the first one, which should be the dense parent.

    accelerate launch recipes/evaluate_models.py outputs/dense outputs/sparse --file test.txt --context_length 256
    accelerate launch recipes/evaluate_models.py outputs/dense outputs/sparse --tasks arc_easy hellaswag --limit 200
    accelerate launch recipes/evaluate_models.py outputs/dense outputs/sparse --task text-classification \\
        --file dev.tsv --column_names text label

Not called evaluate.py: from this folder that would hide the package `evaluate` from every recipe.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from benchmark_inference import measure
from data import load_file, text_column
from pypi_models import resolve_model
from tasks.base import load_metric
from tasks.text_classification import classify
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from hf_lpdecay import measure_sparsity
from hf_lpdecay.evaluation import lm_eval_scores, text_loss
from hf_lpdecay.files import write_text
from hf_lpdecay.sparsity.plot import save_figure
from hf_lpdecay.training.record import update_record


def main(argv: list[str]) -> int:
    options = parse(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    results = []
    try:
        if options.file is not None and not Path(options.file).is_file():
            raise FileNotFoundError(f"file={options.file!r}: there is no such file.")
        if options.first_is and not all(Path(name).is_dir() for name in options.models[1:]):
            raise FileNotFoundError(f"first_is={options.first_is!r}: all models but the first must be local folders.")
        with state.local_main_process_first():
            folders = [resolve_model(name) for name in options.models]
        for name, folder in zip(options.models, folders):
            results.append({"model": name, **evaluate_model(folder, options, state)})
            gc.collect()
        if options.latency and state.is_main_process:
            for result, timed in zip(results, measure(latency_options(folders, options))):
                timed.pop("model")
                result["inference"] = timed
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate_models.py: error: {error}", file=sys.stderr)
        return 2
    if state.is_main_process:
        path = Path(options.results_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"options": vars(options), "models": results}, indent=2) + "\n")
        plot(results, path.with_suffix(".png"))
        if options.first_is:
            for folder, result in zip(folders[1:], results[1:]):
                update_record(folder, **card_facts(result, results[0], options))
        print(f"\n{table(results)}\n\nwritten to {path} and {path.with_suffix('.png')}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Folders, hub ids or pypi:<wheel>; the first is the reference.")
    parser.add_argument("--task", default="causal-lm", choices=("causal-lm", "text-classification"))
    parser.add_argument("--file", help="Text to read, or labelled json, jsonl, csv, tsv, parquet.")
    parser.add_argument("--column_names", nargs="+", help="Names of the columns of csv and tsv files without a header.")
    parser.add_argument("--label_column", default="label", help="Column with the label (default: label).")
    parser.add_argument("--context_length", type=int, default=1024, help="Tokens per window (default: 1024).")
    parser.add_argument("--stride", type=int, help="From one window to the next (default: the context length).")
    parser.add_argument("--max_windows", type=int, help="Read that many windows at most.")
    parser.add_argument("--batch_size", type=int, default=8, help="Sequences read at once (default: 8).")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="Of the weights."
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="Tasks of lm-eval, by name.")
    parser.add_argument("--include_path", help="Folder with YAML files of lm-eval tasks; needs no hub.")
    parser.add_argument("--limit", type=int, help="Documents per lm-eval task at most.")
    parser.add_argument("--latency", action="store_true", help="Time inputs of that length, and generation, too.")
    parser.add_argument(
        "--first_is",
        choices=("before", "dense"),
        help="What the first model is to the others: they, before their training, or trained alike and dense. The"
        " results then go into the others' sparsity.json, which their model cards are made from.",
    )
    parser.add_argument("--results_file", default="outputs/evaluation.json", help="JSON file; a PNG goes beside it.")
    options = parser.parse_args(argv)
    if not (options.file or options.tasks or options.latency):
        parser.error("nothing to evaluate: give --file, --tasks or --latency")
    if options.task == "text-classification" and (options.tasks or not options.file):
        parser.error("a text classifier is evaluated on a labelled --file, without --tasks")
    return options


def evaluate_model(folder: str, options: argparse.Namespace, state: PartialState) -> dict:
    """Sparsity and quality of one model."""
    causal = options.task == "causal-lm"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(state.device).eval()
    report = measure_sparsity(model)
    result = {
        "parameters": model.num_parameters(),
        "sparsity": report.sparsity,
        "model_sparsity": report.model_sparsity,
        "dtype": options.dtype,
    }
    if options.file and causal:
        text = Path(options.file).read_text(encoding="utf-8")
        sizes = {name: getattr(options, name) for name in ("context_length", "stride", "max_windows", "batch_size")}
        result |= text_loss(model, tokenizer, text, **sizes, desc=Path(folder).name).to_dict()
    elif options.file:
        result["accuracy"], result["examples"] = accuracy(model, tokenizer, options)
    if options.tasks:
        result["lm_eval"] = lm_eval_scores(
            model, tokenizer, options.tasks, options.include_path, options.batch_size, options.limit
        )
    return result


def accuracy(model, tokenizer, options: argparse.Namespace) -> tuple[float, int]:
    """Accuracy of a classifier on a labelled file, and the number of examples."""
    data = load_file(options.file, options.column_names)
    column = text_column(data, None)
    labels = [model.config.label2id[str(label)] for label in data[options.label_column]]
    rows = [
        {**tokenizer(text, truncation=True, max_length=options.context_length), "labels": label}
        for text, label in zip(data[column], labels)
    ]
    metric = load_metric("accuracy")
    collator = DataCollatorWithPadding(tokenizer)
    return classify(model, rows, collator, options.batch_size, metric, "Accuracy"), len(rows)


def latency_options(folders: list[str], options: argparse.Namespace) -> argparse.Namespace:
    """What the inference benchmark takes."""
    return argparse.Namespace(
        models=folders,
        task=options.task,
        sparse=[],
        other_dtype=[],
        dtype=options.dtype,
        batch_size=1,
        prompt_tokens=options.context_length,
        new_tokens=64,
        repeats=5,
        threads=torch.get_num_threads(),
    )


def card_facts(result: dict, first: dict, options: argparse.Namespace) -> dict[str, dict]:
    """What a model's card takes from an evaluation."""
    facts = {"results": {}, "lm_eval": {}, "evaluated_on": {}}
    for when, found in (("after", result), (options.first_is, first)):
        metrics = {name: found[name] for name in ("perplexity", "word_perplexity", "accuracy") if name in found}
        facts["results"] |= {when: metrics} if metrics else {}
        facts["lm_eval"] |= {when: found["lm_eval"]} if "lm_eval" in found else {}
    if options.file:
        size = result["windows"] if "windows" in result else result["examples"]
        facts["evaluated_on"] = {"name": Path(options.file).name, "examples": size, "dtype": result["dtype"]}
        facts["evaluated_on"]["block_size"] = options.context_length
    return {name: value for name, value in facts.items() if value}


def scores(result: dict) -> dict[str, float]:
    """The headline numbers of a model: perplexity or accuracy, and one per lm-eval task."""
    found = {name: result[name] for name in ("perplexity", "word_perplexity", "accuracy") if name in result}
    for task, metrics in result.get("lm_eval", {}).items():
        name = next(name for name in ("acc_norm,none", "acc,none", *metrics) if isinstance(metrics.get(name), float))
        found[f"{task} {name.split(',')[0]}"] = metrics[name]
    if "inference" in result:
        for name, title in (("prefill", "prompt"), ("generate", "generation")):
            if f"{name}_tokens_per_second" in result["inference"]:
                found[f"{title}, tokens/s"] = result["inference"][f"{name}_tokens_per_second"]
        found["memory, MB"] = result["inference"]["memory_bytes"] / 1e6
    return found


def table(results: list[dict]) -> str:
    """One row per model, each number with its ratio to the first model's."""
    names = list(scores(results[0]))
    lines = [
        f"| model | parameters | zeros, linear layers | zeros, whole model | {' | '.join(names)} |",
        "| --- " * (4 + len(names)) + "|",
    ]
    reference = scores(results[0])
    for result in results:
        cells = [result["model"], f"{result['parameters']:,}", f"{result['sparsity']:.2%}"]
        cells.append(f"{result['model_sparsity']:.2%}")
        for name, value in scores(result).items():
            interval = result.get(f"{name}_interval")
            spread = f" ({interval[0]:.4g} - {interval[1]:.4g})" if interval else ""
            cells.append(f"{value:.4g}{spread}, x {value / reference[name]:.3f}" if reference[name] else f"{value:.4g}")
        lines.append(f"| {' | '.join(cells)} |")
    if "perplexity" in reference:
        first = results[0]
        lines.append(
            f"\nPerplexity over {first['windows']} windows of {first['context_length']} tokens, stride"
            f" {first['stride']}; in brackets a 95 % interval from drawing windows anew. x: ratio to the first model."
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Quality against sparsity."""
    from matplotlib.figure import Figure

    name = next(iter(scores(results[0])))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        axes.plot(result["sparsity"], scores(result)[name], "o", label=Path(result["model"]).name)
    axes.set(xlabel="sparsity of the linear layers", ylabel=name)
    axes.legend()
    save_figure(figure, path, dpi=150)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
