"""What the parts of gpu_check.py share: the check they belong to, and runs on tiny or random data."""

import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_optimizer import DEVICE, synchronize
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_lpdecay.files import write_text


TESTS = Path(__file__).parent.parent / "tests"
TOY = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


class LeftOut(Exception):
    """A part that cannot be measured with these options."""


@dataclass(frozen=True)
class Check:
    """What a part is told, and where its results go.

    Args:
        output_dir (`Path`): Folder of results and logs.
        rehearse (`bool`): Run at toy size.
        start_method (`str`): How processes are started.
        part (`str`): The name of the part.
        deadline (`float`): When its time is over, by `time.monotonic()`.
        model, train_file, validation_file, paper_file, paper_steps, paper_workers: See gpu_check.py's options.
    """

    output_dir: Path
    rehearse: bool
    start_method: str
    part: str = ""
    deadline: float = float("inf")
    model: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    paper_file: str | None = None
    paper_steps: int | None = None
    paper_workers: int = 4

    @property
    def path(self) -> Path:
        """The JSON file of the part."""
        return self.output_dir / f"{self.part}.json"

    def read(self) -> dict[str, Any]:
        """The part's record so far."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, record: dict[str, Any]) -> None:
        """Replace the part's record."""
        write_text(self.path, json.dumps(record, indent=1) + "\n")

    def record(self, result: dict[str, Any]) -> None:
        """Write a part's result as far as it has come; it is kept if the part fails or its time is over."""
        self.write({**self.read(), "result": result})

    def pick(self, real: Any, toy: Any) -> Any:
        """The toy value in a rehearsal, else the real one."""
        return toy if self.rehearse else real

    def start(self, name: str, function: Callable, *args: Any) -> tuple[multiprocessing.Process, Path]:
        """Start a process that calls `function(check, *args)` and writes what it returns to a JSON file."""
        path = self.output_dir / f"{self.part}-{name}.json"
        path.unlink(missing_ok=True)
        context = multiprocessing.get_context(self.start_method)
        process = context.Process(target=_answer, args=(path, function, self, *args))
        process.start()
        return process, path

    def call(self, name: str, function: Callable, *args: Any) -> Any:
        """Call a function in a process of its own, and wait for it."""
        process, path = self.start(name, function, *args)
        process.join()
        return answer_of(name, process, path)


def _answer(path: Path, function: Callable, *args: Any) -> None:
    try:
        write_text(path, json.dumps(function(*args)))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer_of(name: str, process: multiprocessing.Process, path: Path) -> Any:
    """What the function in a process that has ended returned."""
    if process.exitcode or not path.is_file():
        raise RuntimeError(f"the process for {name} ended with exit code {process.exitcode}; the log says more")
    return json.loads(path.read_text(encoding="utf-8"))


def machine() -> dict[str, str]:
    """Device, driver, versions and date."""
    facts = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()})"}
    if DEVICE == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        facts["driver"] = done.stdout.split("\n")[0].strip() or "unknown"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    return {**facts, **versions, "date": datetime.now(UTC).date().isoformat()}


def free() -> None:
    """Return the memory of what is no longer referred to."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes() -> float | None:
    """Peak memory of the device since [`free`], in GB."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if DEVICE == "cuda" else None


class Intervals(TrainerCallback):
    """Seconds from the start of each step to that of the next, with all that happens between them."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())

    on_train_end = on_step_begin

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:])]


def trainer_arguments(check: Check, **options: Any) -> TrainingArguments:
    """Arguments of a short run that writes nothing; bf16 autocast over float32 weights, as in the recipes."""
    return TrainingArguments(
        str(check.output_dir / f"{check.part}-trainer"),
        **{
            "learning_rate": 1e-5,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": True,
            "use_cpu": DEVICE == "cpu",
            "seed": 0,
            **options,
        },
    )


def random_tokens(rows: int, length: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Training data without a meaning."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_llama(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(dtype)
