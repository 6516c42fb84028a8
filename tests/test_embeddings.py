"""A learning rate of their own for the embedding and the output head."""

from functools import partial

import pytest
import torch
from conftest import arguments, frozen_llama, tiny_bert, tiny_llama, token_rows, trainer_for, weights
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from hf_lpdecay import LpAdamW, LpDecayConfig, LpDecayTrainer, Sparsifier, SparsityCallback, measure_sparsity


CONFIG = LpDecayConfig(target_sparsity=0.5, embedding_learning_rate=1e-4)
OPTIONS = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
SPEECH = Wav2Vec2Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8,),
    conv_stride=(5,),
    conv_kernel=(10,),
)


def by_rate(optimizer):
    return {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}


def lora_beside_the_head():
    return frozen_llama(make=partial(tiny_llama, tie_word_embeddings=False), modules_to_save=["lm_head"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor"])
def test_embedding_and_head_alone_have_the_rate(tmp_path, tied, optim):
    model = tiny_llama(tie_word_embeddings=tied)
    trainer = trainer_for(tmp_path, CONFIG, model=model, optim=optim, **OPTIONS)
    optimizer = trainer.create_optimizer()
    rates, slow = by_rate(optimizer), {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert rates == {id(param): 1e-4 if id(param) in slow else 1e-3 for param in model.parameters()}
    assert optimizer.param_groups[0]["lr"] == 1e-3  # which the Trainer logs
    assert trainer.create_optimizer() is optimizer
    assert by_rate(optimizer) == rates


def test_a_step_of_adam_moves_each_by_its_rate(tmp_path):
    model = tiny_llama()
    before = weights(model)
    config = LpDecayConfig(lp_lambda=0.0, embedding_learning_rate=1e-4)
    trainer_for(tmp_path, config, model=model, max_steps=1, **OPTIONS).train()
    for name, param in model.named_parameters():
        rate = 1e-4 if "embed_tokens" in name else 1e-3
        moved = (param.detach() - before[name]).abs()
        assert moved.max() == pytest.approx(rate, rel=1e-2), name


def test_the_rate_follows_the_schedule_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
    options = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 15}
    whole = trainer_for(tmp_path, CONFIG, **options)
    whole.train()
    assert measure_sparsity(whole.model, whole.lp_modules).sparsity == 0.5
    saved = torch.load(tmp_path / "checkpoint-15" / "optimizer.pt")["param_groups"]
    assert saved[-1]["lr"] == pytest.approx(0.1 * saved[0]["lr"])
    assert 0 < saved[-1]["lr"] < saved[-1]["initial_lr"] == 1e-4
    again = trainer_for(tmp_path / "again", CONFIG, model=tiny_llama(seed=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_an_embedding_trained_beside_lora_has_it_too(tmp_path):
    model = lora_beside_the_head()
    trainer = trainer_for(tmp_path, CONFIG, model=model, **OPTIONS)
    rates = by_rate(trainer.create_optimizer())
    slow = [name for name, param in model.named_parameters() if rates.get(id(param)) == 1e-4]
    assert slow == ["base_model.model.lm_head.modules_to_save.default.weight"]
    trainer.train()
    assert measure_sparsity(model.get_base_model(), trainer.lp_modules).sparsity == 0.5


def test_a_classifier_has_only_its_embedding(tmp_path):
    model = tiny_bert()
    rates = by_rate(trainer_for(tmp_path, CONFIG, model=model, **OPTIONS).create_optimizer())
    slow = [name for name, param in model.named_parameters() if rates[id(param)] == 1e-4]
    assert slow == ["bert.embeddings.word_embeddings.weight"]


def test_where_it_would_do_nothing_it_is_refused(tmp_path):
    frozen = tiny_llama()
    frozen.get_input_embeddings().requires_grad_(False)
    for model in (frozen, frozen_llama(), Wav2Vec2ForCTC(SPEECH)):
        with pytest.raises(ValueError, match=r"embedding_learning_rate=0.0001: .* no embedding or output head that is"):
            trainer_for(tmp_path, CONFIG, model=model)
    beside = lora_beside_the_head()
    own = (torch.optim.AdamW(param for param in beside.parameters() if param.requires_grad), None)
    with pytest.raises(ValueError, match="no effect on the optimizer of optimizers="):
        LpDecayTrainer(beside, arguments(tmp_path), train_dataset=token_rows(), optimizers=own, lp_config=CONFIG)
    with pytest.raises(ValueError, match="groups that a SparsityCallback does not make: use LpDecayTrainer"):
        SparsityCallback(CONFIG)
    model = tiny_llama()
    with pytest.raises(ValueError, match="give the optimizer a group with that lr"):
        Sparsifier(model, LpAdamW(model.parameters()), CONFIG, 30)
    for value in (-1e-4, float("inf"), "fast"):
        with pytest.raises(ValueError, match="Invalid embedding_learning_rate"):
            LpDecayConfig(target_sparsity=0.5, embedding_learning_rate=value)
