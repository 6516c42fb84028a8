"""The GPU's kernel: its arithmetic in Triton's interpreter, its compilation, and on a GPU if there is one.

CUDA_VISIBLE_DEVICES=0 pytest -m gpu
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_lpdecay import LpAdamW, LpDecay
from hf_lpdecay.optim import adamw, kernels, triton_kernel
from hf_lpdecay.optim.functional import low_precision_lp_adamw_, random_bits


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05, "lp_lambda": 1e-3}
SHAPES = ((37, 53), (64, 128), (5000,), (1,), (0,))


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def params_of(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator).mul_(0.1)
        weight.view(-1)[::7] = 0.0
        params.append(torch.nn.Parameter(weight.to(device, dtype)))
    return params


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step + 1)
    for param in params:
        grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(param.device, param.dtype)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def plan(rows, cols, device):
    row, col = torch.linspace(0.5, 2, rows, device=device)[:, None], torch.linspace(2, 0.5, cols, device=device)[None]
    return {"lp_lambda": 1e-2, "lp_threshold": 0.05, "lp_row": row, "lp_col": col}


def trained(fused, device="cpu", dtype=torch.float32, planned=False, steps=20, **options):
    torch.manual_seed(0)
    params = params_of(dtype=dtype, device=device)
    optimizer = LpAdamW(params, **{**OPTIONS, **options}, fused=fused)
    for param in params:
        if planned and param.dim() == 2:
            optimizer.state[param].update(plan(*param.shape, device))
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


def test_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "interpreted_triton.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-1000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu_that_is_not_here(monkeypatch, tmp_path, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_lpdecay.optim import one_pass

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or nothing would be compiled the second time

    def assembly(kernel, types, constants, warps):
        names = kernel.arg_names
        signature = dict(zip(names, types + ["constexpr"] * len(constants)))
        aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(types) if type.startswith("*")}
        source = ASTSource(kernel, signature, dict(zip(names[len(types) :], constants)), aligned)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]

    assembly(one_pass.prepare, ["*i64", "*fp32", "i32"], [True, triton_kernel._PREPARE_BLOCK], 2)
    for case in (
        triton_kernel.Case(None, factors=True),
        triton_kernel.Case(None, post_step=True, weight=torch.bfloat16, moment=torch.bfloat16, aligned=False),
        triton_kernel.Case(None, alone=True, weight=torch.bfloat16),
    ):
        constants = list(triton_kernel._constants(case))
        code = assembly(one_pass.update, ["*i32", "*i64", "*fp32"], constants, triton_kernel._WARPS)
        assert (".v4.b32" in code) == case.aligned


@pytest.mark.parametrize("missing", ["Triton", "a device"])
def test_without_triton_one_warning_and_the_same_result(monkeypatch, caplog, missing):
    expected, _ = trained(False, planned=True, steps=3)
    monkeypatch.setitem(adamw.KERNELS, "cpu", triton_kernel)
    if missing == "Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "hf_lpdecay.optim.one_pass", raising=False)
    else:
        pytest.importorskip("triton")
    triton_kernel._build.cache_clear()
    kernels.warn_once.cache_clear()
    try:
        result, _ = trained(None, planned=True, steps=3)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1 and warnings[0].count("Triton") == 1
        with pytest.raises(RuntimeError, match=r"cannot be imported|could not be compiled"):
            LpAdamW(params_of(), fused=True)
    finally:
        triton_kernel._build.cache_clear()
    for a, b in zip(result, expected):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@gpu
@pytest.mark.parametrize("p", [-1, 0, 0.3, 0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_step_in_torch_operations(p, planned, dtype):
    for variant in ({}, {"post_step": True}, {"freeze_zeros": True}):
        options = {"device": "cuda", "dtype": dtype, "planned": planned, "p": p, **variant}
        (ours, states), (theirs, expected) = trained(True, **options), trained(False, **options)
        exact = dtype == torch.float32
        for a, b, state, other in zip(ours, theirs, states, expected):
            assert torch.allclose(a.float(), b.float(), rtol=0 if exact else 0.02, atol=2e-5 if exact else 1e-3)
            # A difference in the last place may turn a rounding, or let a weight be zero a step later.
            assert (torch.isclose(a, b, rtol=1e-4, atol=1e-6) | (a.numel() < 10)).float().mean().nan_to_num(1) > 0.97
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(state[name].float(), other[name].float(), rtol=1e-4, atol=1e-8)
            assert state["step"].device.type == "cuda" and state["step"] == other["step"] == 20


@gpu
@pytest.mark.parametrize("planned", [False, True])
def test_the_decay_alone_on_a_gpu(monkeypatch, planned):
    results = []
    for covers in (triton_kernel.covers, lambda *args: False):
        monkeypatch.setattr(triton_kernel, "covers", covers)
        params = params_of(device="cuda")
        optimizer = LpDecay(torch.optim.SGD(params, lr=0.1), p=0.5, lp_lambda=1e-3)
        for param in params:
            if planned and param.dim() == 2:
                optimizer.state[param].update(plan(*param.shape, "cuda"))
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@gpu
def test_a_step_waits_for_nothing_and_launches_two_kernels_for_any_number_of_tensors():
    launched = []
    for number in (3, 300):
        params = params_of([(32, 64)] * number, device="cuda")
        optimizer = LpAdamW(params, **OPTIONS, p=0.5, fused=True)
        for param in params:
            optimizer.state[param].update(plan(32, 64, "cuda"))
        set_grads(params, 0)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(3):
                optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        launched.append(sorted(event.name for event in events))
    assert launched[0] == launched[1] and [launched[0].count(name) for name in ("prepare", "update")] == [1, 1]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_a_cuda_graph_is_a_step(dtype):
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        params = params_of(dtype=dtype, device="cuda")
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = LpAdamW(params, **{**OPTIONS, "lr": lr}, p=0.5)
        set_grads(params, 0)
        optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 20):
            lr.fill_(1e-2 / step)
            set_grads(params, step)
            if captured and step != 10:  # tables of steps in between do not disturb the graph
                graph.replay()
            else:
                optimizer.step()
        assert optimizer.state[params[0]]["step"] == 20
        results.append([param.detach().float() for param in params])
    for a, b in zip(*results):
        # Random bits are others in a graph.
        tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
        assert torch.allclose(a, b, **tolerance)


@gpu
def test_a_graph_rounds_otherwise_in_each_replay():
    (param,) = params_of([(4096,)], torch.bfloat16, "cuda")
    optimizer = LpAdamW([param], **OPTIONS, p=0.5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    graph, results, before = torch.cuda.CUDAGraph(), [], param.detach().clone()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(2):
        param.data.copy_(before)
        graph.replay()
        results.append(param.detach().clone())
    assert not torch.equal(*results)


@gpu
def test_on_another_stream_and_with_tensors_on_several_gpus():
    expected, _ = trained(True, "cuda", p=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result, _ = trained(True, "cuda", p=0.5)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(result, expected))
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    params = [param for device in devices for param in params_of(device=device)]
    optimizer = LpAdamW(params, **OPTIONS, p=0.5, fused=True)
    for step in range(20):
        for first in range(0, len(params), len(SHAPES)):
            set_grads(params[first : first + len(SHAPES)], step)
        optimizer.step()
    assert all(torch.equal(param.cpu(), expected[i % len(SHAPES)].cpu()) for i, param in enumerate(params))


@gpu
def test_a_state_that_was_read_to_the_cpu_goes_on_on_the_gpu():
    expected, _ = trained(True, "cuda", p=0.5, steps=2)
    params = params_of(device="cuda")
    optimizer = LpAdamW(params, **OPTIONS, p=0.5)
    set_grads(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    for values in state["state"].values():
        values.update({name: value.cpu() for name, value in values.items() if torch.is_tensor(value)})
    optimizer = LpAdamW(params, **OPTIONS, p=0.5)
    optimizer.load_state_dict(state)
    set_grads(params, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected))


@gpu
def test_more_elements_than_31_bits_count():
    before, tail = 1 << 31, 1 << 12
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of GPU memory")
    param = torch.nn.Parameter(torch.ones(before + tail, dtype=torch.bfloat16, device="cuda"))
    param.data[before:] = torch.linspace(-1, 1, tail)
    param.grad = torch.full_like(param, 0.1)
    optimizer = LpAdamW([param], **OPTIONS, p=0.5, fused=True, float32_moments=False)
    expected, grad = param.detach()[before:].clone(), param.grad[before:]
    torch.manual_seed(0)
    bits = random_bits(tail, int(torch.randint(1 << 32, ())), before, "cuda")
    moments = torch.zeros_like(expected), torch.zeros_like(expected)
    options = {**OPTIONS, "p": 0.5, "freeze_zeros": False, "bits": bits}
    low_precision_lp_adamw_(expected, grad, *moments, torch.zeros(()), **options)
    torch.manual_seed(0)
    optimizer.step()
    assert (param[before:] == expected).float().mean() > 0.97
    assert (param[: 1 << 20] != 1).all()
