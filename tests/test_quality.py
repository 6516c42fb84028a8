"""The method's advantage, end to end: a change that loses it fails here."""

import copy
import math

import pytest
import torch
from conftest import VOCAB, tiny_llama, trainer_for
from transformers import Trainer

from hf_lpdecay import LpDecayConfig, LpDecayTrainer, measure_sparsity


NOISE = 0.1
# Per token: the rule's answer comes with 1 - NOISE + NOISE / VOCAB, any other token with NOISE / VOCAB.
ENTROPY = -(1 - NOISE + NOISE / VOCAB) * math.log(1 - NOISE + NOISE / VOCAB) - (VOCAB - 1) * NOISE / VOCAB * math.log(
    NOISE / VOCAB
)


def language(rows, seed, length=32):
    """Tokens that follow one of two permutations, chosen by the parity of the token before: two tokens decide."""
    generator = torch.Generator().manual_seed(99)
    rules = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(2)])
    generator.manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    noise = torch.rand(rows, length, generator=generator) < NOISE
    for t in range(2, length):
        ruled = rules[tokens[:, t - 2] % 2, tokens[:, t - 1]]
        tokens[:, t] = torch.where(noise[:, t], tokens[:, t], ruled)
    labels = tokens.clone()
    labels[:, :2] = -100
    return [{"input_ids": row, "labels": own} for row, own in zip(tokens.tolist(), labels.tolist())]


TRAIN, TEST = language(4096, seed=0), language(128, seed=1)


def loss_after(folder, model, config, steps, learning_rate, seed=0):
    trainer = trainer_for(
        folder,
        config,
        model=model,
        trainer_cls=Trainer if config is None else LpDecayTrainer,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        warmup_steps=5,
        logging_steps=1000,
        seed=seed,
        data=(TRAIN, TEST),
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A dense model that has learned the language."""
    model = tiny_llama(attention_dropout=0.0, hidden_size=64, intermediate_size=128)
    loss = loss_after(tmp_path_factory.mktemp("dense"), model, None, 400, 3e-3)
    assert loss < ENTROPY + 0.5, loss
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target, scope, share", [(0.8, "layer", 0.85), (0.8, "global", 0.85), (0.9, "layer", 0.5)])
def test_the_decay_beats_gradual_magnitude_pruning(learned, tmp_path, target, scope, share, seed):
    """On a short budget; `share`: of what magnitude pruning loses against the best that is possible."""
    losses = {}
    for name, options in (
        ("lp", {"scope": scope}),
        ("gmp", {"hard_cut": True, "importance": "magnitude", "compensate": False}),
    ):
        model = copy.deepcopy(learned)
        config = LpDecayConfig(target_sparsity=target, **options)
        losses[name] = loss_after(tmp_path / name, model, config, 40, 1e-3, seed)
        assert measure_sparsity(model).sparsity == pytest.approx(target, abs=1e-3)
    assert losses["lp"] - ENTROPY < share * (losses["gmp"] - ENTROPY), losses


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target, options, share", [(0.9, {}, 0.85), (0.5, {"pattern": "2:4"}, 0.97)])
def test_compensation_keeps_more_of_it(learned, tmp_path, target, options, share, seed):
    losses = {}
    for compensate in (True, False):
        config = LpDecayConfig(target_sparsity=target, compensate=compensate, **options)
        losses[compensate] = loss_after(tmp_path / "out", copy.deepcopy(learned), config, 40, 1e-3, seed=seed)
    assert losses[True] - ENTROPY < share * (losses[False] - ENTROPY), losses


@pytest.mark.parametrize("seed", [0, 1])
def test_where_plans_are_few_the_decay_beats_a_hard_cut_by_the_same_importance(learned, tmp_path, seed):
    losses = {}
    for hard_cut in (False, True):
        config = LpDecayConfig(target_sparsity=0.9, compensate=False, num_plans=4, hard_cut=hard_cut)
        losses[hard_cut] = loss_after(tmp_path / "out", copy.deepcopy(learned), config, 40, 1e-3, seed)
    assert losses[False] - ENTROPY < 0.9 * (losses[True] - ENTROPY), losses
