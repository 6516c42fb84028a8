"""Any optimizer of `TrainingArguments` in `LpDecayTrainer`."""

import pytest
import torch
from conftest import arguments, same_bits, tiny_llama, token_rows, trainer_for, weights
from transformers import Trainer

from hf_lpdecay import LpAdamW, LpDecay, LpDecayConfig, Sparsifier, SparsityCallback, measure_sparsity
from hf_lpdecay.sparsity.importance import second_moment


def config(**options):
    return LpDecayConfig(target_sparsity=0.5, num_plans=3, **options)


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "rmsprop", "adagrad", "adamw_bnb_8bit", "paged_adamw_32bit"])
def test_an_optimizer_of_the_arguments_trains_to_the_exact_target_and_resumes(tmp_path, optim):
    if "adamw" in optim:
        pytest.importorskip("bitsandbytes")
    options = {"optim": optim, "learning_rate": 1e-2, "max_steps": 24, "save_strategy": "steps", "save_steps": 8}
    trainer = trainer_for(tmp_path / "whole", config(), **options)
    assert trainer.lp_config.importance == ("fisher" if optim == "sgd" else "adam")
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LpDecay)
    zeros = sum(int((param == 0).sum()) for name, param in weights(trainer.model).items() if "_proj" in name)
    total = sum(param.numel() for name, param in weights(trainer.model).items() if "_proj" in name)
    assert zeros == round(0.5 * total)
    again = trainer_for(tmp_path / "whole", config(), model=tiny_llama(seed=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert same_bits(weights(trainer.model), weights(again.model))


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [("rmsprop", torch.bfloat16), ("sgd", torch.bfloat16), ("rmsprop", torch.float64), ("adamw_torch", torch.float64)],
)
def test_a_plan_keeps_its_dtype_whatever_that_of_the_weights(tmp_path, optim, dtype):
    options = {"optim": optim, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 12}
    trainer = trainer_for(tmp_path, config(), model=tiny_llama().to(dtype), **options)
    trainer.train()
    again = trainer_for(tmp_path, config(), model=tiny_llama(seed=1).to(dtype), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))  # in the ramp
    assert same_bits(weights(trainer.model), weights(again.model))


def test_layers_share_a_hessian_that_is_loaded():
    params = [torch.nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16)) for _ in range(2)]
    for optimizer in (LpAdamW(params), LpDecay(torch.optim.SGD(params, lr=0.1))):
        gram = torch.full((1, 4, 4), 1 / 3)
        for param in params:
            optimizer.state[param]["lp_gram"] = gram
        optimizer.load_state_dict(optimizer.state_dict())
        loaded = [optimizer.state[param]["lp_gram"] for param in params]
        assert loaded[0] is loaded[1] and torch.equal(loaded[0], gram) and loaded[0] is not gram


@pytest.mark.parametrize("inside", ["SGD", "Adam"])
def test_what_is_made_elsewhere_has_an_importance_that_it_can_give(tmp_path, inside):
    def make():
        torch.manual_seed(0)
        model = tiny_llama()
        return model, LpDecay(getattr(torch.optim, inside)(model.parameters(), lr=1e-2))

    expected = "fisher" if inside == "SGD" else "adam"
    assert Sparsifier(*make(), config(), 30).lp_config.importance == expected
    model, optimizer = make()
    callback = SparsityCallback(config())
    options = {"train_dataset": token_rows(), "callbacks": [callback], "optimizers": (optimizer, None)}
    Trainer(model, arguments(tmp_path), **options).train()
    assert callback.lp_config.importance == expected
    assert measure_sparsity(model).sparsity == 0.5


def test_the_second_moment_of_bitsandbytes_is_dequantized():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    param = torch.nn.Parameter(torch.randn(70, 130))  # the last block is cut off
    found = []
    for optimizer in (bitsandbytes.optim.AdamW8bit([param]), bitsandbytes.optim.AdamW([param]), LpAdamW([param])):
        param.grad = torch.linspace(-1, 1, param.numel()).view_as(param)
        optimizer.step()
        found.append(second_moment(optimizer.state[param]))
    assert torch.allclose(found[1], found[2], rtol=1e-5) and found[0].dtype == torch.float32
    assert torch.allclose(found[0], found[1], atol=0.02 * found[1].max().item())


def test_optim_args_reach_the_optimizer(tmp_path):
    trainer = trainer_for(tmp_path, config(), optim="sgd", optim_args="momentum=0.5")
    optimizer = trainer.create_optimizer()
    assert all(group["momentum"] == 0.5 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("optim", "reason"),
    [
        ("galore_adamw_layerwise", "it steps in the backward pass"),
        ("lomo", "it steps in the backward pass"),
        ("schedule_free_adamw", "it trains at points between two sets of weights"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(tmp_path, optim, reason):
    with pytest.raises(ValueError, match=f"optim='{optim}' has no p-norm decay: {reason}"):
        trainer_for(tmp_path, config(), optim=optim)
