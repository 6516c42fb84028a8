"""`importance="fisher"`: the importance of weights that have neither a gradient nor a second moment."""

import dataclasses
import functools
import warnings

import pytest
import torch
from conftest import frozen_llama, tiny_gpt2, tiny_llama, tiny_mixtral, trainer_for, weights

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import input_dims
from hf_lpdecay.sparsity.activations import ActivationStatistics
from hf_lpdecay.sparsity.importance import importance_from_activations
from hf_lpdecay.sparsity.selection import match_parameters


llama = functools.partial(tiny_llama, attention_dropout=0.0)
CONFIG = LpDecayConfig(target_sparsity=0.5, importance="fisher", num_plans=3)


class State:
    """Where an optimizer keeps what is collected."""

    def __init__(self, params):
        self.state = {param: {} for param in params}


def factors(model, ids, scale=1.0):
    """The importance by name, from the logits of one batch of texts."""
    params = match_parameters(model, "all-linear", None)
    dims = {param: input_dims(model).get(name, 1) for name, param in params.items()}
    holder = State(params.values())
    statistics = ActivationStatistics(model, list(dims), holder, gradients=True)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for times in (1.0, scale):
        (times * model(input_ids=ids).logits.square().sum()).backward()
    statistics.finish()
    importance_from_activations(dims, holder.state, together=True)
    states = {name: holder.state[param] for name, param in params.items()}
    return {name: state["lp_row"] * state["lp_col"] for name, state in states.items() if "lp_row" in state}


@pytest.mark.parametrize("make", [llama, tiny_gpt2])
def test_of_one_token_it_is_the_gradient_of_every_weight_of_every_layer(make):
    model, ids = make(), torch.tensor([[3]])
    found = factors(model, ids)
    gradients = {
        name: param.grad.abs()
        for name, param in match_parameters(model, "all-linear", None).items()
        if param.grad.any()
    }
    assert len(gradients) >= 6 and gradients.keys() == found.keys()  # one token has nothing to attend to
    constant = next(found[name].sum() / gradient.sum() for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient * constant, rtol=1e-3, atol=1e-5)


def test_layers_before_the_first_adapter_have_it_too():
    ids = torch.randint(3, 60, (4, 16))
    found = [
        factors(frozen_llama(make=llama, **some).get_base_model(), ids)
        for some in ({}, {"target_modules": r".*layers\.1\..*_proj"})
    ]
    assert len(found[0]) == len(found[1]) == 14
    for one, other in zip(*(each.values() for each in found)):
        torch.testing.assert_close(one, other)


def test_a_step_that_overflows_is_left_out():
    ids = torch.randint(3, 60, (4, 16))
    for one, other in zip(factors(llama(), ids, 0.0).values(), factors(llama(), ids, torch.inf).values()):
        torch.testing.assert_close(one, other)


def test_a_compiled_model_shows_the_same_gradients():
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 4))
        params = [model[0].weight, model[2].weight]
        holder = State(params)
        ActivationStatistics(model, params, holder, gradients=True)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(torch.randn(5, 8)).square().sum().backward()
        seen.append([holder.state[param]["lp_output_sq"] for param in params])
    for one, other in zip(*seen):
        torch.testing.assert_close(one, other)


def test_it_is_the_default_of_optimizers_without_a_second_moment_and_of_frozen_bases(tmp_path):
    config = LpDecayConfig(target_sparsity=0.5, num_plans=3)
    for model, options, expected in (
        (tiny_llama(), {"optim": "sgd"}, ("fisher", "global")),
        (tiny_mixtral(), {"optim": "sgd"}, ("activation", "layer")),
        (frozen_llama(), {}, ("fisher", "global")),
    ):
        found = trainer_for(tmp_path, config, model=model, **options).lp_config
        assert (found.importance, found.scope) == expected
    magnitude = LpDecayConfig(target_sparsity=0.5, importance="magnitude")
    assert trainer_for(tmp_path, magnitude, model=frozen_llama()).lp_config.scope == "layer"
    semi_structured = trainer_for(tmp_path, LpDecayConfig(pattern="2:4"), model=frozen_llama()).lp_config
    assert (semi_structured.importance, semi_structured.scope) == ("activation", "layer")


def sparse_at_the_end(folder, config=CONFIG, prepare=lambda model: None, **options):
    model = frozen_llama(make=llama)
    prepare(model)
    trainer = trainer_for(folder, config, model=model, **options)
    trainer.train()
    merged = trainer.merge_adapters()
    assert measure_sparsity(merged).sparsity == pytest.approx(0.5, abs=1e-4)
    return weights(merged)


def test_activation_checkpointing_changes_nothing_and_bf16_and_calibration_reach_the_target(tmp_path):
    def checkpointing(model, reentrant):
        with warnings.catch_warnings():  # of the newer name that the oldest supported version lacks
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    plain = sparse_at_the_end(tmp_path)
    for reentrant in (False, True):
        again = sparse_at_the_end(tmp_path, prepare=functools.partial(checkpointing, reentrant=reentrant))
        for name, weight in plain.items():
            torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-4)
    sparse_at_the_end(tmp_path, bf16=True)
    sparse_at_the_end(tmp_path, dataclasses.replace(CONFIG, calibration_batches=2))


def test_experts_do_not_show_their_gradients(tmp_path):
    with pytest.raises(ValueError, match=r"importance='fisher' needs .*experts.*importance='activation' with"):
        trainer_for(tmp_path, CONFIG, model=tiny_mixtral()).train()
