"""The arithmetic of the decay, for any number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lpdecay import LpAdamW
from hf_lpdecay.optim.functional import decay_denominator_


finite = st.floats(-(2.0**50), 2.0**50, width=32)
size = st.floats(0, 2.0**100, width=32)
norm = st.floats(-20, 6)
strength = st.floats(0, 1e6)
rate = st.floats(0, 10)


def denominator(r, lr, lp_lambda, p, dtype=torch.float32):
    return decay_denominator_(torch.tensor([r], dtype=dtype), lr, lp_lambda, p).item()


@given(r=size, lr=rate, lp_lambda=strength, p=norm)
def test_decay_never_grows_a_weight_nor_turns_its_sign(r, lr, lp_lambda, p):
    result = denominator(r, lr, lp_lambda, p)
    assert result >= 1.0  # also fails for NaN


@given(r=size, lr=rate, lp_lambda=strength, more=st.floats(1, 100), p=norm)
def test_decay_is_monotone_in_lambda(r, lr, lp_lambda, more, p):
    assert denominator(r, lr, lp_lambda * more, p) >= denominator(r, lr, lp_lambda, p) * (1 - 1e-5)


@given(r=size, factor=st.floats(1, 100), lr=rate, lp_lambda=strength, p=st.floats(-20, 1.99))
def test_small_weights_decay_more(r, factor, lr, lp_lambda, p):
    larger = min(r * factor, 2.0**100)
    assert denominator(larger, lr, lp_lambda, p) <= denominator(r, lr, lp_lambda, p) * (1 + 1e-5)


@given(
    w=finite,
    grad=finite,
    lr=st.floats(0, 1),
    lp_lambda=strength,
    p=norm,
    freeze=st.booleans(),
    post=st.booleans(),
    rate=st.sampled_from([1.0, 0.3]),
)
def test_no_finite_input_gives_nan(w, grad, lr, lp_lambda, p, freeze, post, rate):
    param = torch.nn.Parameter(torch.tensor([w, 0.0, -0.0, 1e-42, -1e-45, 1e-38], dtype=torch.float32))
    param.grad = torch.full_like(param, min(max(grad, -1e15), 1e15))
    options = {"freeze_zeros": freeze, "post_step": post, "s_rate": rate}
    optimizer = LpAdamW([param], lr=lr, p=p, lp_lambda=lp_lambda, **options)
    for _ in range(2):
        optimizer.step()
    assert param.isfinite().all()


@given(w_hat=st.floats(-100, 100, width=32), lr=rate, lp_lambda=st.floats(0, 100))
def test_p_2_is_adamw_decay_in_implicit_form(w_hat, lr, lp_lambda):
    assert w_hat / denominator(abs(w_hat), lr, lp_lambda, 2) == pytest.approx(w_hat / (1 + lr * lp_lambda), rel=1e-6)


def test_a_learning_rate_on_the_device_is_never_asked_for_its_value():
    r = torch.tensor([0.0, 1e-30, 0.02, 3.0])
    for p in (-1, 0.5, 2, 3):
        for lr in (0.0, 1e-3):
            expected = decay_denominator_(r.clone(), lr, 1e-2, p)
            assert torch.allclose(decay_denominator_(r.clone(), torch.tensor(lr), 1e-2, p), expected)
