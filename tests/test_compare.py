"""The comparison recipe, on a tiny model."""

import json
from pathlib import Path

import compare
import plot_results
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lpdecay.sparsity import select_parameters


def test_methods_side_by_side(command, tmp_path, capsys, language_model):
    methods = ["dense", "gmp", "gmp-adam", "gmp-swaps", "lp-plain", "lp", "lp-distill"]
    flags = ["--methods", *methods, "--seeds", "0", "1", "--results_file", str(tmp_path / "results.json")]
    assert compare.main([*command, *flags]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, method) for seed in (0, 1) for method in methods]
    for run in runs:
        assert run["sparsity"] == (0.0 if run["method"] == "dense" else 0.5)
        assert run["perplexity"] < run["before"] and run["before"] == runs[0]["before"]
    assert len({run["perplexity"] for run in runs}) == len(runs)  # neither methods nor seeds are the same run twice
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(methods) and rows[2].startswith("| dense | 0.00% |")


def test_a_pruned_checkpoint_is_continued_with_its_zeros_frozen(command, tmp_path, language_model):
    model = AutoModelForCausalLM.from_pretrained(language_model)
    for param in select_parameters(model).values():
        param.data[:, : param.shape[1] // 4] = 0.0
    model.save_pretrained(tmp_path / "pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pruned" / name).write_bytes((language_model / name).read_bytes())
    flags = [
        "--methods",
        "lp-distill",
        "dense",
        "--distill",
        str(language_model),
        "--init_from",
        str(tmp_path / "pruned"),
    ]
    assert compare.main([*command, *flags, "--results_file", str(tmp_path / "results.json")]) == 0
    distilled, dense, frozen = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert frozen["method"] == str(tmp_path / "pruned") and frozen["before"] != dense["before"]
    assert frozen["sparsity"] == 0.25 and frozen["perplexity"] < frozen["before"]
    assert (distilled["sparsity"], dense["sparsity"]) == (0.5, 0.0)


def test_masks_side_by_side(command, tmp_path, language_model, capsys):
    import compare_masks

    results = tmp_path / "masks.json"
    flags = ["--rounds", "0", "4", "--calibration_batches", "4", "--results_file", str(results)]
    assert compare_masks.main([*command, *flags]) == 0
    plain, swapped = json.loads(results.read_text())["runs"]
    assert plain["sparsity"] == swapped["sparsity"] == 0.5
    assert plain["perplexity"] != swapped["perplexity"]
    assert "| mask_swaps=4 | 50.00% |" in capsys.readouterr().out
    assert compare_masks.main([*command, "--pattern", "block:4x4", *flags]) == 2


def test_unknown_methods_and_folders_are_refused(capsys):
    assert compare.main(["--methods", "magic"]) == 2
    assert "'magic' - should be one of dense, gmp" in capsys.readouterr().err
    assert compare.main(["--init_from", "nowhere"]) == 2
    assert "'nowhere' - there is no config.json in it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--help"])


def test_adapters_on_a_sparse_model_side_by_side(command, language_model, tmp_path, capsys):
    import compare_lora

    model = AutoModelForCausalLM.from_pretrained(language_model)
    for name, param in model.named_parameters():
        if name.endswith("proj.weight"):
            param.data.view(-1)[::2] = 0.0
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "half")
    results = tmp_path / "lora.json"
    flags = ["--max_steps", "24", "--target_sparsity", "0.5", "--results_file", str(results)]
    methods = ["--methods", *compare_lora.METHODS]
    assert compare_lora.main([*command, *flags, *methods, "--init_from", str(tmp_path / "half")]) == 0
    runs = {run["method"]: run for run in json.loads(results.read_text())["runs"]}
    assert list(runs) == list(compare_lora.METHODS)
    assert all(run["sparsity"] == 0.5 for run in runs.values())
    for method in ("masked-lora", "frozen-base"):
        assert runs[method]["merged"] == pytest.approx(runs[method]["unmerged"], rel=1e-5)
    assert compare_lora.main([*command, *flags, "--methods", "frozen-base"]) == 0
    again = json.loads(results.read_text())["runs"]
    assert [run["merged"] for run in again] == [runs["frozen-base"]["merged"]]
    assert compare_lora.main([*command, *flags]) == 2
    assert "Which sparse models for lora, masked-lora, all-weights?" in capsys.readouterr().err
    assert compare_lora.main([*command, *flags, "--init_from", str(tmp_path / "none")]) == 2
    assert "there is no config.json in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wikitext2", "budgets"])
def test_the_pictures_are_drawn_from_their_results(tmp_path, name, capsys):
    results = Path(plot_results.__file__).parent / "results" / f"{name}.json"
    picture = tmp_path / "picture.png"
    assert plot_results.main([str(results), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    broken = tmp_path / "broken.json"
    broken.write_text(results.read_text().replace("perplexity", "loss"))
    assert plot_results.main([str(broken), str(tmp_path / "none.png")]) == 2
    assert "broken.json: KeyError" in capsys.readouterr().err and not (tmp_path / "none.png").exists()
