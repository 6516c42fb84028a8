"""A target sparsity is reached, layer by layer or in the whole model, and reported."""

import itertools
import json

import pytest
import torch
from conftest import constant, controlled, drive, tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import Ramp, select_parameters
from hf_lpdecay.sparsity.quantiles import histogram, kth_smallest, lower_edges


@given(
    values=st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=60),
    rank=st.floats(0, 1),
    cut=st.integers(0, 60),
)
def test_order_statistics_agree_with_sorting(values, rank, cut):
    tensor = torch.tensor(values)
    k = max(1, round(rank * len(values)))
    ordered = tensor.sort().values
    parts = [part for part in (tensor[:cut], tensor[cut:]) if part.numel()]
    value, below = kth_smallest(lambda: iter(parts), lambda counts: counts, k)
    assert value == ordered[k - 1].item() and below == int((ordered < value).sum())
    edge, smallest = lower_edges(torch.stack([histogram(tensor)] * 2), [k, 1])
    assert smallest <= ordered[0].item() and smallest <= edge
    assert value - max(value * 2**-7, 2.0**-132) <= edge <= value and int((tensor < edge).sum()) < k


def zeros(params):
    return {name: param.numel() - int(param.count_nonzero()) for name, param in params.items()}


@pytest.mark.parametrize("importance", ["adam", "magnitude"])
@pytest.mark.parametrize("target", [0.5, 0.9, 1 / 3])
def test_every_layer_ends_with_exactly_the_target(target, importance):
    params, optimizer, controller = controlled(target, importance=importance)
    drive(params, optimizer, controller, 50)
    assert zeros(params) == {name: round(target * param.numel()) for name, param in params.items()}
    assert all(group["freeze_zeros"] for group in optimizer.param_groups)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params.values())


@pytest.mark.parametrize("importance", ["adam", "magnitude"])
def test_the_whole_model_ends_with_exactly_the_target(importance):
    params, optimizer, controller = controlled(0.7, scope="global", importance=importance)
    drive(params, optimizer, controller, 50)
    counts = zeros(params)
    total = sum(param.numel() for param in params.values())
    assert sum(counts.values()) == round(0.7 * total)
    assert len({counts[name] / param.numel() for name, param in params.items()}) > 1


def test_the_decay_follows_the_ramp_and_does_the_work_before_the_cut():
    params, optimizer, controller = controlled(0.5)
    numel = sum(param.numel() for param in params.values())
    ramp = controller.ramp
    drive(params, optimizer, controller, ramp.end - 1)
    generator_free = sum(zeros(params).values()) / numel
    assert 0.9 * 0.5 < generator_free <= 0.5
    for step in range(ramp.start, ramp.end + 1):
        assert ramp.sparsity(step) <= 0.5
    assert ramp.sparsity(ramp.start) == 0 and ramp.sparsity(ramp.end) == 0.5


def test_trimmed_decay_leaves_the_survivors_alone():
    def after(trim):
        model = tiny_llama()
        params, optimizer, controller = controlled(0.5, importance="magnitude", trim=trim, model=model)
        before = {name: param.detach().clone() for name, param in params.items()}
        for step in range(1, controller.ramp.end + 1):
            for param in params.values():
                param.grad = torch.zeros_like(param)
            optimizer.step()
            controller.after_step(step, constant(1e-3))
        return params, before

    params, before = after(trim=True)
    for name, param in params.items():
        survives = param != 0
        assert torch.equal(param[survives], before[name][survives])
    params, before = after(trim=False)
    assert all((param.abs() < before[name].abs())[param != 0].all() for name, param in params.items())


@pytest.mark.parametrize("importance", ["adam", "magnitude"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_hard_cut_follows_the_cubic_schedule_exactly(scope, importance):
    params, optimizer, controller = controlled(0.8, scope=scope, importance=importance, hard_cut=True)
    total = sum(param.numel() for param in params.values())
    for step in range(1, 51):
        for param in params.values():
            param.grad = torch.randn_like(param)
        optimizer.step()
        controller.after_step(step, constant(1e-3))
        if step == controller.ramp.end or controller.ramp.next_plan(step) is not None:
            scheduled, counts = controller.ramp.sparsity(step), zeros(params)
            if scope == "global":
                assert sum(counts.values()) == round(scheduled * total)
            else:
                assert counts == {name: round(scheduled * param.numel()) for name, param in params.items()}


@pytest.mark.parametrize("pattern", ["unstructured", "neurons", "2:4"])
def test_a_hard_cut_decays_nothing(pattern):
    params, optimizer, controller = controlled(pattern=pattern, hard_cut=True)
    for step in range(1, 51):
        before = {name: param.detach().clone() for name, param in params.items()}
        for param in params.values():
            param.grad = torch.randn_like(param)
        controller.before_step()
        optimizer.param_groups[0]["lr"] = 0.0 if step > 20 else 1e-3  # then a change is none of AdamW's
        optimizer.step()
        controller.after_step(step, constant(1e-3))
        if step > 20:
            assert all(torch.equal(param[param != 0], before[name][param != 0]) for name, param in params.items())
    assert controller.lp_lambda() == 0.0
    assert {count / params[name].numel() for name, count in zeros(params).items()} == {0.5}


def test_equal_weights_are_cut_to_the_exact_count():
    model = tiny_llama()
    for param in select_parameters(model).values():
        param.data.fill_(0.25)
    params, _optimizer, controller = controlled(0.37, importance="magnitude", model=model)
    controller.after_step(controller.ramp.end, constant(0.0))
    assert zeros(params) == {name: round(0.37 * param.numel()) for name, param in params.items()}


def test_what_is_zero_when_the_ramp_begins_stays_zero():
    params, optimizer, controller = controlled(0.3)
    drive(params, optimizer, controller, controller.ramp.start - 1)
    for param in params.values():
        param.data[:, ::2] = 0.0
    controller.after_step(controller.ramp.start, constant(1e-3))
    drive(params, optimizer, controller, 50)
    assert all((param[:, ::2] == 0).all() and (param[:, 1::2] != 0).all() for param in params.values())


def test_importance_is_the_factored_second_moment():
    params, optimizer, controller = controlled(0.5)
    for param in params.values():
        param.grad = torch.randn_like(param) * torch.linspace(0.1, 1, param.shape[0])[:, None]
    optimizer.step()
    controller.after_step(controller.ramp.start, constant(1e-3))
    for param in params.values():
        state, moment = optimizer.state[param], optimizer.state[param]["exp_avg_sq"].double()
        expected = moment.mean(1, keepdim=True) * moment.mean(0, keepdim=True) / moment.mean() ** 2
        assert torch.allclose((state["lp_row"] * state["lp_col"]).double() ** 2, expected, rtol=1e-4)


def test_a_tensor_without_gradient_is_ranked_by_magnitude():
    for scope in ("layer", "global"):
        params, optimizer, controller = controlled(0.5, scope=scope)
        first = next(iter(params))
        for name, param in params.items():
            param.grad = torch.zeros_like(param) if name == first else torch.randn_like(param)
        optimizer.step()
        controller.after_step(controller.ramp.start, constant(1e-3))
        assert "lp_row" not in optimizer.state[params[first]]
        controller.after_step(controller.ramp.end, constant(1e-3))
        assert all(param.isfinite().all() for param in params.values())


def test_ramp_waits_for_the_warm_up_and_needs_ten_steps():
    config = LpDecayConfig(target_sparsity=0.5, ramp_start=0.1, ramp_end=0.5, num_plans=20)
    assert (Ramp.from_config(config, 100).start, Ramp.from_config(config, 100).end) == (10, 50)
    assert Ramp.from_config(config, 100, warmup_steps=30).start == 30
    ramp = Ramp.from_config(LpDecayConfig(target_sparsity=0.5, num_plans=7), 107)
    assert ramp.plans == 7 and Ramp.from_config(config, 30).plans == 10
    assert [ramp.phase(s) for s in (0, ramp.start, ramp.end - 1, ramp.end)] == ["dense", "decay", "decay", "settle"]
    with pytest.raises(ValueError, match="would have 9 optimizer steps, from step 5 to 14 of 20, and needs 10"):
        Ramp.from_config(LpDecayConfig(target_sparsity=0.5), 20)


@pytest.mark.parametrize(
    "options, steps, warmup, start, end",
    [
        ({"target_sparsity": 0.5}, 1000, 0, 5, 700),
        ({"target_sparsity": 0.5}, 1000, 100, 100, 700),
        ({"target_sparsity": 0.5, "ramp_start": 0.5}, 1000, 0, 500, 700),
        ({"pattern": "2:4"}, 1000, 100, 0, 100),  # calibrated, so that it need not wait
        ({"pattern": "2:4"}, 60, 5, 0, 10),
        ({"pattern": "2:4", "importance": "adam"}, 1000, 150, 150, 160),
    ],
)
def test_where_the_ramp_is_by_default(options, steps, warmup, start, end):
    ramp = Ramp.from_config(LpDecayConfig(**options), steps, warmup)
    assert (ramp.start, ramp.end) == (start, end)


@given(start=st.integers(0, 50), length=st.integers(1, 300), num_plans=st.integers(1, 40))
def test_a_ramp_makes_as_many_plans_as_asked_for_at_equal_distances(start, length, num_plans):
    ramp = Ramp(start, start + length, min(num_plans, length), 0.5)
    plans = [step for step in range(ramp.end + 10) if ramp.next_plan(step) is not None]
    assert len(plans) == ramp.plans and plans[0] == start
    distances = [after - before for before, after in itertools.pairwise([*plans, ramp.end])]
    assert max(distances) - min(distances) <= 1
    for plan, after in itertools.pairwise([*plans, ramp.end]):
        assert ramp.next_plan(plan) == after and {ramp.following(step) for step in range(plan, after)} == {after}
    assert ramp.following(start - 1) is ramp.following(ramp.end) is None


def test_report_counts_exact_zeros_in_scope_and_in_the_whole_model(tmp_path):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[:8] = 0.0
    model.model.layers[0].self_attn.k_proj.weight.data[0, :2] = torch.tensor([-0.0, 1e-30])
    model.model.embed_tokens.weight.data[0] = 0.0
    report = measure_sparsity(model)
    selected = sum(p.numel() for p in select_parameters(model).values())
    assert report.sparsity == (8 * 32 + 1) / selected
    assert report.model_sparsity == (8 * 32 + 1 + 32) / sum(p.numel() for p in model.parameters())
    table = str(report)
    assert "model.layers.0.self_attn.q_proj.weight" in table and "25.00%" in table and "whole model" in table
    assert report.table(by="module").count("q_proj") == 1
    report.to_json(tmp_path / "sparsity.json", perplexity=3.5)
    loaded = json.loads((tmp_path / "sparsity.json").read_text())
    assert loaded["perplexity"] == 3.5 and loaded["sparsity"] == report.sparsity
    assert len(loaded["tensors"]) == len(list(model.parameters()))
    assert {t["name"] for t in loaded["tensors"] if not t["selected"]} >= {"model.embed_tokens.weight"}


def test_plot_is_a_picture_with_and_without_a_course(tmp_path):
    history = [{"step": s, "loss": 3.0 - s / 10, "sparsity": s / 10} for s in range(5)] + [
        {"step": 5, "eval_loss": 1.0}
    ]
    for log_history in ([], history):
        measure_sparsity(tiny_gpt2()).plot(tmp_path / "run.png", log_history, title="tiny")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]
