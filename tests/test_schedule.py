"""How norm and strength change in a run, and what is known before its first step."""

import pytest
import torch
from conftest import controlled, tiny_llama, token_rows, trainer_for, weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_lpdecay import LpAdamW, LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import Ramp, calibrate
from hf_lpdecay.sparsity import controller as controller_module
from hf_lpdecay.sparsity.schedule import decayed, strength, trim_threshold


EQUAL = [(1e-3,) * steps for steps in (1, 2, 3, 10, 150)]
UNEVEN = [(0.0, 2e-4, 4e-4, 6e-4, 8e-4), (1e-3, 1e-4, 1e-5, 0.0), (1e-3,) * 100 + (5e-4,) * 100]


@pytest.mark.parametrize("rates", EQUAL + UNEVEN, ids=str)
@pytest.mark.parametrize("p", [-2.0, 0.0, 0.5, 0.8, 1.5])
def test_the_strength_takes_a_weight_of_the_size_to_zero_in_time_and_no_sooner(p, rates):
    size = 0.05
    reached = []
    for slack in (1.0, 0.9):
        param = torch.nn.Parameter(torch.tensor([size, -size], dtype=torch.float64))
        optimizer = LpAdamW([param], p=p, lp_lambda=slack * strength(p, rates) * size ** (2 - p))
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            param.grad = torch.zeros_like(param)
            optimizer.step()
        reached.append(param.abs().max().item())
    assert reached[0] <= size / 1024 * 1.001 < reached[1]


@pytest.mark.parametrize("p", [0.0, 0.5, 0.8])
def test_in_many_steps_the_strength_is_that_of_a_flow(p):
    few, many, more = (strength(p, (1e-3,) * steps) * (2 - p) * steps * 1e-3 for steps in (10, 1000, 100_000))
    assert few > 1.5 and many == pytest.approx(1.0, abs=0.05) and more == pytest.approx(many)
    assert strength(p, (0.0, 0.0)) == 0


@given(
    size=st.floats(1e-30, 1e3), p=st.floats(-20, 1.99), lr=st.floats(0, 1), lp_lambda=st.floats(0, 1e6)
)  # fmt: skip
def test_a_size_decays_as_the_optimizer_says(size, p, lr, lp_lambda):
    param = torch.nn.Parameter(torch.tensor([size], dtype=torch.float64))
    param.grad = torch.zeros_like(param)
    LpAdamW([param], lr=lr, p=p, lp_lambda=lp_lambda, weight_decay=0.0).step()
    assert decayed(size, p, lr * lp_lambda) == pytest.approx(param.item(), rel=1e-9, abs=1e-200)


def test_the_threshold_follows_the_decaying_weights_down():
    assert trim_threshold(0.05, 0.05) == 0.05 and trim_threshold(0.0, 0.0) == 0.0
    assert trim_threshold(0.04, 0.01) == pytest.approx(0.02)  # as far from the one as from the other
    assert trim_threshold(0.04, 0.0) == trim_threshold(0.04, 1e-9) == 0.04 / 32


@pytest.mark.parametrize("p", [-1.0, 0.0, 0.5, 1.5])
@pytest.mark.parametrize("rates", [*EQUAL, *UNEVEN, (1e-3,) * 1000], ids=str)
def test_what_is_due_stays_below_the_sinking_threshold_and_the_rest_above(p, rates):
    size = 0.05
    lp_lambda = strength(p, rates) * size ** (2 - p)
    param = torch.nn.Parameter(torch.tensor([size * (1 - 1e-9), -size / 2, size], dtype=torch.float64))
    optimizer = LpAdamW([param], p=p, lp_lambda=lp_lambda)
    edge, thresholds = size, []
    for rate in rates:
        thresholds.append(trim_threshold(size, edge))
        optimizer.state[param]["lp_threshold"] = thresholds[-1]
        assert param[0] < thresholds[-1]
        optimizer.param_groups[0]["lr"] = rate
        param.grad = torch.zeros_like(param)
        optimizer.step()
        edge = decayed(edge, p, rate * lp_lambda)
        assert param[0].item() == pytest.approx(edge, rel=1e-3, abs=size / 1e4)
    assert thresholds[0] == size and thresholds == sorted(thresholds, reverse=True)
    # Of more steps than 200 the strength is that of fewer and larger ones.
    assert param[:2].abs().max() < size / (1000 if len(rates) <= 200 else 20) and param[2] == size


RATES = {"constant": lambda step: 1e-3, "warm-up": lambda step: 2e-3 * min(1.0, step / 30)}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("sinks", [True, False])
def test_what_is_due_goes_and_no_more_although_the_weights_move(sinks, rate, monkeypatch):
    if not sinks:
        monkeypatch.setattr(controller_module, "trim_threshold", lambda planned, edge: planned)
    params, optimizer, controller = controlled(0.7, num_plans=4, ramp_end=0.9)
    ahead = []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, controller.ramp.end):
        optimizer.param_groups[0]["lr"] = rate(step - 1)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
        optimizer.step()
        if step > controller.ramp.start and controller.ramp.next_plan(step) is not None:
            states = [(param, optimizer.state[param]["lp_threshold"]) for param in params.values()]
            pruned = [((param == 0) | (controller._score(param) < edge)).sum().item() for param, edge in states]
            ahead.append(sum(pruned) / sum(param.numel() for param in params.values()) - controller.ramp.sparsity(step))
        controller.after_step(step, lambda first, last, now=step: [[rate(now + i) for i in range(first, last)]])
    assert len(ahead) == 3 and min(ahead) > -0.01 and (max(ahead) < 0.002) == sinks


class Groups(TrainerCallback):
    """What each step is taken with."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([(group["p"], group["lp_lambda"]) for group in optimizer.param_groups])


def groups_of(folder, config, **options):
    groups = Groups()
    trainer = trainer_for(folder, config, callbacks=[groups], **options)
    trainer.train()
    return trainer, groups.seen


@pytest.mark.parametrize("schedule, shares", [("linear", [0.0, 0.5, 1.0]), ("cubic", [0.0, 0.875, 1.0])])
def test_norm_and_strength_of_the_plain_method_move_over_the_ramp(tmp_path, schedule, shares):
    config = LpDecayConfig(
        p=0.5, p_start=2.0, lp_lambda=0.02, lp_lambda_schedule=schedule, ramp_start=0.2, ramp_end=0.6
    )
    trainer, seen = groups_of(tmp_path, config)
    for step, share, p in ((0, shares[0], 2.0), (6, shares[0], 2.0), (12, shares[1], 1.25), (18, shares[2], 0.5)):
        decayed, *others = seen[step]
        assert decayed == pytest.approx((p, 0.02 * share))
        assert all(lp_lambda == 0 for _, lp_lambda in others)
    assert seen[-1][0] == pytest.approx((0.5, 0.02))
    assert trainer.state.log_history[0]["lp_lambda"] == seen[5][0][1]


def test_with_a_target_the_norm_moves_at_every_plan_and_the_target_is_met(tmp_path):
    trainer, seen = groups_of(
        tmp_path, LpDecayConfig(p=0.0, p_start=1.5, target_sparsity=0.5, ramp_end=0.7, num_plans=20)
    )
    norms = [step[0][0] for step in seen]
    assert norms[5] == 1.5 and norms[5:] == sorted(norms[5:], reverse=True) and 0 < norms[20] < 0.2
    assert measure_sparsity(trainer.model).sparsity == 0.5


@pytest.mark.parametrize("options", [{"s_rate": 0.3}, {"post_step": True}])
def test_variations_of_the_rule_meet_the_target(tmp_path, options):
    model = trainer_for(tmp_path, LpDecayConfig(p=0.5, target_sparsity=0.5, **options)).model
    trainer, _ = groups_of(tmp_path, LpDecayConfig(p=0.5, target_sparsity=0.5, **options))
    assert measure_sparsity(trainer.model).sparsity == 0.5
    assert all(trainer.optimizer.param_groups[0][name] == value for name, value in options.items())
    plain, _ = groups_of(tmp_path, LpDecayConfig(p=0.5, target_sparsity=0.5))
    assert any(not torch.equal(a, b) for a, b in zip(weights(trainer.model).values(), weights(plain.model).values()))
    assert measure_sparsity(model).sparsity == 0.0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_calibration_is_the_squared_gradient_of_the_first_batches(tmp_path, scope):
    seen = {}

    class Peek(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
            twin = tiny_llama(attention_dropout=0.0).double().train()
            batches = [batch for batch, _ in zip(train_dataloader, range(3))]
            for name, param in twin.named_parameters():
                seen[name] = torch.zeros_like(param)
            for batch in batches:
                twin.zero_grad()
                twin(**batch).loss.backward()
                for name, param in twin.named_parameters():
                    seen[name] += param.grad.square()
            seen["state"] = {
                name: {key: optimizer.state[param][key].clone() for key in ("lp_row_sq", "lp_col_sq")}
                for name, param in model.named_parameters()
                if "lp_row_sq" in optimizer.state[param]
            }

    config = LpDecayConfig(p=0.5, target_sparsity=0.5, calibration_batches=3, scope=scope)
    model = tiny_llama(attention_dropout=0.0)
    trainer = trainer_for(tmp_path, config, model=model, callbacks=[Peek()], warmup_steps=0)
    # Ours comes first in the list, but the trainer appends it: put the peek behind it.
    trainer.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, Peek))
    trainer.train()
    state = seen["state"]
    assert len(state) == 14
    for name, factors in state.items():
        torch.testing.assert_close(factors["lp_row_sq"].double(), seen[name].mean(1, keepdim=True), rtol=1e-3, atol=0)
        torch.testing.assert_close(factors["lp_col_sq"].double(), seen[name].mean(0, keepdim=True), rtol=1e-3, atol=0)
    assert measure_sparsity(model).sparsity == 0.5
    assert Ramp.from_config(config, 30).start == 0  # it does not wait for AdamW's second moment


def test_calibration_leaves_no_trace_but_its_result():
    model = tiny_llama().eval()
    params, optimizer, _ = controlled(model=model)
    batch = {name: torch.tensor([row[name] for row in token_rows(4)]) for name in ("input_ids", "labels")}
    before, state = weights(model), torch.random.get_rng_state()
    calibrate(model, list(params.values()), optimizer, [batch], 5)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    assert all(torch.equal(before[name], param) and param.grad is None for name, param in model.named_parameters())
    assert all(set(optimizer.state[param]) == {"lp_row_sq", "lp_col_sq"} for param in params.values())
    model.model.layers[1].mlp.forward = torch.zeros_like  # a layer that was dropped has no gradients
    unused = model.model.layers[1].mlp.up_proj.weight
    calibrate(model, list(params.values()), optimizer, [batch], 1)
    calibrate(model, [unused], (other := LpAdamW([unused])), [batch], 1)
    assert not other.state[unused]["lp_row_sq"].any() and optimizer.state[unused]["lp_row_sq"].any()
    with pytest.raises(ValueError, match="at least one training batch"):
        calibrate(model, list(params.values()), optimizer, [], 2)
    with pytest.raises(ValueError, match="returned no loss"):
        calibrate(model, list(params.values()), optimizer, [{"input_ids": batch["input_ids"]}], 1)
