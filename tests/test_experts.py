"""Experts' 3-D parameters: every expert's matrix is the weight of a linear layer like any other."""

import pytest
import torch
import worker
from conftest import VOCAB, tiny_mixtral, token_rows, trainer_for
from processes import run_in_processes
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from hf_lpdecay import LpAdamW, LpDecay, LpDecayConfig, measure_sparsity
from hf_lpdecay.optim.functional import structured_size
from hf_lpdecay.sparsity import Compensation, input_dims, match_parameters
from hf_lpdecay.sparsity.importance import importance_from_adam


def tiny_gpt_oss():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = GptOssConfig(vocab_size=VOCAB, **sizes, **experts, layer_types=["full_attention"] * 2)
    return AutoModelForCausalLM.from_config(config)


def test_all_linear_takes_the_experts_and_not_the_router():
    model = tiny_mixtral()
    names = match_parameters(model)
    assert sum("experts" in name for name in names) == 4 and not any(".gate." in name for name in names)
    assert set(match_parameters(model, ["gate_up_proj"])) == set(match_parameters(model, ["experts.gate_up_proj"]))
    with pytest.raises(ValueError, match="Did you mean 'gate_up_proj'"):
        match_parameters(model, ["gate_up_prj"])


def test_the_orientation_is_the_models_even_where_all_sides_are_equal():
    assert {dim for name, dim in input_dims(tiny_gpt_oss()).items() if "experts" in name} == {0}
    assert set(input_dims(tiny_mixtral()).values()) == {1}


@pytest.mark.parametrize("pattern", ["2:4", "block:4x8"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_pattern_is_that_of_each_matrix(pattern, dim):
    torch.manual_seed(0)
    sizes = torch.rand(3, 16, 32)
    each = torch.stack([structured_size(size, pattern, dim) for size in sizes])
    assert torch.equal(structured_size(sizes, pattern, dim), each)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_step_is_that_of_each_matrix(fused, dtype, wrapped):
    """With factors of importance, by the kernel and without, as if each expert were a parameter of its own."""
    torch.manual_seed(0)
    weight = torch.randn(3, 16, 24).to(dtype)
    together = [nn.Parameter(weight.clone())]
    apart = [nn.Parameter(matrix.clone()) for matrix in weight]
    factors = torch.rand(3, 16, 1) + 0.5, torch.rand(3, 1, 24) + 0.5
    for params in (together, apart):
        options = {"lr": 1e-2, "p": 0.5, "fused": fused, "stochastic_rounding": False}
        if wrapped:
            if dtype == torch.bfloat16:
                pytest.skip("rounds stochastically")
            optimizer = LpDecay(torch.optim.SGD(params, lr=1e-2), p=0.5)
        else:
            optimizer = LpAdamW(params, **options)
        for i, param in enumerate(params):
            row, col = factors if param.dim() == 3 else (factors[0][i], factors[1][i])
            plan = {"lp_lambda": 0.5, "lp_threshold": 0.8, "lp_row": row, "lp_col": col}
            if wrapped:
                optimizer.state[param].update(plan)
            else:
                optimizer.state[param].update(plan)
        for step in range(3):
            torch.manual_seed(step)
            grad = torch.randn(weight.shape).to(dtype)
            for i, param in enumerate(params):
                param.grad = grad if param.dim() == 3 else grad[i].clone()
            optimizer.step()
    assert torch.equal(together[0], torch.stack(list(apart)))
    if not wrapped:
        assert int(optimizer.state[apart[0]]["step"]) == 3


def test_an_expert_without_a_token_is_ranked_by_magnitude():
    param = nn.Parameter(torch.randn(3, 4, 6))
    moment = torch.rand(3, 4, 6)
    moment[1] = 0.0
    state = {param: {"exp_avg_sq": moment}}
    importance_from_adam([param], state, together=False)
    factors = state[param]["lp_row"] * state[param]["lp_col"]
    torch.testing.assert_close(factors[1], torch.ones(4, 6))
    for i in (0, 2):
        rows, columns = moment[i].mean(1, keepdim=True), moment[i].mean(0, keepdim=True)
        unit = moment.mean()
        torch.testing.assert_close(factors[i], (rows * columns / moment[i].mean() / unit).sqrt())


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_hessians_are_those_of_each_experts_own_tokens(make, implementation):
    """Against what a forward pass of the experts, written out, multiplies with."""
    model = make()
    model.set_experts_implementation(implementation)
    model.train()
    experts = model.model.layers[0].mlp.experts
    optimizer = LpAdamW([experts.gate_up_proj, experts.down_proj], lr=1e-3)
    dims = dict.fromkeys((experts.gate_up_proj, experts.down_proj), 0 if experts.is_transposed else 1)
    seen = {}
    experts.register_forward_pre_hook(lambda module, args: seen.setdefault("args", args))
    compensation = Compensation(model, dims, optimizer)
    model(input_ids=torch.tensor([row["input_ids"] for row in token_rows(4)]))
    compensation.remove_hooks()
    states, chosen = (tensor.detach() for tensor in seen["args"][:2])
    states = states.flatten(0, -2)
    for expert in range(experts.num_experts):
        features = states[(chosen.view(len(states), -1) == expert).any(1)]
        gram = optimizer.state[experts.gate_up_proj]["lp_gram"][expert, 0]
        torch.testing.assert_close(gram, features.t() @ features)
        if experts.is_transposed:
            hidden = features @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        else:
            hidden = features @ experts.gate_up_proj[expert].t()
        hidden = experts._apply_gate(hidden)
        gram = optimizer.state[experts.down_proj]["lp_gram"][expert, 0]
        torch.testing.assert_close(gram, hidden.t() @ hidden)


CONFIGS = {
    "half": {"target_sparsity": 0.5},
    "semi": {"pattern": "2:4", "calibration_batches": 4},
    "neurons": {"target_sparsity": 0.5, "pattern": "neurons"},
}


def zeros(weights):
    return sum(int((tensor == 0).sum()) for tensor in weights)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Trained in one process, by config."""
    models = {}
    for name, config in CONFIGS.items():
        model = tiny_mixtral()
        trainer_for(tmp_path_factory.mktemp(name), LpDecayConfig(**config), model=model).train()
        models[name] = model
    return models


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_is_trained_to_exactly_half(alone, name):
    experts = ["gate_up_proj", "down_proj"] if name == "neurons" else "all-linear"  # in whose place nothing else is
    assert measure_sparsity(alone[name], experts).sparsity == 0.5
    if name == "semi":
        for tensor in (param for key, param in alone[name].named_parameters() if "experts" in key):
            assert ((tensor.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize("state_dict_type", [None, "FULL_STATE_DICT"], ids=["DDP", "FSDP2"])
def test_two_processes_end_with_as_many_zeros_as_one(alone, tmp_path, state_dict_type):
    run_in_processes(worker.train_experts, 2, str(tmp_path), CONFIGS, state_dict_type)
    for name, model in alone.items():
        saved = load_file(tmp_path / name / "model.safetensors")
        assert zeros(saved.values()) == zeros(model.parameters()), name


def test_what_takes_no_part_is_said_with_its_share(tmp_path, capsys):
    config = LpDecayConfig(target_sparsity=0.5, exclude_modules=["experts.gate_up_proj"])
    trainer_for(tmp_path, config, model=tiny_mixtral()).train()
    assert (
        "of the weights in the blocks take no part: model.layers.0.mlp.experts.gate_up_proj" in capsys.readouterr().out
    )
