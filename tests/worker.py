"""What one of several processes does that train a tiny model on the CPU: see processes.py and test_processes.py."""

import functools
import json
import os
import signal

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import frozen_llama, same_bits, tiny_llama, tiny_mixtral, trainer_for, weights
from test_callback import plain as plain_trainer
from transformers import Trainer, TrainerCallback

from hf_lpdecay import LpDecayConfig, LpDecayTrainer, mask_lora


class CpuFsdp2Mixin:
    """Accelerate makes DDP of FSDP on a CPU, without a word; this insists."""

    state_dict_type: str | None = None
    block: str = "LlamaDecoderLayer"

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[self.block],
            state_dict_type=self.state_dict_type,
        )
        if self.args.bf16:  # as accelerate does it: a MixedPrecisionPolicy with param_dtype=bfloat16
            plugin.set_mixed_precision("bf16")
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        self.is_fsdp_enabled = True


class CpuFsdp2Trainer(CpuFsdp2Mixin, LpDecayTrainer):
    pass


class PlainCpuFsdp2Trainer(CpuFsdp2Mixin, Trainer):
    state_dict_type = "FULL_STATE_DICT"


class Kill(TrainerCallback):
    """As the kernel does it when memory runs out: one process, without a word."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_class(state_dict_type: str | None, block: str) -> type[LpDecayTrainer]:
    """The trainer of shards, if it is said how they are saved."""
    CpuFsdp2Trainer.state_dict_type, CpuFsdp2Trainer.block = state_dict_type, block
    return CpuFsdp2Trainer if state_dict_type else LpDecayTrainer


def train_experts(folder: str, configs: dict[str, dict], state_dict_type: str | None) -> None:
    """Train a tiny Mixtral with each config, and save it."""
    cls = trainer_class(state_dict_type, "MixtralDecoderLayer")
    for name, config in configs.items():
        trainer = trainer_for(
            os.path.join(folder, name),
            LpDecayConfig(**config),
            trainer_cls=cls,
            model=tiny_mixtral(),
            per_device_train_batch_size=2,
        )
        trainer.train()
        trainer.save_model()


def train_frozen_base(
    folder: str, config: dict, dtype: str, resume: str | None = None, state_dict_type: str | None = None, **options
) -> None:
    """Make the frozen base of a tiny Llama sparse, and save what each process has in the end."""
    trainer = trainer_for(
        folder,
        LpDecayConfig(**config),
        trainer_cls=trainer_class(state_dict_type, "LlamaDecoderLayer"),
        model=frozen_llama(getattr(torch, dtype)),
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    torch.save(trainer.model.state_dict(), os.path.join(folder, f"rank-{trainer.args.process_index}.pt"))


def train_masked_lora(folder: str, how: str, **options) -> None:
    """Train masked LoRA with a plain `Trainer`, and save the adapter."""
    if how == "ZeRO":
        no_shared_memory()
    cls = PlainCpuFsdp2Trainer if how == "FSDP2" else Trainer
    trainer = trainer_for(folder, trainer_cls=cls, model=masked_llama(), learning_rate=1e-2, **options)
    trainer.train()
    assert (type(next(trainer.model.parameters())).__name__ == "DTensor") == (how == "FSDP2")
    trainer.save_model()
    if trainer.is_world_process_zero():
        with open(os.path.join(folder, "losses.json"), "w") as file:
            json.dump([log["loss"] for log in trainer.state.log_history if "loss" in log], file)


def masked_llama():
    """Masked LoRA on a tiny Llama with half of its linear weights at zero."""
    model = frozen_llama(make=functools.partial(tiny_llama, attention_dropout=0.0), lora_alpha=32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "base_layer" in name:
                param.masked_fill_(param.abs() < param.abs().median(), 0.0)
    return mask_lora(model)


def no_shared_memory() -> None:
    """Keep DeepSpeed from what it would compile at its first use, for a minute, to spare gloo within one machine."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def resume_everywhere(folder: str, kind: str, steps: list[int], **options) -> None:
    """Train with a checkpoint at every step, go on from some of them, and check that each ends in the same bits."""
    config = LpDecayConfig(
        target_sparsity=0.5, scope="layer", num_plans=2, importance="fisher" if kind == "frozen" else "activation"
    )
    options |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}

    def end(name: str, resume: str | None) -> dict[str, torch.Tensor]:
        model = {"frozen": frozen_llama, "experts": tiny_mixtral}.get(kind, tiny_llama)()
        make = plain_trainer if kind == "plain" else trainer_for
        trainer = make(os.path.join(folder, name), config, model=model, **options)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole = end("whole", None)
    for step in steps:
        assert same_bits(whole, end(f"from-{step}", os.path.join(folder, "whole", f"checkpoint-{step}"))), step


def train(
    folder: str,
    config: dict,
    resume: bool | str | None = None,
    kill_at: int | None = None,
    state_dict_type: str | None = None,
    model: dict | None = None,
    **options,
) -> None:
    """Train a tiny Llama, save it, and write what was logged to result.json."""
    if "deepspeed" in options:
        no_shared_memory()
    trainer = trainer_for(
        folder,
        LpDecayConfig(**config),
        trainer_cls=trainer_class(state_dict_type, "LlamaDecoderLayer"),
        model=tiny_llama(tie_word_embeddings=False, attention_dropout=0.0, **(model or {})),
        callbacks=None if kill_at is None else [Kill(kill_at)],
        per_device_train_batch_size=2,
        **options,
    )
    computed_in = set()
    projection = trainer.model.model.layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda module, args: computed_in.add(str(module.weight.dtype)))
    trainer.train(resume_from_checkpoint=resume)
    sharded = type(next(trainer.model.parameters())).__name__
    trainer.save_model()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump({"parameters": sharded, "computed_in": sorted(computed_in), "logs": logs}, file)


def abort_once(flag: str) -> None:
    """Abort in the second process, as gloo's threads do it, unless the file is there that this writes."""
    if os.environ["RANK"] == "1" and not os.path.exists(flag):
        open(flag, "w").close()
        os.abort()
