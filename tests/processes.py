"""Real processes that talk over gloo, without an interpreter's start for each.

A fork server imports torch, transformers and the package once; every process is a fork of it and begins with what a
launcher sets. The server computes nothing, so that torch has started no thread in it that a fork would lack.
"""

import functools
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import torch

from hf_lpdecay import LpDecayMixin


HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
# `conftest` imports all that the tests share, and Accelerate's `unwrap_model` DeepSpeed, where it is installed.
CONTEXT.set_forkserver_preload(["conftest", "torch.distributed.fsdp", "deepspeed"])
# gloo's threads abort a process now and then on a CPU: at an interpreter's end ("terminate called without an active
# exception"), and once in hundreds of runs in a gather of FSDP2. Such a run is tried once more.
ABORTED = {-signal.SIGABRT, -signal.SIGSEGV}
# What a process that is left alone in a collective is given to notice it and to say what it saw.
GRACE = 10.0


def succeed(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Run a recipe's `main`, which returns an exit code."""
    code = main(arguments)
    if code:
        raise RuntimeError(f"{main.__module__} ended with code {code}")


def run_into_a_full_disk(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Run a recipe whose disk is full when it has trained."""
    train = LpDecayMixin.train

    def train_and_fill(*args, **kwargs):
        train(*args, **kwargs)
        limit_files(20_000)

    LpDecayMixin.train = train_and_fill
    succeed(main, arguments)


def limit_files(limit: int) -> None:
    """Let no file that this process writes get longer than `limit` bytes, which is to a library as a full disk is."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def start_server() -> None:
    """Start the fork server, if it does not run, with the paths of the tests and the recipes."""
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")}
    paths = [str(HERE), str(HERE.parent / "recipes"), str(HERE.parent), kept["PYTHONPATH"] or ""]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, paths)), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run_in_processes(function: Callable, world_size: int, *args, timeout: float = 240.0, **options) -> list[str]:
    """Call a function in several processes at once, with what `torchrun` sets in the environment; or in one, without.

    Args:
        function (`Callable`): of a module, so that it can be pickled. What it returns is ignored.
        world_size (`int`): how many processes.
        *args: what the function is called with; it is pickled, as `options` is.
        timeout (`float`, *optional*, defaults to `240.0`): seconds after which the processes are ended.
        **options: what the function is called with by name.

    Returns:
        `list[str]`: what each process wrote to stdout and stderr.

    Raises:
        RuntimeError: when a process failed, with the end of each one's output, its traceback included.
        TimeoutError: after `timeout` seconds, likewise.
    """
    start_server()
    call = functools.partial(function, *args, **options)
    in_time, codes, outputs = _attempt(call, world_size, timeout)
    if ABORTED.intersection(codes):
        print(f"{function.__name__}: exit codes {codes}, once more. {outputs}")
        in_time, codes, outputs = _attempt(call, world_size, timeout)
    if in_time and not any(codes):
        return outputs
    ends = "".join(f"\n--- process {rank}, exit code {codes[rank]}:\n{out[-3000:]}" for rank, out in enumerate(outputs))
    if not in_time:
        raise TimeoutError(f"{function.__name__} took more than {timeout:g} s in {world_size} processes{ends}")
    raise RuntimeError(f"{function.__name__} failed in {world_size} processes{ends}")


def launch(command: list, **options) -> subprocess.CompletedProcess:
    """Run a launcher's command, and once more where a process aborted; `options` are those of `subprocess.run`."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode and "(SIGABRT)" in done.stderr:
        print(f"{command}: once more. {done.stderr}")
        done = subprocess.run(command, capture_output=True, text=True, **options)
    return done


def _attempt(call: Callable, world_size: int, timeout: float) -> tuple[bool, list[int], list[str]]:
    """Whether all processes ended in time, their exit codes, and what they wrote."""
    # It listens at a free port from the start, so that nobody can take the port in between.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
    }
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if world_size == 1:
        ranks = [{}]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(world_size)]
        processes = [
            CONTEXT.Process(target=_run, args=(call, environment, log)) for environment, log in zip(ranks, logs)
        ]
        for process in processes:
            process.start()
        in_time = _wait(processes, timeout)
        outputs = [log.read_text() if log.exists() else "" for log in logs]
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.close()
    return in_time, codes, outputs


def _wait(processes: list, timeout: float) -> bool:
    """Wait for all processes, end those that outlive a failed one or the limit, and tell whether the limit was kept."""
    end = time.monotonic() + timeout
    failed = False
    try:
        while running := [process for process in processes if process.exitcode is None]:
            if not failed and any(process.exitcode for process in processes):
                failed, end = True, time.monotonic() + GRACE
            if not connection.wait([process.sentinel for process in running], max(0.0, end - time.monotonic())):
                return failed
        return True
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(call: Callable, environment: dict[str, str], log: Path) -> None:
    """One process. It ends without an interpreter's end, in which gloo's threads now and then abort."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    gc.freeze()  # what the server imported is never collected, and looking through it takes most of a second
    torch.set_num_threads(1)
    call()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
