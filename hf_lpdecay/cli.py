"""The command line: `lpdecay report | eval | generate | pack | unpack | shrink | push`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


# What a command needs it imports itself: the help would have to wait for all of it.


EXAMPLES = """\
examples:
  lpdecay report outputs/sparse                          what is zero, and where
  lpdecay report outputs/sparse outputs/tuned            which zeros were gained and lost in between
  lpdecay report outputs/tuned --against outputs/sparse  fails if a zero of outputs/sparse was lost
  lpdecay eval outputs/sparse --file test.txt --context_length 256
  lpdecay generate outputs/sparse --prompt "Once upon a time"   sparse, with tokens/s and memory at the end
  lpdecay pack outputs/sparse outputs/sparse-packed      a lossless archive, much smaller
  lpdecay unpack outputs/sparse-packed outputs/again     every file as it was
  lpdecay shrink outputs/neurons outputs/small           cut zero neurons and heads out
  lpdecay push outputs/sparse me/sparse --dry_run        what would be pushed to the hub

exit codes: 0 done, 1 a check failed, 2 refused, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (`list[str]`, *optional*): Arguments. Defaults to those of the process.

    Returns:
        `int`: 0 if it was done, 1 if a check failed, 2 if the input was refused, 130 if interrupted.
    """
    options = _parser().parse_args(argv)
    # Libraries print too, some when they are imported: the JSON must stand alone.
    stdout = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    try:
        with stdout:
            result, text, failed = options.run(options)
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was left half written.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"lpdecay {options.command}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else text)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpdecay",
        description="Sparse models on the disk: look, evaluate, make smaller, push.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, run in COMMANDS:
        command = commands.add_parser(
            name,
            help=run.__doc__.splitlines()[0],
            description=run.__doc__,
            epilog="examples:\n" + "\n".join(x for x in EXAMPLES.splitlines() if x.startswith(f"  lpdecay {name} ")),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.add_argument("--json", action="store_true", help="Print the result as JSON.")
        command.set_defaults(run=run)
    return parser


Result = tuple[dict[str, Any], str, bool]


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a saved model (config.json and safetensors).")
    parser.add_argument("other", nargs="?", help="A second one, to compare: zeros gained and lost per tensor.")
    parser.add_argument("--against", metavar="BASE", help="Fail, with exit code 1, if a zero of this folder was lost.")
    parser.add_argument("--by", choices=("module", "tensor"), default="module", help="Rows (default: module).")


def _report(options: argparse.Namespace) -> Result:
    """Count the exact zeros of a saved model, or compare those of two in their selected weights.

    Reads the files tensor by tensor, without making the model.
    """
    from .sparsity.checkpoint import measure_checkpoint

    if options.other and options.against:
        raise ValueError("Give either a second folder or --against, not both.")
    if options.other or options.against:
        base, folder = (options.against, options.folder) if options.against else (options.folder, options.other)
        return _compare(base, folder, check=bool(options.against))
    report = measure_checkpoint(options.folder)
    return report.to_dict(), report.table(by=options.by), False


def _compare(base: str, folder: str, check: bool) -> Result:
    from .sparsity.checkpoint import selected_names
    from .sparsity.zeros import compare_zeros

    # A new bias is zero too, and should learn: only the selected weights count.
    changes = compare_zeros(base, folder, selected_names(base))
    rows = [change for change in changes if change.before or change.after]
    width = max([len(change.name) for change in rows] + [len("in total")])
    lines = [f"{'':<{width}}  {'zeros':>13}  {'lost':>13}  {'gained':>13}"]
    for change in rows:
        lines.append(f"{change.name:<{width}}  {change.before:>13,}  {change.lost:>13,}  {change.gained:>13,}")
    totals = {name: sum(getattr(change, name) for change in changes) for name in ("before", "after", "lost", "gained")}
    lines.append(f"{'in total':<{width}}  {totals['before']:>13,}  {totals['lost']:>13,}  {totals['gained']:>13,}")
    if check:
        lost = totals["lost"]
        lines.append(f"{lost:,} zeros of {base} were lost." if lost else f"No zero of {base} was lost.")
    result = {"base": base, "folder": folder, **totals, "tensors": [asdict(change) for change in changes]}
    return result, "\n".join(lines), check and totals["lost"] > 0


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a causal language model, or its hub id.")
    parser.add_argument("--file", required=True, help="Text to read.")
    parser.add_argument("--context_length", type=int, default=1024, help="Tokens per window (default: 1024).")
    parser.add_argument("--stride", type=int, help="From one window to the next (default: the context length).")
    parser.add_argument("--max_windows", type=int, help="Read that many windows at most.")
    parser.add_argument("--batch_size", type=int, default=8, help="Windows read at once (default: 8).")
    parser.add_argument("--sparse", action="store_true", help="Load it as load_sparse does; an archive is taken, too.")


def _eval(options: argparse.Namespace) -> Result:
    """Measure the perplexity of a causal language model on a text.

    In float32, with a 95 % interval from drawing windows anew.
    """
    import torch
    from transformers import AutoTokenizer

    from .evaluation import text_loss
    from .evaluation.causal import load_causal

    text = Path(options.file).read_text(encoding="utf-8")
    if options.sparse:
        from .inference.loading import find_folder, load_sparse

        folder = find_folder(options.folder)
        model = load_sparse(folder, dtype=torch.float32)
    else:
        folder = options.folder
        model = load_causal(folder, torch.float32)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss = text_loss(
        model, tokenizer, text, options.context_length, options.stride, options.max_windows, options.batch_size
    )
    result = loss.to_dict()
    low, high = result["perplexity_interval"]
    said = (
        f"perplexity {loss.perplexity:.4g} per token (95 % interval {low:.4g} - {high:.4g}),"
        f" {loss.word_perplexity:.4g} per word; {result['tokens']:,} tokens in {result['windows']} windows of"
        f" {loss.context_length}, stride {loss.stride}"
    )
    return result, said, False


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="Folder of a causal language model, an archive, or a hub id.")
    parser.add_argument("--prompt", required=True, help="Text to go on from.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Tokens to generate (default: 128).")
    parser.add_argument("--do_sample", action="store_true", help="Draw tokens instead of taking the likeliest.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Default: as stored.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sparse", action="store_true", default=True, help="As load_sparse loads it (default).")
    kind.add_argument("--dense", action="store_false", dest="sparse", help="As from_pretrained loads it, to compare.")


def _generate(options: argparse.Namespace) -> Result:
    """Generate text with a causal language model, and say how fast that was and how much memory it took.

    The text is printed as it is made, with --json to stderr.
    """
    from .inference.generation import generate_text

    result = generate_text(
        options.path,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        dtype=options.dtype,
        sparse=options.sparse,
        stream=sys.stderr if options.json else sys.stdout,
    )
    said = (
        f"\n{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s;"
        f" {result['weight_bytes'] / 1e6:,.0f} MB of weights, {result['peak_bytes'] / 1e6:,.0f} MB at the peak"
    )
    return result, said, False


def _pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a saved model.")
    parser.add_argument("out", help="Folder to write; must not exist or be empty.")


def _pack(options: argparse.Namespace) -> Result:
    """Pack a saved model into a lossless archive.

    A bit mask and the compressed non-zero values of each tensor, with a checksum.
    """
    from .artifacts import pack

    result = pack(options.folder, options.out)
    dense, packed = result["dense_bytes"], result["packed_bytes"]
    text = f"{dense:,} bytes of weights, now {packed:,} ({packed / dense:.1%}), in {options.out}"
    return {"out": options.out, **result}, text, False


def _unpack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", help="Folder that `lpdecay pack` has written.")
    parser.add_argument("out", help="Folder to write; must not exist or be empty.")


def _unpack(options: argparse.Namespace) -> Result:
    """Unpack an archive: every file as it was, byte for byte.

    Checksums are checked; of a damaged archive nothing is written.
    """
    from .artifacts import unpack

    unpack(options.archive, options.out)
    return {"out": options.out}, f"unpacked to {options.out}", False


def _shrink_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a model with zero neurons or heads.")
    parser.add_argument("out", help="Folder to write; must not exist or be empty.")


def _shrink(options: argparse.Namespace) -> Result:
    """Cut zero neurons and heads out of a model, and save it smaller.

    The result is a plain Transformers model; its outputs are checked to be the same. What sparsity.json says of the
    training is taken along, for the model card.
    """
    from transformers import AutoTokenizer

    from .artifacts import shrink
    from .artifacts.archive import written_whole
    from .card import read_record
    from .sparsity.checkpoint import model_class
    from .sparsity.report import RECORD_FILE, measure_sparsity

    has_record = (Path(options.folder) / RECORD_FILE).is_file()
    facts = read_record(options.folder) if has_record else {}
    with written_whole(options.out) as folder:
        cls, _ = model_class(options.folder)
        model = cls.from_pretrained(options.folder, dtype="auto")
        smaller = shrink(model)
        smaller.save_pretrained(folder)
        before, after = model.num_parameters(), smaller.num_parameters()
        measure_sparsity(smaller).to_json(Path(folder) / RECORD_FILE, **{**facts, "parameters_before_cut": before})
        if (Path(options.folder) / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(options.folder).save_pretrained(folder)
    result = {"out": options.out, "parameters_before": before, "parameters_after": after}
    return result, f"{before:,} parameters, now {after:,} ({after / before:.1%}), in {options.out}", False


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a saved model.")
    parser.add_argument("repo_id", help="namespace/name on the hub.")
    parser.add_argument("--private", action="store_true", help="Make it private, and push to no public one.")
    parser.add_argument("--revision", help="Branch (default: main).")
    parser.add_argument(
        "--packed",
        nargs="?",
        const="beside",
        choices=("beside", "only"),
        help="Push an archive for load_sparse beside the dense weights, or it only.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Only list what would be pushed.")


def _push(options: argparse.Namespace) -> Result:
    """Push a saved model and its card to the Hugging Face Hub.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`.
    """
    from .artifacts import push_to_hub

    push = push_to_hub(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        packed="only" if options.packed == "only" else options.packed is not None,
        dry_run=options.dry_run,
    )
    return asdict(push), str(push), False


COMMANDS: tuple[tuple[str, Callable, Callable[[argparse.Namespace], Result]], ...] = (
    ("report", _report_options, _report),
    ("eval", _eval_options, _eval),
    ("generate", _generate_options, _generate),
    ("pack", _pack_options, _pack),
    ("unpack", _unpack_options, _unpack),
    ("shrink", _shrink_options, _shrink),
    ("push", _push_options, _push),
)


if __name__ == "__main__":
    sys.exit(main())
