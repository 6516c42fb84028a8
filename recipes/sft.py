"""Supervised fine-tuning with TRL that makes the model sparse, by all weights or under a LoRA, or finds a LoRA's ranks.

    accelerate launch recipes/sft.py
    accelerate launch recipes/sft.py --config recipes/configs/smollm2-135m/lora-rank.yaml
    accelerate launch recipes/sft.py --config recipes/configs/smollm2-135m/sft-frozen-base.yaml

The options are TRL's own (SFTConfig and ModelConfig) and those of LpDecayConfig.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import finetune
from accelerate import PartialState
from arguments import parse_recipe
from data import BUILTIN, DataArguments, check_files, data_facts, head, load_texts
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pypi_models import license_of, resolve_model
from run_folder import claim_folder, finish, stopped
from stdlib_text import load_stdlib_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, get_peft_config

from hf_lpdecay import LpDecayConfig, measure_sparsity, trim_rank
from hf_lpdecay.sparsity.report import RECORD_FILE
from hf_lpdecay.training import FullDiskError, naming_a_full_disk, write_record
from hf_lpdecay.training.trl import LpDecaySFTTrainer


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "smollm2-135m" / "sft.yaml"


@dataclass
class SftArguments(DataArguments):
    """The data come as TRL takes them: in columns `messages`, or `prompt` and `completion`, or `text`. `stdlib` asks
    what the functions of Python's library do."""

    config: str = field(default=str(DEFAULT_CONFIG), metadata={"help": "YAML file; flags win over it."})


def main(argv: list[str]) -> int:
    try:
        script, lp_config, args, model_args, given = parse(argv)
        with PartialState().main_process_first():
            checkpoint = claim_folder(args.output_dir, given)
        trainer = make_trainer(script, lp_config, args, model_args)
    except (ValueError, OSError) as error:
        print(f"sft.py: error: {error}", file=sys.stderr)
        return 2
    try:
        before = results(trainer)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        found = {"before": before, "after": results(trainer)}
        if lp_config.pattern == "rank":
            trim_rank(trainer.model)
        if trainer.has_frozen_base:
            trainer.merge_adapters()
        with naming_a_full_disk(args.output_dir):
            trainer.save_model()
    except (KeyboardInterrupt, FullDiskError) as error:
        return stopped(error, args.output_dir)
    if trainer.is_world_process_zero():
        report(script, trainer, model_args, found)
    finish(trainer)
    return 0


def parse(argv: list[str]):
    """Parse and check everything that can be checked without a model."""
    (script, lp_config, args, model_args), given = parse_recipe(
        (SftArguments, LpDecayConfig, SFTConfig, ModelConfig), argv, finetune.device_defaults(), description=__doc__
    )
    check_files(script)
    if lp_config.pattern == "rank" and not model_args.use_peft:
        raise ValueError(
            "pattern='rank' finds the ranks of a LoRA: add --use_peft, --lora_r and --lora_target_modules."
        )
    if not model_args.model_name_or_path:
        raise ValueError("Which model? Say so with --model_name_or_path, or in the YAML file.")
    return script, lp_config, args, model_args, given


def make_trainer(script, lp_config: LpDecayConfig, args: SFTConfig, model_args: ModelConfig) -> LpDecaySFTTrainer:
    """Load the data and the model."""
    set_seed(args.seed)
    with PartialState().local_main_process_first():
        path = resolve_model(model_args.model_name_or_path)
        builtin = script.dataset_name == BUILTIN and not (script.train_file or script.validation_file)
        train, validation = load_stdlib_chats() if builtin else load_texts(script)
    return LpDecaySFTTrainer(
        # float32 weights under autocast: bfloat16 weights would lose small updates and most of the decay.
        AutoModelForCausalLM.from_pretrained(path, dtype=model_args.dtype),
        args=args,
        train_dataset=head(train, script.max_train_samples),
        eval_dataset=head(validation, script.max_eval_samples),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(model_args),
        lp_config=lp_config,
    )


def results(trainer: LpDecaySFTTrainer) -> dict[str, float]:
    """Loss and accuracy per token of the completions."""
    metrics = trainer.evaluate()
    return {"loss": metrics["eval_loss"], "mean_token_accuracy": metrics["eval_mean_token_accuracy"]}


def report(script, trainer: LpDecaySFTTrainer, model_args: ModelConfig, found: dict[str, dict[str, float]]) -> None:
    """Write sparsity.json, and say what came out."""
    folder, name = Path(trainer.args.output_dir), model_args.model_name_or_path
    facts = data_facts(script)
    dtype = "bfloat16 autocast" if trainer.args.bf16 else model_args.dtype
    facts["evaluated_on"] |= {"examples": len(trainer.eval_dataset), "dtype": dtype}
    if isinstance(trainer.model, PeftModel):
        sparsity = measure_sparsity(trainer.model)
        layers = {n: m for n, m in trainer.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        ranks = {n: m.r["default"] for n, m in layers.items()}
        sparsity.to_json(folder / RECORD_FILE, base_model=name, results=found, ranks=ranks, **facts)
        width = max(map(len, ranks))
        print("\n".join(f"{n:<{width}}  rank {rank}" for n, rank in ranks.items()))
        print(f"\n{sum(ranks.values())} ranks in {len(ranks)} layers, of {model_args.lora_r * len(ranks)}")
    else:
        sparsity = write_record(
            trainer, folder, base_model=name, license=license_of(name), task="causal-lm", results=found, **facts
        )
        print(f"\n{sparsity.table(by='module')}")
    for metric, value in found["before"].items():
        print(f"{metric}: {value:.4g} before, {found['after'][metric]:.4g} after")
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
