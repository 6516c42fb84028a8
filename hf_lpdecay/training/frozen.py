"""A frozen base that becomes sparse while adapters learn: its weights decay after each step of the adapters."""

import os
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import LpDecayConfig
from ..files import written_aside
from ..optim.decay import Batches, decay_
from ..sparsity import input_dims
from ..sparsity.patterns import Structured, parse_pattern
from ..sparsity.selection import match_parameters, own_name
from .adapters import mask_lora
from .masked_lora import is_quantized_weight
from .optimizers import importance_without_moment, with_importance


# In a checkpoint, beside the adapter: the base's weights as they are, and the plan by which they decay.
WEIGHTS_FILE, PLAN_FILE = "frozen_base.safetensors", "frozen_base_plan.pt"


class FrozenBase:
    """The frozen weights of a PEFT model that become sparse, as a driver sees those of an optimizer.

    It has `param_groups` and `state` as an optimizer has, which hold the options and the plan of the decay. They have
    no gradient, no moments, and nothing else of their size.

    Args:
        model (`nn.Module`): The base model, with the adapters in it.
        params (`dict[str, torch.Tensor]`): The weights by the names that they have in it.
        config (`LpDecayConfig`): How they become sparse.
    """

    def __init__(self, model: nn.Module, params: dict[str, Tensor], config: LpDecayConfig):
        self.model = model
        self.params = params
        self.config = config
        self.reset()

    @property
    def changes(self) -> bool:
        """Whether there is a target; otherwise the base only keeps the zeros that it has."""
        return self.config.target_sparsity is not None

    def reset(self) -> None:
        """Forget the plan, for a new run."""
        options = {"p": self.config.p, "lp_lambda": 0.0, "freeze_zeros": False, "post_step": False, "s_rate": 1.0}
        self.param_groups: list[dict[str, Any]] = [{"params": list(self.params.values()), **options}]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, lr: float, number: int) -> None:
        """Decay the weights.

        Args:
            lr (`float`): The learning rate of the adapters in this step.
            number (`int`): The step's number: what is rounded stochastically is so in the same way in every process.
        """
        (group,), batches = self.param_groups, Batches()
        for name, param in self.params.items():
            seed = zlib.crc32(f"{number} {name}".encode())
            decay_(param, group, self.state[param], lr, seed, batches)
        batches.run()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the weights as they are, and the plan, into a checkpoint's folder."""
        group = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        plan = {"group": group, "state": {name: self.state[param] for name, param in self.params.items()}}
        tensors = {own_name(name): param.detach().contiguous() for name, param in self.params.items()}
        for file, write in (
            (WEIGHTS_FILE, lambda path: save_file(tensors, path)),
            (PLAN_FILE, lambda path: torch.save(plan, path)),
        ):
            with written_aside(Path(folder, file)) as aside:
                write(aside)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Read what [`save`] has written.

        Raises:
            ValueError: If the folder has no such files.
        """
        missing = [name for name in (WEIGHTS_FILE, PLAN_FILE) if not Path(folder, name).is_file()]
        if missing:
            raise ValueError(
                f"There is no {' and no '.join(missing)} in {folder}: it is no checkpoint of a run that makes a frozen"
                " base sparse. Start a new run."
            )
        tensors = load_file(Path(folder, WEIGHTS_FILE))
        plan = torch.load(Path(folder, PLAN_FILE), map_location="cpu", weights_only=True)
        self.reset()
        self.param_groups[0].update(plan["group"])
        moved: dict[int, Tensor] = {}  # layers with the same input share a Hessian
        for name, param in self.params.items():
            param.copy_(tensors[own_name(name)])
            for key, value in plan["state"][name].items():
                if torch.is_tensor(value):
                    value = moved.setdefault(id(value), value.to(param.device))
                self.state[param][key] = value

    def save_model(self, folder: str | os.PathLike) -> None:
        """Save the base as a plain model, without the adapters."""
        state = {}
        for name, tensor in self.model.state_dict().items():
            parts = name.split(".")
            if not any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
                state[own_name(name).replace(".original_module", "")] = tensor
        self.model.save_pretrained(folder, state_dict=state)


def find_frozen_base(model: nn.Module, config: LpDecayConfig, main_process: bool = True) -> FrozenBase | None:
    """Find the frozen weights of a PEFT model that `config` selects, and mask the adapters.

    Args:
        model (`nn.Module`): Any model.
        config (`LpDecayConfig`): How it shall be made sparse.
        main_process (`bool`, *optional*, defaults to `True`): Whether this process says what is done.

    Returns:
        `FrozenBase`, *optional*: With the config that holds for it; `None` if the base is trained, there are no
            adapters, or neither a target nor frozen zeros are asked for.

    Raises:
        ValueError: If the base is quantized, if adapters cannot be masked, or if the config asks for what frozen
            weights do not have.
    """
    keeps_zeros = config.freeze_zeros and not config.lp_lambda
    if not (config.target_sparsity or keeps_zeros) or config.pattern == "rank" or not isinstance(model, PeftModel):
        return None
    base = model.get_base_model()
    params = match_parameters(base, config.target_modules, config.exclude_modules)
    trained = [name for name, param in params.items() if param.requires_grad]
    if len(trained) == len(params):
        return None
    if trained:
        raise ValueError(
            f"{len(trained)} of the selected weights are trained, such as {trained[0]}, and the other"
            f" {len(params) - len(trained)} are frozen: a run makes the ones or the others sparse. Leave either of them"
            " out with exclude_modules."
        )
    _check(base, params, config)
    parse_pattern(config.pattern).check_all(params, input_dims(base))
    if config.target_sparsity:
        experts = any(param.dim() == 3 for param in params.values())
        left = "importance" in config.left_to_default
        config = with_importance(config, importance_without_moment(config, experts) if left else config.importance)
    frozen = FrozenBase(base, params, config)
    mask_lora(model, becoming_sparse=params.values() if frozen.changes else ())
    if main_process:
        tqdm.write(
            f"The base is frozen{', and becomes sparse while the adapters learn' if frozen.changes else ''}. The"
            " adapters are masked by its zeros, so that they can be merged without loss: trainer.merge_adapters()."
        )
    return frozen


def check_whole(kind: DistributedType, changes: bool) -> None:
    """Raise where each process holds parts of the frozen base only; `changes` says whether it becomes sparse."""
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        cure = (
            "and its decay needs whole tensors: train with DDP or in one process."
            if changes
            else "and freeze_zeros is not needed: adapters from mask_lora(model) keep the zeros in a plain Trainer."
        )
        raise ValueError(f"Under {kind.value} a process holds parts of the frozen base only, {cure}")


def _check(base: nn.Module, params: dict[str, Tensor], config: LpDecayConfig) -> None:
    """Raise where frozen weights cannot be made sparse."""
    quantized = next((name for name, param in params.items() if is_quantized_weight(param)), None)
    if quantized is not None or getattr(base, "quantization_method", None):
        raise ValueError(
            f"{quantized or 'The base'} is quantized, and a decay needs values between those that a quantized weight"
            " can have: make the model sparse first, quantize it then, and train masked adapters (mask_lora) on it."
        )
    if config.importance == "adam" and "importance" not in config.left_to_default:
        raise ValueError(
            "importance='adam' needs the second moment of the gradients, and a frozen base has none: take 'fisher'"
            " (the default there), 'activation' or 'magnitude'."
        )
    if isinstance(parse_pattern(config.pattern), Structured):
        raise ValueError(
            f"pattern={config.pattern!r} takes units of several layers, which are not looked for in a frozen base with"
            " adapters: take 'unstructured', 'n:m' or 'block:RxC', or train all weights."
        )
    if config.s_rate != 1:
        raise ValueError(
            f"s_rate={config.s_rate} would keep a number for each frozen weight, and nothing is kept of them: leave it"
            " out."
        )
