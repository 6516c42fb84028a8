"""The tasks of recipes/finetune.py: a short run of each, and their metrics against values that are known."""

import json
from pathlib import Path

import evaluate
import finetune
import numpy as np
import pytest
from conftest import tiny_bert, tiny_t5
from data import Dataset
from tasks import TASKS
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration


RECIPES = Path(__file__).parent.parent / "recipes"
CITIES = ["Paris", "New York", "Rio de Janeiro", "Bonn"]


def tagged(i: int, names: bool) -> dict:
    city = CITIES[i % 4].split()
    tags = ["O", "O", "B-LOC", *["I-LOC"] * (len(city) - 1), "O"]
    return {"tokens": ["They", "saw", *city, "today"], "ner_tags": tags if names else [len(tag) for tag in tags]}


def question(i: int) -> dict:
    city, context = (
        CITIES[i % 4],
        f"In the year {1900 + i} nobody wrote much. The train went to {CITIES[i % 4]} at night.",
    )
    answers = {"text": [city, f"to {city}"], "answer_start": [context.index(city), context.index(city) - 3]}
    return {"id": str(i), "question": f" Where did train {i} go?", "context": context, "answers": answers}


def summary(i: int) -> dict:
    return {
        "article": f"The council of {CITIES[i % 4]} met again. It said little.",
        "highlights": CITIES[i % 4],
        "id": "a",
    }


def pair(i: int) -> dict:
    return {"translation": {"en": f"She lives in {CITIES[i % 4]}.", "ro": f"Ea locuiește în {CITIES[i % 4]}."}}


ROWS = {
    "token-classification": lambda i: tagged(i, names=True),
    "question-answering": question,
    "summarization": summary,
    "translation": pair,
}


@pytest.fixture(scope="module")
def models(language_model, tmp_path_factory):
    """Folders with a tiny BERT, T5 and BART and their tokenizer, by the task they are for."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    special = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    bart = BartConfig(
        vocab_size=512,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        forced_eos_token_id=2,
        **special,
    )
    t5 = tiny_t5()
    t5.resize_token_embeddings(512)
    for name, model in (("bert", tiny_bert(512).bert), ("t5", t5), ("bart", BartForConditionalGeneration(bart))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def flags(task, model, folder, train=8, config=None):
    files = [folder / "train.json", folder / "validation.json"]
    for path, rows in zip(files, (train, 6)):
        Dataset.from_list([ROWS[task](i) for i in range(rows)]).to_json(path)
    config = config or next(RECIPES.glob(f"configs/*/{task}.yaml"))
    return [
        *("--config", str(config), "--model_name_or_path", str(model), "--train_file", str(files[0])),
        *(
            "--validation_file",
            str(files[1]),
            "--output_dir",
            str(folder / "out"),
            "--max_steps",
            "20",
            "--ramp_end",
            "0.8",
        ),
        *("--block_size", "32", "--doc_stride", "8", "--max_target_length", "8", "--per_device_train_batch_size", "4"),
        *("--save_strategy", "no", "--warmup_steps", "0", "--use_cpu", "true", "--bf16", "false"),
    ]


@pytest.mark.parametrize(
    "task, model, metrics",
    [
        ("token-classification", "bert", ["f1", "precision", "recall", "accuracy"]),
        ("question-answering", "bert", ["f1", "exact_match"]),
        ("summarization", "t5", ["rougeL", "rouge1", "rouge2", "loss"]),
        ("translation", "bart", ["rougeL", "rouge1", "rouge2", "loss"]),
    ],
)
def test_each_task_trains_to_the_target_of_its_config_from_local_files(task, model, metrics, models, tmp_path, capsys):
    extra = ["--eval_strategy", "epoch"]
    if model == "bert":
        extra += ["--distill", "self"]
    else:
        extra += ["--predict_with_generate", "true", "--generation_max_length", "8"]
    assert finetune.main([*flags(task, models / model, tmp_path), *extra]) == 0
    facts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert facts["task"] == task and facts["sparsity"] == pytest.approx(
        0.8 if task == "token-classification" else 0.5, abs=1e-3
    )
    assert list(facts["results"]["before"]) == list(facts["results"]["after"]) == metrics
    assert facts["evaluated_on"]["examples"] == 6
    # during the training the Trainer finds the same names, and the report says how to load the model
    logged = next(entry for entry in facts["log_history"] if "eval_loss" in entry)
    assert {f"eval_{name}" for name in metrics} <= logged.keys()
    printed = capsys.readouterr().out
    assert f"{TASKS[task].auto_class.__name__}.from_pretrained" in printed
    loaded = TASKS[task].auto_class.from_pretrained(tmp_path / "out")
    if task == "token-classification":
        assert loaded.config.id2label == {0: "O", 1: "B-LOC", 2: "I-LOC"}


def prepare(task, models, tmp_path, *more):
    model = "bert" if task.endswith(("classification", "answering")) else "t5"
    script, _, _, _ = finetune.parse([*flags(task, models / model, tmp_path), *more])
    return finetune.load_task(script)


def test_right_tags_have_an_f1_of_one_and_each_word_is_counted_once(models, tmp_path):
    task = prepare("token-classification", models, tmp_path)
    labels = task.validation["labels"]
    width = max(map(len, labels))
    padded = np.array([row + [-100] * (width - len(row)) for row in labels])
    logits = np.eye(3)[np.maximum(padded, 0)]
    result = task.compute_metrics(None)(evaluate_input(logits, padded))
    assert result == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    assert [sum(label >= 0 for label in row) for row in labels] == [len(tagged(i, True)["tokens"]) for i in range(6)]


def evaluate_input(predictions, label_ids):
    from transformers import EvalPrediction

    return EvalPrediction(predictions=predictions, label_ids=label_ids)


@pytest.mark.parametrize(
    "expected, predicted, f1",
    [
        ("O B-PER I-PER O", "O B-PER I-PER O", 1.0),
        ("O B-PER I-PER O", "O B-PER O O", 0.0),  # an entity is right or wrong as a whole
        ("O B-PER I-PER O", "O I-PER I-PER O", 1.0),  # IOB, where B- only parts neighbours
        ("B-PER B-PER O B-LOC", "B-PER I-PER O B-LOC", 0.4),  # 1 of 2 found, 1 of 3 expected
        ("B-PER I-LOC", "B-PER B-LOC", 1.0),
        ("S-PER B-LOC E-LOC", "B-PER B-LOC I-LOC", 1.0),
        ("person person O art", "person O O art", 0.5),
        ("O O", "O O", 0.0),
    ],
)
def test_entity_f1(expected, predicted, f1):
    metric = evaluate.load(str(RECIPES / "metrics" / "entity_f1.py"))
    assert metric.compute(predictions=[predicted.split()], references=[expected.split()])["f1"] == pytest.approx(f1)


def test_exact_match_and_f1_of_answers():
    metric = evaluate.load(str(RECIPES / "metrics" / "span_f1.py"))
    predictions = ["The Eiffel Tower!", "in New York", "", "Bonn"]
    references = [["eiffel tower"], ["York", "New York"], [""], [""]]
    assert metric.compute(predictions=predictions, references=references) == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 0.8 + 1 + 0) / 4),
    }


def test_the_labels_of_questions_are_their_answers_in_whichever_window_they_lie(models, tmp_path):
    task = prepare("question-answering", models, tmp_path)
    assert len(task.validation) > len(task.questions) == task.examples == 6
    found = set()
    for index, spans, row in zip(task.question_index, task.spans, task.validation):
        start, end = row["start_positions"], row["end_positions"]
        if start:
            text = task.questions[index]["context"][spans[start][0] : spans[end][1]]
            assert text.strip() == task.questions[index]["answers"]["text"][0]
            found.add(index)
    assert found == set(range(6))
    # Logits that say just that have every answer right.
    one_hot = [
        [np.eye(len(row["input_ids"]))[row[name]] * (10 if row[name] else -10) for row in task.validation]
        for name in ("start_positions", "end_positions")
    ]
    assert task.score(*one_hot) == {"f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_best_span_is_that_of_a_search_through_all_of_them(models, tmp_path, unanswerable):
    task = prepare("question-answering", models, tmp_path, "--max_answer_length", "3")
    task.has_unanswerable = unanswerable
    rng = np.random.default_rng(0)
    starts, ends = ([rng.normal(size=40) for _ in task.spans] for _ in range(2))  # longer than a window: padding
    expected = []
    for question_number, row in enumerate(task.questions):
        best, text, null = -np.inf, "", np.inf
        for index, spans, start, end in zip(task.question_index, task.spans, starts, ends):
            if index != question_number:
                continue
            null = min(null, start[0] + end[0])
            for i in range(len(spans)):
                for j in range(i, min(i + 3, len(spans))):
                    if spans[i][0] >= 0 and spans[j][0] >= 0 and start[i] + end[j] > best:
                        best, text = start[i] + end[j], row["context"][spans[i][0] : spans[j][1]].strip()
        expected.append("" if unanswerable and null > best else text)
    assert task.answers(starts, ends) == expected


def test_rouge_is_that_of_its_package_and_the_loss_stands_in_where_it_is_missing(models, tmp_path, monkeypatch, capsys):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    task = prepare("summarization", models, tmp_path)
    labels = task.validation["labels"]
    assert task.rouge(labels, labels)["rougeL"] == 1.0
    texts = ["the council of Bonn met", "nobody met again"], ["Bonn's council met again", "nobody met"]
    found = evaluate.load(str(RECIPES / "metrics" / "rouge.py")).compute(predictions=texts[0], references=texts[1])
    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    assert found["rouge2"] == sum(scorer.score(r, p)["rouge2"].fmeasure for p, r in zip(*texts)) / 2

    def missing(name):
        raise ImportError("pip install rouge_score")

    monkeypatch.setattr("tasks.seq2seq.load_metric", missing)
    task = prepare("summarization", models, tmp_path)
    assert "without ROUGE: pip install rouge_score" in capsys.readouterr().out
    model = task.load_model(models / "t5").eval()
    loss = task.evaluate(model, 4, "Evaluating")  # 6 texts: batches of unequal size
    batch = task.collator(model)(list(task.validation))
    assert loss == {"loss": pytest.approx(model(**batch).loss.item(), rel=1e-5)}
    assert task.compute_metrics(type("Arguments", (), {"predict_with_generate": True})) is None


@pytest.mark.parametrize(
    "task, more, message",
    [
        ("token-classification", ["--tags_column", "tags"], "tags_column='tags' is not one of the columns ['tokens'"),
        ("question-answering", ["--doc_stride", "20"], "and doc_stride=20 of them overlap: raise block_size or lower"),
        ("summarization", ["--target_column", "nope"], "target_column='nope' is not one of the columns"),
        ("translation", ["--target_lang", "xx"], "target_lang='xx' is not one of the languages ['en', 'ro']"),
        ("translation", ["--max_answer_length", "0"], "Invalid max_answer_length: 0"),
        ("question-answering", ["--doc_stride", "-1"], "Invalid doc_stride: -1"),
    ],
)
def test_data_that_do_not_fit_the_task_are_refused(task, more, message, models, tmp_path, capsys):
    model = "bert" if "summ" not in task else "t5"
    assert finetune.main([*flags(task, models / model, tmp_path), *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_tags_must_be_known_and_as_many_as_words(models, tmp_path, monkeypatch, capsys):
    rows = {
        "numbers without names": lambda i: tagged(i, names=False),
        "5 words have 4 tags": lambda i: {**tagged(1, True), "ner_tags": ["O"] * 4},
    }
    for message, row in rows.items():
        monkeypatch.setitem(ROWS, "token-classification", row)
        assert finetune.main(flags("token-classification", models / "bert", tmp_path)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
