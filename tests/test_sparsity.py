import dataclasses
import itertools
import json

import pytest
import torch
from conftest import constant, controlled, drive, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import Ramp, match_parameters, select_parameters
from hf_lpdecay.sparsity.quantiles import histogram, kth_smallest, lower_edges


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def kinds(params):
    return sorted({name.split(".")[-2] for name in params})


def test_all_linear_leaves_out_embeddings_head_norms_and_biases():
    assert kinds(select_parameters(tiny_llama(tie_word_embeddings=False))) == sorted(ATTENTION + MLP)
    assert kinds(select_parameters(tiny_llama())) == sorted(ATTENTION + MLP)
    assert kinds(select_parameters(tiny_gpt2())) == ["c_attn", "c_fc", "c_proj"]
    assert kinds(select_parameters(tiny_bert())) == ["dense", "key", "query", "value"]
    assert kinds(select_parameters(tiny_t5())) == ["k", "o", "q", "v", "wi", "wo"]
    assert not any("classifier" in name for name in select_parameters(tiny_bert()))
    assert all(param.ndim == 2 for param in select_parameters(tiny_bert()).values())


def test_suffixes_regex_and_exclusion():
    model = tiny_llama()
    assert kinds(select_parameters(model, ["q_proj", "mlp.up_proj"])) == ["q_proj", "up_proj"]
    assert list(select_parameters(model, r".*\.1\.mlp\.(up|gate)_proj")) == [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert kinds(select_parameters(model, "all-linear", MLP)) == sorted(ATTENTION)
    assert len(select_parameters(model, "all-linear", r".*layers\.0.*")) == 7


def test_tied_weights_count_once_under_the_name_they_are_saved_by():
    model = tiny_llama()
    assert list(select_parameters(model, ["lm_head"])) == ["model.embed_tokens.weight"]
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = list(select_parameters(model, ["up_proj"]))
    assert names == ["model.layers.0.mlp.up_proj.weight"]
    report = measure_sparsity(model)
    assert sum(t.numel for t in report.tensors) == sum(p.numel() for p in model.parameters())


def test_what_starts_at_zero_is_refused_by_name_and_left_out_of_all_linear():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: all zero.*exclude_modules"):
        select_parameters(model, ["down_proj"])
    assert len(select_parameters(model)) == 13
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with pytest.raises(ValueError, match=r"lora_B.* and 1 more: all zero"):
        select_parameters(lora, r".*lora_B.*")
    with pytest.raises(ValueError, match="requires_grad"):
        select_parameters(lora)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_modules": ["q_prj"]}, r"matches no linear layer. Did you mean 'q_proj'\?"),
        ({"target_modules": "q_proj"}, "regular expression for the whole name; give a list"),
        ({"target_modules": ["input_layernorm"]}, "end in: down_proj, gate_proj"),
        ({"exclude_modules": ["qproj"]}, r"exclude_modules=\['qproj'\] matches no linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves nothing"),
    ],
)
def test_patterns_that_match_nothing_say_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_parameters(tiny_llama(), **arguments)


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


def test_defaults_are_resolved_by_the_pattern():
    plain, early = LpDecayConfig(target_sparsity=0.7), LpDecayConfig(pattern="2:4")
    names = ("p", "scope", "importance", "num_plans", "calibration_batches", "trim")
    assert [getattr(plain, name) for name in names] == [0.5, "global", "adam", 20, 0, True]
    assert [getattr(early, name) for name in names] == [0.5, "layer", "activation", 2, 64, True]
    assert LpDecayConfig(target_sparsity=0.5, pattern="neurons").scope == "layer"
    assert LpDecayConfig(pattern="2:4", importance="adam").calibration_batches == 0
    for config in (plain, early):  # such as a checkpoint's
        assert dataclasses.asdict(LpDecayConfig(**dataclasses.asdict(config))) == dataclasses.asdict(config)


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"p": float("nan"), "target_sparsity": 0.5}, "Invalid p: nan"),
        ({"p": "0.5", "target_sparsity": 0.5}, "Invalid p: '0.5'"),
        ({"p": 2, "target_sparsity": 0.5}, "Invalid p: 2 - should be below 2 with a target_sparsity"),
        ({"lp_lambda": -1.0}, "Invalid lp_lambda: -1.0"),
        ({"lp_lambda": float("inf")}, "Invalid lp_lambda: inf"),
        ({"target_sparsity": 1.0}, "Invalid target_sparsity: 1.0"),
        ({"target_sparsity": 0}, "Invalid target_sparsity: 0"),
        ({"target_sparsity": 50}, "Invalid target_sparsity: 50 - should be a fraction"),
        ({"target_sparsity": 0.5, "lp_lambda": 0.1}, "Both target_sparsity=0.5 and lp_lambda=0.1"),
        ({}, "Neither target_sparsity nor lp_lambda"),
        (
            {"target_sparsity": 0.5, "ramp_start": 0.7, "ramp_end": 0.7},
            "ramp_end=0.7 - should be greater than ramp_start=0.7",
        ),
        ({"target_sparsity": 0.5, "ramp_end": 1.5}, "Invalid ramp_end: 1.5"),
        ({"target_sparsity": 0.5, "scope": "row"}, "Invalid scope: 'row'"),
        ({"target_sparsity": 0.5, "pattern": "4:2"}, "Invalid pattern: '4:2'"),
        ({"target_sparsity": 0.5, "pattern": "block:16"}, "Invalid pattern: 'block:16'"),
        (
            {"target_sparsity": 0.6, "pattern": "2:4"},
            "pattern='2:4' leads to a sparsity of 0.5, but target_sparsity=0.6",
        ),
        ({"lp_lambda": 0.1, "pattern": "2:4"}, "pattern='2:4' needs a target_sparsity instead of lp_lambda=0.1"),
        ({"target_sparsity": 0.5, "importance": "wanda"}, "Invalid importance: 'wanda'"),
        ({"lp_lambda": 0.1, "importance": "adam"}, "importance='adam' needs a target_sparsity"),
        ({"lp_lambda": 0.1, "trim": True}, "trim=True needs a target_sparsity"),
        ({"lp_lambda": 0.1, "hard_cut": True}, "hard_cut=True needs a target_sparsity"),
        ({"target_sparsity": 0.5, "num_plans": 0}, "Invalid num_plans: 0"),
        ({"target_sparsity": 0.5, "p_start": 2.0}, "Invalid p_start: 2.0 - should be below 2 with a target_sparsity"),
        ({"lp_lambda": 0.1, "p_start": "high"}, "Invalid p_start: 'high'"),
        ({"lp_lambda": 0.1, "s_rate": 0.0}, "Invalid s_rate: 0.0 - should be > 0 and <= 1"),
        ({"lp_lambda": 0.1, "lp_lambda_schedule": "cosine"}, "Invalid lp_lambda_schedule: 'cosine'"),
        ({"target_sparsity": 0.5, "lp_lambda_schedule": "linear"}, "lp_lambda_schedule='linear' needs lp_lambda"),
        ({"target_sparsity": 0.5, "calibration_batches": -1}, "Invalid calibration_batches: -1"),
        ({"lp_lambda": 0.1, "calibration_batches": 2}, "calibration_batches=2 needs a target_sparsity"),
        (
            {"target_sparsity": 0.5, "importance": "magnitude", "compensate": False, "calibration_batches": 2},
            "calibration_batches=2 is used by .* leave it out with importance='magnitude'",
        ),
        ({"target_sparsity": 0.5, "pattern": "neurons", "scope": "global"}, "pattern='neurons' with scope='global'"),
        ({"pattern": "heads", "freeze_zeros": True}, "pattern='heads' needs a target_sparsity"),
        ({"target_sparsity": 0.5, "target_modules": []}, r"Invalid target_modules: \[\]"),
        ({"target_sparsity": 0.5, "target_modules": None}, "Invalid target_modules: None"),
    ],
)
def test_config_refuses_bad_values_with_value_and_cure(options, message):
    with pytest.raises(ValueError, match=message):
        LpDecayConfig(**options)


def test_config_defaults_follow_the_mode():
    target, plain = LpDecayConfig(target_sparsity=0.5), LpDecayConfig(lp_lambda=0.1)
    assert (target.importance, target.trim) == ("adam", True)
    assert (plain.importance, plain.trim) == ("magnitude", False)
    assert LpDecayConfig(freeze_zeros=True).lp_lambda == 0.0
    assert LpDecayConfig(lp_lambda=0.1, target_modules=["all-linear"]).target_modules == "all-linear"
