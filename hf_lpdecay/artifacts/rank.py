"""`trim_rank`: LoRA adapters with no more ranks than they use."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..sparsity import find_units


@torch.no_grad()
def trim_rank(model: PeftModel) -> PeftModel:
    """Cut the ranks that are zero out of LoRA adapters, each layer to its own rank.

    After a training with ``pattern="rank"``, where with ``scope="global"`` every layer finds a rank of its own. The
    adapter's config then says the rank and alpha of every layer in `rank_pattern` and `alpha_pattern`, in place of what
    these said before, so that plain PEFT loads it. PEFT knows no rank of 0: a layer without any keeps one that is zero.

    Args:
        model (`PeftModel`): With LoRA on linear layers. Its active adapters are changed in place.

    Returns:
        `PeftModel`: The same model; its outputs are what they were.

    Raises:
        ValueError: If there is no LoRA, or LoRA on parameters or convolutions. Nothing is changed then.

    Example:

    ```python
    >>> trim_rank(trainer.model).save_pretrained("outputs/adapter")
    ```
    """
    units = {id(each.params[0]): each for each in find_units(model, "rank")}
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    trimmed = set()
    for layer in layers.values():
        for adapter in (adapter for adapter in layer.active_adapters if adapter in layer.lora_A):
            a, b = layer.lora_A[adapter], layer.lora_B[adapter]
            count = units[id(a.weight)].count
            used = (a.weight.any(1) & b.weight.any(0)).nonzero().view(-1)
            if len(used) == count:
                continue
            if len(used) == 0:
                used = torch.zeros(1, dtype=torch.long, device=a.weight.device)
                b.weight[:, 0] = 0.0
            a.weight = nn.Parameter(a.weight[used].clone(), requires_grad=a.weight.requires_grad)
            b.weight = nn.Parameter(b.weight[:, used].clone(), requires_grad=b.weight.requires_grad)
            a.out_features = b.in_features = layer.r[adapter] = len(used)
            # What PEFT computes when it loads the adapter must be the scaling that there is now.
            scaling, rslora = layer.scaling[adapter], model.peft_config[adapter].use_rslora
            layer.lora_alpha[adapter] = scaling * (len(used) ** 0.5 if rslora else len(used))
            trimmed.add(adapter)
    for adapter in trimmed:
        # PEFT takes the first key that matches: none may be left that matches several layers, or the end of a name.
        own = {f"^{name}": layer for name, layer in layers.items() if adapter in layer.r}
        config = model.peft_config[adapter]
        config.rank_pattern = {key: layer.r[adapter] for key, layer in own.items()}
        config.alpha_pattern = {key: layer.lora_alpha[adapter] for key, layer in own.items()}
    return model
