"""Models that are sparse before the training begins."""

import pytest
import torch
from conftest import tiny_llama, trainer_for, weights

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import match_parameters


def sparse_llama(sparsity):
    model = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for param in match_parameters(model).values():
            param.view(-1)[torch.randperm(param.numel())[: round(sparsity * param.numel())]] = 0.0
    return model


@pytest.mark.parametrize(
    ("sparsity", "config"),
    [(0.5, {"target_sparsity": 0.7}), (0.5, {"target_sparsity": 0.5}), (0.7, {"pattern": "2:4"})],
    ids=["50 to 70", "50 to 50", "2:4 of 70"],
)
def test_every_old_zero_stays(tmp_path, sparsity, config):
    model = sparse_llama(sparsity)
    before, names = weights(model), match_parameters(model)
    config = LpDecayConfig(calibration_batches=2, **config)
    trainer_for(tmp_path, config, model=model).train()
    assert all((param[before[name] == 0] == 0).all() for name, param in names.items())
    if config.pattern == "2:4":
        assert measure_sparsity(model).sparsity >= sparsity - 1e-3
        assert all(((param.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all() for param in names.values())
    else:
        assert measure_sparsity(model).sparsity == pytest.approx(config.target_sparsity, abs=1e-4)


@pytest.mark.parametrize("importance", ["activation", "fisher", "adam"])
def test_zeros_come_before_the_weights_of_features_that_are_never_used(tmp_path, importance):
    model = sparse_llama(0.5)
    layer = model.model.layers[1].mlp
    with torch.no_grad():
        layer.up_proj.weight.copy_(torch.randn(64, 32))
        layer.up_proj.weight[::2] = 0.0  # every other input of down_proj is dead
        layer.down_proj.weight.fill_(1.0)
        layer.down_proj.weight[:16, ::2] = 0.0
        layer.down_proj.weight[16:, 1::2] = 0.0  # the other half of it, behind dead inputs, is not zero
    config = LpDecayConfig(target_sparsity=0.6, scope="layer", importance=importance)
    trainer_for(tmp_path, config, model=model).train()
    for param in match_parameters(model).values():
        assert int((param == 0).sum()) == round(0.6 * param.numel())


def test_a_target_below_what_is_there_is_an_error_unless_the_zeros_are_frozen(tmp_path):
    with pytest.raises(ValueError, match=r"target_sparsity=0.5 is below the 70.0\d% zeros"):
        trainer_for(tmp_path, LpDecayConfig(target_sparsity=0.5), model=sparse_llama(0.7)).train()
    model = sparse_llama(0.7)
    trainer_for(tmp_path, LpDecayConfig(target_sparsity=0.5, freeze_zeros=True), model=model).train()
    assert measure_sparsity(model).sparsity == pytest.approx(0.7, abs=1e-3)
