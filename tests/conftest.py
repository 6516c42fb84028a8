"""Tiny models and data, made on the spot: nothing is downloaded."""

import os


# Before anything imports transformers: a test that reaches for the hub must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Workers share the cores, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import stdlib_text
import torch
from hypothesis import settings
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    set_seed,
)

from hf_lpdecay import LpAdamW, LpDecayConfig, LpDecayTrainer
from hf_lpdecay.sparsity import Ramp, SparsityController, input_dims, participants, selected_units


# The same examples in every run, and no failure because a machine is slow.
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")

VOCAB = 64
TARGET = LpDecayConfig(target_sparsity=0.5, scope="layer")


def make_params(dtype=torch.float32, shapes=((7, 5), (300,), (3, 4, 2)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides}))


def frozen_llama(dtype: torch.dtype = torch.float32, make=tiny_llama, **options) -> PeftModel:
    """A model with a frozen base and LoRA on all of its linear layers."""
    # Weights of ten times the usual size, with which a tiny model's blocks matter.
    model = make(initializer_range=0.2)
    given = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(model.to(dtype), LoraConfig(**given))


def tiny_gpt2(**overrides) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": VOCAB, **options, **overrides}))


def tiny_bert(vocab_size: int = VOCAB) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def tiny_mixtral(**overrides) -> MixtralForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **{**options, **overrides}))


def token_rows(rows: int = 64, length: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences that count upwards in steps of 1 to 3: easy to learn, so that a few steps show."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB, (rows, 1), generator=generator)
    stride = torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = ((start + stride * torch.arange(length)) % VOCAB).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def controlled(target=0.5, scope="layer", importance="adam", model=None, **options):
    model = model or tiny_llama()
    config = LpDecayConfig(p=0.5, target_sparsity=target, scope=scope, importance=importance, **options)
    params = participants(model, config)
    optimizer = LpAdamW([{"params": list(params.values())}], lr=1e-3, p=config.p)
    ramp = Ramp.from_config(config, 50)
    units = selected_units(model, config, params)
    return params, optimizer, SparsityController(config, params, optimizer, ramp, input_dims(model), units)


def constant(lr):
    """One group's learning rates, as a controller asks for them."""
    return lambda first, last: [[lr] * (last - first)]


def drive(params, optimizer, controller, steps, lr=1e-3):
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
        controller.before_step()
        optimizer.step()
        controller.after_step(step, constant(lr))


def arguments(folder, cls=TrainingArguments, **overrides):
    options = {
        "output_dir": str(folder),
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return cls(**{**options, **overrides})


def trainer_for(folder, config=None, trainer_cls=LpDecayTrainer, model=None, callbacks=None, data=None, **overrides):
    set_seed(0)
    train, test = data or (token_rows(), token_rows(8, seed=1))
    extra = {} if config is None else {"lp_config": config}
    return trainer_cls(
        model=tiny_llama() if model is None else model,
        args=arguments(folder, **overrides),
        train_dataset=train,
        eval_dataset=test,
        callbacks=callbacks,
        **extra,
    )


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def save_language_model(folder, texts):
    """Save a tiny Llama, and a tokenizer of 512 pieces that is trained on some texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    tiny_llama(vocab_size=512).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more, and results should not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts():
    return stdlib_text.load_stdlib_text()


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, texts):
    """A folder with a tiny Llama and a tokenizer of 512 pieces."""
    return save_language_model(tmp_path_factory.mktemp("llama"), texts[0]["text"][:100])


@pytest.fixture
def text_files(tmp_path, texts):
    train, validation = texts
    (tmp_path / "train.txt").write_text("".join(train["text"][:60]))
    (tmp_path / "validation.txt").write_text("".join(validation["text"][:10]))
    return ["--train_file", str(tmp_path / "train.txt"), "--validation_file", str(tmp_path / "validation.txt")]


@pytest.fixture
def command(language_model, text_files, tmp_path):
    """The default recipe, cut down to a second or two."""
    return [
        *("--model_name_or_path", str(language_model), *text_files, "--output_dir", str(tmp_path / "out")),
        *("--block_size", "32", "--max_steps", "30", "--learning_rate", "2e-3", "--save_steps", "10"),
        *("--max_eval_samples", "8", "--use_cpu", "true", "--bf16", "false"),
    ]
