import pytest
import torch
from conftest import arguments, same_bits, tiny_bert, tiny_llama, tiny_t5, token_rows, trainer_for, weights
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from hf_lpdecay import LpDecayConfig, LpDecaySeq2SeqTrainer, LpDecayTrainer, measure_sparsity
from hf_lpdecay.training.distillation import Distiller


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
