"""One ranking for all experts of a tensor, or one for each expert: which leaves the better mixture of experts?

python recipes/expert_quantiles.py --train_file shakespeare.txt --seeds 0 1 2

A small Mixtral learns a text's characters from scratch and is cut to its target on the way (`scope="layer"`,
`hard_cut=True`), with the weights of all experts of a 3-D parameter ranked together, as the package does it, and with
each expert's ranked for themselves, so that all are equally sparse.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import compare
import reproduce_paper
import torch
from arguments import parse_recipe
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments, get_scheduler, set_seed

from hf_lpdecay import LpAdamW, LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import SparsityController, SparsityDriver, participants


@dataclass
class QuantileArguments(reproduce_paper.PaperArguments):
    """What is compared."""

    num_experts: int = field(default=8, metadata={"help": "Experts of a layer, of which a token gets two."})
    targets: list[float] = field(default_factory=lambda: [0.5, 0.8], metadata={"help": "Target sparsities."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds to repeat everything with."})
    results_file: str = field(default="outputs/expert_quantiles.json", metadata={"help": "JSON file to write."})


class PerExpert(SparsityController):
    """Cuts equally many weights of each expert."""

    def _smallest(self, pool: list[Tensor], count: int) -> Iterator[Tensor]:
        (param,) = pool
        if param.dim() != 3:
            yield from super()._smallest(pool, count)
            return
        score = self._score(param).flatten(1)
        smallest = score.topk(count // len(score), dim=1, largest=False).indices
        yield torch.zeros_like(score, dtype=torch.bool).scatter_(1, smallest, True).view(param.shape)


METHODS = {"one ranking per tensor": SparsityController, "one per expert": PerExpert}


def main(argv: list[str]) -> int:
    try:
        (script, args), given = parse_recipe((QuantileArguments, TrainingArguments), argv, {"use_cpu": True}, __doc__)
        configs = [LpDecayConfig(target_sparsity=t, scope="layer", hard_cut=True) for t in script.targets]
    except (ValueError, OSError) as error:
        print(f"expert_quantiles.py: error: {error}", file=sys.stderr)
        return 2
    data = reproduce_paper.load_characters(script)
    runs: list[dict] = []
    for config in configs:
        for name, make_controller in METHODS.items():
            for seed in script.seeds:
                found = run(script, args, data, config, make_controller, seed)
                runs.append({"method": f"{name}, {config.target_sparsity:g}", "seed": seed, **found})
                compare.record(runs, given, script.results_file)
    print(f"\n{compare.table(runs)}\n\nwritten to {script.results_file}")
    return 0


def run(script, args, data, config: LpDecayConfig, make_controller, seed: int) -> dict[str, float]:
    """Train one model; the loss is that of the validation text."""
    train, validation, vocab_size = data
    set_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocab_size,
            hidden_size=script.n_embd,
            intermediate_size=script.n_embd,
            num_hidden_layers=script.n_layer,
            num_attention_heads=script.n_head,
            num_key_value_heads=script.n_head,
            num_local_experts=script.num_experts,
            max_position_embeddings=script.block_size,
        )
    )
    params = participants(model, config)
    optimizer = LpAdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, args.adam_beta2))
    steps, warmup = args.max_steps, int(args.warmup_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)
    driver = SparsityDriver(config, model, params, optimizer, steps, warmup, make_controller=make_controller)

    def rates(first: int, last: int) -> list[list[float]]:  # a cut does not ask for more
        return [[scheduler.get_last_lr()[0]] * (last - first)]

    batches = iter(DataLoader(train, args.per_device_train_batch_size, shuffle=True))
    started = time.monotonic()
    driver.start(rates)
    model.train()
    for step in tqdm(range(1, steps + 1), desc="Training", leave=False):
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        driver.before_step()
        optimizer.step()
        scheduler.step()
        driver.after_step(step, rates)
        optimizer.zero_grad()
    driver.finish()
    seconds = time.monotonic() - started
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss for batch in DataLoader(validation, args.per_device_eval_batch_size)]
    return {
        "loss": torch.stack(losses).mean().item(),
        "sparsity": measure_sparsity(model).sparsity,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
