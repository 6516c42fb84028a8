"""Which checkpoint of a run can be resumed."""

import json
import os
import re

from transformers.trainer import TRAINER_STATE_NAME


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Find the newest checkpoint that was written to its end.

    A `Trainer` writes `trainer_state.json` last, so a checkpoint that was cut off (Ctrl-C, a full disk) has none, or
    one that cannot be read.

    Args:
        output_dir (`str` or `os.PathLike`): Where the run writes its `checkpoint-<step>` folders.

    Returns:
        `str`, *optional*: Path of the folder, or `None` if there is no whole checkpoint.
    """
    steps = []
    for entry in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        match = re.fullmatch(r"checkpoint-(\d+)", entry)
        if match:
            steps.append(int(match.group(1)))
    for step in sorted(steps, reverse=True):
        checkpoint = os.path.join(output_dir, f"checkpoint-{step}")
        try:
            with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return checkpoint
    return None
