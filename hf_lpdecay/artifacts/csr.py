"""`to_sparse_csr`: very sparse linear layers, faster on a CPU."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..sparsity.report import count_nonzero
from ..sparsity.selection import Modules, match_layers


logger = logging.get_logger(__name__)

# Below either, a dense product was as fast for some number of tokens (recipes/README.md has the measurement).
MIN_SPARSITY = 0.95
MIN_NUMEL = 1 << 19


class CsrLinear(nn.Module):
    """A linear layer whose weight is kept in compressed sparse rows, for inference.

    Args:
        weight (`torch.Tensor`): Dense, shape (out, in).
        bias (`torch.Tensor`, *optional*): Shape (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, shape (..., in)."""
        # Sparse times dense is several times as fast as torch's own order, dense times transposed sparse.
        y = (self.weight @ x.reshape(-1, self.in_features).t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.weight._nnz():,}"


@torch.no_grad()
def to_sparse_csr(
    model: nn.Module, target_modules: Modules = "all-linear", exclude_modules: Modules = None
) -> nn.Module:
    """Run a model's very sparse linear layers as products with sparse matrices, on a CPU, for inference.

    Layers that would be no faster so stay dense: those with less than 95 % zeros, and those with fewer than 524,288
    weights. Such a model can be neither trained nor saved; keep the folder that it was loaded from.

    Args:
        model (`nn.Module`): float32, on a CPU.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Which layers, spelt as in
            [`~hf_lpdecay.LpDecayConfig`].
        exclude_modules (`list[str]` or `str`, *optional*): Which of them not.

    Returns:
        `nn.Module`: The same model, its outputs as before but for rounding.

    Raises:
        ValueError: If a layer is not in float32, or none would be faster. Nothing is changed then.
        RuntimeError: If the model is not on a CPU.

    Example:

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/sparse-98", dtype=torch.float32)
    >>> to_sparse_csr(model).generate(**inputs)
    ```
    """
    layers = match_layers(model, target_modules, exclude_modules)
    for name, module in layers.items():
        if module.weight.device.type != "cpu":
            raise RuntimeError(f"{name} is on {module.weight.device}; sparse rows are for a CPU: move the model there.")
        if module.weight.dtype != torch.float32:
            raise ValueError(
                f"{name} is {module.weight.dtype}, which torch has no sparse products for: load the model with"
                " dtype=torch.float32."
            )
    sparsity = {n: 1 - int(count_nonzero(m.weight)) / m.weight.numel() for n, m in layers.items()}
    large = [name for name, module in layers.items() if module.weight.numel() >= MIN_NUMEL]
    # A target of 95 % may be met by a weight less, since weights are whole.
    faster = [name for name in large if sparsity[name] >= MIN_SPARSITY - 1e-4]
    if not faster:
        sparsest = max(large, key=sparsity.get, default=None)
        found = f"the sparsest of those has {sparsity[sparsest]:.1%} ({sparsest})" if sparsest else "none is that large"
        raise ValueError(
            f"No layer would be faster: it takes {MIN_SPARSITY:.0%} zeros and {MIN_NUMEL:,} weights, and {found}. Run"
            " the model as it is, or make it sparser."
        )
    for name in faster:
        module = layers[name]
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        model.set_submodule(name, CsrLinear(weight.detach(), module.bias))
    logger.info(f"{len(faster)} of {len(layers)} linear layers are kept in sparse rows.")
    return model
