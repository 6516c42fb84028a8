"""Where the Hessians of the compensation are held, and for how long."""

import pytest
from conftest import frozen_llama, same_bits, tiny_llama, trainer_for, weights

from hf_lpdecay import LpDecayConfig
from hf_lpdecay.sparsity import Compensation


@pytest.mark.parametrize("make", [tiny_llama, frozen_llama])
def test_hessians_on_the_cpu_change_no_bit_there(tmp_path, make):
    found = []
    for on_cpu in (False, True):
        config = LpDecayConfig(target_sparsity=0.5, scope="layer", hessians_on_cpu=on_cpu)
        trainer = trainer_for(tmp_path, config, model=make())
        trainer.train()
        found.append(weights(trainer.model))
    assert same_bits(*found)


def test_a_layers_hessian_is_freed_when_the_last_cut_is_done_with_it(tmp_path, monkeypatch):
    left, apply = [], Compensation.apply

    def count(self, *args, **kwargs):
        left.append(sum("lp_gram" in state for state in self._optimizer.state.values()))
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Compensation, "apply", count)
    trainer_for(tmp_path, LpDecayConfig(target_sparsity=0.5, num_plans=2)).train()
    assert left == [14] * 28 + list(range(14, 0, -1))


def test_hessians_on_the_cpu_need_hessians():
    with pytest.raises(ValueError, match="hessians_on_cpu=True needs compensate"):
        LpDecayConfig(target_sparsity=0.5, compensate=False, hessians_on_cpu=True)
    with pytest.raises(ValueError, match="hessians_on_cpu=True needs a target_sparsity"):
        LpDecayConfig(lp_lambda=0.1, hessians_on_cpu=True)
