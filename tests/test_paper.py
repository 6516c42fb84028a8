"""The recipe that reproduces the paper, on a model that takes seconds."""

import json

import compare_paper
import expert_quantiles
import pytest
import reproduce_paper


def entry(p, lp_lambda, loss, sparsity):
    return {"p": p, "lp_lambda": lp_lambda, "loss": loss, "best_loss": loss, "sparsity": sparsity}


def test_the_grid_is_run_judged_and_drawn(tmp_path, texts, capsys):
    (tmp_path / "text.txt").write_text("".join(texts[0]["text"][:20]))
    flags = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--max_steps", "30"]
    flags += ["--p_grid", "0.5", "1.5", "--lambda_grid", "0.3", "--eval_steps", "15", "--warmup_steps", "2"]
    flags += ["--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert reproduce_paper.main([*flags, "--results_file", str(tmp_path / "paper.json")]) == 0
    results = json.loads((tmp_path / "paper.json").read_text())
    assert [(run["p"], run["lp_lambda"]) for run in results["runs"]] == [(None, 0.0), (0.5, 0.3), (1.5, 0.3)]
    adamw, half, above = results["runs"]
    assert adamw["sparsity"] == 0.0 and half["sparsity"] > 0.5 > above["sparsity"]
    assert all(run["best_loss"] <= run["loss"] and run["steps"] == 30 for run in results["runs"])
    assert len(results["claims"]) == 3 and (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert "| AdamW | 0 |" in capsys.readouterr().out
    assert reproduce_paper.main(["--train_file", "nowhere"]) == 2
    assert reproduce_paper.main(["--p_grid", "0"]) == 2
    assert "'nowhere': there is no such file" in capsys.readouterr().err


def test_ways_to_a_target_from_scratch(tmp_path, texts, capsys):
    (tmp_path / "text.txt").write_text("".join(texts[0]["text"][:20]))
    flags = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--max_steps", "30"]
    flags += ["--targets", "0.5", "0.9", "--seeds", "0", "1", "--eval_steps", "30", "--warmup_steps", "2"]
    flags += ["--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    flags += ["--methods", "dense", "gmp-compensate", "lp", "--results_file", str(tmp_path / "compare.json")]
    flags += ["--num_plans", "3"]
    assert compare_paper.main(flags) == 0
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    found = {(run["method"], run["seed"]): run for run in runs}
    assert len(found) == len(runs) == 10  # the dense model is the same for both targets
    for (method, _), run in found.items():
        assert run["sparsity"] == pytest.approx(float(method.split()[1]) if " " in method else 0.0, abs=1e-3)
    assert "| lp 0.9 | 90.0" in capsys.readouterr().out
    assert compare_paper.main(["--methods", "magic"]) == 2 and compare_paper.main(["--targets", "2"]) == 2
    assert compare_paper.main(["--methods", "lp-distill"]) == 2 and compare_paper.main(["--lp_lambda", "1"]) == 2
    assert "Invalid target_sparsity: 2" in capsys.readouterr().err


def test_rankings_of_experts_side_by_side(tmp_path, texts, capsys):
    (tmp_path / "text.txt").write_text("".join(texts[0]["text"][:20]))
    flags = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--max_steps", "24"]
    flags += ["--targets", "0.75", "--num_experts", "4", "--warmup_steps", "2"]
    flags += ["--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out")]
    assert expert_quantiles.main([*flags, "--results_file", str(tmp_path / "experts.json")]) == 0
    together, alone = json.loads((tmp_path / "experts.json").read_text())["runs"]
    assert together["sparsity"] == alone["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert together["loss"] != alone["loss"]
    assert "| one per expert, 0.75 | 75.00% |" in capsys.readouterr().out
    assert expert_quantiles.main(["--targets", "2"]) == 2


def test_claims_are_judged_by_the_numbers():
    adamw = entry(None, 0.0, 1.5, 0.0)
    runs = [adamw, entry(0.5, 0.1, 1.51, 0.995), entry(1.5, 0.1, 1.45, 0.2), entry(2.0, 0.1, 1.6, 0.99)]
    assert [v.split(" (")[0] for v in reproduce_paper.check_claims(runs, 0.01).values()] == ["reproduced"] * 3
    runs = [adamw, entry(0.5, 0.1, 1.6, 0.5), entry(1.0, 0.1, 1.5, 0.6), entry(1.5, 0.1, 1.4995, 0.2)]
    assert [v.split(" (")[0] for v in reproduce_paper.check_claims(runs, 0.01).values()] == ["not reproduced"] * 3
    runs = [adamw, entry(0.5, 0.1, 1.6, 0.995), entry(1.5, 0.1, 1.6, 0.1), entry(1.5, 0.01, 1.6, 0.2)]
    first, _, third = reproduce_paper.check_claims(runs, 0.01).values()
    assert first.startswith("not reproduced (p=0.5") and "p=1.5, lambda=0.01" in first
    assert third.startswith("not reproduced (none; AdamW")
