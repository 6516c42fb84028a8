"""The GPU's kernel on CPU tensors, in Triton's interpreter: `test_triton.py` runs this file, in a process of its own.

TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py

The variable must be set before anything imports Triton (torch does), and nothing can be compiled beside it.
"""

import math

import pytest
import torch
from reference import ReferenceLpAdamW

from hf_lpdecay.optim import LpAdamW, LpDecay, adamw, functional, one_pass, triton_kernel


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for every infinity and NaN

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05, "lp_lambda": 1e-3}
NORMS = (-1, 0, 0.3, 0.5, 1, 1.5, 2, 3)
VARIANTS = ({}, {"freeze_zeros": True}, {"post_step": True, "freeze_zeros": True}, {"post_step": True})
# All that is to be distinguished: the groups of one optimizer, since they are updated in the same launches.
ALL = [({"p": p, **variant}, planned) for p in NORMS for variant in VARIANTS for planned in (False, True)]
# The interpreter takes some 10 ms for a block: every p with one or two of the rest, and the other way round.
SOME = ALL[::5]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setitem(adamw.KERNELS, "cpu", triton_kernel)


def importance(rows, cols):
    return torch.linspace(0.5, 2, rows)[:, None], torch.linspace(2, 0.5, cols)[None]


def trained(fused, shapes, cases=SOME, dtype=torch.float32, **options):
    """Two steps of one parameter for each case and shape."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    groups, plans = [], []
    for group, planned in cases:
        for shape in shapes:
            param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(dtype))
            param.data.view(-1)[::7] = 0.0
            groups.append({"params": [param], **group})
            plans.append({})
            if planned:
                plans[-1].update(lp_lambda=1e-2, lp_threshold=0.05)
                if len(shape) == 2:
                    plans[-1]["lp_row"], plans[-1]["lp_col"] = importance(*shape)
    optimizer = LpAdamW(groups, **OPTIONS, **options, fused=fused)
    params = [group["params"][0] for group in groups]
    for param, plan in zip(params, plans):
        optimizer.state[param].update(plan)
    for _ in range(2):
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(dtype)
        optimizer.step()
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


def test_agrees_with_the_float64_twin():
    params, _ = trained(True, [(3, 7)], ALL)
    generator = torch.Generator().manual_seed(0)
    twins = []
    for group, planned in ALL:
        weights = torch.randn((3, 7), generator=generator).mul_(0.1)
        weights.view(-1)[::7] = 0.0
        options = {**OPTIONS, **group}
        if planned:
            row, col = importance(3, 7)
            options.update(lp_lambda=1e-2, threshold=0.05, h=(row * col).flatten())
        twins.append(ReferenceLpAdamW(weights.flatten(), **options))
    for _ in range(2):
        for twin in twins:
            twin.step((torch.randn((3, 7), generator=generator) * 1e-2).flatten())
    for case, param, twin in zip(ALL, params, twins):
        expected = torch.tensor(twin.w, dtype=torch.float64).view(3, 7)
        assert torch.allclose(param.double(), expected, rtol=2e-4, atol=1e-7), case


def test_agrees_with_the_step_in_torch_operations():
    # Two blocks, where 16 bytes are loaded at once and where not; a few elements; none.
    shapes = [(64, 33), (41, 53), (7,), (0,)]
    (ours, states), (theirs, expected) = trained(True, shapes), trained(False, shapes)
    for a, b, state, other in zip(ours, theirs, states, expected):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and torch.equal(a == 0, b == 0)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(state[name], other[name], rtol=1e-5, atol=1e-9)
        assert state["step"] == other["step"] == 2


@pytest.mark.parametrize("float32_moments", [True, False])
@pytest.mark.parametrize("rounding", [None, False])
def test_bfloat16_draws_the_same_random_bits_as_torch_operations_do(float32_moments, rounding):
    options = {"dtype": torch.bfloat16, "float32_moments": float32_moments, "stochastic_rounding": rounding}
    shapes = [(64, 16) if float32_moments else (37, 5)]
    (ours, states), (theirs, expected) = trained(True, shapes, **options), trained(False, shapes, **options)
    a, b = (torch.cat([param.flatten() for param in params]) for params in (ours, theirs))
    # A difference in float32's last place may turn a rounding, once in a few hundred times.
    assert (a == b).float().mean() > 0.99
    assert torch.allclose(a.float(), b.float(), rtol=0.02, atol=1e-3)
    for state, other in zip(states, expected):
        assert state["exp_avg"].dtype == (torch.float32 if float32_moments else torch.bfloat16)
        assert torch.allclose(state["exp_avg_sq"].float(), other["exp_avg_sq"].float(), rtol=0.02, atol=1e-12)


def test_where_float32_is_exact_all_roundings_are_those_of_torch_operations():
    # 1 - lr * weight_decay has 10 bits, the weights have 8.
    options = {"lr": 0.5, "weight_decay": 2.0**-9, "freeze_zeros": True}
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(torch.bfloat16)) for n in (5000, 33)]
        before = [param.detach().clone() for param in params]
        optimizer = LpAdamW(params, **options, fused=fused)
        for _ in range(3):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        results.append([param.detach() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert (results[0][0] != before[0]).float().mean() > 0.1


def test_rounding_to_nearest_is_that_of_torch_also_in_the_middle():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(2000).to(torch.bfloat16))
    param.grad = torch.randn(2000).to(torch.bfloat16)  # of the squares one in 32 lies in the middle
    options = {**OPTIONS, "betas": (0.0, 0.0), "float32_moments": False, "stochastic_rounding": False}
    optimizer = LpAdamW([param], **options, fused=True)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], param.grad.float().square().to(torch.bfloat16))
    assert torch.equal(optimizer.state[param]["exp_avg"], param.grad)


def test_the_decay_alone_is_that_of_torch_operations():
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for covers in (triton_kernel.covers, lambda *args: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_kernel, "covers", covers)
                torch.manual_seed(0)
                params, plans = [], []
                for group, planned in SOME:
                    params.append({"params": [torch.nn.Parameter((torch.randn(31, 17) * 0.1).to(dtype))], **group})
                    params[-1]["params"][0].data[::3] = 0.0
                    plan = dict(zip(("lp_row", "lp_col"), importance(31, 17)), lp_lambda=2e-3, lp_threshold=0.08)
                    plans.append(plan if planned else {})
                optimizer = LpDecay(torch.optim.SGD(params, lr=0.1), lp_lambda=1e-3)
                params = [group["params"][0] for group in params]
                for param, plan in zip(params, plans):
                    optimizer.state[param].update(plan)
                for param in params:
                    param.grad = torch.randn(param.shape).mul_(0.01).to(dtype)
                optimizer.step()
                results.append(torch.cat([param.detach().flatten().float() for param in params]))
        ours, theirs = results
        close = torch.isclose(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-7)
        assert close.float().mean() > 0.999 and ((ours == 0) == (theirs == 0)).float().mean() > 0.999


def batch_of(tensors, step, seed=None, factors=None, **options):
    """What one step of LpAdamW adds."""
    options = {**OPTIONS, "p": 0.5, "freeze_zeros": False, "post_step": False, "threshold": None, **options}
    batch = triton_kernel.Batch()
    batch.add(triton_kernel.case_for(tensors, factors, options), tensors, step, options, seed, factors)
    return batch


def test_a_learning_rate_may_be_a_tensor_and_at_zero_no_bit_changes():
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        torch.manual_seed(0)
        tensors = tuple(torch.rand(100) for _ in range(4))
        batch_of(tensors, torch.zeros(()), lr=lr).run()
        results.append(torch.stack(tensors))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for dtype in (torch.float32, torch.bfloat16):
        for lr, lp_lambda in ((0.0, 1.0), (torch.tensor(0.0), 1.0), (torch.tensor(0.0), 0.0)):
            for p in (-1, 0.5, 2, 3):
                w = torch.cat((torch.linspace(-1, 1, 40), torch.tensor([0.0, 1e-38, 1e-45, 1e38]))).to(dtype)
                tensors = (w.clone(), w.clone(), torch.zeros_like(w), torch.zeros_like(w))
                step = torch.zeros(())
                batch_of(tensors, step, seed=5, lr=lr, lp_lambda=lp_lambda, p=p).run()
                assert torch.equal(tensors[0], w) and step == 1 and (tensors[2] != 0).any()


def test_without_a_strength_the_step_is_adamw():
    for p in (-1, 0.5, 2, 3):
        results = []
        for options in (
            {"lp_lambda": 0.0},
            {"lp_lambda": 1.0, "threshold": 0.0},
            {"lp_lambda": 0.0, "post_step": True},
        ):
            torch.manual_seed(0)
            tensors = tuple(torch.rand(100) for _ in range(4))
            tensors[0][0] = 0.0
            results.append(tensors)
            batch_of(tensors, torch.zeros(()), p=p, **options).run()
        assert all(torch.equal(results[0][0], tensors[0]) for tensors in results[1:])
    torch.manual_seed(0)
    expected = tuple(torch.rand(100) for _ in range(4))
    expected[0][0] = 0.0
    functional.adamw_([(*expected, torch.zeros(()))], OPTIONS, fused=False)
    assert torch.allclose(results[0][0], expected[0], rtol=1e-6, atol=1e-7)


def test_the_table_goes_to_the_device_only_if_something_changed():
    launches = []

    def hook(*args, **kwargs):
        launches.append(args)

    one_pass.update.add_pre_run_hook(hook)
    triton_kernel._table.cache_clear()
    triton_kernel._programs.cache_clear()
    try:
        params = [torch.nn.Parameter(torch.rand(n, 16)) for n in range(1, 13)]
        for param in params:
            param.grad = torch.rand_like(param)
        optimizer = LpAdamW(params, **OPTIONS, p=0.5, fused=True)
        launches.clear()
        for _ in range(3):
            optimizer.step()
        assert triton_kernel._table.cache_info().misses == triton_kernel._programs.cache_info().misses == 1
        assert len(launches) == 3  # for 12 parameters
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
        assert triton_kernel._table.cache_info().misses == 2 and triton_kernel._programs.cache_info().misses == 1
    finally:
        one_pass.update.pre_run_hooks.remove(hook)


class Tail:
    """The end of a tensor of more than 2 ** 32 elements, as far as the kernel looks at it."""

    device = torch.device("cpu")

    def __init__(self, tensor, before):
        self.tensor, self.before, self.dtype = tensor, before, tensor.dtype

    def numel(self):
        return self.before + self.tensor.numel()

    def data_ptr(self):
        return self.tensor.data_ptr() - self.before * self.tensor.element_size()


def test_positions_beyond_32_bits():
    rows, cols, seed = 3, 1000, 2**32 - 7
    first_row = (1 << 33) // (cols * triton_kernel._BLOCK) * triton_kernel._BLOCK
    before = first_row * cols
    torch.manual_seed(0)
    row, col = importance(rows, cols)
    w, g = (torch.randn(rows, cols).to(torch.bfloat16) for _ in range(2))
    m, v = torch.zeros(rows, cols), torch.zeros(rows, cols)
    expected = w.clone()
    options = {**OPTIONS, "p": 0.5, "freeze_zeros": False, "threshold": 1.0}
    bits = functional.random_bits(w.numel(), seed, before)
    state = (g, m.clone(), v.clone(), torch.zeros(()))
    functional.low_precision_lp_adamw_(expected, *state, bits=bits, row=row, col=col, **options)

    tensors = tuple(Tail(tensor, before) for tensor in (w, g, m, v))
    case = triton_kernel.Case(Tail.device, factors=True, weight=torch.bfloat16, aligned=False)
    batch = triton_kernel.Batch()
    batch.add(case, tensors, torch.zeros(()), {**options, "post_step": False}, seed, (row, col))
    ((words, blocks),) = batch._tasks[case]
    table, numbers = torch.frombuffer(bytearray(words), dtype=torch.int64), torch.empty(triton_kernel._NUMBERS)
    table[4] = row.data_ptr() - first_row * row.element_size()
    one_pass.prepare[(1,)](table, numbers, 1, False, triton_kernel._PREPARE_BLOCK)
    last = before // triton_kernel._BLOCK
    programs = torch.tensor([[0, block] for block in range(last, blocks)], dtype=torch.int32)
    one_pass.update[(len(programs),)](programs, table, numbers, *triton_kernel._constants(case))
    assert torch.equal(m, state[1]) and (w == expected).float().mean() > 0.99


def test_a_captured_graph_draws_other_random_bits_in_each_step():
    table, numbers = torch.zeros(24, dtype=torch.int64), torch.empty(12)
    step = torch.zeros(())
    table[6], table[10] = step.data_ptr(), 5
    seeds = []
    for captured in (False, False, True, True):
        one_pass.prepare[(1,)](table, numbers, 1, captured, 1)
        seeds.append(numbers.view(torch.int32)[10].item())
    assert seeds[:2] == [5, 5] and len(set(seeds)) == 3 and step == 4


def test_nan_and_infinity_are_not_hidden():
    param = torch.nn.Parameter(torch.tensor([math.nan, math.inf, 1.0, 1.0, 0.5] * 10))
    param.grad = torch.tensor([0.0, 0.0, math.nan, math.inf, 0.1] * 10)
    LpAdamW([param], **OPTIONS, p=0.8, fused=True).step()
    kind = param.detach().view(-1, 5)
    assert kind[:, 0].isnan().all() and (kind[:, 1] == math.inf).all()
    assert kind[:, 2:4].isnan().all() and kind[:, 4].isfinite().all()


def test_what_the_kernel_does_not_cover_is_updated_all_the_same(monkeypatch):
    def refuse(*args):
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(triton_kernel, "available", refuse)
    for dtype, options in ((torch.float64, {}), (torch.float16, {}), (torch.float32, {"p": 2000})):
        param = torch.nn.Parameter(torch.ones(5, 4, dtype=dtype).t() if options else torch.ones(5, 4, dtype=dtype))
        param.grad = torch.ones_like(param)
        LpAdamW([param], **OPTIONS, **options).step()
        assert (param != 1).all()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_goes_wrong_is_noticed_and_not_used(monkeypatch, alone, factors, dtype):
    case = triton_kernel.Case(torch.device("cpu"), factors, factors and alone, alone, dtype, aligned=not factors)
    triton_kernel._build.cache_clear()
    assert triton_kernel.available(case)
    monkeypatch.setattr(triton_kernel, "_log2", lambda x: math.log2(x) + 0.2 if x > 0 else -math.inf)
    triton_kernel._build.cache_clear()
    with pytest.raises(RuntimeError, match="goes wrong as Triton compiles it for cpu"):
        triton_kernel.build(case)
    triton_kernel._build.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_layer_on_a_gpu_is_the_plain_one(dtype):
    from hf_lpdecay.inference import triton_kernel as sparse_kernel
    from hf_lpdecay.inference.encoding import encode

    torch.manual_seed(0)
    for rows, cols, n in ((19, 133, 1), (16, 128, 8), (5, 7, 3)):
        weight = torch.randn(rows, cols).to(dtype)
        weight[torch.rand(rows, cols) < 0.5] = 0.0
        x, bias = torch.randn(n, cols).to(dtype), torch.randn(rows).to(dtype)
        for b in (None, bias):
            expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            actual = sparse_kernel.linear(encode(weight), b, x)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * 5)
