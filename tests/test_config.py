"""`LpDecayConfig`: defaults, and values that are refused."""

import dataclasses

import pytest

from hf_lpdecay import LpDecayConfig


def test_defaults_are_resolved_by_the_pattern():
    plain, early = LpDecayConfig(target_sparsity=0.7), LpDecayConfig(pattern="2:4")
    names = ("p", "scope", "importance", "num_plans", "calibration_batches", "trim")
    assert [getattr(plain, name) for name in names] == [0.5, "global", "adam", 20, 0, True]
    assert [getattr(early, name) for name in names] == [0.5, "layer", "activation", 2, 64, True]
    assert LpDecayConfig(target_sparsity=0.5, pattern="neurons").scope == "layer"
    assert LpDecayConfig(pattern="2:4", importance="adam").calibration_batches == 0
    for config in (plain, early):  # such as a checkpoint's
        assert dataclasses.asdict(LpDecayConfig(**dataclasses.asdict(config))) == dataclasses.asdict(config)


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
        ({"target_sparsity": 0.5, "ramp_start": 0.8}, r"ramp_end=0.7 \(the default\) - should be greater than"),
        ({"lp_lambda": 0.1, "lp_lambda_schedule": "linear", "ramp_start": 0.7}, r"ramp_end=0.7 \(the default\)"),
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
