"""What works with which architecture: tiny random models of many types, trained sparse, cut, packed and merged.

    python recipes/architectures.py                     # all of them, as a Markdown table
    python recipes/architectures.py --models mixtral t5

Whoever adds an architecture adds a line to `MODELS`. tests/test_architectures.py runs the same list.
"""

import argparse
import contextlib
import copy
import io
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from hf_lpdecay import LpAdamW, LpDecayConfig, measure_sparsity, merge_sparse, pack, shrink, unpack
from hf_lpdecay.artifacts.shrink import example_inputs
from hf_lpdecay.sparsity import SparsityDriver, input_dims, match_parameters, participants


STEPS = 12
COLUMNS = ("unstructured", "2:4", "neurons", "heads", "shrink", "pack", "LoRA merge")
# Options of a config that differ from these, by model type, and the class that is made from it.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
MIXTURE = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WIDE = {"intermediate_size": 48}
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
SEQ2SEQ, IMAGE = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64, "decoder_start_token_id": 1}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
PIXELS = {"image_size": 16, "patch_size": 8, "num_channels": 3}
DEEPSEEK = {**MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
MODELS = {
    "llama": (CAUSAL, GATED),
    "mistral": (CAUSAL, GATED),
    "qwen2": (CAUSAL, GATED),
    "qwen3": (CAUSAL, {**GATED, "head_dim": 8}),
    "gemma": (CAUSAL, {**GATED, "head_dim": 8}),
    "gemma2": (CAUSAL, {**GATED, "head_dim": 8}),
    "phi": (CAUSAL, {**GATED, "num_key_value_heads": 4}),
    "phi3": (CAUSAL, GATED),
    "olmo": (CAUSAL, GATED),
    "olmo2": (CAUSAL, GATED),
    "smollm3": (CAUSAL, GATED),
    "granite": (CAUSAL, GATED),
    "cohere": (CAUSAL, GATED),
    "stablelm": (CAUSAL, GATED),
    "starcoder2": (CAUSAL, GATED),
    "glm": (CAUSAL, {**GATED, "head_dim": 8}),
    "gpt2": (CAUSAL, {"n_positions": 64}),
    "gptj": (CAUSAL, {"rotary_dim": 4, "n_positions": 64}),
    "gpt_neox": (CAUSAL, WIDE),
    "falcon": (CAUSAL, {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}),
    "bloom": (CAUSAL, {}),
    "opt": (CAUSAL, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": (CAUSAL, {**MIXTURE, "num_local_experts": 4}),
    "olmoe": (CAUSAL, {**MIXTURE, "num_experts": 4}),
    "qwen3_moe": (CAUSAL, {**MIXTURE, "num_experts": 4, "head_dim": 8}),
    "gpt_oss": (CAUSAL, {**MIXTURE, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "deepseek_v3": (CAUSAL, DEEPSEEK),
    "bert": (MASKED, WIDE),
    "roberta": (MASKED, {**WIDE, "max_position_embeddings": 66}),
    "deberta-v2": (MASKED, WIDE),
    "distilbert": (MASKED, {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "albert": (MASKED, {**WIDE, "embedding_size": 16}),
    "electra": (MASKED, {**WIDE, "embedding_size": 32}),
    "modernbert": (MASKED, {**WIDE, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": (SEQ2SEQ, T5),
    "bart": (SEQ2SEQ, BART),
    "vit": (IMAGE, {**WIDE, **PIXELS}),
}


def make(name: str) -> transformers.PreTrainedModel:
    """A tiny random model of a type."""
    auto, options = MODELS[name]
    config = transformers.AutoConfig.for_model(name)
    common = {key: value for key, value in COMMON.items() if hasattr(config, key)}
    if {"d_model", "dim"} & options.keys():
        common = {key: value for key, value in common.items() if key == "vocab_size" or key.endswith("_id")}
    config = transformers.AutoConfig.for_model(name, **{**common, **options})
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(config, dtype=torch.float32)


def train(model: transformers.PreTrainedModel, config: LpDecayConfig) -> None:
    """Train on random inputs until the target is cut, and a step more."""
    params = {name: dict(model.named_parameters())[name] for name in participants(model, config)}
    optimizer = LpAdamW(
        [{"params": list(params.values())}, {"params": [p for n, p in model.named_parameters() if n not in params]}],
        lr=1e-3,
    )
    driver = SparsityDriver(config, model, params, optimizer, total_steps=STEPS)
    model.train()

    def rates(first: int, last: int) -> list[list[float]]:
        return [[1e-3] * (last - first)] * 2

    driver.start(rates)
    inputs = example_inputs(model)
    for step in range(1, STEPS + 1):
        model(**inputs)[0].float().square().mean().backward()
        driver.before_step()
        optimizer.step()
        optimizer.zero_grad()
        driver.after_step(step, rates)
    driver.finish()


def config_for(pattern: str) -> LpDecayConfig:
    """Half of everything, with a ramp as short as it may be."""
    options = {"pattern": pattern, "ramp_end": 0.9, "num_plans": 2, "importance": "magnitude"}
    if pattern != "2:4":
        options["target_sparsity"] = 0.5
    return LpDecayConfig(compensate=pattern == "unstructured", calibration_batches=0, **options)


def check(name: str) -> dict[str, str]:
    """What works for a type: `"yes"` or the reason why not, by column.

    Raises:
        AssertionError: If something that was not refused before the training came out wrong.
    """
    row = dict.fromkeys(COLUMNS, "yes")
    dense = make(name)
    for pattern in COLUMNS[:4]:
        model = copy.deepcopy(dense)
        config = config_for(pattern)
        try:
            participants(model, config)
        except ValueError as error:
            row[pattern] = reason(str(error))
            continue
        train(model, config)
        report = measure_sparsity(model)
        if pattern == "unstructured":
            assert abs(report.sparsity - 0.5) < 1e-3, report.sparsity
            sparse = model
        elif pattern == "2:4":
            check_semi_structured(model)
        else:
            smaller = shrink(model)
            assert smaller.num_parameters() < model.num_parameters()
    cut = [pattern for pattern in ("neurons", "heads") if row[pattern] == "yes"]
    row["shrink"] = "yes" if cut else "nothing to cut"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(folder)
        sparse.save_pretrained(folder / "model")
        pack(folder / "model", folder / "packed")
        unpack(folder / "packed", folder / "unpacked")
        files = [path.name for path in (folder / "model").iterdir()]
        assert all((folder / "model" / f).read_bytes() == (folder / "unpacked" / f).read_bytes() for f in files)
    zeros = {key: value == 0 for key, value in sparse.named_parameters() if value.dim() > 1}
    # PEFT's own "all-linear" takes routers and experts too, which merge_sparse does not.
    layers = [key.removesuffix(".weight") for key, value in match_parameters(sparse).items() if value.dim() == 2]
    peft_model = get_peft_model(sparse, LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what was merged is not part of the table
            merged = dict(merge_sparse(peft_model).named_parameters())
    except ValueError as error:  # PEFT may adapt the experts with the layers of the same names
        row["LoRA merge"] = reason(str(error))
    else:
        assert all((merged[key][mask] == 0).all() for key, mask in zeros.items())
    return row


def check_semi_structured(model: transformers.PreTrainedModel) -> None:
    """At most two of any four consecutive weights along the input features are left."""
    params, dims = dict(model.named_parameters()), input_dims(model)
    for name in participants(model, config_for("2:4")):
        weight = params[name].detach()
        weight = weight if dims[name] == 1 else weight.transpose(-1, -2)
        assert (weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max() <= 2, name


def reason(message: str) -> str:
    """A refusal in about three words."""
    for part, words in (
        ("Experts, and adapters", "no: 3-D experts"),
        ("how wide fewer heads", "no: width not free"),
        ("over all heads", "no: norm over heads"),
        ("has no number for", "no: width not in config"),
        ("then makes it", "no: config cannot say"),
        ("different numbers", "no: layers differ"),
        ("were not found", "no: unknown layout"),
    ):
        if part in message:
            return words
    return f"no: {message}"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    transformers.logging.set_verbosity_error()
    print(f"| model type | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for name in parser.parse_args(arguments).models:
        print(f"| {name} | {' | '.join(check(name).values())} |", flush=True)


if __name__ == "__main__":
    main()
