"""`push_to_hub`: a saved model, its card and nothing else to the Hugging Face Hub."""

import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, validate_repo_id
from transformers.utils import CONFIG_NAME, logging

from ..card import CARD_FILE, is_hand_written, make_card, read_record, write_card
from ..files import write_text
from ..sparsity.checkpoint import measure_checkpoint, stored_tensors, weight_files
from ..sparsity.report import RECORD_FILE
from .archive import PICKLE_SUFFIXES, pack


logger = logging.get_logger(__name__)

# Of the archive in a repository or a folder.
PACKED_FOLDER = "packed"
# What a training leaves beside its model. Hidden files stay as well.
_NOT_PUSHED = (
    *("checkpoint-*", "__pycache__", "*.tmp", "training_args.bin", "trainer_state.json", "run.yaml"),
    *("optimizer*", "scheduler.*", "scaler.*", "rng_state*", "pytorch_model_fsdp*", "global_step*", "zero_to_fp32.py"),
)


@dataclass(frozen=True)
class Push:
    """What was pushed, or would be.

    Args:
        repo_id (`str`): Where to.
        files (`dict[str, int]`): Their sizes in bytes, by their paths in the repository.
        left_out (`list[str]`): What else lies in the folder; folders end in a slash.
        url (`str`, *optional*): The commit's; `None` after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    url: str | None = None

    def __str__(self) -> str:
        width = max(len(f"{size:,}") for size in self.files.values())
        lines = [f"{size:>{width},} bytes  {name}" for name, size in self.files.items()]
        total = f"{sum(self.files.values()):,} bytes in {len(self.files)} files"
        lines.append(f"{total} pushed: {self.url}" if self.url else f"{total} would be pushed to {self.repo_id}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    packed: bool | str = False,
    dry_run: bool = False,
    commit_message: str = "Upload a sparse model",
) -> Push:
    """Push a saved model to the Hugging Face Hub, with a model card made from its sparsity.json.

    Checkpoints, optimizer states and what else a training leaves behind stay where they are, and the result names them.
    A README.md that hf_lpdecay did not make is pushed as it is. Without a sparsity.json the zeros are counted and one
    is written.

    Args:
        folder (`str` or `os.PathLike`): Has config.json and safetensors.
        repo_id (`str`): `"namespace/name"`, or `"name"` for your own namespace. Made if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Make it private, and push to no public one.
        token (`str`, *optional*): Defaults to the environment's `HF_TOKEN` or the login that `hf auth login` keeps.
        revision (`str`, *optional*): Branch to push to, made if it does not exist. Defaults to `main`.
        packed (`bool` or `str`, *optional*, defaults to `False`): Push an archive of [`pack`] too, in the folder
            `packed`, from which [`~hf_lpdecay.load_sparse`] loads the model; with `"only"` in place of the dense
            weights.
        dry_run (`bool`, *optional*, defaults to `False`): Only say what would be pushed; nothing is written anywhere.
        commit_message (`str`, *optional*, defaults to `"Upload a sparse model"`): Of the commit.

    Returns:
        `Push`: The files and their sizes, what was left out, and the commit's URL.

    Raises:
        FileNotFoundError: If config.json or safetensors are missing, or if the hub has no such namespace or branch.
        ValueError: If `packed` is something else, the folder has pickled weights, sparsity.json is of another
            model, or a name is not valid.
        PermissionError: If there is no token, or it may not do this.
        ConnectionError: If the hub cannot be reached or fails.
        OSError: If the hub refuses for another reason.

    Example:

    ```python
    >>> print(push_to_hub("outputs/smollm2-135m-sparse-50", "me/smollm2-135m-sparse-50", dry_run=True))
    ```
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if packed not in (False, True, "only"):
        raise ValueError(f"Invalid packed={packed!r}: should be False, True or 'only'.")
    files, left_out = _files(folder)
    facts = _facts(folder)
    if not is_hand_written(folder / CARD_FILE):
        files[CARD_FILE] = len(str(make_card(folder, facts, repo_id, packed=packed)).encode())
    if RECORD_FILE not in files:
        files[RECORD_FILE] = len(_as_json(facts).encode())
    if dry_run:
        with _packed(folder, files, packed) as (_, more):
            return Push(repo_id, dict(sorted(more.items())), left_out)

    if is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.")
    if not (token or get_token()):
        raise PermissionError(
            "There is no token for the hub: run `hf auth login`, set HF_TOKEN, or give token=. Tokens that may write"
            " are made on https://huggingface.co/settings/tokens."
        )
    if left_out:
        logger.warning(f"Not pushed from {folder}: {', '.join(left_out)}")
    if not (folder / RECORD_FILE).is_file():
        write_text(folder / RECORD_FILE, _as_json(facts))
    api = HfApi(token=token, library_name="hf_lpdecay")
    with _told_plainly(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise PermissionError(
                f"{repo_id} exists and is public, but private=True: make it private on the hub, or push to another."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_card(folder, repo_id, packed=packed)
        files = {name: (folder / name).stat().st_size for name in files}
        with _packed(folder, files, packed) as (source, files):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=source,
                allow_patterns=[glob.escape(name) for name in files],
                revision=revision,
                commit_message=commit_message,
            )
    sizes = dict(sorted(files.items()))
    return Push(repo_id, sizes, left_out, str(commit.commit_url))


def _files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of the files that are pushed, and the names of what is not."""
    if not (folder / CONFIG_NAME).is_file():
        adapter = " It holds an adapter: merge it into its model first." * (folder / "adapter_config.json").is_file()
        raise FileNotFoundError(
            f"There is no {CONFIG_NAME} in {folder}: give the folder that save_pretrained or trainer.save_model wrote."
            + adapter
        )
    weight_files(folder)
    files: dict[str, int] = {}
    left_out: list[str] = []
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted(folders):
            if _stays(name):
                folders.remove(name)
                left_out.append(f"{(inside / name).as_posix()}/")
        for name in sorted(names):
            path = (inside / name).as_posix()
            if _stays(name):
                left_out.append(path)
            elif _is_pickle(Path(root) / name):
                raise ValueError(
                    f"{folder / path} is a pickle, which runs code when it is loaded, and is not pushed: delete it (the"
                    " model is in safetensors already)."
                )
            else:
                files[path] = (Path(root) / name).stat().st_size
    return files, left_out


@contextmanager
def _packed(folder: Path, files: dict[str, int], packed: bool | str) -> Iterator[tuple[Path, dict[str, int]]]:
    """What is pushed, with the archive: a folder, and the sizes of its files."""
    if not packed:
        yield folder, files
        return
    with tempfile.TemporaryDirectory() as aside:
        plain, whole = Path(aside, "plain"), Path(aside, "whole")
        for name in files:
            # The archive holds what is pushed, without the card, not what lies beside it. A dry run has no card yet.
            roots = (whole,) if name == CARD_FILE else (plain, whole)
            for root in roots if (folder / name).is_file() else ():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to((folder / name).resolve())
        if packed == "only":
            weights = [path.name for path in weight_files(folder)] + [SAFETENSORS_INDEX_FILE]
            files = {name: size for name, size in files.items() if name not in weights}
        pack(plain, whole / PACKED_FOLDER)
        archive = (path for path in (whole / PACKED_FOLDER).rglob("*") if path.is_file())
        yield whole, {**files, **{path.relative_to(whole).as_posix(): path.stat().st_size for path in archive}}


def _stays(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in _NOT_PUSHED)


def _is_pickle(path: Path) -> bool:
    """Whether `torch.save` or `pickle` wrote a file that is called like one."""
    if path.suffix not in PICKLE_SUFFIXES:
        return False
    with open(path, "rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"


def _facts(folder: Path) -> dict[str, Any]:
    """What sparsity.json says, after a look whether it is of this model; or what can be counted without one."""
    if not (folder / RECORD_FILE).is_file():
        return measure_checkpoint(folder).to_dict()
    facts = read_record(folder)
    recorded = {tensor["name"]: tensor for tensor in facts["tensors"]}
    for tensor in stored_tensors(folder):
        said = recorded.get(tensor.name)
        if said and (said["shape"], said["zeros"]) != (tensor.shape, tensor.zeros):
            raise ValueError(
                f"{folder / RECORD_FILE} is of another model: its {tensor.name} has shape {said['shape']} and"
                f" {said['zeros']:,} zeros, the saved one {tensor.shape} and {tensor.zeros:,}. Delete it, or write it"
                " anew: measure_sparsity(model).to_json(path)."
            )
    return facts


def _as_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"


@contextmanager
def _told_plainly(repo_id: str) -> Iterator[None]:
    """Turn the hub's errors into ones that say what to do."""
    try:
        yield
    except (httpx.HTTPError, RuntimeError, json.JSONDecodeError) as error:
        raise _plainly(repo_id, error) from error


def _plainly(repo_id: str, error: Exception) -> OSError:
    cause: BaseException = error
    while not isinstance(cause, httpx.HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__  # an upload's thread says first which file it was
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    kind, cure = {
        401: (PermissionError, "the token is not valid, or no longer: run `hf auth login`, or give another token="),
        403: (
            PermissionError,
            "the token may not write there: it needs the write role, and you need to belong to that namespace",
        ),
        404: (
            FileNotFoundError,
            "there is no such namespace, repository or branch, or the token may not see it: check the names",
        ),
        409: (OSError, "somebody else changed the repository at the same time: push again"),
        412: (OSError, "somebody else changed the repository at the same time: push again"),
        429: (ConnectionError, "too many requests: wait a while, then push again"),
    }.get(status, (OSError, "see what it says"))
    if status is None or status >= 500:
        kind, cure = ConnectionError, "the hub cannot be reached or has failed: push again later"
    said = (isinstance(cause, HfHubHTTPError) and cause.server_message) or " ".join(str(cause).split())
    answer = f"HTTP status {status}" if status else type(cause).__name__
    return kind(f"The push to {repo_id} did not succeed: {cure}. Nothing on this side is lost. ({answer}: {said})")
