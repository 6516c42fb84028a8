"""How fast and how large models are for inference, side by side in one run.

    python recipes/benchmark_inference.py outputs/dense outputs/dense-shrunk
    python recipes/benchmark_inference.py outputs/sparse --sparse outputs/sparse --dtype bfloat16

Each model lives in a process of its own (so that its memory is its own) and is timed in turns with the others.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_lpdecay import load_sparse
from hf_lpdecay.files import write_text
from hf_lpdecay.inference import SparseLinear
from hf_lpdecay.inference.convert import layer_bytes


OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float32"}
AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Folders of models; the first is the reference.")
    parser.add_argument("--task", default="causal-lm", choices=tuple(AUTO_CLASSES), help="Default: causal-lm.")
    parser.add_argument("--sparse", nargs="+", default=[], help="Folders or archives to run with load_sparse.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="Of the weights.")
    parser.add_argument("--other_dtype", nargs="+", default=[], help="Folders to run, dense, in the other dtype too.")
    parser.add_argument("--batch_size", type=int, default=1, help="Prompts at a time (default: 1).")
    parser.add_argument("--prompt_tokens", type=int, default=256, help="Length of the prompt (default: 256).")
    parser.add_argument("--new_tokens", type=int, default=64, help="Tokens to generate (default: 64).")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds, after one that is not (default: 5).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--results_file", default="outputs/benchmark_inference.json", help="JSON file to write.")
    options = parser.parse_args(argv)
    for folder in (*options.models, *options.sparse, *options.other_dtype):
        if not (Path(folder) / "config.json").is_file():
            print(f"benchmark_inference.py: error: {folder!r} has no config.json.", file=sys.stderr)
            return 2
    try:
        results = measure(options)
    except EOFError:
        print("benchmark_inference.py: error: a model could not be run; its process said why.", file=sys.stderr)
        return 2
    Path(options.results_file).parent.mkdir(parents=True, exist_ok=True)
    facts = {"options": vars(options), "torch": torch.__version__, "python": platform.python_version()}
    write_text(options.results_file, json.dumps({**facts, "models": results}, indent=2) + "\n")
    print(f"\n{table(results)}\n\nwritten to {options.results_file}")
    return 0


def measure(options: argparse.Namespace) -> list[dict]:
    """Time every model in turns: one round of each, again and again."""
    context = multiprocessing.get_context("spawn")
    workers, results = [], []
    try:
        runs = [(folder, "") for folder in options.models]
        runs += [(folder, "sparse") for folder in options.sparse]
        runs += [(folder, OTHER_DTYPE[options.dtype]) for folder in options.other_dtype]
        for folder, how in runs:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, folder, how, vars(options)), daemon=True)
            process.start()
            theirs.close()  # so that a process that stops is noticed
            workers.append((process, ours))
            name = f"{folder} ({how})" if how else folder
            results.append({"model": name, **ours.recv()})
        for turn in tqdm(range(options.repeats + 1), desc="Rounds"):
            for (_, connection), result in zip(workers, results):
                connection.send("run")
                for name, seconds in connection.recv().items():
                    if turn:  # the first one warms up
                        result.setdefault(f"{name}_seconds", []).append(seconds)
    finally:
        for process, _ in workers:
            process.terminate()
    first = torch.tensor(results[0]["logits"])
    for result in results:
        logits = torch.tensor(result.pop("logits"))
        if logits.shape == first.shape:
            result["logits_off"] = float((logits - first).abs().max() / first.abs().max())
        for name, tokens in (("prefill", options.prompt_tokens), ("generate", options.new_tokens)):
            if f"{name}_seconds" not in result:
                continue
            seconds = statistics.median(result[f"{name}_seconds"])
            result[f"{name}_tokens_per_second"] = options.batch_size * tokens / seconds
            pairs = zip(results[0][f"{name}_seconds"], result[f"{name}_seconds"])
            result[f"{name}_speedups"] = sorted(reference / own for reference, own in pairs)
    return results


@torch.inference_mode()
def serve(connection, folder: str, how: str, options: dict) -> None:
    """In a process of its own: load a model, and time a prompt (and a generation) whenever asked."""
    torch.set_num_threads(options["threads"])
    before = psutil.Process().memory_info().rss
    dtype = getattr(torch, how if how in OTHER_DTYPE else options["dtype"])
    if how == "sparse":
        model = load_sparse(folder, dtype=dtype)
    else:
        model = AUTO_CLASSES[options["task"]].from_pretrained(folder, dtype=dtype).eval()
    gc.collect()
    generator = torch.Generator().manual_seed(0)
    shape = options["batch_size"], options["prompt_tokens"]
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator)
    logits = model(prompt).logits[0].float()
    connection.send(
        {
            "logits": logits.view(-1, logits.shape[-1])[-1].tolist(),
            "parameters": parameter_count(model),
            "linear_bytes": linear_bytes(model),
            "file_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
            "memory_bytes": psutil.Process().memory_info().rss - before,
        }
    )
    length = {"min_new_tokens": options["new_tokens"], "max_new_tokens": options["new_tokens"]}
    while connection.recv() == "run":
        started = time.perf_counter()
        model(prompt)
        between = time.perf_counter()
        seconds = {"prefill": between - started}
        if model.can_generate():
            model.generate(prompt[:, :8], attention_mask=torch.ones_like(prompt[:, :8]), do_sample=False, **length)
            seconds["generate"] = time.perf_counter() - between
        connection.send(seconds)


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters, with the zeros that sparse layers leave out."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return model.num_parameters() + sum(module.in_features * module.out_features for module in sparse)


def linear_bytes(model: torch.nn.Module) -> int:
    """Memory of the weights of all linear layers but the output head."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D, SparseLinear)
    modules = [module for module in model.modules() if isinstance(module, kinds) and module is not head]
    return sum(layer_bytes(m) if isinstance(m, SparseLinear) else m.weight.nbytes for m in modules)


def table(results: list[dict]) -> str:
    """One row per model; speed as a ratio to the first one of the same round, median and spread; last logits of the
    prompt, the largest difference from the first model's as a share of its largest."""
    timed = {"prefill": "prefill, tokens/s", "generate": "generation, tokens/s"}
    timed = {name: title for name, title in timed.items() if f"{name}_seconds" in results[0]}
    titles = ["model", "parameters", "file, MB", "memory, MB", "linear layers, MB", "logits, off the first's"]
    for title in timed.values():
        titles += [title, "against the first"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for result in results:
        cells = [Path(result["model"]).name, f"{result['parameters']:,}"]
        cells += [f"{result[name] / 1e6:.0f}" for name in ("file_bytes", "memory_bytes", "linear_bytes")]
        cells.append(f"{result['logits_off']:.1e}" if "logits_off" in result else "")
        for name in timed:
            ratios = result[f"{name}_speedups"]
            cells.append(f"{result[f'{name}_tokens_per_second']:.4g}")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
