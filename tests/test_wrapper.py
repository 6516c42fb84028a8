import copy
import pickle

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import constant, controlled, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceLpAdamW

from hf_lpdecay import LpAdamW, LpDecay
from hf_lpdecay.optim import kernels, wrapper


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
INSIDE = {
    "AdamW": lambda params: torch.optim.AdamW(params, **ADAMW),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Muon": lambda params: torch.optim.Muon(params, lr=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "transformers' Adafactor": lambda params: transformers.Adafactor(params, lr=1e-2, relative_step=False),
}


def make_params(dtype=torch.float32, shapes=((7, 5), (30, 20), (6, 4)), zeros=True):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(dtype)) for shape in shapes]
    for param in params if zeros else ():
        param.data.view(-1)[::7] = 0.0
    return params


def train(optimizer, params, steps=range(20)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).mul_(1e-2).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("kept", [1, 1 << 24])
@pytest.mark.parametrize("options", [{}, {"freeze_zeros": True, "p": 2}, {"post_step": True}])
def test_is_the_formula_around_any_optimizer(monkeypatch, inside, kept, options):
    monkeypatch.setattr(wrapper, "KEPT", kept)
    options = {"p": 0.8, "lp_lambda": 1e-2, **options}
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    optimizer, plain = LpDecay(INSIDE[inside](ours), **options), INSIDE[inside](theirs)
    for step in range(10):
        train(optimizer, ours, [step])
        before = [param.detach().clone() for param in theirs]
        train(plain, theirs, [step])
        for param, w in zip(theirs, before):
            size = (param.detach() if "post_step" in options else w).abs()
            param.data /= 1 + plain.param_groups[0]["lr"] * options["lp_lambda"] * size ** (options["p"] - 2)
            if options.get("freeze_zeros"):
                param.data[w == 0] = 0.0
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@settings(max_examples=30)
@given(
    p=st.floats(-2, 3),
    lp_lambda=st.one_of(st.just(0.0), st.floats(1e-9, 0.1)),
    lr=st.one_of(st.just(0.0), st.floats(1e-9, 0.1)),
    freeze=st.booleans(),
    post=st.booleans(),
    planned=st.booleans(),
)
def test_around_adamw_it_is_the_twin_and_lp_adamw(p, lp_lambda, lr, freeze, post, planned):
    options = {"p": p, "lp_lambda": lp_lambda, "freeze_zeros": freeze, "post_step": post}
    adamw = {**ADAMW, "lr": lr}
    (a,), (b,) = (make_params(torch.float64, shapes=[(9, 6)]) for _ in range(2))
    row, col = torch.linspace(0.5, 2, 9)[:, None].double(), torch.linspace(2, 0.5, 6)[None].double()
    twin = {}
    if planned:
        twin = {"threshold": 0.08, "h": (row * col).flatten()}
    twin = ReferenceLpAdamW(a.detach().flatten(), **adamw, **options, **twin)
    wrapped, ours = LpDecay(torch.optim.AdamW([a], **adamw), **options), LpAdamW([b], **adamw, **options)
    for optimizer, param in ((wrapped, a), (ours, b)):
        if planned:
            optimizer.state[param].update(lp_threshold=0.08, lp_row=row, lp_col=col)
        train(optimizer, [param], range(5))
    for step in range(5):
        train(torch.optim.SGD([a], lr=0.0), [a], [step])  # for the gradients
        twin.step(a.grad.flatten())
    expected = torch.tensor(twin.w, dtype=torch.float64).view_as(a)
    assert torch.allclose(a, expected, rtol=1e-8, atol=1e-10) and torch.allclose(b, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("p", [-1, 0, 0.3, 0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_for_the_decay_alone_is_the_decay_in_torch_operations(monkeypatch, p, planned, dtype):
    for variant in ({}, {"post_step": True}, {"post_step": True, "freeze_zeros": True}, {"freeze_zeros": True}):
        results = []
        for kernel in (True, False):
            with monkeypatch.context() as patch:
                if not kernel:
                    patch.setattr(kernels, "covers", lambda *args: False)
                torch.manual_seed(0)
                (param,) = make_params(dtype, shapes=[(31, 17)])
                optimizer = LpDecay(torch.optim.SGD([param], lr=0.1), p=p, lp_lambda=1e-3, **variant)
                if planned:
                    row, col = torch.linspace(0.5, 2, 31)[:, None], torch.linspace(2, 0.5, 17)[None]
                    optimizer.state[param].update(lp_lambda=2e-3, lp_threshold=0.08, lp_row=row, lp_col=col)
                train(optimizer, [param], range(3))
            results.append(param.detach().float())
        ours, theirs = results
        close = torch.isclose(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)
        assert close.float().mean() > 0.995 and ((ours == 0) == (theirs == 0)).float().mean() > 0.995


@pytest.mark.parametrize("p", [-1, 0.3, 0.5, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", ["SGD", "transformers' Adafactor"])  # in parts, and all at once
def test_factors_worked_out_before_the_step_give_the_bits_of_a_kept_copy(monkeypatch, p, dtype, inside):
    results = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(wrapper, "prepare_decay", lambda *args: False)
        torch.manual_seed(0)
        params = make_params(dtype, shapes=[(31, 17), (300,), (3, 8, 5)])
        optimizer = LpDecay(INSIDE[inside](params), p=p, lp_lambda=1e-3, freeze_zeros=True)
        row, col = torch.linspace(0.5, 2, 31)[:, None], torch.linspace(2, 0.5, 17)[None]
        optimizer.state[params[0]].update(lp_lambda=2e-3, lp_threshold=0.08, lp_row=row, lp_col=col)
        train(optimizer, params, range(5))
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(results[0][0], make_params(dtype, shapes=[(31, 17)])[0])


@pytest.mark.parametrize("inside", ["AdamW", "SGD", "transformers' Adafactor"])
def test_without_lambda_it_is_the_optimizer_inside_bit_for_bit(inside):
    ours, theirs = make_params(), make_params()
    train(LpDecay(INSIDE[inside](ours)), ours)
    train(INSIDE[inside](theirs), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_what_is_kept_is_bounded_however_many_parameters_there_are(monkeypatch):
    monkeypatch.setattr(wrapper, "KEPT", 100)
    params = make_params(shapes=[(10, 5)] * 8)
    optimizer = LpDecay(torch.optim.SGD(params, lr=0.1), lp_lambda=1e-2)
    stepped, step = [], optimizer.optimizer.step

    def counted():
        stepped.append(sum(param.numel() for group in optimizer.param_groups for param in group["params"]))
        return step()

    monkeypatch.setattr(optimizer.optimizer, "step", counted)
    train(optimizer, params, [0])
    assert stepped == [100, 100, 100, 100] and len(optimizer._buffers[torch.float32]) == 100
    assert [len(group["params"]) for group in optimizer.param_groups] == [8]


def test_another_class_is_stepped_once_with_everything():
    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    params, others = make_params(), make_params()
    counting = Counting(params, lr=1e-2)
    train(LpDecay(counting, p=0.5, lp_lambda=1e-2), params)
    train(LpDecay(torch.optim.SGD(others, lr=1e-2), p=0.5, lp_lambda=1e-2), others)
    assert counting.steps == 20 and all(torch.equal(a, b) for a, b in zip(params, others))


def test_the_controller_drives_it_to_the_target():
    params, _, controller = controlled(target=0.5, model=tiny_llama())
    optimizer = LpDecay(torch.optim.AdamW(list(params.values()), lr=1e-3), p=0.5)
    controller.optimizer = optimizer
    generator = torch.Generator().manual_seed(0)
    decayed = 0.0
    for step in range(1, 51):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
        if step == controller.ramp.end:
            decayed = sum((p == 0).sum().item() for p in params.values()) / sum(p.numel() for p in params.values())
        optimizer.step()
        controller.after_step(step, constant(1e-3))
    for param in params.values():
        assert (param == 0).sum() == round(0.5 * param.numel())
        assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"}
    assert decayed > 0.4  # by the decay, before the cut


def test_states_resume_to_the_same_bits_and_take_a_plain_checkpoint():
    params, lr = make_params(), 0.0
    optimizer = LpDecay(torch.optim.AdamW(params, **ADAMW), p=0.5, lp_lambda=1e-2, freeze_zeros=True)
    optimizer.state[params[0]].update(lp_lambda=2e-2, lp_threshold=0.05)  # planned before the first step
    train(optimizer, params, range(5))
    copied = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = LpDecay(torch.optim.AdamW(copied, lr=lr))
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert resumed.param_groups[0]["p"] == 0.5 and resumed.state[copied[0]]["lp_lambda"] == 2e-2
    train(optimizer, params, range(5, 10))
    train(resumed, copied, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(params, copied))
    plain = torch.optim.AdamW(make_params(), **ADAMW)
    resumed.param_groups[0]["lp_lambda"] = 0.3
    resumed.load_state_dict(plain.state_dict())
    assert resumed.param_groups[0]["lp_lambda"] == 0.3 and resumed.param_groups[0]["lr"] == ADAMW["lr"]
    assert copy.deepcopy(resumed).param_groups[0]["lp_lambda"] == 0.3


def test_schedulers_accelerate_groups_and_closures_work_through_it():
    params = make_params()
    optimizer = LpDecay(torch.optim.SGD(params[:1], lr=0.1), p=0.5, lp_lambda=1e-2)
    optimizer.add_param_group({"params": params[1:], "lp_lambda": 0.0})
    assert [group["lp_lambda"] for group in optimizer.param_groups] == [1e-2, 0.0]
    assert isinstance(optimizer, torch.optim.Optimizer)
    accelerated = Accelerator(cpu=True).prepare_optimizer(optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)
    before = [param.detach().clone() for param in params]
    train(accelerated, params, [0])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.055)
    assert torch.allclose(params[1], before[1] - 0.05 * params[1].grad)
    expected = (before[0] - 0.05 * params[0].grad) / (1 + 0.05 * 1e-2 * before[0].abs() ** -1.5)
    assert torch.allclose(params[0], expected)
    accelerated.zero_grad()
    assert all(param.grad is None for param in params)

    def closure():
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    for inside in (torch.optim.SGD, torch.optim.LBFGS):
        optimizer = LpDecay(inside(params, lr=0.1), p=0.5, lp_lambda=1e-3)
        first = optimizer.step(closure)
        assert optimizer.step(closure) < first


def test_a_step_with_infinite_gradients_skips_the_decay_too():
    (param,) = make_params(shapes=[(5, 4)])
    optimizer = LpDecay(torch.optim.SGD([param], lr=0.1), p=0.5, lp_lambda=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = param.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, before) == (factor != 1.0)
    assert torch.allclose(param, (before - 0.1) / (1 + 0.1 * before.abs() ** -1.5))


def test_bfloat16_weights_decay_to_zero_in_the_time_of_float32():
    torch.manual_seed(0)
    alive = {}
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(torch.full((2000,), 0.02, dtype=dtype))
        optimizer = LpDecay(torch.optim.SGD([param], lr=1e-2), p=0.8, lp_lambda=1e-2)
        param.grad = torch.zeros_like(param)
        alive[dtype] = 0.0
        while (param != 0).any():
            optimizer.step()
            alive[dtype] += (param != 0).float().mean().item()
            assert alive[dtype] < 500
    assert alive[torch.bfloat16] == pytest.approx(alive[torch.float32], rel=0.1)


def test_bad_input_is_refused():
    params = make_params()
    for options, message in (
        ({"p": float("nan")}, "Invalid p: nan"),
        ({"lp_lambda": -1.0}, "Invalid lp_lambda: -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LpDecay(torch.optim.SGD(params, lr=0.1), **options)
    with pytest.raises(ValueError, match="lr=None"):
        LpDecay(transformers.Adafactor(params))
    with pytest.raises(ValueError, match="complex64"):
        LpDecay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        LpDecay(torch.optim.SGD(embedding.parameters(), lr=0.1), lp_lambda=1.0).step()
