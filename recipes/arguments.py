"""Arguments of a recipe: a YAML file with flat keys, and flags on the command line that win over it."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import HfArgumentParser

from hf_lpdecay import LpDecayConfig


@dataclasses.dataclass
class AdapterArguments:
    """Adapters in place of all weights, as TRL's `ModelConfig` names them. The base is frozen: with a target it becomes
    sparse while masked adapters learn, with `freeze_zeros` it is sparse already."""

    use_peft: bool = dataclasses.field(default=False, metadata={"help": "Train a masked LoRA on a frozen base."})
    lora_r: int = dataclasses.field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout in front of them."})
    lora_target_modules: list[str] = dataclasses.field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that are adapted."}
    )

    def lora_config(self, task_type: str) -> LoraConfig:
        """PEFT's config of these adapters, for a task as PEFT names it."""
        modules = self.lora_target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if list(modules) == ["all-linear"] else modules,
            task_type=task_type,
        )


def parse_recipe(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    defaults: dict[str, Any],
    description: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Parse the command line and the YAML file that `--config` names.

    Args:
        dataclass_types (`Sequence[type]`): What to fill; the first must have a `config` field.
        argv (`Sequence[str]`): The command line, without the program's name.
        defaults (`dict[str, Any]`): Values that hold where neither the file nor the command line says otherwise.
        description (`str`): For `--help`.

    Returns:
        `tuple[tuple, dict[str, Any]]`: The filled dataclasses, and what file and command line said in so many words.

    Raises:
        ValueError: If an option is not known, or a dataclass refuses its value.
        FileNotFoundError: If the YAML file is missing.
    """
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        usage="%(prog)s [--config FILE] [--<option> VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    if LpDecayConfig in dataclass_types:  # HfArgumentParser forgets the default of a field that may be a list
        parser.set_defaults(target_modules=LpDecayConfig.target_modules)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    given = _given(parser, argv)
    options = {field.name for dtype in dataclass_types for field in dataclasses.fields(dtype) if field.init}
    file = _read_yaml(Path(given.get("config", parser.get_default("config"))), options)
    # The two exclude each other, so that a flag for one of them replaces the file's other one.
    for option, other in (("lp_lambda", "target_sparsity"), ("target_sparsity", "lp_lambda")):
        if option in given and other not in given:
            file.pop(other, None)
    parser.set_defaults(**file)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        name = unknown[0].split("=")[0]
        raise ValueError(f"{name} is not an option.{_nearest(name.lstrip('-').replace('-', '_'), options, '--')}")
    return tuple(parsed), {**file, **given}


def _given(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What the command line says, without defaults."""
    before = [(action, action.default) for action in parser._actions]
    defaults, parser._defaults = parser._defaults, {}
    for action, _ in before:
        action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_known_args(argv)[0])
    finally:
        parser._defaults = defaults
        for action, default in before:
            action.default = default


def _read_yaml(path: Path, options: set[str]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r}: there is no such file. Give --config the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but should hold flat 'option: value' lines.")
    if "activation_checkpointing" not in options and "activation_checkpointing" in content:
        # as TrainingArguments spells it in older versions of transformers
        content["gradient_checkpointing"] = content.pop("activation_checkpointing")
    for key in content:
        if key not in options:
            raise ValueError(f"{path}: {key!r} is not an option.{_nearest(str(key), options, '')}")
    return content


def _nearest(name: str, options: set[str], prefix: str) -> str:
    near = difflib.get_close_matches(name, sorted(options), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else " --help lists them all."
