import pytest
import torch
from conftest import (
    arguments,
    frozen_llama,
    same_bits,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    token_rows,
    trainer_for,
    weights,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_lpdecay import LpDecayConfig, LpDecaySeq2SeqTrainer, LpDecayTrainer, measure_sparsity
from hf_lpdecay.training.distillation import Distiller, _square_head


class Losses(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs += [dict(logs)] if "loss" in logs else []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_distillation_adds_the_distance_from_the_parent_and_logs_both(tmp_path, accumulation):
    seen = Losses()
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, distill="self", distill_weight=0.7, distill_hidden=0.5)
    trainer = trainer_for(tmp_path, config, callbacks=[seen], gradient_accumulation_steps=accumulation)
    trainer.train()
    assert measure_sparsity(trainer.model).sparsity == 0.5
    for logs in seen.logs:
        assert logs["loss"] == pytest.approx(logs["loss_task"] + 0.7 * logs["loss_distill"], rel=1e-3)
    assert seen.logs[0]["loss_distill"] < seen.logs[-1]["loss_distill"]
    assert all(not param.requires_grad for param in trainer._distiller.teacher.parameters())


def test_the_distance_from_an_equal_teacher_is_zero_and_that_of_logits_is_the_divergence(tmp_path):
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, distill="self", distill_temperature=2.0)
    model = tiny_llama().eval()
    distiller = Distiller(config, model)
    distiller.teacher.float().load_state_dict(model.state_dict())
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[3, -100, 5, 6]])}
    total, count = distiller.loss(inputs, model(**inputs))
    assert count == 2 and abs(total.item()) < 1e-5
    other = tiny_llama(seed=1).eval()
    total, _ = distiller.loss(inputs, other(**inputs))
    log_p, log_q = ((m(**inputs).logits[:, 1:3].double() / 2).log_softmax(-1) for m in (model, other))
    assert total.item() == pytest.approx(4 * (log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)


def test_a_teacher_in_bfloat16_is_as_from_pretrained_makes_it(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    configs = (LpDecayConfig(freeze_zeros=True, distill=name) for name in ("self", str(tmp_path)))
    itself, loaded = (Distiller(config, model) for config in configs)
    assert loaded.teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    own = {**dict(itself.teacher.named_buffers()), **weights(itself.teacher)}
    assert same_bits(own, {**dict(loaded.teacher.named_buffers()), **weights(loaded.teacher)})
    assert type(Distiller(loaded.config, frozen_llama()).teacher) is type(model)


def test_a_distilled_run_resumes_with_its_first_teacher(tmp_path):
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, distill="self")
    options = {"save_strategy": "steps", "save_steps": 10}
    whole = trainer_for(tmp_path, config, **options)
    whole.train()
    resumed = trainer_for(tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert same_bits(weights(whole.model), weights(resumed.model))


def test_distillation_for_classifiers_and_encoder_decoders(tmp_path):
    rows = [{**row, "labels": row["input_ids"][0] % 2} for row in token_rows()]
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, distill="self", distill_hidden=1.0)
    seen = Losses()
    options = {"train_dataset": rows, "lp_config": config, "callbacks": [seen]}
    LpDecayTrainer(tiny_bert(), arguments(tmp_path / "a"), **options).train()
    options["train_dataset"] = token_rows()
    LpDecaySeq2SeqTrainer(tiny_t5(), arguments(tmp_path / "b", Seq2SeqTrainingArguments), **options).train()
    assert len(seen.logs) == 12 and all(logs["loss_distill"] >= 0 for logs in seen.logs)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    tiny_llama(vocab_size=32).save_pretrained(tmp_path / "teacher")
    config = LpDecayConfig(lp_lambda=0.0, distill=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="has vocab_size=32, but the student has 64"):
        trainer_for(tmp_path, config)


def span_rows():
    rows = token_rows()
    return [
        {"input_ids": row["input_ids"], "start_positions": i % 5, "end_positions": 6 + i % 5}
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_distillation_for_extractive_question_answering(tmp_path, accumulation):
    seen = Losses()
    config = LpDecayConfig(p=0.5, target_sparsity=0.5, distill="self", distill_weight=0.7, distill_hidden=0.5)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    model = BertForQuestionAnswering(tiny_bert().config)
    trainer = LpDecayTrainer(model, args, train_dataset=span_rows(), lp_config=config, callbacks=[seen])
    trainer.train()
    assert measure_sparsity(model).sparsity == 0.5
    for logs in seen.logs:
        assert logs["loss"] == pytest.approx(logs["loss_task"] + 0.7 * logs["loss_distill"], rel=1e-3)
    assert 0 < seen.logs[0]["loss_distill"] < seen.logs[-1]["loss_distill"]


def divergence(ours, theirs):
    log_q, log_p = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    return (log_p.exp() * (log_p - log_q)).sum().item()


def span(ours, theirs):  # of five and of eight tokens, the rest is padding
    heads = [
        (ours[name][i, :size], theirs[name][i, :size])
        for name in ("start_logits", "end_logits")
        for i, size in enumerate((5, 8))
    ]
    return sum(divergence(*head) for head in heads) / 2, 2


def tokens(ours, theirs):  # -100, and padding with a label
    chosen = [(0, 1), (0, 2), (0, 4), *((1, i) for i in range(1, 8))]
    return sum(divergence(ours["logits"][at], theirs["logits"][at]) for at in chosen), len(chosen)


def entries(ours, theirs):
    total = 0.0
    for x, y in zip(ours["logits"].double().flatten(), theirs["logits"].double().flatten()):
        total += divergence(torch.stack([x, -x]) / 2, torch.stack([y, -y]) / 2)
    return total, 6


def values(ours, theirs):
    return (ours["logits"] - theirs["logits"]).square().sum().item(), ours["logits"].numel()


TOKEN_LABELS = torch.tensor([[-100, 1, 0, -100, 1, 1, 1, 1], [-100, 1, 0, 1, 0, 0, 1, 1]])


@pytest.mark.parametrize(
    "model_class, options, labels, expected",
    [
        (
            BertForQuestionAnswering,
            {},
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
            span,
        ),
        (BertForTokenClassification, {}, {"labels": TOKEN_LABELS}, tokens),
        (BertForMaskedLM, {}, {"labels": TOKEN_LABELS}, tokens),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.tensor([[1.0, 0, 0], [1, 1, 0]])}, entries),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.tensor([0.3, 0.7])}, values),
        (
            BertForSequenceClassification,
            {"num_labels": 3, "problem_type": "regression"},
            {"labels": torch.tensor([[1.0, 0, 0], [1, 1, 0]])},
            values,
        ),
    ],
)
def test_the_distance_for_each_kind_of_logits_leaves_padding_out(model_class, options, labels, expected):
    ours, theirs = (
        model_class(BertConfig(**{**tiny_bert().config.to_diff_dict(), **options})).eval() for _ in range(2)
    )
    with torch.no_grad():
        for param in (*ours.parameters(), *theirs.parameters()):
            param.normal_()
    distiller = Distiller(LpDecayConfig(lp_lambda=0.0, distill="self", distill_hidden=1e-9), ours, list(labels))
    distiller.teacher = theirs
    inputs = {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"][0, 5:] = 0
    inputs |= labels
    for padding in (0, 9):  # which changes nothing but the logits there
        inputs["input_ids"][0, 5:] = padding
        outputs, teacher = (model(**inputs, output_hidden_states=True) for model in (ours, theirs))
        total, count = distiller.loss(inputs, outputs)
        assert (pytest.approx(total.item(), rel=1e-4), count.item()) == expected(outputs, teacher)


def test_hidden_states_of_a_decoder_are_compared_where_there_are_labels():
    """Not where the encoder's mask says, even if both are of the same length."""
    config = LpDecayConfig(lp_lambda=0.0, distill="self", distill_hidden=1.0)
    model = tiny_t5().eval()
    distiller = Distiller(config, model)
    distiller.teacher.float().load_state_dict(model.state_dict())
    inputs = {
        "input_ids": torch.arange(3, 9)[None],
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, 8, -100, -100]]),
    }
    outputs = model(**inputs, output_hidden_states=True)
    assert distiller.loss(inputs, outputs)[0].item() == pytest.approx(0, abs=1e-5)
    for states in outputs["decoder_hidden_states"]:
        states.data[:, 4:] += 1.0
    assert distiller.loss(inputs, outputs)[0].item() == pytest.approx(0, abs=1e-5)
    for states in outputs["decoder_hidden_states"]:
        states.data[:, 3:] += 1.0
    assert distiller.loss(inputs, outputs)[0].item() > 0.1


def test_each_token_counts_by_its_own_norm_in_the_distance_of_hidden_states():
    """A language model's first token is so much larger than the others that their sum would say nothing of these."""
    theirs = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    theirs[:, 0] *= 1000
    for token in (0, 3):
        ours = theirs.clone()
        ours[:, token] *= 1.5
        distance = _square_head({}, {"hidden_states": (ours, ours)}, {"hidden_states": (theirs, theirs)})
        assert distance.item() == pytest.approx(0.25 / 4)


def test_distillation_is_refused_where_there_are_no_logits_to_compare_or_other_layers(tmp_path):
    config = LpDecayConfig(lp_lambda=0.0, distill="self")
    rows = [{**row, "next_sentence_label": 0} for row in token_rows()]
    trainer = LpDecayTrainer(
        BertForPreTraining(tiny_bert().config), arguments(tmp_path), train_dataset=rows, lp_config=config
    )
    with pytest.raises(ValueError, match="and the outputs are loss, prediction_logits, seq_relationship_logits: leave"):
        trainer.train()
    logits = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"these have the shape \(1, 2, 3, 4\): leave it out"):
        distiller = Distiller(config, tiny_bert())
        distiller._distance(logits, logits, None, None)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "teacher")
    config = LpDecayConfig(lp_lambda=0.0, distill=str(tmp_path / "teacher"), distill_hidden=1.0)
    with pytest.raises(ValueError, match="has num_hidden_layers=1, but the student has 2"):
        trainer_for(tmp_path, config)
