import pytest
import torch
from conftest import constant, controlled, drive, tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from hf_lpdecay.optim.functional import structured_size
from hf_lpdecay.sparsity import input_dims


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern, group, dead", [("2:4", 4, 2), ("1:8", 8, 7), ("3:4", 4, 1)])
def test_n_of_m_consecutive_inputs_survive(pattern, group, dead, scope, make):
    model = make()
    params, optimizer, controller = controlled(dead / group, pattern=pattern, scope=scope, model=model)
    dims = input_dims(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 51):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
        optimizer.step()
        controller.after_step(step, constant(1e-3))
        for name, param in params.items():
            by_output = param if dims[name] == 1 else param.t()
            zeros = (by_output.unflatten(1, (-1, group)) == 0).sum(-1)
            assert (zeros <= dead).all() if step < controller.ramp.end else (zeros == dead).all()
    assert {dims[name] for name in params} == ({1} if make is tiny_llama else {0})


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_tiles_become_zero_as_one(make):
    model = make()
    params, optimizer, controller = controlled(0.5, pattern="block:4x8", model=model)
    drive(params, optimizer, controller, controller.ramp.end - 1)
    dims = input_dims(model)

    def live_per_tile():
        for name, param in params.items():
            by_output = param if dims[name] == 1 else param.t()
            yield (by_output.unflatten(1, (-1, 8)).unflatten(0, (-1, 4)) != 0).sum((1, 3))

    before_cut = torch.cat([tile.flatten() for tile in live_per_tile()])
    assert ((before_cut == 0) | (before_cut == 32)).float().mean() > 0.9 and (before_cut == 0).float().mean() > 0.4
    controller.after_step(controller.ramp.end, constant(0.0))
    for live in live_per_tile():
        assert set(live.flatten().tolist()) == {0, 32} and (live == 0).sum() == live.numel() / 2


@given(st.lists(st.floats(0, 10, width=32), min_size=8, max_size=8), st.integers(1, 3))
def test_out_of_reach_are_the_largest_of_each_group(values, keep):
    r = torch.tensor(values).view(1, 8)
    size = structured_size(r, f"{keep}:4")
    for group, result in zip(r.view(2, 4), size.view(2, 4)):
        assert result.isinf().sum() == keep and group[result.isinf()].min() >= group[~result.isinf()].max()
        assert torch.equal(result[~result.isinf()], group[~result.isinf()])
    assert torch.equal(structured_size(r.t(), f"{keep}:4", dim=0), size.t())


@pytest.mark.parametrize(
    "target, pattern, message",
    [
        (None, "1:3", "gate_proj.weight has 32 input features, not a multiple of 3"),
        (0.5, "block:5x4", "gate_proj.weight has 64 output and 32 input features, which such tiles do not fill"),
    ],
)
def test_a_shape_that_does_not_fit_the_pattern_is_refused_by_name(target, pattern, message):
    with pytest.raises(ValueError, match=message):
        controlled(target, pattern=pattern, exclude_modules=ATTENTION)
