"""The memory table, against what a run really holds."""

import memory
import torch
from conftest import frozen_llama, tiny_llama, trainer_for
from transformers import TrainerCallback

from hf_lpdecay import LpDecayConfig


class Hold(TrainerCallback):
    """Looks for the numbers that are held at the end of each step."""

    def __init__(self, trainer):
        self.trainer, self.hessians, self.moments = trainer, 0, 0

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        grams = {id(own["lp_gram"]): own["lp_gram"] for own in self.trainer._frozen.state.values() if "lp_gram" in own}
        self.hessians = max(self.hessians, sum(gram.numel() for gram in grams.values()))
        states = [own for own in optimizer.state.values() if "exp_avg" in own]
        self.moments = sum(own[name].numel() for own in states for name in ("exp_avg", "exp_avg_sq"))


def test_the_table_counts_what_a_run_holds(tmp_path):
    model = frozen_llama(torch.bfloat16)
    trainer = trainer_for(tmp_path, LpDecayConfig(target_sparsity=0.5, scope="layer"), model=model)
    hold = Hold(trainer)
    trainer.add_callback(hold)
    trainer.train()
    config = tiny_llama().config
    found = memory.memory(config, lora_r=4)
    frozen = found["frozen base made sparse"]
    assert frozen["Hessians"] == 4 * hold.hessians > 0 and frozen["moments"] == 4 * hold.moments
    assert frozen["weights"] == sum(param.numel() * param.element_size() for param in model.parameters())
    assert frozen["gradients"] == 4 * sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert found["full fine-tuning"]["moments"] == 4 * found["full fine-tuning"]["weights"]


def test_the_recipe_prints_markdown(capsys):
    assert memory.main([]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert [row[1].strip() for row in rows[2:]] == list(memory.memory(tiny_llama().config, 4))
    assert memory.main(["--model_name_or_path", "nowhere"]) == 2
