"""Checkpoints that are whole: how they are written, and which one can be resumed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


# Neither the rotation of checkpoints nor a push to the hub looks at a name that starts like this.
UNFINISHED = "_unfinished"


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
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", entry)
        if match:
            steps.append(int(match.group(1)))
    for step in sorted(steps, reverse=True):
        checkpoint = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


class FullDiskError(OSError):
    """There was no space left to write a checkpoint or a model."""


# EFBIG: a limit on the size of a file.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How torch's and safetensors' own errors begin or end, where they do not carry the system's.
_WRITE_FAILED = re.compile(r"unexpected pos \d+ vs|PytorchStreamWriter failed writing|\(os error (28|122|27)\)")


@contextmanager
def naming_a_full_disk(folder: str | os.PathLike, output_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Turn what libraries raise when a disk is full into a sentence, and leave no half-written file behind.

    Args:
        folder (`str` or `os.PathLike`): What is written to in the block. If it fails for want of space, the files in
            it that the block wrote are deleted.
        output_dir (`str` or `os.PathLike`, *optional*, defaults to `folder`): Where the checkpoints of the run are.

    Raises:
        FullDiskError: Instead of what said so: the folder, the space left, and the checkpoint to resume from.
    """
    before = _files(folder)
    try:
        yield
    except Exception as error:
        if isinstance(error, FullDiskError) or not _is_full(error):
            raise
        for path, changed in _files(folder).items():
            if before.get(path) != changed:
                os.unlink(path)
        place = os.path.abspath(folder)
        while not os.path.isdir(place):
            place = os.path.dirname(place)
        free = shutil.disk_usage(place).free
        last = last_whole_checkpoint(folder if output_dir is None else output_dir)
        raise FullDiskError(
            f"There is not enough space to write {os.fspath(folder)} ({free / 1e6:,.1f} MB are free; {error}). What was"
            " half written is deleted. Make space; "
            + (f"the run can be resumed from {last}." if last else "no checkpoint was written yet to resume from.")
        ) from error


def _files(folder: str | os.PathLike) -> dict[str, int]:
    """The files of a folder, with the time each was changed last."""
    entries = os.scandir(folder) if os.path.isdir(folder) else []
    return {entry.path: entry.stat().st_mtime_ns for entry in entries if entry.is_file(follow_symlinks=False)}


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no space."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or _WRITE_FAILED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class WholeCheckpointsMixin:
    """Makes a `Trainer` write each checkpoint whole or not at all: in a folder aside, which is then renamed.

    Under its final name there is never a checkpoint that lacks a file, whatever reads it and whenever the run is
    killed. What was left aside by a killed run is deleted when the next checkpoint is written.
    """

    _writing = False

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:  # an upload in the background must not read from a folder that is about to move
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = self._get_output_dir(trial)
        aside, name = os.path.join(folder, UNFINISHED), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = os.path.join(aside, name), os.path.join(folder, name)
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            with naming_a_full_disk(written, folder):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == written:
                    self.state.best_model_checkpoint = final
                    if self.args.should_save:
                        self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
        except Exception:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            if os.path.isdir(final):  # of an earlier run that came as far
                os.rename(final, os.path.join(aside, "replaced"))
            os.rename(written, final)
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
