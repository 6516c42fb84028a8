"""Parts of gpu_check.py: trainings, and what comes of them."""

import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare
import finetune
import reproduce_paper
import torch
from arguments import parse_recipe
from benchmark_optimizer import DEVICE
from gpu_support import TESTS, Check, LeftOut, answer_of, free, gigabytes
from transformers import TrainerCallback, TrainingArguments

from hf_lpdecay import LpDecayConfig, LpDecayTrainer


HERE = Path(__file__).parent


def processes(check: Check) -> dict[str, Any]:
    """DDP and FSDP2 in one process, over NCCL on a GPU: the zeros and the loss of the plain run."""
    runs = {kind: check.call(kind, _train_small, kind) for kind in ("plain", "ddp", "fsdp2")}
    rows = []
    for kind, run in runs.items():
        near = max(abs(a - b) for a, b in zip(run["losses"], runs["plain"]["losses"], strict=True))
        run["loss_difference"] = near
        rows.append((f"{kind} ({run['backend']})", f"{run['zeros']:,} zeros, loss within {near:.1e} of the plain run"))
    result = {"rows": rows, "runs": runs}
    check.record(result)
    wrong = [
        kind for kind, run in runs.items() if run["loss_difference"] > 1e-3 or run["zeros"] != runs["plain"]["zeros"]
    ]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)}: not the zeros or the loss of the plain run")
    return result


def _train_small(check: Check, kind: str) -> dict[str, Any]:
    """Train the tests' tiny Llama for 20 steps."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0" if DEVICE == "cuda" else "")
    sys.path.insert(0, str(TESTS))
    import worker
    from conftest import tiny_llama, trainer_for

    if kind != "plain":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer_cls = LpDecayTrainer
    if kind == "fsdp2" and DEVICE == "cpu":  # where accelerate would make DDP of it
        trainer_cls, worker.CpuFsdp2Trainer.state_dict_type = worker.CpuFsdp2Trainer, "FULL_STATE_DICT"
    elif kind == "fsdp2":  # what `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    trainer = trainer_for(
        check.output_dir / f"processes-{kind}",
        LpDecayConfig(p=0.5, target_sparsity=0.5, ramp_end=0.8, num_plans=4),
        trainer_cls=trainer_cls,
        model=tiny_llama(tie_word_embeddings=False, attention_dropout=0.0),
        max_steps=20,
        use_cpu=DEVICE == "cpu",
    )
    trainer.train()
    params = [param.to_local() if hasattr(param, "to_local") else param for param in trainer.model.parameters()]
    sharded = type(next(trainer.model.parameters())).__name__
    if (sharded == "DTensor") != (kind == "fsdp2"):
        raise RuntimeError(f"{kind}: the parameters are of the class {sharded}")
    distributed = torch.distributed.is_initialized()
    if distributed != (kind != "plain"):
        raise RuntimeError(f"{kind}: no process group was made")
    return {
        "backend": torch.distributed.get_backend() if distributed else "no process group",
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "zeros": sum(int((param == 0).sum()) for param in params),
    }


# Norm and strength, the most telling first.
PAPER_POINTS = [(None, 0.0), (0.8, 0.1), (0.5, 0.01), (0.8, 0.03), (0.5, 0.003), (0.8, 0.01), (0.5, 0.03)]


def paper(check: Check) -> dict[str, Any]:
    """Points of the paper's experiment, several at a time: the small model leaves most of a GPU idle."""
    if check.rehearse and not check.paper_file:  # written once, before several processes read it
        check = replace(check, paper_file=_toy_texts(check)[1])
    waiting, running = list(check.pick(PAPER_POINTS, PAPER_POINTS[:2])), {}
    result: dict[str, Any] = {"rows": [], "points": [], "workers": check.paper_workers}
    while waiting or running:
        while waiting and len(running) < check.paper_workers:
            p, strength = waiting.pop(0)
            name = "adamw" if p is None else f"p{p:g}-lambda{strength:g}"
            running[name] = check.start(name, _paper_point, name, p, strength)
        time.sleep(0.1)
        for name in [name for name, (process, _) in running.items() if not process.is_alive()]:
            point = answer_of(name, *running.pop(name))
            result["points"].append(point)
            title = "AdamW" if point["p"] is None else f"p = {point['p']:g}, lambda = {point['lp_lambda']:g}"
            text = f"validation loss {point['loss']:.4f} (best {point['best_loss']:.4f}), {point['sparsity']:.2%} zeros"
            result["rows"].append((f"{title}, {point['steps']:,} steps", text))
            check.record(result)
    return result


class Progress(TrainerCallback):
    """Each evaluation in a JSON Lines file, for runs that the time limit ends."""

    def __init__(self, path: Path):
        self.path = path
        path.unlink(missing_ok=True)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **metrics}) + "\n")


def _paper_point(check: Check, name: str, p: float | None, lp_lambda: float) -> dict[str, Any]:
    argv = ["--config", str(HERE / "configs" / "paper" / "full.yaml")]
    argv += ["--output_dir", str(check.output_dir / f"paper-{name}"), "--bf16", "true"]
    argv += ["--train_file", check.paper_file] if check.paper_file else []
    argv += ["--max_steps", str(check.paper_steps)] if check.paper_steps else []
    if check.rehearse:
        argv += ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--max_steps", "4"]
        argv += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4096"]
    types = (reproduce_paper.PaperArguments, TrainingArguments)
    (script, args), _ = parse_recipe(types, argv, {"use_cpu": DEVICE == "cpu"}, __doc__)
    train, validation, vocab_size = reproduce_paper.load_characters(script)
    progress = Progress(check.output_dir / f"paper-{name}.jsonl")
    if check.rehearse:
        validation.tokens = validation.tokens[:1000]
    lp_config = LpDecayConfig(p=p or 0.8, lp_lambda=lp_lambda)
    point = reproduce_paper.run(script, args, train, validation, vocab_size, lp_config, [progress])
    return {"p": p, "lp_lambda": lp_lambda, **point}


def train(check: Check) -> dict[str, Any]:
    """Dense fine-tuning, the decay and the hard cut on a real model, with the code of compare.py."""
    model = check.model
    if model is None and not check.rehearse:
        raise LeftOut("no --model was given")
    argv = ["--output_dir", str(check.output_dir / "train-run"), "--save_strategy", "no", "--disable_tqdm", "true"]
    argv += ["--max_steps", check.pick("500", "24"), "--per_device_train_batch_size", check.pick("8", "2")]
    argv += ["--logging_strategy", "no", "--per_device_eval_batch_size", "16"]
    argv += ["--num_plans", check.pick("20", "3"), "--warmup_steps", check.pick("20", "2")]
    if check.train_file:
        argv += ["--train_file", check.train_file, "--validation_file", check.validation_file]
    if check.rehearse:
        model = model or _toy_model(check)
        argv += ["--block_size", "32", "--max_train_samples", "64", "--max_eval_samples", "4"]
        argv += [] if check.train_file else _toy_texts(check)
    argv += ["--max_eval_samples", "64"] if not check.rehearse else []
    script, lp_config, args, _ = finetune.parse(
        [*argv, "--model_name_or_path", model], compare.CompareArguments, compare.__doc__
    )
    task = finetune.load_task(script)
    result: dict[str, Any] = {"rows": [], "runs": [], "options": argv}
    for method, target in (
        ("dense", None),
        ("lp", 0.7),
        ("gmp-compensate", 0.7),
        ("lp", 0.5),
        ("gmp-compensate", 0.5),
    ):
        free()
        config = replace(lp_config, target_sparsity=target or 0.5)
        run = {"method": method, **compare.run(script, config, args, task, method, 0), "peak_gb": gigabytes()}
        result["runs"].append(run)
        name = {"dense": "dense fine-tuning", "lp": "decay", "gmp-compensate": "hard cut"}[method]
        name += f" to {target:.0%}" if target else ""
        text = f"perplexity {run['perplexity']:.2f} (before: {run['before']:.2f}), {run['sparsity']:.2%} zeros"
        result["rows"].append((f"{name}, {args.max_steps} steps, seed 0", f"{text}, {run['seconds']:.0f} s"))
        check.record(result)
    return result


def _toy_model(check: Check) -> str:
    sys.path.insert(0, str(TESTS))
    from pydoc_data.topics import topics

    from conftest import save_language_model

    folder = check.output_dir / "train-model"
    folder.mkdir(exist_ok=True)
    return str(save_language_model(folder, list(topics.values())[:20]))


def _toy_texts(check: Check) -> list[str]:
    from pydoc_data.topics import topics

    files = {name: check.output_dir / f"{check.part}-{name}.txt" for name in ("train_file", "validation_file")}
    texts = list(topics.values())
    files["train_file"].write_text("".join(texts[:20]), encoding="utf-8")
    files["validation_file"].write_text("".join(texts[20:24]), encoding="utf-8")
    return [word for name, path in files.items() for word in (f"--{name}", str(path))]
