import copy
import math

import pytest
import torch
from conftest import make_params, set_grads
from reference import ReferenceLpAdamW

from hf_lpdecay import LpAdamW
from hf_lpdecay.optim import pieces as pieces_module


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_without_decay_has_the_bits_of_torch_adamw(dtype, fused):
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer = LpAdamW(ours, **OPTIONS, lp_lambda=0.0, fused=fused)
    reference = torch.optim.AdamW(theirs, **OPTIONS, fused=fused or None, foreach=False if not fused else None)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
    for a, b in zip(ours, theirs):
        assert set(optimizer.state[a]) == set(reference.state[b]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("p", [-3, 0, 0.3, 0.5, 0.8, 1, 1.5, 2, 3])
@pytest.mark.parametrize("planned", [False, True])
def test_agrees_with_the_float64_twin(p, planned, fused):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        (param,) = make_params(dtype, shapes=[(9, 6)])
        lp_lambda = 1e-3
        optimizer = LpAdamW([param], **OPTIONS, p=p, lp_lambda=lp_lambda, freeze_zeros=planned, fused=fused)
        twin = {}
        if planned:
            row = torch.linspace(0.5, 2, 9, dtype=dtype)[:, None]
            col = torch.linspace(2, 0.5, 6, dtype=dtype)[None, :]
            twin = {"threshold": 0.8, "h": (row * col).flatten(), "freeze_zeros": True}
            optimizer.state[param].update(lp_lambda=3e-3, lp_threshold=0.8, lp_row=row, lp_col=col)
            lp_lambda = 3e-3
        twin = ReferenceLpAdamW(param.detach().flatten(), **OPTIONS, p=p, lp_lambda=lp_lambda, **twin)
        for step in range(100):
            set_grads([param], step)
            twin.step(param.grad.flatten())
            optimizer.step()
        result, expected = param.detach().flatten().double(), torch.tensor(twin.w, dtype=torch.float64)
        # A weight that collapses does so super-linearly: the two may be a step apart on their way to zero.
        assert torch.allclose(result, expected, rtol=tolerance, atol=tolerance), (result - expected).abs().max()


@pytest.mark.parametrize("variant", [{"post_step": True}, {"s_rate": 0.3}, {"post_step": True, "s_rate": 0.3}])
@pytest.mark.parametrize("p", [-1, 0.5, 1, 2, 3])
@pytest.mark.parametrize("planned", [False, True])
def test_variants_agree_with_the_float64_twin(p, planned, variant):
    (param,) = make_params(torch.float64, shapes=[(9, 6)])
    param.data[0, 0] = 0.0
    optimizer = LpAdamW([param], **OPTIONS, p=p, lp_lambda=1e-3, freeze_zeros=planned, **variant)
    twin = {}
    if planned:
        row = torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None]
        col = torch.linspace(2, 0.5, 6, dtype=torch.float64)[None, :]
        twin = {"threshold": 0.8, "h": (row * col).flatten(), "freeze_zeros": True}
        optimizer.state[param].update(lp_threshold=0.8, lp_row=row, lp_col=col)
    twin = ReferenceLpAdamW(param.detach().flatten(), **OPTIONS, p=p, lp_lambda=1e-3, **twin, **variant)
    for step in range(100):
        set_grads([param], step)
        twin.step(param.grad.flatten())
        optimizer.step()
    expected = torch.tensor(twin.w, dtype=torch.float64).view_as(param)
    assert torch.allclose(param, expected, rtol=1e-10, atol=1e-10), (param - expected).abs().max()
    assert ("lp_s" in optimizer.state[param]) == ("s_rate" in variant)


def test_zero_absorbs_in_the_variants_only_if_frozen():
    for variant in ({"post_step": True}, {"s_rate": 0.5}):
        for freeze in (False, True):
            (param,) = make_params(shapes=[(50,)])
            optimizer = LpAdamW([param], lr=1e-2, p=0.5, lp_lambda=1e-9, freeze_zeros=freeze, **variant)
            set_grads([param], 0)
            optimizer.step()
            param.data[::2] = 0.0
            optimizer.step()
            assert (param[::2] == 0).all() == freeze and param.isfinite().all()


def test_the_state_of_the_s_dynamics_is_resumed_and_stays_float32():
    for dtype in (torch.float32, torch.bfloat16):
        params = make_params(dtype)
        options = {**OPTIONS, "p": 0.5, "lp_lambda": 1e-2, "s_rate": 0.1, "stochastic_rounding": False}
        optimizer = LpAdamW(params, **options)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        copied = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = LpAdamW(copied)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert resumed.state[copied[0]]["lp_s"].dtype == torch.float32
        set_grads(params, 3)
        set_grads(copied, 3)
        optimizer.step()
        resumed.step()
        assert all(torch.equal(a, b) for a, b in zip(params, copied))


@pytest.mark.parametrize("p", [-1, 0.5, 2, 3])
@pytest.mark.parametrize("change", [{"lr": 0.0}, {"lp_lambda": 0.0}])
def test_no_learning_rate_or_no_lambda_is_the_identity_bit_for_bit(p, change):
    options = {"lr": 1e-2, "lp_lambda": 1e-2, **change}
    params, plain = make_params(), make_params()
    for group in (params, plain):
        group[0].data.view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e30, 1.0])
        set_grads(group, 0)
    LpAdamW(params, p=p, fused=False, **options).step()
    torch.optim.AdamW(plain, lr=options["lr"], weight_decay=0.0, foreach=False).step()
    for a, b in zip(params, plain):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("p", [-2, 0, 0.5, 1, 1.9])
def test_zero_absorbs_below_p_2(p):
    (param,) = make_params(shapes=[(50,)])
    param.data[::2] = 0.0
    optimizer = LpAdamW([param], lr=1e-2, p=p, lp_lambda=1e-9)
    for step in range(10):
        set_grads([param], step)
        optimizer.step()
    assert (param[::2] == 0).all() and (param[1::2] != 0).any()


@pytest.mark.parametrize("lp_lambda", [0.0, 1e-3])
@pytest.mark.parametrize("p", [0.5, 2, 3])
def test_freeze_zeros_keeps_zeros_at_any_lambda_and_moves_the_rest(lp_lambda, p):
    (param,) = make_params(shapes=[(50,)])
    param.data[::2] = 0.0
    before = param.detach().clone()
    optimizer = LpAdamW([param], lr=1e-2, p=p, lp_lambda=lp_lambda, freeze_zeros=True)
    for step in range(3):
        set_grads([param], step)
        optimizer.step()
    assert (param[::2] == 0).all() and (param[1::2] != before[1::2]).all()


def test_small_weights_become_exactly_zero_when_the_closed_form_says():
    lr, p, size = 1e-3, 0.5, 0.05
    steps = 200
    lp_lambda = size ** (2 - p) / ((2 - p) * lr * steps)
    param = torch.nn.Parameter(torch.tensor([size, -size, 3 * size]))
    optimizer = LpAdamW([param], lr=lr, p=p, lp_lambda=lp_lambda)
    collapsed = None
    for step in range(1, 400):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        if collapsed is None and (param[:2] == 0).all():
            collapsed = step
    assert steps * 0.95 < collapsed < steps * 1.1
    # Under decay alone |w| ** (2 - p) falls by the same amount for every weight.
    assert param[2].item() == pytest.approx(((3 * size) ** 1.5 - size**1.5 * 399 / steps) ** (1 / 1.5), rel=2e-2)


def test_parameters_without_gradient_are_left_alone():
    a, b = make_params(shapes=[(5,), (5,)])
    before = b.detach().clone()
    optimizer = LpAdamW([a, b], lr=0.1, p=0.5, lp_lambda=1.0)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b, before) and b not in optimizer.state


def test_closure_is_called_with_gradients_and_its_loss_returned():
    (param,) = make_params(shapes=[(5,)])
    optimizer = LpAdamW([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad and optimizer.step(closure) < first


def test_groups_carry_their_own_hyperparameters():
    a, b = make_params(shapes=[(5,), (5,)])
    optimizer = LpAdamW([a], lr=1e-3, p=0.5, lp_lambda=1.0)
    optimizer.add_param_group({"params": [b], "lp_lambda": 0.0, "p": 1.0})
    assert [g["lp_lambda"] for g in optimizer.param_groups] == [1.0, 0.0]
    assert [g["p"] for g in optimizer.param_groups] == [0.5, 1.0]
    before = b.detach().clone()
    for param in (a, b):
        param.grad = torch.zeros_like(param)
    for _ in range(3000):
        optimizer.step()
    assert (a == 0).all() and torch.equal(b, before)


def test_state_dict_continues_with_the_same_bits():
    def train(params, optimizer, steps):
        for step in steps:
            set_grads(params, step)
            optimizer.step()

    params = make_params()
    optimizer = LpAdamW(params, **OPTIONS, p=0.5, lp_lambda=1e-3)
    train(params, optimizer, range(5))
    copied = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = LpAdamW(copied, lr=1.0, p=1.0, lp_lambda=5.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lp_lambda"] == 1e-3 and resumed.param_groups[0]["p"] == 0.5
    train(params, optimizer, range(5, 10))
    train(copied, resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(params, copied))


def test_a_checkpoint_of_torch_adamw_can_be_continued():
    params = make_params()
    theirs = torch.optim.AdamW(params, **OPTIONS)
    for step in range(5):
        set_grads(params, step)
        theirs.step()
    copied = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = LpAdamW(copied, p=0.5, lp_lambda=1e-2, freeze_zeros=True, fused=False)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["p"], group["lp_lambda"], group["freeze_zeros"], group["lr"]) == (0.5, 1e-2, True, OPTIONS["lr"])
    assert "amsgrad" not in group and ours.state[copied[0]]["step"] == 5
    group["lp_lambda"] = 0.0
    set_grads(params, 5)
    set_grads(copied, 5)
    theirs.step()
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copied))
    with pytest.raises(ValueError, match="amsgrad"):
        ours.load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())


@pytest.mark.parametrize("planned", [False, True])
def test_pieces_give_what_the_whole_gives(monkeypatch, planned):
    results = []
    for chunk in (1 << 20, 7):
        monkeypatch.setattr(pieces_module, "PIECE", chunk)
        params = make_params(torch.float64, shapes=[(11, 5), (40,), (4, 3, 2)])
        params.append(torch.nn.Parameter(torch.arange(1.0, 21.0, dtype=torch.float64).view(4, 5).t()))
        optimizer = LpAdamW(params, **OPTIONS, p=0.5, lp_lambda=1e-2)
        if planned:
            for param in (params[0], params[3]):
                optimizer.state[param].update(
                    lp_threshold=1.0,
                    lp_row=torch.linspace(1, 2, param.shape[0], dtype=torch.float64)[:, None],
                    lp_col=torch.linspace(1, 2, param.shape[1], dtype=torch.float64)[None],
                )
            flat = torch.linspace(1, 2, 40, dtype=torch.float64)  # as under DeepSpeed
            optimizer.state[params[1]].update(lp_threshold=1.0, lp_row=flat, lp_col=flat.new_ones(1))
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    for whole, pieces in zip(*results):
        assert torch.allclose(whole, pieces, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr: -1.0"),
        ({"lp_lambda": -1e-3}, "lp_lambda: -0.001"),
        ({"lp_lambda": math.inf}, "lp_lambda: inf"),
        ({"p": math.nan}, "p: nan"),
        ({"p": "half"}, "p: 'half'"),
        ({"s_rate": 0.0}, "s_rate: 0.0"),
        ({"s_rate": 1.5}, "s_rate: 1.5"),
        ({"betas": (0.9, 1.0)}, "beta in betas: 1.0"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Invalid {message}"):
        LpAdamW(make_params(), **options)
    optimizer = LpAdamW(make_params())
    with pytest.raises(ValueError, match=f"Invalid {message}"):
        optimizer.add_param_group({"params": make_params(), **options})


def test_sparse_complex_and_a_missing_kernel_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = LpAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    elsewhere = torch.nn.Parameter(torch.empty(2, device="meta"))
    elsewhere.grad = torch.empty(2, device="meta")
    with pytest.raises(RuntimeError, match="no kernel for a parameter on meta"):
        LpAdamW([elsewhere], fused=True).step()
    with pytest.raises(ValueError, match="complex64"):
        LpAdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_weight_is_subnormal_on_its_way_to_zero(fused, dtype):
    """A matrix product with one per cent of subnormal weights takes several times as long on most CPUs."""
    tiny = torch.finfo(dtype).tiny
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(200, 50, generator=generator, dtype=torch.float64).mul_(1e-2).to(dtype))
    optimizer = LpAdamW([param], lr=1e-3, p=0.5, lp_lambda=2e-2, fused=fused)
    smallest = 1.0
    for _ in range(20):
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
        left = param.detach().abs()[param != 0]
        assert left.min() >= tiny
        smallest = min(smallest, left.min().item())
    assert smallest < 1e-25 and 0 < (param == 0).sum() < param.numel()  # some came close
