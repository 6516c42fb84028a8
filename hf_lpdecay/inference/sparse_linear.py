"""`SparseLinear`: a linear layer whose weight is kept as positions and the values that are not zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity.report import count_nonzero
from ..sparsity.selection import PackedWeight
from . import kernels
from .encoding import concatenate, decode, encode
from .kernels import PADDING, Weight


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseLinear(nn.Module, PackedWeight):
    """A linear layer for inference that takes the memory, and the time, of its values that are not zero.

    Its state dict holds the dense `weight`, as the layer's that it replaces: what `save_pretrained` writes is the
    ordinary checkpoint, bit for bit.

    Args:
        weight (`Weight`): The layer's, shape (out, in).
        bias (`torch.Tensor`, *optional*): Shape (out,).
        transposed (`bool`, *optional*, defaults to `False`): Whether the layer that it replaces keeps its weight as
            (in, out), as `Conv1D` does.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, transposed: bool = False):
        super().__init__()
        self.in_features, self.out_features = weight.cols, weight.rows
        self.columns, self.transposed = weight.columns, transposed
        self.register_buffer("positions", weight.positions, persistent=False)
        self.register_buffer("values", weight.values, persistent=False)
        self.register_buffer("starts", weight.starts, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.dense_dtype = weight.values.dtype  # of the layer that it replaces
        self._calls: dict[torch.dtype, tuple] = {}
        self.eval()

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> "SparseLinear":
        """Pack a dense weight.

        Args:
            weight (`torch.Tensor`): Shape (out, in), or (in, out) with `transposed`; float32, bfloat16 or float16.
            bias (`torch.Tensor`, *optional*): Shape (out,).
            options: `columns` of [`encode`], `transposed` of the class.
        """
        transposed = options.pop("transposed", False)
        return cls(encode(weight.t() if transposed else weight, **options), bias, transposed)

    @property
    def packed(self) -> Weight:
        """Positions and values together."""
        return Weight(self.positions, self.values, self.starts, self.in_features, self.columns)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded anew each time: for code that looks at a layer's weight, not for computing."""
        weight = decode(self.packed)
        return weight.t().contiguous() if self.transposed else weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`."""
        shape = self.out_features, self.in_features
        return shape[::-1] if self.transposed else shape

    def count_nonzero(self) -> int:
        """How many values are not zero; -0.0, which is kept, is zero here."""
        return int(count_nonzero(self.values))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, shape (..., in)."""
        if self.training:  # `train` itself must not raise: it would leave half of the model in the other mode
            raise RuntimeError(NO_TRAINING)
        # Past torch's dispatcher, which takes as long as a small layer.
        if needs_operator(x):
            return torch.ops.hf_lpdecay.sparse_linear(x, *self.packed, self.bias)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(NO_TRAINING)
        call = self._calls.get(x.dtype)
        if call is None:
            call = self._calls[x.dtype] = _prepare(self.packed, self.bias, x.dtype)
        return kernels.linear(*call[:3], x, call[3])

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        zeros = 1 - self.packed.count / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" sparsity={zeros:.1%}, dtype={self.values.dtype}, positions={'columns' if self.columns else 'bits'}"
        )

    def _apply(self, fn, recurse=True):
        self.dense_dtype = dtype_after(fn, self.dense_dtype, self.values)
        self._calls = {}  # they hold addresses
        itemsize = self.values.itemsize
        super()._apply(fn, recurse)
        if self.values.itemsize != itemsize:  # what follows the values is not as long as a kernel may read
            values = self.values[: self.values.numel() - PADDING // itemsize]
            self.values = concatenate([values, values.new_zeros(PADDING // values.itemsize)])
        return self

    def __getstate__(self) -> dict[str, Any]:  # of copy and pickle
        return {**self.__dict__, "_calls": {}}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing, unexpected, errors = args[2:]
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
            return
        if prefix + "weight" in unexpected:
            unexpected.remove(prefix + "weight")
        weight = weight.t() if self.transposed and weight.dim() == 2 else weight
        if weight.shape != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}weight is {list(weight.shape)} as (out, in) features, and the layer has"
                f" {self.out_features} and {self.in_features}."
            )
            return
        packed = encode(weight.to(self.values.device, self.values.dtype), columns=self.columns)
        self.positions, self.values, self.starts = packed[:3]
        self._calls = {}


NO_TRAINING = (
    "A sparse layer is for inference, with model.eval(), and cannot be trained: hf_lpdecay.inference.to_dense(model)"
    " gives the dense model back (or load the checkpoint again), and LpDecayConfig(freeze_zeros=True) keeps its zeros"
    " in training."
)


def needs_operator(x: Tensor) -> bool:
    """Whether torch must see the product: on another device, or where a model is compiled, exported or traced."""
    # An exported model's tensors are of a type of their own.
    return type(x) is not Tensor or not x.is_cpu or torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing()


def dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """What `module.to(...)` makes of a dtype.

    Args:
        fn (`Callable`): What it applies to each tensor.
        dtype (`torch.dtype`): The dtype.
        like (`torch.Tensor`): On the device.

    Raises:
        TypeError: If the kernels have not that type.
    """
    new = fn(like.new_empty(0, dtype=dtype)).dtype
    if new not in DTYPES:
        raise TypeError(
            f"A sparse layer cannot be made {new}: its kernels have float32, bfloat16 and float16. Make the model dense"
            " first, with hf_lpdecay.inference.to_dense(model)."
        )
    return new


def _prepare(weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> tuple:
    if dtype not in DTYPES:
        raise TypeError(f"A sparse layer was given {dtype}: use float32, bfloat16 or float16.")
    kernel = kernels.kernel_for(weight.values.dtype)
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    bias = None if bias is None else bias.detach().to(dtype)
    return kernel, weight, bias, kernel.describe(weight, bias)


@torch.library.custom_op("hf_lpdecay::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor, positions: Tensor, values: Tensor, starts: Tensor, cols: int, columns: bool, bias: Tensor | None
) -> Tensor:
    """`x W^T + bias`; see [`Weight`] for the others."""
    weight = Weight(positions, values, starts, cols, columns)
    kernels.check_features(x, weight)
    if x.device.type == "cpu":
        return kernels.linear(*_prepare(weight, bias, x.dtype)[:3], x)
    if x.device.type == "cuda" and not columns and 0 < x.numel() // cols <= 8:
        from . import triton_kernel

        if triton_kernel.available():
            return triton_kernel.linear(weight, bias, x)
    bias = None if bias is None else bias.to(x.dtype)
    return nn.functional.linear(x, decode(weight).to(x.dtype), bias)


@sparse_linear.register_fake
def _(x, positions, values, starts, cols, columns, bias):
    weight = Weight(positions, values, starts, cols, columns)
    kernels.check_features(x, weight)
    return x.new_empty(*x.shape[:-1], weight.rows)


def _refuse(ctx, *args):
    raise RuntimeError(NO_TRAINING)


sparse_linear.register_autograd(_refuse)
