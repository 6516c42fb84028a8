"""Masks that are improved by swaps, against the best of all masks."""

import itertools

import pytest
import torch
from conftest import same_bits, tiny_llama, trainer_for, weights
from hypothesis import given
from hypothesis import strategies as st

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity.reconstruction import DAMPING, Solver, reconstruct
from hf_lpdecay.sparsity.swaps import swap


SIZE = 8


def layer(seed: int, size: int = SIZE, correlated: bool = True, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, shape (rows, size), and a Hessian, shape (1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(64, size, generator=generator) * torch.linspace(0.5, 2, size)
    if correlated:
        features = features + 3 * torch.randn(64, 2, generator=generator) @ torch.randn(2, size, generator=generator)
    gram = features.T @ features if correlated else (features.T @ features).diag().diag()
    return torch.randn(rows, size, generator=generator), gram[None]


def least_error(row: torch.Tensor, keep: tuple[int, ...], hessian: torch.Tensor) -> float:
    """What the best values for the kept weights of a row leave."""
    kept = list(keep)
    others = [i for i in range(len(row)) if i not in kept]
    # (v - w) H (v - w)^T, least over the kept v: the Schur complement's share of the pruned weights
    rest = hessian[others][:, others] - hessian[others][:, kept] @ torch.linalg.solve(
        hessian[kept][:, kept], hessian[kept][:, others]
    )
    return (row[others] @ rest @ row[others]).item()


def errors(weight, mask, gram):
    hessian = (gram[0] + DAMPING * gram[0].diagonal().mean() * torch.eye(len(gram[0]))).double()
    keeps = [tuple((~row).nonzero().view(-1).tolist()) for row in mask]
    return [least_error(row.double(), keep, hessian) for row, keep in zip(weight, keeps)], hessian


def improve(weight, mask, gram, rounds=6, group=1):
    return reconstruct(weight, mask, gram, lambda *arguments: swap(*arguments, rounds=rounds, group=group))


def by_wanda(weight, gram, kept):
    score = weight.abs() * gram[0].diagonal().sqrt()
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, score.topk(kept, 1).indices, False)


@pytest.mark.parametrize("seed", range(4))
def test_swaps_come_near_the_best_of_all_masks(seed):
    weight, gram = layer(seed)
    mask = by_wanda(weight, gram, SIZE // 2)
    before, hessian = errors(weight, mask, gram)
    solution, better = improve(weight, mask, gram)
    after, _ = errors(weight, better, gram)
    best = [
        min(least_error(row.double(), keep, hessian) for keep in itertools.combinations(range(SIZE), SIZE // 2))
        for row in weight
    ]
    assert all(new <= old * 1.001 for old, new in zip(before, after))
    assert sum(after) - sum(best) < 0.35 * (sum(before) - sum(best))
    assert torch.equal(better.sum(1), mask.sum(1)) and bool((solution[better] == 0).all())


def test_gains_and_costs_are_those_of_single_swaps():
    """Up to what a preconditioner of rank 16 does not know of the Hessian."""
    size = 64
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, size, generator=generator)
    gram = (torch.eye(size) * 4 + 9 * directions.T @ directions)[None]
    gram = gram / gram[0].diagonal().sqrt() / gram[0].diagonal().sqrt()[:, None]
    weight = torch.randn(1, size, generator=generator)
    solver, mask = Solver(gram), by_wanda(weight, gram, size // 2)
    hessian = solver.hessian[0].double()
    kept = (~mask[0]).nonzero().view(-1).tolist()
    keep = (~mask).float()[None]
    exact = torch.zeros(size, dtype=torch.double)
    residual = (weight[0].double() - exact) @ hessian
    exact[kept] = torch.linalg.solve(hessian[kept][:, kept], residual[kept])
    residual = ((weight[0].double() - exact) @ hessian).float()[None, None]
    gain, cost = solver.precondition.values(residual, exact.float()[None, None], keep)
    now = least_error(weight[0].double(), tuple(kept), hessian)
    changes = [least_error(weight[0].double(), tuple(sorted(set(kept) ^ {i})), hessian) - now for i in range(size)]
    found = torch.where(keep[0, 0] > 0, cost[0, 0], -gain[0, 0])
    assert torch.corrcoef(torch.stack([found.double(), torch.tensor(changes).double()]))[0, 1] > 0.9


def test_nothing_is_swapped_where_the_features_are_independent():
    weight, gram = layer(0, correlated=False)
    mask = by_wanda(weight, gram, SIZE // 2)
    assert torch.equal(improve(weight, mask, gram)[1], mask)


@given(seed=st.integers(0, 1000), group=st.sampled_from([1, 4]), zeros=st.floats(0, 0.4))
def test_counts_groups_and_old_zeros_stay(seed, group, zeros):
    weight, gram = layer(seed, size=16)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0.0
    score = (weight.abs() * gram[0].diagonal().sqrt()).unflatten(1, (-1, 4))
    mask = torch.ones_like(score, dtype=torch.bool).scatter_(2, score.topk(2, 2).indices, False).flatten(1)
    mask |= weight == 0
    solution, better = improve(weight, mask, gram, group=group)
    size = 16 if group == 1 else group
    assert torch.equal(better.unflatten(1, (-1, size)).sum(2), mask.unflatten(1, (-1, size)).sum(2))
    assert bool((better | (weight != 0)).all()) and bool((solution[better] == 0).all())
    old, new = (sum(errors(weight, m, gram)[0]) for m in (mask, better))
    assert new <= old * 1.001 + 1e-6


@pytest.mark.parametrize("options", [{"target_sparsity": 0.7}, {"pattern": "2:4", "calibration_batches": 4}])
def test_a_run_with_swaps_ends_at_the_target(tmp_path, options, capsys):
    found = {}
    for rounds in (0, 2):
        config = LpDecayConfig(hard_cut=True, mask_swaps=rounds, num_plans=3, **options)
        trainer = trainer_for(tmp_path / str(rounds), config, model=tiny_llama())
        trainer.train()
        found[rounds] = weights(trainer.model)
        report = measure_sparsity(trainer.model)
        assert report.sparsity == pytest.approx(options.get("target_sparsity", 0.5), abs=1e-3)
        assert all(param.isfinite().all() for param in trainer.model.parameters())
    assert not same_bits(found[0], found[2])
    assert "mask_swaps=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"hard_cut": False},
        {"compensate": False},
        {"pattern": "block:4x4"},
        {"pattern": "neurons"},
    ],
)
def test_swaps_are_refused_where_they_cannot_work(options):
    with pytest.raises(ValueError, match="mask_swaps=2 needs hard_cut=True, compensate and single weights or n:m"):
        LpDecayConfig(**{"target_sparsity": 0.5, "hard_cut": True, "mask_swaps": 2, **options})
