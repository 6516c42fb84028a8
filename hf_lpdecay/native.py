"""Compiles a C++ source for this machine's processor when it is first used, and keeps the result on the disk."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from .files import written_aside


# Comparisons and square roots only become vector instructions without errno and traps. No -ffast-math: infinities and
# NaN keep their meaning.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
# Older compilers for ARM only know the second spelling.
_NATIVE = ("-march=native", "-mcpu=native")


def load_library(
    what: str,
    sources: tuple[Path, ...],
    defines: dict[str, object],
    standard: str = "c++11",
    machines: tuple[str, ...] = _NATIVE,
) -> ctypes.CDLL:
    """Compile a source, or take what an earlier process compiled for the same processor, and load it.

    The compiled library is kept in `$XDG_CACHE_HOME/hf_lpdecay` (`~/.cache/hf_lpdecay`), under a name made from the
    sources, the flags, the compiler and the processor, so that a home folder may be shared by machines that differ.

    Args:
        what (`str`): What the kernel is for, as errors call it, such as `"optimizer"`.
        sources (`tuple[Path, ...]`): The file to compile, then those that it includes.
        defines (`dict[str, object]`): Macros and their values.
        standard (`str`, *optional*, defaults to `"c++11"`): Of the language.
        machines (`tuple[str, ...]`, *optional*): Flags that name the processor; the first that the compiler knows is
            used. Defaults to this machine's own.

    Returns:
        `ctypes.CDLL`: The library.

    Raises:
        RuntimeError: If there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError(
            "No C++ compiler (c++, g++ or clang++) was found: install one, or name it in the variable CXX."
        )
    options = [f"-std={standard}", *_FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
    digest = hashlib.sha256(repr((compiler, _identity(compiler), options, machines, _processor())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    with tempfile.TemporaryDirectory() as temporary:
        library = (_cache_folder() or Path(temporary)) / f"{sources[0].stem}-{digest.hexdigest()[:24]}.so"
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            pass  # not there yet, or damaged
        for machine in machines:
            try:
                with written_aside(library) as made:  # whole, whatever another process does at the same time
                    command = [*shlex.split(compiler), *options, machine, str(sources[0]), "-o", str(made)]
                    outcome = subprocess.run(command, capture_output=True, text=True)
                    if outcome.returncode:
                        raise OSError(outcome.stderr.strip()[-500:])
                return ctypes.CDLL(str(library))
            except OSError as error:
                reason = str(error)
    raise RuntimeError(f"The {what}'s kernel could not be compiled with {compiler}: {reason}")


def _identity(compiler: str) -> tuple:
    """What changes when the compiler does."""
    found = shutil.which((shlex.split(compiler) or [compiler])[0])
    if found is None:
        return ()
    status = os.stat(found)
    return os.path.realpath(found), status.st_size, status.st_mtime_ns


@functools.cache
def _processor() -> str:
    """What distinguishes this machine's processor from others."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return repr((platform.machine(), platform.processor(), platform.version()))
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")  # not the clock's frequency
    return platform.machine() + "\n".join(line for line in first if line.startswith(kept))


def _cache_folder() -> Path | None:
    """Where libraries are kept; `None` if there is no place that only this user can write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_lpdecay")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        safe = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        return folder if safe and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
