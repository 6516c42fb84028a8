"""The model card as its readers see it: rendered, whatever is missing and whatever is in the names."""

import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from conftest import tiny_bert, tiny_llama
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_shrink import with_dead

from hf_lpdecay import LpDecayConfig, cli, measure_sparsity
from hf_lpdecay.card import make_card, read_record
from hf_lpdecay.sparsity import select_parameters


FACTS = {
    "base_model": "org/base",
    "datasets": ["org/data"],
    "trained_on": "some text",
    "license": "mit",
    "language": "en",
    "tags": ["mine"],
    "pipeline_tag": "text-generation",
    "results": {"before": {"perplexity": 31.4}, "dense": {"perplexity": 20.0}, "after": {"perplexity": 25.1}},
    "lm_eval": {"after": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "arc_easy"}}},
    "evaluated_on": {"name": "WikiText-2", "split": "test", "examples": 64, "block_size": 128, "dtype": "float32"},
    "lp_config": {**asdict(LpDecayConfig(p=0.5, target_sparsity=0.5)), "scope": "global"},
    "training": {"steps": 100, "learning_rate": 2e-4, "adam_betas": [0.9, 0.99], "bf16_autocast": True},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "log_history": [{"loss": 3.0, "lp_lambda": 0.125, "step": 1}],
}
# Things that a name or a result should not be able to do.
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b",
    "two\nlines",
    "---\nlicense: mit\n---",
    "{{ 7 * 7 }}{% raw %}",
    "`code` **bold** [link](javascript:alert(1))",
    "# title",
    "snake_case_name and *stars*",
    "![x](https://example.com/x.png)",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's folder and what measure_sparsity says of it."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama()
    for param in select_parameters(model).values():
        param.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    return folder, measure_sparsity(model).to_dict()


class Page(HTMLParser):
    """What there is to see."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [value or "" for _, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data


def page(card: ModelCard) -> Page:
    return Page(MarkdownIt("gfm-like", {"linkify": False}).render(card.text))


def check(card: ModelCard) -> Page:
    """What holds for every card."""
    shown = page(card)
    assert not re.search(r"\bNone\b|\bnan\b|\bNaN\b|\{\{|\{%", shown.text.replace(r"{{ 7 * 7 }}{% raw %}", ""))
    headings = re.split(r"^#{1,2} .+$", card.text, flags=re.M)
    assert all(section.strip() for section in headings[1:-1])  # none is empty
    for row in shown.rows:
        assert len(row) > 1 and all(cell.strip() for cell in row[1:])
    assert "(9,216 of 18,432)" in shown.text and ["selected, in total", "18,432", "9,216", "50.00%"] in shown.rows
    again = ModelCard(str(card)).data.to_dict()
    assert again == card.data.to_dict() and all(value not in (None, "", []) for value in again.values())
    return shown


def test_everything_that_is_known_is_told(saved):
    folder, facts = saved
    card = make_card(folder, {**facts, **FACTS}, "me/sparse")
    shown = check(card)
    for said in (
        "50.0% of the weights of 14 linear layers are exactly zero",
        "this model, 50.0% of the selected weights zero",
        "Measured on 64 windows of 128 tokens from WikiText-2 (test), in float32.",
        'AutoModelForCausalLM.from_pretrained("me/sparse")',
        "LpDecayConfig(",
        "the authors' code has p·λ in that place",
        "the largest in the log is 0.125",
        "Trained with torch 2.13.0, transformers 5.23.0.",
    ):
        assert said in " ".join(shown.text.split()), said
    assert ["", "perplexity", "arc_easy, acc"] in shown.rows
    assert ["this model, 50.0% of the selected weights zero", "25.1", "0.5"] in shown.rows
    assert ["the same training, dense", "20", "-"] in shown.rows
    assert {"https://arxiv.org/abs/2404.10824", "https://huggingface.co/org/base"} <= set(shown.attributes)
    data = card.data
    assert (data.library_name, data.base_model, data.datasets, data.license) == (
        "transformers",
        "org/base",
        ["org/data"],
        "mit",
    )
    assert data.tags == ["sparsity", "pruning", "lp-weight-decay", "arxiv:2404.10824", "mine"]
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("WikiText-2", "perplexity", 25.1),
        ("arc_easy", "acc", 0.5),
    }


@given(st.sets(st.sampled_from(sorted(FACTS))), st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_is_missing_no_field_is_empty_or_wrong(saved, missing, hollow):
    folder, facts = saved
    known = {name: value for name, value in FACTS.items() if name not in missing}
    if hollow:  # there, and empty
        known |= {name: type(FACTS[name])() for name in missing}
    shown = check(make_card(folder, {**facts, **known}))
    assert ("org/base" in shown.text) == ("base_model" not in missing)
    assert ("LpDecayConfig(" in shown.text.split("Fine-tuning it further")[1].split("trainer.train()")[1]) == (
        "lp_config" not in missing
    )
    assert ("25.1" in shown.text) == ("results" not in missing)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_show_as_they_are_and_do_nothing(saved, name):
    folder, facts = saved
    known = {
        **FACTS,
        "base_model": name,
        "trained_on": name,
        "datasets": [name],
        "results": {"after": {name: 1.5}},
        "lm_eval": {"after": {name: {"acc,none": 0.5}}},
        "evaluated_on": {"name": name, "split": name, "dtype": name},
        "training": {"lr_scheduler_type": name, "steps": 3},
        "versions": {name: name},
    }
    shown = check(make_card(folder, {**facts, **known}, title=name))
    plain = check(make_card(folder, {**facts, **known, **FACTS}, title="title"))
    assert set(shown.tags) <= set(plain.tags) | {"code"} and "script" not in shown.tags
    assert not any(value.startswith("javascript:") for value in shown.attributes)
    assert not any(value.endswith(".png") for value in shown.attributes)
    line = " ".join(name.split())
    assert f"trained on {line}" in shown.text or f"fine-tuned on {line}" in shown.text
    assert ["", line, f"{line}, acc"] in shown.rows and ["its schedule", line] in shown.rows
    assert [row[1:] for row in shown.rows if row[0].startswith("this model")] == [["1.5", "0.5"]]


def test_results_that_are_no_numbers_are_left_out(saved):
    folder, facts = saved
    results = {"after": {"perplexity": float("nan"), "loss": float("inf"), "note": "good", "done": True}}
    card = make_card(folder, {**facts, **FACTS, "results": results, "lm_eval": {}})
    assert "## Results" not in check(card).text and not card.data.eval_results


def test_a_hard_cut_is_not_called_a_decay(saved):
    folder, facts = saved
    config = vars(LpDecayConfig(target_sparsity=0.5, hard_cut=True))
    card = make_card(folder, {**facts, **FACTS, "lp_config": config})
    shown = check(card)
    assert "by gradual pruning" in shown.text and "decoupled weight decay" not in shown.text
    assert "strength" not in shown.text and "hard_cut=True" in shown.text
    assert set(card.data.tags) == {"sparsity", "pruning", "mine"}


def test_a_dense_classifier_boasts_of_nothing(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    card = make_card(tmp_path, measure_sparsity(model).to_dict())
    shown = page(card)
    assert card.data.pipeline_tag == "text-classification" and not card.data.tags
    assert "It is dense." in shown.text and "Fine-tuning it further" not in shown.text
    assert "AutoModelForSequenceClassification.from_pretrained(" in shown.text
    assert isinstance(card.data, ModelCardData)


def test_a_shrunk_model_says_what_was_cut_out(tmp_path, capsys):
    model = with_dead(tiny_llama(), "neurons", [20, 20])
    model.save_pretrained(tmp_path / "model")
    measure_sparsity(model).to_json(tmp_path / "model" / "sparsity.json", **FACTS)
    assert cli.main(["shrink", str(tmp_path / "model"), str(tmp_path / "small")]) == 0
    card = make_card(tmp_path / "small", read_record(tmp_path / "small"))
    shown = page(card)
    before, after = model.num_parameters(), model.num_parameters() - 2 * 3 * 20 * 32
    assert f"were made zero and then cut out: {after:,} of {before:,} parameters are left" in shown.text
    assert card.data.tags == ["pruning", "lp-weight-decay", "arxiv:2404.10824", "mine"]
    assert "Fine-tuning it further" not in shown.text
    assert ["this model", "25.1", "0.5"] in shown.rows and ["parameters", f"{after:,}"] in shown.rows
    assert "## Sparsity" not in card.text
