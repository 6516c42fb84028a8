"""Sparse layers: every instruction set against the plain loop, and the module against the dense layer."""

import copy
import math
import mmap
import pickle
import re

import pytest
import torch
from torch import nn

from hf_lpdecay.inference import SparseLinear, encoding, kernels
from hf_lpdecay.inference.encoding import decode_slowly, encode, pad_rows, to_columns
from hf_lpdecay.inference.head import PackedHead
from hf_lpdecay.inference.kernels import INSTRUCTION_SETS, PADDING, kernel_for


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def with_zeros(rows, cols, share=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) < share] = 0.0
    return weight.to(dtype)


def kernel(dtype, instructions):
    found = kernel_for(dtype, instructions)
    if instructions == "avx2" and isinstance(found, str):
        pytest.skip(found)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", [name for name in INSTRUCTION_SETS if name != "plain"])
def test_every_instruction_set_is_the_plain_loop(instructions, dtype, columns):
    plain, fast = kernel(dtype, "plain"), kernel(dtype, instructions)
    assert plain.instruction_set == "plain"
    for rows, cols in ((5, 70), (33, 33), (40, 576), (3, 7), (34, 1030), (100, 65)):
        weight = with_zeros(rows, cols, dtype=dtype)
        weight[0] = 0.0  # an empty row, and a full one
        weight[1] = 1.0
        packed = encode(weight, columns)
        for act in DTYPES:
            bias = torch.randn(rows).to(act)
            most = fast.most_rows[act]
            for n in (1, 2, 3, 13, min(37, most), *([min(530, most)] if rows == 100 else ())):
                x = torch.randn(n, cols).to(act)
                expected, actual = x.new_empty(n, rows), x.new_empty(n, rows)
                plain.multiply(plain.describe(packed, bias), x, expected, n)
                fast.multiply(fast.describe(packed, bias), x, actual, n)
                error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
                assert error < TOLERANCE[act], (rows, cols, act, n)
        for out in (dtype, torch.float32):
            assert torch.equal(decoded(fast, packed, out), weight.to(out))
            assert torch.equal(decoded(plain, packed, out), weight.to(out))


def decoded(kernel, packed, dtype):
    out = torch.full((packed.rows, packed.cols), 7.0, dtype=dtype)
    kernel.decode(kernel.describe(packed, None), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive_both_encodings(dtype):
    weight = torch.tensor([[0.0, -0.0, math.nan, math.inf], [1.0, 0.0, 0.0, -2.0], [0.0] * 4]).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for columns in (False, True):
        packed = encode(weight, columns)
        assert packed.starts.tolist() == [0, 3, 5, 5]  # -0.0 is a value
        assert torch.equal(decode_slowly(packed).view(bits), weight.view(bits))
        assert torch.equal(kernels.dense(kernel(dtype, "native"), packed).view(bits), weight.view(bits))
    one = with_zeros(9, 13, dtype=dtype)
    mask, rows = encode(one.view(1, -1)), encode(one)
    assert all(torch.equal(a, b) for a, b in zip(pad_rows(mask.positions, mask.values, 9, 13)[:3], rows[:3]))
    assert all(torch.equal(a, b) for a, b in zip(to_columns(rows)[:3], encode(one, columns=True)[:3]))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7), (300, 7), (300, 7, "as with AMX"), (3, 0, 7)])
def test_the_layer_is_the_dense_one_in_float64(shape, columns, monkeypatch):
    if isinstance(shape[-1], str):  # many rows are then multiplied by torch, with the decoded weight
        shape = shape[:-1]
        for dtype in DTYPES:
            monkeypatch.setattr(kernel_for(dtype), "most_rows", dict.fromkeys(DTYPES, 128))
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).requires_grad_(False)
    linear.weight.copy_(with_zeros(5, 7))
    x = torch.randn(shape)
    expected = linear.double()(x.double())
    linear.float()
    layer = SparseLinear.from_dense(linear.weight, linear.bias, columns=columns)
    actual = layer(x)
    assert actual.dtype == torch.float32 and actual.shape == (*shape[:-1], 5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)
        assert low.values.dtype == dtype and low.positions.dtype == torch.uint8
        torch.testing.assert_close(low(x.to(dtype)).double(), expected, rtol=2e-2, atol=2e-2)
        # Activations of another type than the values: sums are float32.
        torch.testing.assert_close(low(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_strided_activations_threads_copies_and_pickles():
    layer = SparseLinear.from_dense(with_zeros(2048, 96), torch.randn(2048))
    x = torch.randn(96, 3).t()
    expected = layer(x.contiguous())
    assert torch.equal(layer(x), expected)
    torch.set_num_threads(2)
    assert torch.equal(layer(x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    other.load_state_dict({"weight": torch.ones(2048, 96), "bias": torch.zeros(2048)})
    assert torch.allclose(other(x), x.sum(-1, keepdim=True).expand(3, 2048), atol=1e-4)
    with pytest.raises(RuntimeError, match=r"weight is \[96, 2048\] as \(out, in\) features, and the layer has 2048"):
        other.load_state_dict({"weight": torch.ones(96, 2048)}, strict=False)
    assert other.load_state_dict({}, strict=False).missing_keys == ["bias", "weight"]
    assert "sparsity=" in repr(layer) and len(layer.values) < 2048 * 96 * 0.52 + PADDING


@pytest.mark.parametrize("columns", [False, True])
def test_another_dtype_keeps_the_padding_and_is_what_the_dense_layer_would_have(columns):
    weight, bias = with_zeros(5, 70), torch.randn(5)
    layer = SparseLinear.from_dense(weight, bias, columns=columns)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32):
        weight, bias = weight.to(dtype), bias.to(dtype)
        layer.to(dtype)
        count = layer.packed.count
        assert layer.values[count:].nbytes == PADDING and not layer.values[count:].any()
        assert torch.equal(decode_slowly(layer.packed), weight) and torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias) and layer.dense_dtype == dtype
        x = torch.randn(3, 70, dtype=dtype)
        expected = nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)
    before = layer.state_dict()
    with pytest.raises(TypeError, match=r"cannot be made torch\.float64: its kernels have .*to_dense\(model\)"):
        layer.double()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


def test_large_weights_lie_in_large_pages():
    weight = with_zeros(1030, 2100)
    layer = SparseLinear.from_dense(weight)
    assert layer.values.nbytes > encoding._PAGE and torch.equal(layer.weight, weight)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert layer.values.data_ptr() % encoding._PAGE == 0
    assert torch.equal(to_columns(layer.packed).positions, encode(weight, columns=True).positions)
    x = torch.ones(2, 2100)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.values.untyped_storage().nbytes() == layer.values.nbytes


def test_compiled_exported_and_traced_by_the_operator():
    layer = SparseLinear.from_dense(with_zeros(20, 33), torch.randn(20))
    x = torch.randn(4, 33)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(x), expected) and torch.equal(traced(2 * x), layer(2 * x))
    arguments = (x, *layer.packed, layer.bias)
    torch.library.opcheck(
        torch.ops.hf_lpdecay.sparse_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("width", [0, 7, 32, 34, 33 * 64])
def test_other_features_than_the_layers_are_refused_as_by_a_dense_one(width):
    dense = nn.Linear(33, 20)
    x = torch.randn(2, 3, width)
    with pytest.raises(RuntimeError) as raised:
        dense(x)
    message = re.escape(str(raised.value))
    for columns in (False, True):
        layer = SparseLinear.from_dense(with_zeros(20, 33), columns=columns)
        with pytest.raises(RuntimeError, match=message):
            layer(x)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hf_lpdecay.sparse_linear(x, *layer.packed, None)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hf_lpdecay.sparse_linear(x.to("meta"), *(t.to("meta") for t in layer.packed[:3]), 33, False, None)
    packed = PackedHead(dense.weight, None, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        packed(x)


def test_training_is_refused_with_the_way_back():
    layer = SparseLinear.from_dense(with_zeros(4, 6))
    layer.train()
    for x in (torch.ones(2, 6), torch.ones(2, 6, device="meta")):
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=r"model\.eval\(\), .*to_dense\(model\) gives the dense"),
        ):
            layer(x)
    layer.eval()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        layer(torch.ones(2, 6, requires_grad=True))
    with pytest.raises(TypeError, match=r"was given torch\.int64"):
        layer(torch.ones(2, 6, dtype=torch.int64))
    with torch.no_grad():
        assert layer(torch.ones(2, 6, requires_grad=True)).shape == (2, 4)
