"""One of several processes that train a tiny Llama on the CPU; see test_processes.py.

torchrun --standalone --nproc_per_node 2 tests/worker.py '{"output_dir": "out", ...}'
"""

import json
import os
import signal
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import frozen_llama, tiny_llama, tiny_mixtral, trainer_for
from transformers import TrainerCallback

from hf_lpdecay import LpDecayConfig, LpDecayTrainer


class CpuFsdp2Trainer(LpDecayTrainer):
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


class Kill(TrainerCallback):
    """As the kernel does it when memory runs out: one process, without a word."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_experts(folder: str, configs: dict[str, dict], state_dict_type: str | None) -> None:
    """Train a tiny Mixtral with each config, and save it."""
    CpuFsdp2Trainer.state_dict_type, CpuFsdp2Trainer.block = state_dict_type, "MixtralDecoderLayer"
    for name, config in configs.items():
        trainer = trainer_for(
            os.path.join(folder, name),
            LpDecayConfig(**config),
            trainer_cls=CpuFsdp2Trainer if state_dict_type else LpDecayTrainer,
            model=tiny_mixtral(),
            per_device_train_batch_size=2,
        )
        trainer.train()
        trainer.save_model()


def train_frozen_base(folder: str, config: dict, dtype: str, resume: str | None, options: dict) -> None:
    """Make the frozen base of a tiny Llama sparse, and save what each process has in the end."""
    model = frozen_llama(getattr(torch, dtype))
    trainer = trainer_for(folder, LpDecayConfig(**config), model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    torch.save(trainer.model.state_dict(), os.path.join(folder, f"rank-{trainer.args.process_index}.pt"))


def main(options: dict) -> None:
    torch.set_num_threads(1)
    if "frozen_base" in options:
        dtype, config, folder = (options.pop(name) for name in ("frozen_base", "lp_config", "output_dir"))
        train_frozen_base(folder, config, dtype, options.pop("resume", None), options)
        finish()
    if "experts" in options:
        train_experts(options["output_dir"], options["experts"], options.get("state_dict_type"))
        finish()
    if "deepspeed" in options:
        import deepspeed

        # It would be compiled at its first use, for a minute, and spares gloo within one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = LpDecayConfig(**options.pop("lp_config"))
    CpuFsdp2Trainer.state_dict_type = options.pop("state_dict_type", None)
    trainer_cls = CpuFsdp2Trainer if CpuFsdp2Trainer.state_dict_type else LpDecayTrainer
    folder, resume = options.pop("output_dir"), options.pop("resume", None)
    callbacks = [Kill(options.pop("kill_at"))] if "kill_at" in options else None
    model = tiny_llama(tie_word_embeddings=False, attention_dropout=0.0, **options.pop("model", {}))
    trainer = trainer_for(folder, config, trainer_cls=trainer_cls, model=model, callbacks=callbacks, **options)
    computed_in = set()
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda module, args: computed_in.add(str(module.weight.dtype)))
    trainer.train(resume_from_checkpoint=resume)
    sharded = type(next(trainer.model.parameters())).__name__
    trainer.save_model()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump({"parameters": sharded, "computed_in": sorted(computed_in), "logs": logs}, file)
    finish()


def finish() -> None:
    """End all processes at once."""
    torch.distributed.barrier()
    # On a busy machine gloo's threads now and then outlive what they belong to, and abort a process that is done.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
