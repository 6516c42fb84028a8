"""Quality and sparsity of saved models."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from huggingface_hub import ModelCard
from processes import run_in_processes, succeed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_lpdecay import measure_sparsity
from hf_lpdecay.card import make_card, read_record
from hf_lpdecay.evaluation import lm_eval_scores, perplexity, text_loss
from hf_lpdecay.sparsity import select_parameters
from hf_lpdecay.training.record import update_record


evaluate = pytest.importorskip("evaluate")

import evaluate_models  # noqa: E402


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def models(language_model, tmp_path_factory):
    """A dense model's folder and a sparse one's."""
    sparse = tmp_path_factory.mktemp("sparse")
    model = AutoModelForCausalLM.from_pretrained(language_model)
    for param in select_parameters(model).values():
        param.data[:, ::4] = 0.0
    model.save_pretrained(sparse)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(sparse)
    return [str(language_model), str(sparse)]


@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_every_token_is_counted_once_with_the_context_that_was_promised(language_model, texts, stride):
    model = AutoModelForCausalLM.from_pretrained(language_model).double()
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    text = texts[1]["text"][0][:600]
    found = text_loss(model, tokenizer, text, context_length=16, stride=stride, batch_size=3)
    tokens = tokenizer(text)["input_ids"]
    step = stride or 16
    total = count = 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 15, step):
            window = torch.tensor([tokens[start : start + 16]])
            log_probs = model(window).logits[0].log_softmax(-1)
            for i in range(1 if start == 0 else max(1, 16 - step), 16):
                total -= log_probs[i - 1, window[0, i]].item()
                count += 1
    assert int(found.tokens.sum()) == count
    if step < 16:  # nothing twice, nothing left out
        assert count == (len(tokens) - 16) // step * step + 15
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
    assert found.word_perplexity == pytest.approx(math.exp(total / found.words), rel=1e-6)
    low, high = found.interval()
    assert low < found.perplexity < high and (low, high) == found.interval()
    if stride is None:
        windows = [tokens[i : i + 16] for i in range(0, len(tokens) - 15, 16)]
        assert found.perplexity == pytest.approx(perplexity(model, windows), rel=1e-9)


@pytest.mark.parametrize("context_length, stride", [(2, 2), (8, 8), (8, 3), (32, 32), (128, 128)])
def test_words_that_are_tokens_have_the_perplexity_of_tokens(context_length, stride):
    vocabulary = {f"w{i}": i for i in range(64)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    text = " ".join(f"w{i * i % 61}" for i in range(300))
    found = text_loss(tiny_llama(max_position_embeddings=128), tokenizer, text, context_length, stride)
    assert found.words == found.tokens.sum() and found.word_perplexity == found.perplexity


def test_a_stride_or_text_that_does_not_fit_is_refused(language_model):
    model, tokenizer = tiny_llama(vocab_size=512), AutoTokenizer.from_pretrained(language_model)
    with pytest.raises(ValueError, match=r"Invalid stride=17 for context_length=16"):
        text_loss(model, tokenizer, "some text", context_length=16, stride=17)
    with pytest.raises(ValueError, match=r"tokens, fewer than a window of context_length=1024"):
        text_loss(model, tokenizer, "some text")
    for other in (tiny_bert(), tiny_t5()):
        with pytest.raises(ValueError, match=f"{type(other).__name__} does not predict the next token"):
            text_loss(other, tokenizer, "some text", context_length=16)
    with pytest.raises(
        ValueError, match="A window of 65 tokens takes 65 positions, and the model has embeddings for 64"
    ):
        perplexity(tiny_gpt2(), [[1] * 65])
    assert perplexity(tiny_gpt2(), [[1] * 64]) > 0 and perplexity(tiny_llama(), [[1] * 65]) > 0  # rotary: no end


def run(models, tmp_path, *flags):
    path = tmp_path / "evaluation.json"
    code = evaluate_models.main([*models, *flags, "--results_file", str(path)])
    return code, json.loads(path.read_text())["models"] if path.exists() else None


def test_models_side_by_side(models, text_files, tmp_path, capsys):
    flags = ["--file", text_files[3], "--context_length", "32", "--max_windows", "12", "--stride", "16"]
    code, (dense, sparse) = run(models, tmp_path, *flags)
    assert code == 0 and (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert dense["sparsity"] == 0.0 and sparse["sparsity"] == 0.25
    loaded = AutoModelForCausalLM.from_pretrained(models[1])
    assert sparse["model_sparsity"] == measure_sparsity(loaded).model_sparsity
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    alone = text_loss(loaded, tokenizer, Path(text_files[3]).read_text(), 32, 16, 12)
    assert sparse["perplexity"] == alone.perplexity and sparse["windows"] == 12
    printed = capsys.readouterr().out
    assert f"x {sparse['perplexity'] / dense['perplexity']:.3f}" in printed
    assert "12 windows of 32 tokens, stride 16" in printed


def test_two_processes_share_the_windows_and_find_the_same(models, text_files, tmp_path):
    flags = ["--file", text_files[3], "--context_length", "32", "--max_windows", "7"]
    arguments = [*map(str, models), *flags, "--results_file", str(tmp_path / "two.json")]
    run_in_processes(succeed, 2, evaluate_models.main, arguments)
    two = json.loads((tmp_path / "two.json").read_text())["models"]
    _, one = run(models, tmp_path, *flags)
    for a, b in zip(one, two):
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-6) and a["windows"] == b["windows"] == 7


def test_a_real_lm_eval_task_from_local_files(models, tmp_path, capsys):
    rows = [
        {"question": f"{a} plus {b} is", "choices": [str(a + b), "x"], "answer": 0} for a in range(3) for b in range(2)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "sums.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    code, (dense, _) = run(models, tmp_path, "--tasks", "sums", "--include_path", str(tmp_path), "--batch_size", "2")
    assert code == 0 and 0 <= dense["lm_eval"]["sums"]["acc,none"] <= 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    hits = 0
    for row in rows:  # by hand: the choice with the smaller loss
        costs = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            costs.append(-sum(log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        hits += costs[0] < costs[1]
    assert dense["lm_eval"]["sums"]["acc,none"] == pytest.approx(hits / len(rows))
    assert "sums acc" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Unknown tasks: products"):
        lm_eval_scores(model, tokenizer, ["products"], include_path=str(tmp_path))


def test_results_go_into_the_card_beside_those_of_the_first_model(models, tmp_path, text_files, capsys):
    sparse = shutil.copytree(models[1], tmp_path / "sparse")
    flags = ["--file", text_files[3], "--context_length", "32", "--max_windows", "4", "--first_is", "dense"]
    code, (dense, found) = run([models[0], str(sparse)], tmp_path, *flags)
    assert code == 0
    update_record(sparse, lm_eval={"after": {"sums": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "sums"}}})
    card = str(make_card(sparse, read_record(sparse)))
    assert f"| the same training, dense | {dense['perplexity']:.4g} | {dense['word_perplexity']:.4g} | - |" in card
    row = f"| **this model**, 25.0% of the selected weights zero | {found['perplexity']:.4g} | "
    assert f"{row}{found['word_perplexity']:.4g} | 0.5 |" in card
    assert f"Measured on 4 windows of 32 tokens from {Path(text_files[3]).name}, in float32." in card
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results}
    assert results[("sums", "acc")] == 0.5 and len(results) == 3
    assert results[(Path(text_files[3]).name, "perplexity")] == found["perplexity"]
    assert evaluate_models.main(["some/hub-id", "other/hub-id", "--file", text_files[3], "--first_is", "dense"]) == 2
    assert "all models but the first must be local folders" in capsys.readouterr().err


def test_a_classifier_and_the_sparsity_module(language_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = tiny_bert(vocab_size=512)
    model.config.label2id, model.config.id2label = {"0": 0, "1": 1}, {0: "0", 1: "1"}
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [("good", 1), ("bad", 0), ("so so", 1)]
    (tmp_path / "dev.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    flags = ["--task", "text-classification", "--file", str(tmp_path / "dev.tsv"), "--column_names", "text", "label"]
    code, (result,) = run([str(tmp_path / "bert")], tmp_path, *flags, "--latency", "--context_length", "16")
    assert result["inference"]["prefill_tokens_per_second"] > 0 and "generate_seconds" not in result["inference"]
    with torch.no_grad():
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
        hits = [int(loaded(**tokenizer(t, return_tensors="pt")).logits.argmax()) == label for t, label in rows]
    assert code == 0 and result["accuracy"] == pytest.approx(sum(hits) / 3) and result["examples"] == 3
    metric = evaluate.load(str(RECIPES / "metrics" / "sparsity.py"))
    found = metric.compute(data=[str(tmp_path / "bert")])
    assert found == {"sparsity": [0.0], "model_sparsity": [measure_sparsity(loaded).model_sparsity]}


def test_wrong_arguments_end_with_a_message(models, capsys):
    assert evaluate_models.main([*models, "--file", "nowhere.txt"]) == 2
    assert "'nowhere.txt': there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_models.main(models)
    assert "nothing to evaluate" in capsys.readouterr().err
