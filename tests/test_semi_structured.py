"""2:4 on sparse tensor cores: checked before anything changes."""

import pytest
import torch
from conftest import tiny_llama, weights

from hf_lpdecay import to_semi_structured
from hf_lpdecay.sparsity import select_parameters


def two_of_four(**overrides):
    model = tiny_llama(hidden_size=64, intermediate_size=128, **overrides).to(torch.bfloat16)
    for param in select_parameters(model).values():
        param.data.unflatten(1, (-1, 4))[..., :2] = 0.0
    return model


def test_what_would_be_wrong_or_no_faster_is_refused_and_nothing_changes():
    model = two_of_four()
    before = weights(model)
    with pytest.raises(RuntimeError, match="The model is on cpu, and 2:4 sparsity is only faster"):
        to_semi_structured(model)
    with pytest.raises(ValueError, match="load the model with dtype=torch"):
        to_semi_structured(two_of_four().float())
    model.model.layers[1].mlp.up_proj.weight.data[0, :3] = 1.0
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is not 2:4 sparse: 1 of its 2,048 groups of 4"):
        to_semi_structured(model)
    narrow = two_of_four(num_key_value_heads=1)  # 16 output features
    with pytest.raises(ValueError, match=r"k_proj has 16 output and 64 input features"):
        to_semi_structured(narrow)
    with pytest.raises(RuntimeError, match="sparse tensor cores"):
        to_semi_structured(narrow, exclude_modules=["k_proj", "v_proj"])
    assert all(type(param) is torch.nn.Parameter for param in model.parameters()) and len(before) == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_are_those_of_the_dense_layers():
    model = two_of_four().cuda().eval()
    tokens = torch.arange(64, device="cuda")[None]
    with torch.no_grad():
        before = model(tokens).logits
        after = to_semi_structured(model)(tokens).logits
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
