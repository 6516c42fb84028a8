"""Where the units of a model are: its neurons, heads or ranks.

Neurons and heads are found by shape and order, in every block of the model: all linear layers of a block read from or
write to the residual stream, whose width is `config.hidden_size`.
"""

import re
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .experts import expert_modules, router_names
from .units import Units, UnitSlice


# Names of a layer that holds queries, keys and values, and how the models that have one order its rows: all queries,
# all keys, all values; or those of the first head (key/value group), then those of the next.
_FUSED = re.compile("qkv|query_key_value|c_attn", re.IGNORECASE)
_ONE_AFTER_THE_OTHER = ("gpt2", "phi3", "modernbert")
_GROUP_BY_GROUP = ("gpt_neox", "bloom", "falcon")


def find_units(model: PreTrainedModel | PeftModel, pattern: str) -> list[Units]:
    """Find the units that the pattern prunes as a whole, block by block or adapter by adapter.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Llama, Qwen, Mistral, Phi-3, GPT-2, GPT-NeoX, Falcon, BLOOM, OPT,
            BERT, ModernBERT, RoBERTa, BART, T5, ViT and what is built like them; for `"rank"`, with LoRA on linear
            layers.
        pattern (`str`): `"neurons"`: a neuron is a row of the layers that read the residual stream and the column of
            the one that writes to it; each expert of a mixture has its own. `"heads"`: the rows of queries, keys and
            values and the columns of the output projection; with grouped queries, those of a key/value group and all
            its query heads. `"rank"`: a row of LoRA's A and the column of its B.

    Returns:
        `list[Units]`: One per feed-forward, attention or adapter, and one for the experts of a block.

    Raises:
        ValueError: If a block has none, or more than can be told apart; if there is no LoRA, or not on linear layers;
            if the config is that of several models in one.
    """
    if pattern == "rank":
        return _ranks(model)
    names = {id(param): name for name, param in model.named_parameters()}
    routers = router_names(model)
    blocks = list(_blocks(model))
    if not blocks:
        raise ValueError(
            f"pattern={pattern!r}: {type(model).__name__} has no list of blocks with linear layers (nn.Linear or"
            " Conv1D), so there is nothing to take units from. Take another pattern."
        )
    config = getattr(model, "config", None)
    for name in ("hidden_size", "num_attention_heads"):
        if getattr(config, name, None) is None:
            raise ValueError(
                f"pattern={pattern!r} finds units by the config of one model, and that of {type(model).__name__} has no"
                f" {name}, as where several models are in one: take another pattern, or train the inner one by itself."
            )
    found = []
    for block_name, block in blocks:
        attentions = _attentions(model, block, names)
        if pattern == "heads":
            found += [Units(f"{block_name}: heads", count, slices) for count, slices in attentions]
            missing = not attentions
        else:
            inside = {id(part.param) for _, slices in attentions for part in slices}
            rest = {
                name: m
                for name, m in _linears(block).items()
                if id(m.weight) not in inside
                and f"{block_name}.{name}" not in routers
                and not re.search("attn|attention", name, re.IGNORECASE)
            }
            neurons = _feed_forward(model.config.hidden_size, list(rest.values()), names)
            if neurons is not None:
                found.append(Units(f"{block_name}: neurons", *neurons))
            experts = [module for _, module in expert_modules(block)]
            found += [Units(f"{block_name}: neurons of each expert", *_of_experts(m, names)) for m in experts]
            missing = neurons is None and (rest or not experts)
        if missing:
            raise ValueError(_not_found(model, pattern, block_name, block))
    return found


def _ranks(model: nn.Module) -> list[Units]:
    names = {id(param): name for name, param in model.named_parameters()}
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in (adapter for adapter in layer.active_adapters if adapter in layer.lora_A):
                if isinstance(layer, ParamWrapper) or not isinstance(layer.lora_A[adapter], nn.Linear):
                    what = "a parameter" if isinstance(layer, ParamWrapper) else "a convolution"
                    raise ValueError(
                        f"pattern='rank' is for LoRA on linear layers, and {name} has it on {what}, whose ranks lie in"
                        " another order: leave it out of target_modules and target_parameters."
                    )
                parts = [_slice(layer.lora_A[adapter], True, 1, names), _slice(layer.lora_B[adapter], False, 1, names)]
                found.append(Units(f"{name}: ranks", layer.r[adapter], tuple(parts)))
    if not found:
        raise ValueError(
            f"pattern='rank' is for LoRA, and {type(model).__name__} has no LoRA adapters on linear layers: add them"
            " with get_peft_model, or take another pattern."
        )
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost module lists that hold linear layers."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in seen):
            blocks = [(f"{name}.{i}", block) for i, block in enumerate(module) if _linears(block)]
            if blocks:
                seen.append(name)
                yield from blocks


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _inputs_outputs(linear: nn.Module) -> tuple[int, int]:
    inputs, outputs = linear.weight.shape if isinstance(linear, Conv1D) else reversed(linear.weight.shape)
    return inputs, outputs


def _slice(linear: nn.Module, of_outputs: bool, width: int, names: dict[int, str], start: int = 0) -> UnitSlice:
    dim = int(isinstance(linear, Conv1D)) if of_outputs else int(not isinstance(linear, Conv1D))
    return UnitSlice(names[id(linear.weight)], linear.weight, dim, start, width)


def _attentions(model: PreTrainedModel, block: nn.Module, names: dict[int, str]) -> list[tuple]:
    """The smallest modules of a block that hold the projections of an attention, and nothing else."""
    found, taken = [], set()
    for module in reversed(list(block.modules())):  # children before their parents
        linears = list(_linears(module).values())
        if any(id(linear) in taken for linear in linears):
            continue
        attention = _attention(model.config, linears, names)
        if attention is not None:
            taken |= {id(linear) for linear in linears}
            found.append(attention)
    return found[::-1]


def _attention(config, linears: list[nn.Module], names: dict[int, str]) -> tuple[int, tuple[UnitSlice, ...]] | None:
    heads = config.num_attention_heads
    if len(linears) not in (2, 4):
        return None
    # The output projection comes last, but for a layer that holds queries, keys and values.
    *readers, output = (
        sorted(linears, key=lambda m: not _FUSED.search(names[id(m.weight)])) if len(linears) == 2 else linears
    )
    inputs, outputs = _inputs_outputs(output)
    if outputs != config.hidden_size or inputs % heads:
        return None
    width = inputs // heads
    sizes = [_inputs_outputs(reader)[1] for reader in readers]
    if len(readers) == 1:
        groups, rest = divmod(sizes[0] - inputs, 2 * width)
        if rest or not groups or heads % groups or not _FUSED.search(names[id(readers[0].weight)]):
            return None
        if config.model_type in _ONE_AFTER_THE_OTHER:
            starts = ((0, inputs // groups), (inputs, width), (inputs + groups * width, width))
            parts = [_slice(readers[0], True, size, names, start) for start, size in starts]
        elif config.model_type in _GROUP_BY_GROUP:
            parts = [_slice(readers[0], True, sizes[0] // groups, names)]
        else:
            return None
        return groups, (*parts, _slice(output, False, inputs // groups, names))
    queries, keys, values = sorted(sizes, reverse=True)
    groups, rest = divmod(keys, width)
    if queries != inputs or keys != values or rest or not groups or heads % groups:
        return None
    parts = [_slice(reader, True, size // groups, names) for reader, size in zip(readers, sizes)]
    return groups, (*parts, _slice(output, False, inputs // groups, names))


def _feed_forward(hidden: int, linears: list[nn.Module], names: dict[int, str]) -> tuple | None:
    if len(linears) not in (2, 3):
        return None
    writers = [linear for linear in linears if _inputs_outputs(linear)[1] == hidden]
    if not writers:
        return None
    writer = writers[-1]
    width = _inputs_outputs(writer)[0]
    readers = [linear for linear in linears if linear is not writer]
    if len(readers) == 1 and _inputs_outputs(readers[0]) == (hidden, 2 * width):  # gate and up in one layer
        parts = [_slice(readers[0], True, 1, names, start) for start in (0, width)]
        return width, (*parts, _slice(writer, False, 1, names))
    if any(_inputs_outputs(reader) != (hidden, width) for reader in readers):
        return None
    return width, (*(_slice(reader, True, 1, names) for reader in readers), _slice(writer, False, 1, names))


def _of_experts(module: nn.Module, names: dict[int, str]) -> tuple[int, tuple[UnitSlice, ...]]:
    """The neurons of experts, by what Transformers says of the layout of their 3-D parameters."""
    if not hasattr(module, "is_concatenated"):
        raise ValueError(
            f"pattern='neurons': {type(module).__name__} has experts, and Transformers does not say whether their gates"
            " lie before or between what they gate. Take another pattern, such as '2:4'."
        )
    reader = module.gate_up_proj if module.has_gate else module.up_proj
    inputs = 0 if module.is_transposed else 1
    width = module.down_proj.shape[1 + inputs]
    starts, per_neuron = (0,), 1
    if module.has_gate:
        starts, per_neuron = ((0, width), 1) if module.is_concatenated else ((0,), 2)
    parts = [UnitSlice(names[id(reader)], reader, 1 - inputs, start, per_neuron) for start in starts]
    return width, (*parts, UnitSlice(names[id(module.down_proj)], module.down_proj, inputs, 0, 1))


def _not_found(model: PreTrainedModel, pattern: str, block_name: str, block: nn.Module) -> str:
    seen = ", ".join("{} ({} -> {})".format(name, *_inputs_outputs(m)) for name, m in _linears(block).items())
    what = {
        "neurons": "one or two layers that read the residual stream and one that writes to it, beside the attention",
        "heads": "three projections that read the residual stream and one that writes to it",
    }[pattern]
    return (
        f"pattern={pattern!r}: {what}, were not found in {block_name} of {type(model).__name__} (hidden_size"
        f" {model.config.hidden_size}, {model.config.num_attention_heads} heads). Its linear layers, inputs -> outputs:"
        f" {seen}. Take another pattern."
    )
