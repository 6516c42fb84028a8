"""The output head of a language model, dense: as large as all blocks of a small model, and read for every token."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import kernels
from .kernels import Weight
from .sparse_linear import NO_TRAINING, dtype_after, needs_operator
from .speed import time_in_turn


_ROUNDS = 5


class PackedHead(nn.Linear):
    """An output head that multiplies by the sparse layers' kernel with a mask of ones.

    Its weight stays an ordinary parameter, which an embedding may share. Sums are float32 whatever the weight's type,
    and activations are not rounded to it.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, dense_dtype: torch.dtype):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.bias, self.dense_dtype = weight, bias, dense_dtype
        rows, cols = weight.shape
        mask = torch.full((rows * -(-cols // 8) + kernels.PADDING,), 255, dtype=torch.uint8)
        self.register_buffer("positions", mask, persistent=False)
        self.register_buffer("starts", torch.arange(rows + 1) * cols, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head to `x`, shape (..., in)."""
        values = self.weight.detach().view(-1)
        weight = Weight(self.positions, values, self.starts, self.in_features, False)
        if needs_operator(x):
            return torch.ops.hf_lpdecay.sparse_linear(x, *weight, self.bias)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(NO_TRAINING)
        kernel = kernels.kernel_for(values.dtype)
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        return kernels.linear(kernel, weight, bias, x)

    def _apply(self, fn, recurse=True):
        self.dense_dtype = dtype_after(fn, self.dense_dtype, self.weight)
        return super()._apply(fn, recurse)


class CastEmbedding(nn.Embedding):
    """An embedding that shares a head's weight and gives activations of another type than that."""

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter):
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.dense_dtype, self.weight = embedding.weight.dtype, weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `ids`, shape (...)."""
        return super().forward(ids).to(self.dense_dtype)

    def _apply(self, fn, recurse=True):
        self.dense_dtype = dtype_after(fn, self.dense_dtype, self.weight)
        return super()._apply(fn, recurse)


@torch.no_grad()
def pack_head(model: nn.Module, dtype: torch.dtype | None) -> bool:
    """Replace the output head where that is faster.

    Args:
        model (`nn.Module`): On a CPU; without an output head nothing happens.
        dtype (`torch.dtype`, *optional*): Type for the weight; 16 bits only. Defaults to what it has.

    Returns:
        `bool`: Whether it was replaced.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear or head.weight.device.type != "cpu":
        return False
    old = head.weight
    dtype = dtype or old.dtype
    # Rows of whole words: the kernel then reads nothing behind the weight's end.
    if dtype.itemsize != 2 or head.in_features % 64 or isinstance(kernels.kernel_for(dtype), str):
        return False
    sharing = {name: m for name, m in model.named_modules() if m is not head and getattr(m, "weight", None) is old}
    if old.dtype != dtype and any(type(module) is not nn.Embedding for module in sharing.values()):
        return False
    weight = old if old.dtype == dtype else nn.Parameter(old.detach().to(dtype), requires_grad=False)
    new = PackedHead(weight, head.bias, old.dtype)
    if not _is_faster(new, head):
        return False
    for name, module in sharing.items():
        if old.dtype != dtype:
            model.set_submodule(name, CastEmbedding(module, weight))
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, new)
    return True


def _is_faster(new: nn.Module, head: nn.Linear) -> bool:
    x = torch.randn(1, head.in_features).to(head.weight.dtype)
    seconds = time_in_turn({True: (new, x), False: (head, x)}, _ROUNDS)
    return min(seconds[True]) < min(seconds[False])


def unpack_head(model: nn.Module) -> None:
    """Undo [`pack_head`]; a weight that two modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedHead | CastEmbedding):
            old = module.weight
            weight = made.setdefault(id(old), nn.Parameter(old.detach().to(module.dense_dtype)))
            if isinstance(module, PackedHead):
                new = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                new.bias = module.bias
            else:
                new = nn.Embedding(
                    module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta"
                )
            new.weight = weight
            model.set_submodule(name, new.eval())
