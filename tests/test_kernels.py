"""The one-pass kernel against the same step in torch operations and against the float64 twin."""

import json
import math
import resource
import sys
import time

import benchmark_optimizer
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from reference import ReferenceLpAdamW
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from hf_lpdecay import LpAdamW, LpDecay
from hf_lpdecay.optim import kernels


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05, "lp_lambda": 1e-3}


def trained(fused, steps=20, dtype=torch.float32, shape=(37, 53), plan=None, **options):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(dtype))
    param.data.view(-1)[::7] = 0.0
    optimizer = LpAdamW([param], **{**OPTIONS, **options}, fused=fused)
    optimizer.state[param].update(plan or {})
    for _ in range(steps):
        param.grad = (torch.randn(shape, generator=generator) * 1e-2).to(dtype)
        optimizer.step()
    return param.detach(), optimizer.state[param]


def plan(rows=37, cols=53):
    return {
        "lp_lambda": 1e-2,
        "lp_threshold": 0.05,
        "lp_row": torch.linspace(0.5, 2, rows)[:, None],
        "lp_col": torch.linspace(2, 0.5, cols)[None],
    }


@pytest.mark.parametrize("p", [-1, 0, 0.3, 0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("variant", [{}, {"post_step": True}, {"freeze_zeros": True}])
def test_agrees_with_the_step_in_torch_operations(p, planned, variant):
    options = {"p": p, "plan": plan() if planned else None, **variant}
    (ours, state), (theirs, expected) = trained(True, **options), trained(False, **options)
    close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert close.float().mean() > 0.998 and torch.allclose(ours, theirs, rtol=0, atol=2e-5)
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.998  # on its way to zero one may be a step behind
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(state[name], expected[name], rtol=1e-5, atol=1e-8)
    assert state["step"] == expected["step"] == 20


def test_any_p_is_as_exact_as_a_short_cut():
    for p in (0, 0.5, 1, 1.5, 2):
        short, general = (trained(True, p=x)[0] for x in (p, p + 1e-9))
        assert torch.allclose(short, general, rtol=1e-4, atol=2e-5), (short - general).abs().max()


number = st.floats(-(2.0**50), 2.0**50, width=32)


@settings(max_examples=200)
@given(
    w=number,
    grad=number,
    lr=st.floats(1e-12, 1),
    lp_lambda=st.floats(1e-12, 1e6),
    p=st.one_of(st.floats(-20, 6), st.sampled_from([0, 0.5, 1, 1.5, 2])),
)
def test_one_step_is_that_of_the_twin_for_any_numbers(w, grad, lr, lp_lambda, p):
    weights = torch.tensor([w, 0.0, -0.0, 1e-30, -1e-8, 0.02] * 4)
    param = torch.nn.Parameter(weights.clone())
    param.grad = torch.full_like(param, grad)
    options = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "p": p, "lp_lambda": lp_lambda}
    LpAdamW([param], **options, fused=True).step()
    twin = ReferenceLpAdamW(weights, **options)
    twin.step(param.grad)
    expected = torch.tensor(twin.w, dtype=torch.float64).to(torch.float32)
    # ŵ = w - lr * u may cancel, which float32 shows.
    scale = max(abs(w), lr, 1e-8) if p > 2 else max(abs(w), lr)
    assert torch.allclose(param.detach(), expected, rtol=2e-3, atol=1e-6 * scale)


def test_threads_and_the_neighbours_do_not_matter():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (70_001, 1, 0, 129, 90_000)]
            params.append(torch.nn.Parameter(torch.linspace(-1, 1, 301 * 211).view(301, 211)))
            optimizer = LpAdamW(params, **OPTIONS, p=0.8, fused=True)
            optimizer.state[params[-1]].update(plan(301, 211))
            for step in range(3):
                for param in params:
                    param.grad = torch.full_like(param, 0.1 * (step + 1))
                optimizer.step()
            results.append([param.detach() for param in params])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results):
        assert torch.allclose(one, three, rtol=1e-6, atol=1e-9)


def test_nan_and_infinity_are_not_hidden():
    param = torch.nn.Parameter(torch.tensor([math.nan, math.inf, 1.0, 1.0, 0.5] * 10))
    param.grad = torch.tensor([0.0, 0.0, math.nan, math.inf, 0.1] * 10)
    LpAdamW([param], **OPTIONS, p=0.8, fused=True).step()
    kind = param.detach().view(-1, 5)
    assert kind[:, 0].isnan().all() and (kind[:, 1] == math.inf).all()
    assert kind[:, 2:4].isnan().all() and kind[:, 4].isfinite().all()


@pytest.mark.parametrize("float32_moments", [True, False])
@pytest.mark.parametrize("rounding", [None, False])
@pytest.mark.parametrize("planned", [False, True])
def test_bfloat16_draws_the_same_random_bits_as_torch_operations_do(float32_moments, rounding, planned):
    options = {
        "dtype": torch.bfloat16,
        "p": 0.8,
        "stochastic_rounding": rounding,
        "float32_moments": float32_moments,
        "plan": plan() if planned else None,
    }
    (ours, state), (theirs, expected) = trained(True, **options), trained(False, **options)
    assert state["exp_avg"].dtype == (torch.float32 if float32_moments else torch.bfloat16)
    # A difference in float32's last place may turn a rounding, once in a few hundred times.
    assert (ours == theirs).float().mean() > 0.97
    assert torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=1e-3)
    assert torch.allclose(state["exp_avg_sq"].float(), expected["exp_avg_sq"].float(), rtol=0.02, atol=1e-12)


def test_zeros_take_no_longer_than_other_weights():
    """Of a zero, and of what is about to be one, the decay must not compute with subnormal numbers."""
    torch.manual_seed(0)
    seconds = []
    for zeros in (0.0, 0.5):
        param = torch.nn.Parameter(torch.randn(1 << 16).mul_(0.02).masked_fill_(torch.rand(1 << 16) < zeros, 0.0))
        param.grad = torch.randn_like(param) * 1e-3
        optimizer = LpAdamW([param], lr=1e-7, p=0.3, lp_lambda=1e-3, fused=True)
        times = []
        for _ in range(100):
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        assert (param == 0).float().mean() == pytest.approx(zeros, abs=0.01)
        seconds.append(min(times))
    assert seconds[1] < 1.5 * seconds[0]


def test_what_the_kernel_does_not_cover_is_updated_all_the_same(monkeypatch):
    def refuse(*args):
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(kernels, "available", refuse)
    for options in ({"dtype": torch.float64}, {"dtype": torch.float16}, {"s_rate": 0.5}, {"p": 2000}):
        before, _ = trained(None, steps=0, **{"p": 0.8, **options})
        after, _ = trained(None, steps=1, **{"p": 0.8, **options})
        assert (before != after).any()
    # Strides that are not in a row.
    param = torch.nn.Parameter(torch.ones(5, 4).t())
    param.grad = torch.ones_like(param)
    LpAdamW([param], **OPTIONS).step()
    assert (param != 1).all()


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_one_warning_and_the_same_result(monkeypatch, caplog, compiler):
    expected = trained(False, p=0.8)[0]
    monkeypatch.setenv("CXX", compiler)
    kernels._build.cache_clear()
    kernels.warn_once.cache_clear()
    try:
        result = trained(None, p=0.8)[0]
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1 and compiler in warnings[0]
        with pytest.raises(RuntimeError, match="could not be compiled"):
            LpAdamW([torch.nn.Parameter(torch.ones(2))], fused=True)
    finally:
        kernels._build.cache_clear()
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-6)


def measure_memory_of_a_step():
    params = [torch.nn.Parameter(torch.ones(4 << 20)) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = LpAdamW(params, p=0.8, lp_lambda=1e-2)
    small = LpAdamW([torch.nn.Parameter(torch.ones(2))], p=0.8, lp_lambda=1e-2)
    small.param_groups[0]["params"][0].grad = torch.ones(2)
    small.step()
    for param in params:
        moments = {name: torch.ones(4 << 20) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param].update(step=torch.zeros(()), **moments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer.step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (16 << 20))


def test_the_kernel_needs_no_extra_memory():
    (printed,) = run_in_processes(measure_memory_of_a_step, 1)
    assert float(printed) < 0.1  # bytes per parameter; a copy would be 4


def step_sharded_and_whole():
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def wrapped(params):
        return LpDecay(torch.optim.AdamW(params, lr=1e-2), p=0.8, lp_lambda=3e-2)

    for make in (
        lambda params: LpAdamW(params, lr=1e-2, p=0.8, lp_lambda=3e-2, fused=True),
        lambda params: LpAdamW(params, lr=1e-2, p=0.8, lp_lambda=3e-2, fused=False, s_rate=0.5),
        lambda params: LpAdamW(params, lr=1e-2, p=0.8, freeze_zeros=True),
        wrapped,
    ):
        results = []
        for sharded in (False, True):
            torch.manual_seed(0)
            # Seven rows: the shards are not equal.
            model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
            model[0].weight.data[:3] = 0.0
            inputs = torch.randn(16, 5)
            if sharded:
                fully_shard(model, mesh=mesh)
            optimizer = make(model.parameters())
            for step in range(10):
                if sharded and step == 5:  # what a resumed run does, its step with lr = 0 on empty state included
                    saved = get_optimizer_state_dict(model, optimizer)
                    optimizer = make(model.parameters())
                    set_optimizer_state_dict(model, optimizer, saved)
                model(inputs).square().mean().backward()
                if step >= 5 and make is not wrapped:
                    state = optimizer.state[model[2].weight]
                    row = state["exp_avg_sq"].mean(1, keepdim=True).sqrt() * 100
                    state.update(lp_threshold=0.1, lp_row=row, lp_col=torch.linspace(0.5, 2, 7)[None])
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.full_tensor() if sharded else p.detach() for p in model.parameters()])
        for whole, shards in zip(*results):
            torch.testing.assert_close(whole, shards, rtol=1e-4, atol=1e-5)
        zeros = [(p == 0).sum().item() for p in results[0]]
        assert zeros == [(p == 0).sum().item() for p in results[1]] and sum(zeros) > 0, zeros
        assert all((p != 0).any() for p in results[0])


def test_shards_in_two_processes_give_what_one_process_gives():
    run_in_processes(step_sharded_and_whole, 2)


def test_the_benchmark_runs_and_measures_every_rival(tmp_path, monkeypatch, capsys):
    tiny = tiny_llama().config
    monkeypatch.setattr(benchmark_optimizer, "SMOLLM2", tiny)
    monkeypatch.setattr(benchmark_optimizer, "SHAPES", {"tiny": (LlamaForCausalLM, tiny)})
    monkeypatch.setattr(benchmark_optimizer, "SMALL", ["tiny"])
    file = tmp_path / "out" / "results.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_optimizer.py", "--rounds", "3", "--results_file", str(file)])
    benchmark_optimizer.main()
    results = json.loads(file.read_text())
    rivals = results["shapes"][0]["rivals"]
    assert len(rivals) == 16 and all(rival["ms"] > 0 for rival in rivals.values())
    assert all(speed > 0 for speed in results["tokens_per_second"].values())
    assert capsys.readouterr().out.count("| LpAdamW, p =") == 7
