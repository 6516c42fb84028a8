"""What is checked before a run begins, so that nothing is trained in vain."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object

from ..config import LpDecayConfig
from ..optim import LpAdamW, LpDecay
from .zero import check_zero


def check_ranks(config: LpDecayConfig) -> None:
    """Every process must have the same config, or they would make different weights zero."""
    first, *others = gather_object([asdict(config)])
    for rank, other in enumerate(others, start=1):
        changed = differences(other, first, "rank 0:")
        if changed:
            raise ValueError(f"Rank {rank} has an LpDecayConfig with {changed}: give every process the same one.")


def check_optimizer(optimizer: torch.optim.Optimizer, config: LpDecayConfig) -> torch.optim.Optimizer:
    """Raise where the decay cannot act on what the `Trainer` steps; returns the optimizer itself, without wrappers."""
    check_sharding(AcceleratorState(), config)
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        inner = inner.optimizer
    cure = "give the Trainer optimizer_cls_and_kwargs=(LpAdamW, {'lr': ...}), or use LpDecayTrainer"
    check_stepped(inner, "SparsityCallback", cure)
    return inner


def check_alone(config: LpDecayConfig, driver: str) -> None:
    """Raise where the config asks for what only a trainer can do, which computes the loss and makes the optimizer."""
    if config.distill:
        raise ValueError(
            f"distill={config.distill!r} needs the loss, which a {driver} does not see: use LpDecayTrainer, or leave"
            " distill out and add the teacher's loss to yours."
        )
    if config.embedding_learning_rate is not None:
        raise ValueError(
            f"embedding_learning_rate={config.embedding_learning_rate} needs groups that a {driver} does not make: use"
            " LpDecayTrainer, or leave it out and give the optimizer a group with that lr."
        )


def check_stepped(optimizer: torch.optim.Optimizer, driver: str, cure: str) -> None:
    """Raise where an optimizer has no p-norm decay to drive."""
    if not isinstance(optimizer, (LpAdamW, LpDecay)):
        raise ValueError(f"{driver} drives an LpAdamW, but got a {type(optimizer).__name__}: {cure}.")


def check_sharding(state: AcceleratorState, config: LpDecayConfig, deepspeed: bool = True) -> None:
    """Raise where a process holds parts of the model that the decay cannot work on; `deepspeed` says whether ZeRO is
    possible at all."""
    kind, plugin = state.distributed_type, getattr(state, "fsdp_plugin", None)
    if plugin is not None and kind != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate has set up {kind.value}, as it does without a GPU: leave fsdp out."
        )
    if kind == DistributedType.DEEPSPEED and not deepspeed:
        raise ValueError("A Sparsifier does not support DeepSpeed: use LpDecayTrainer, or FSDP2.")
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP) and config.average_weights:
        raise ValueError(
            f"average_weights={config.average_weights} needs whole weights in each process, not parts as under"
            f" {kind.value}: train with DDP, or leave it out."
        )
    if kind == DistributedType.DEEPSPEED:
        check_zero(state.deepspeed_plugin, config)
    fsdp1 = kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) != 2
    if fsdp1 or kind == DistributedType.MEGATRON_LM:
        name = "FSDP1" if fsdp1 else kind.value
        raise ValueError(
            f"hf_lpdecay does not support {name}, whose flat pieces of parameters have no rows and columns: use FSDP2"
            " (fsdp_version: 2), or DDP."
        )


def check_same_config(saved: dict[str, Any], config: LpDecayConfig) -> None:
    """Raise where a checkpoint was trained with another config than the run that resumes it."""
    changed = differences(saved, asdict(config), "now")
    if changed:
        raise ValueError(
            f"This checkpoint was trained with {changed}. Resume with the same LpDecayConfig, or start a new run in"
            " another output_dir."
        )


def differences(config: dict[str, Any], other: dict[str, Any], what: str) -> str:
    """How one config differs from another, in words; empty if it does not."""
    names = [name for name in other if config.get(name, other[name]) != other[name]]
    return ", ".join(f"{name}={config[name]!r} ({what} {other[name]!r})" for name in names)
