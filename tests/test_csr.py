"""Very sparse layers on a CPU: the same outputs, and only where it is faster."""

import copy

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

from hf_lpdecay import to_sparse_csr
from hf_lpdecay.artifacts.csr import CsrLinear
from hf_lpdecay.sparsity import select_parameters


def very_sparse(model, sparsity=0.96):
    generator = torch.Generator().manual_seed(0)
    for param in select_parameters(model).values():
        param.data[torch.rand(param.shape, generator=generator) < sparsity] = 0.0
    return model.eval()


@pytest.mark.parametrize(
    ("make", "wide"),
    [(tiny_llama, {"hidden_size": 256, "intermediate_size": 2048}), (tiny_gpt2, {"n_embd": 512, "n_inner": 1024})],
)
def test_the_outputs_are_the_same_and_small_layers_stay_dense(make, wide):
    model = very_sparse(make(**wide))
    sizes = {name.removesuffix(".weight"): param.numel() for name, param in select_parameters(model).items()}
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        after = to_sparse_csr(model)(tokens).logits
        generated = model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert generated.shape == (1, 7)
    found = {name: module for name, module in model.named_modules() if isinstance(module, CsrLinear)}
    assert set(found) == {name for name, size in sizes.items() if size >= 1 << 19} and 0 < len(found) < len(sizes)
    assert all(module.weight._nnz() < 0.05 * sizes[name] for name, module in found.items())


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_dense_one_in_float64(shape, bias):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(7, 5, bias=bias)
    linear.weight.data[torch.rand(5, 7, generator=generator) < 0.7] = 0.0
    x = torch.randn(shape, generator=generator)
    expected = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0.0)
    actual = CsrLinear(linear.weight.detach(), linear.bias)(x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_would_be_no_faster_is_refused_and_nothing_changes():
    model = very_sparse(tiny_llama(hidden_size=256, intermediate_size=2048), sparsity=0.9)
    with pytest.raises(ValueError, match=r"takes 95% zeros and 524,288 weights, and the sparsest of those has 90\.\d%"):
        to_sparse_csr(model)
    weight = model.model.layers[0].mlp.up_proj.weight.data.view(-1)
    weight[: round(0.95 * len(weight))] = 0.0  # 498,074 of 524,288: a little less than 95 %
    weight[round(0.95 * len(weight)) :] = 1.0
    assert isinstance(to_sparse_csr(copy.deepcopy(model)).model.layers[0].mlp.up_proj, CsrLinear)
    with pytest.raises(ValueError, match="none is that large"):
        to_sparse_csr(very_sparse(tiny_llama()))
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, which torch has no sparse products for"):
        to_sparse_csr(very_sparse(tiny_llama()).bfloat16())
    with pytest.raises(RuntimeError, match="q_proj is on meta; sparse rows are for a CPU"):
        to_sparse_csr(tiny_llama().to("meta"))
    assert not any(isinstance(module, CsrLinear) for module in model.modules())
