"""Weights in bfloat16 and float16: what is rounded away in one step must not be lost in all of them."""

import math

import pytest
import torch
from conftest import make_params, set_grads, tiny_llama, token_rows

from hf_lpdecay import LpAdamW
from hf_lpdecay.optim.functional import random_bits, stochastic_round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_the_mean_and_what_is_exact(dtype):
    bits = random_bits(40_000, seed=3)
    for value in (0.02, -1.2345, 3e-6, 100.3):
        rounded = stochastic_round(torch.full((40_000,), value), dtype, bits)
        assert rounded.unique().numel() <= 2
        ulp = (rounded.max() - rounded.min()).item()
        assert rounded.double().mean().item() == pytest.approx(value, abs=ulp * 0.01 + 1e-12)
    exact = torch.tensor([0.0, 1.0, -2.5, 0.15625, math.inf, -math.inf]).to(dtype)
    assert torch.equal(stochastic_round(exact.float(), dtype, bits[:6]), exact)
    assert stochastic_round(torch.tensor([math.nan]), dtype, bits[:1]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_decay_to_zero_in_the_time_of_float32(dtype):
    torch.manual_seed(0)
    steps = {}
    for kind in (torch.float32, dtype):
        param = torch.nn.Parameter(torch.full((10_000,), 0.02, dtype=kind))
        optimizer = LpAdamW([param], lr=1e-3, p=0.8, lp_lambda=1e-2)
        alive = []
        while (param != 0).any():
            param.grad = torch.zeros_like(param)
            optimizer.step()
            alive.append((param != 0).float().mean().item())
            assert len(alive) < 5000
        steps[kind] = sum(alive)
    assert steps[dtype] == pytest.approx(steps[torch.float32], rel=0.1)


@pytest.mark.parametrize("float32_moments", [True, False])
def test_moments_of_low_precision_weights_keep_their_dtype_when_loaded(float32_moments):
    params = make_params(torch.bfloat16)
    optimizer = LpAdamW(params, lr=1e-3, float32_moments=float32_moments)
    set_grads(params, 0)
    optimizer.step()
    other = LpAdamW([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.state.values(), other.state.values()):
        for name in ("exp_avg", "exp_avg_sq"):
            assert b[name].dtype == (torch.float32 if float32_moments else torch.bfloat16)
            assert torch.equal(a[name], b[name])
    plain = torch.optim.AdamW(params, lr=1e-3)
    plain.step()
    third = LpAdamW(params, lr=1e-3)
    third.load_state_dict(plain.state_dict())
    assert third.state[params[0]]["exp_avg"].dtype == torch.float32


def test_training_bfloat16_weights_ends_with_the_loss_of_float32():
    tokens = torch.tensor([row["input_ids"] for row in token_rows(64)])
    losses = []
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"float32_moments": False})):
        torch.manual_seed(0)
        model = tiny_llama(attention_dropout=0.0).to(dtype)
        optimizer = LpAdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), p=0.8, lp_lambda=1e-3, **options)
        for _ in range(60):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model.float()(input_ids=tokens, labels=tokens).loss.item())
    assert losses[0] < 3.0 and losses[1:] == pytest.approx([losses[0]] * 2, rel=0.01), losses
