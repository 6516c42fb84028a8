"""The folder a run writes to: one run each, which the same command resumes."""

import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from hf_lpdecay.files import write_text
from hf_lpdecay.training import FullDiskError, last_whole_checkpoint


RUN_FILE = "run.yaml"
# Options that may differ between a run and its continuation, since they do not change its result.
_FREE = {
    "config",
    "output_dir",
    "disable_tqdm",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "resume_from_checkpoint",
    "dataloader_num_workers",
}


def claim_folder(output_dir: str, options: dict[str, Any]) -> str | None:
    """Note in `output_dir` which run it holds, or find out that it holds this one already.

    Args:
        output_dir (`str`): Where the run writes.
        options (`dict[str, Any]`): What its YAML file and command line said.

    Returns:
        `str`, *optional*: The newest whole checkpoint of this run, if there is one.

    Raises:
        ValueError: If the folder holds something else.
    """
    folder = Path(output_dir)
    note = folder / RUN_FILE
    # A run that got no further than its note has nothing to lose.
    if any(folder.glob("checkpoint-*")) or any(folder.glob("*.safetensors")):
        cure = "Give another --output_dir, or delete the folder."
        if not note.is_file():
            raise ValueError(f"output_dir={output_dir!r} holds a model or checkpoints of something else. {cure}")
        earlier = yaml.safe_load(note.read_text(encoding="utf-8"))
        changed = [
            f"{name}={earlier.get(name)!r} (now {options.get(name)!r})"
            for name in sorted(earlier.keys() | options.keys())
            if name not in _FREE and earlier.get(name) != options.get(name)
        ]
        if changed:
            raise ValueError(f"output_dir={output_dir!r} holds a run with {', '.join(changed)}. {cure}")
        return last_whole_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(note, yaml.safe_dump(options, sort_keys=True))
    return None


def finish(trainer: Trainer) -> None:
    """Push to the hub once more, now that the card has results, and end all processes together."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    # A process that leaves while others are still connected to it can take them along.
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()  # DDP holds the process group, whose threads must end before Python does
    trainer.accelerator.end_training()


def stopped(error: KeyboardInterrupt | FullDiskError, output_dir: str) -> int:
    """Say why a run stopped and how it is resumed, and return the exit code."""
    if isinstance(error, FullDiskError):
        print(f"\n{error}", file=sys.stderr)
        return 1
    last = last_whole_checkpoint(output_dir)
    kept = f"The same command resumes from {last}." if last else "No checkpoint was written yet."
    print(f"\nInterrupted. {kept}", file=sys.stderr)
    return 130
