"""Weight updates of the remaining weights: against an exact solution in float64, through a whole run."""

import math

import pytest
import torch
from conftest import VOCAB, controlled, tiny_bert, tiny_gpt2, tiny_llama, trainer_for
from hypothesis import given
from hypothesis import strategies as st
from processes import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import TrainerCallback

from hf_lpdecay import LpDecayConfig, measure_sparsity
from hf_lpdecay.sparsity import Compensation, input_dims, participants, reconstruction
from hf_lpdecay.sparsity.compensation import MAX_TOKENS, block_size, sample_tokens
from hf_lpdecay.sparsity.reconstruction import DAMPING, reconstruct
from hf_lpdecay.sparsity.sharding import has_whole_rows


def problem(rows, blocks, size, seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    features = torch.randn(blocks, 4 * size, size, generator=generator) @ mix
    weight = torch.randn(rows, blocks * size, generator=generator)
    pruned = torch.rand(weight.shape, generator=generator) < share
    return weight, pruned, features.transpose(1, 2) @ features


def damped(gram):
    gram = gram.double()
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    return torch.block_diag(*(one + DAMPING * m * torch.eye(len(one)) for one, m in zip(gram, mean)))


def exact(weight, pruned, gram):
    """The slow twin: one row at a time, by solving for the remaining weights."""
    hessian, result = damped(gram), torch.zeros(weight.shape, dtype=torch.float64)
    for row, (values, mask) in enumerate(zip(weight.double(), pruned)):
        keep = ~mask
        if keep.any():
            result[row, keep] = torch.linalg.solve(hessian[keep][:, keep], (hessian @ values)[keep])
    return result


def error(found, weight, gram):
    change = found.double() - weight.double()
    return ((change @ damped(gram)) * change).sum(1)


@pytest.mark.parametrize("blocks", [1, 3])
def test_with_enough_iterations_it_is_the_exact_solution(monkeypatch, blocks):
    weight, pruned, gram = problem(8, blocks, 12, seed=0)
    monkeypatch.setattr(reconstruction, "ITERATIONS", 40)
    found = reconstruct(weight, pruned, gram)[0]
    torch.testing.assert_close(found.double(), exact(weight, pruned, gram), rtol=1e-3, atol=1e-4)


@given(
    rows=st.integers(1, 5), blocks=st.integers(1, 3), size=st.integers(1, 9), seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)  # fmt: skip
def test_it_never_does_worse_than_leaving_the_others_alone(rows, blocks, size, seed, share):
    weight, pruned, gram = problem(rows, blocks, size, seed, share)
    found = reconstruct(weight, pruned, gram)[0]
    assert not found[pruned].any()
    alone, best = error(weight * ~pruned, weight, gram), error(exact(weight, pruned, gram), weight, gram)
    ours = error(found, weight, gram)
    assert (ours <= alone * (1 + 1e-4) + 1e-4).all()
    assert (ours >= best * (1 - 1e-4) - 1e-4).all()
    if share == 0:
        torch.testing.assert_close(found, weight)


def test_nothing_was_heard_and_dead_features():
    weight, pruned, gram = problem(4, 1, 6, seed=1)
    assert torch.equal(reconstruct(weight, pruned, torch.zeros_like(gram))[0], weight * ~pruned)
    gram[:, 2], gram[:, :, 2] = 0, 0  # a feature that is always zero
    assert reconstruct(weight, pruned, gram)[0].isfinite().all()


def test_a_few_iterations_find_most_of_it():
    weight, pruned, gram = problem(64, 1, 48, seed=2)
    alone, best = (error(x, weight, gram).sum() for x in (weight * ~pruned, exact(weight, pruned, gram)))
    assert error(reconstruct(weight, pruned, gram)[0], weight, gram).sum() - best < 0.2 * (alone - best)


def test_a_few_directions_that_hold_most_of_the_features_do_not_slow_it_down():
    """As in language models; with a diagonal preconditioner it ends 70 % above the best."""
    weight, pruned, _ = problem(64, 1, 128, seed=3)
    generator = torch.Generator().manual_seed(3)
    strengths = torch.logspace(2, 0, 8)
    features = torch.randn(1, 512, 8, generator=generator) * strengths @ torch.randn(8, 128, generator=generator)
    features += torch.randn(1, 512, 128, generator=generator)
    gram = features.transpose(1, 2) @ features
    best = error(exact(weight, pruned, gram), weight, gram).sum()
    assert error(reconstruct(weight, pruned, gram)[0], weight, gram).sum() < 1.02 * best


def test_many_features_are_divided_into_equal_blocks():
    assert [block_size(n) for n in (1, 576, 2048, 2560, 8192, 11008, 18944)] == [1, 576, 2048, 1280, 2048, 1376, 1184]
    assert block_size(2053) == 1  # a prime number


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_what_is_heard_are_the_products_of_the_input_features(make):
    model = make()
    config = LpDecayConfig(target_sparsity=0.5)
    params, dims = participants(model, config), input_dims(model)
    optimizer = torch.optim.SGD(params.values())
    updates = Compensation(model, {param: dims.get(name, 1) for name, param in params.items()}, optimizer)
    weights = {id(param): name for name, param in params.items()}
    expected, handles = {}, []
    for module in model.modules():
        if (name := weights.get(id(getattr(module, "weight", None)))) is not None:

            def hook(module, inputs, name=name):
                x = inputs[0].detach().double().flatten(0, -2)
                expected[name] = expected.get(name, 0) + x.T @ x

            handles.append(module.register_forward_pre_hook(hook))
    for seed in range(2):
        ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
        model.train()(input_ids=ids)
        for handle in handles if seed else []:
            handle.remove()
    model.eval()(input_ids=ids)  # has no say
    assert expected.keys() == params.keys()
    for name, param in params.items():
        torch.testing.assert_close(optimizer.state[param]["lp_gram"][0].double(), expected[name], rtol=1e-4, atol=1e-4)
    grams = [optimizer.state[param]["lp_gram"] for param in params.values()]
    if make is tiny_llama:  # what queries, keys and values read is one, and what gate and up read
        assert len({gram.data_ptr() for gram in grams}) == 4 * model.config.num_hidden_layers
    updates.finish()
    assert not any(optimizer.state[param] for param in params.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dim", [0, 1])
def test_what_was_made_up_for_is_not_made_up_for_again(dim):
    weight, pruned, gram = problem(8, 1, 12, seed=3)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.t().clone() if dim == 0 else weight.clone())
    optimizer = torch.optim.SGD(layer.parameters())
    updates = Compensation(layer, {layer.weight: dim}, optimizer)
    optimizer.state[layer.weight]["lp_gram"] = gram
    nothing = torch.zeros_like(pruned)
    masks = (pruned.t(), nothing.t()) if dim == 0 else (pruned, nothing)
    updates.apply(layer.weight, *masks)
    moved = layer.weight.detach().t() if dim == 0 else layer.weight.detach()
    torch.testing.assert_close(moved, torch.where(pruned, weight, reconstruct(weight, pruned, gram)[0]))
    assert error(moved * ~pruned, weight, gram).sum() < 0.5 * error(weight * ~pruned, weight, gram).sum()
    once = layer.weight.detach().clone()
    updates.apply(layer.weight, masks[0], masks[0])
    torch.testing.assert_close(layer.weight.detach(), once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_move_is_spread_over_the_steps_in_which_the_others_decay(dtype):
    weight, pruned, gram = problem(8, 2, 12, seed=4)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.to(dtype))
    start = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters())
    updates = Compensation(layer, {layer.weight: 1}, optimizer)
    optimizer.state[layer.weight]["lp_gram"] = gram
    updates.apply(layer.weight, pruned, torch.zeros_like(pruned), gradually=True)
    end = torch.where(pruned, start.float(), reconstruct(start, pruned, gram)[0])
    made = 0.0
    for share in (0.0, 0.5, 0.3, 0.2):
        updates.advance(layer.weight, share)
        # What is less than float32 cannot be moved by so little: it moves at once.
        made = made + share if dtype == torch.float32 else 1.0
        expected = start.float().lerp(end, made)
        torch.testing.assert_close(layer.weight.detach().float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    updates.apply(layer.weight, pruned, torch.zeros_like(pruned), gradually=True)
    with torch.no_grad():
        layer.weight[0] = 0.0
    updates.advance(layer.weight, 1.0)
    assert not layer.weight[0].any()  # zero stays zero
    updates.apply(layer.weight, pruned, pruned)  # nothing is left of the last plan
    moved = layer.weight.detach().clone()
    updates.advance(layer.weight, 1.0)
    assert torch.equal(layer.weight, moved)


class Shares(Compensation):
    """Writes down how far it moves."""

    def __init__(self, *args):
        super().__init__(*args)
        self.of = {}

    def advance(self, param, share):
        self.of.setdefault(param, []).append(share)
        super().advance(param, share)


@pytest.mark.parametrize("trim", [True, False])
def test_survivors_move_as_far_as_the_others_have_decayed(trim):
    """With a learning rate that warms up within a plan, in whose first step nothing decays."""
    model = tiny_llama()
    params, optimizer, controller = controlled(0.5, model=model, trim=trim, num_plans=2, ramp_end=0.5)
    updates = controller._compensation = Shares(model, dict.fromkeys(params.values(), 1), optimizer)
    rates = [0.0] * controller.ramp.start + [1e-3 * share for share in (0.0, 0.2, 0.4, 0.6, 0.8)] + [1e-3] * 30
    for step in range(1, controller.ramp.end + 1):
        optimizer.param_groups[0]["lr"] = rates[step - 1]
        for param in params.values():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        controller.after_step(step, lambda first, last, step=step: [rates[step + first : step + last]])
    plan = (controller.ramp.end - controller.ramp.start) // controller.ramp.plans
    for shares in updates.of.values():
        assert len(shares) == 2 * plan and min(shares) >= 0 and shares[0] == 0
        assert [sum(shares[:plan]), sum(shares[plan:])] == pytest.approx([1, 1])
        assert shares[1] < shares[2] < shares[3]


@given(more=st.integers(1, 10_000), length=st.sampled_from([1, 2, 128, 512, 2048]))
def test_samples_of_many_tokens_are_from_all_positions(more, length):
    count = MAX_TOKENS + more
    samples = sample_tokens(torch.arange(count)[:, None])[:, 0].sort().values
    assert len(samples.unique()) == MAX_TOKENS
    gaps = torch.cat([samples[:1] + 1, samples.diff(), count - samples[-1:]])
    assert gaps.max() <= 2 * count / MAX_TOKENS + 1  # evenly
    first = (samples % length == 0).float().mean().item()  # such as each text's first
    assert first == pytest.approx(len(range(0, count, length)) / count, rel=0.5, abs=0.002)
    assert torch.equal(sample_tokens(samples[:, None]), samples[:, None])


def test_of_many_tokens_the_products_are_estimated():
    layer = torch.nn.Linear(6, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters())
    Compensation(layer, {layer.weight: 1}, optimizer)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 512, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    layer(features)
    exact = (features.double().flatten(0, 1).T @ features.double().flatten(0, 1)).float()
    assert (optimizer.state[layer.weight]["lp_gram"][0] - exact).norm() < 0.05 * exact.norm()


def test_an_overflow_is_not_heard():
    layer = torch.nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters())
    Compensation(layer, {layer.weight: 1}, optimizer)
    features = torch.arange(8.0).view(2, 4)
    layer(features)
    layer(features * torch.tensor([1.0, math.inf, 1.0, 1.0]))
    layer(features * math.nan)
    assert torch.equal(optimizer.state[layer.weight]["lp_gram"][0], features.T @ features)


def test_a_run_compensates_and_leaves_nothing_behind(tmp_path):
    losses = {}
    for compensate in (None, False):
        config = LpDecayConfig(p=0.5, target_sparsity=0.8, compensate=compensate)
        trainer = trainer_for(tmp_path, config)
        trainer.train()
        assert measure_sparsity(trainer.model).sparsity == pytest.approx(0.8, abs=1e-3)
        assert not any("lp_gram" in state or "lp_move" in state for state in trainer.optimizer.state.values())
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())
        losses[compensate] = trainer.evaluate()["eval_loss"]
    assert losses[None] != losses[False]


@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_what_needs_no_gradient_hears_the_batches_before_the_training_and_begins_with_it(tmp_path, importance):
    seen = {}

    class Peek(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen["grads"] = [param.grad for param in model.parameters()]
            for name, param in model.named_parameters():
                if "lp_gram" in optimizer.state[param]:
                    seen[name] = {key: value for key, value in optimizer.state[param].items() if key != "lp_gram"}
                    seen[name]["gram"] = optimizer.state[param]["lp_gram"][0].double()

    config = LpDecayConfig(p=0.5, pattern="2:4", importance=importance, calibration_batches=3, ramp_end=0.4)
    model = tiny_llama(attention_dropout=0.0)
    trainer = trainer_for(tmp_path, config, model=model, callbacks=[Peek()], warmup_steps=5)
    trainer.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, Peek))  # behind ours
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(3))]
    twin, inputs = tiny_llama(attention_dropout=0.0).double().train(), {}
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(module, x, name=name):
                inputs.setdefault(name, []).append(x[0].detach().flatten(0, -2))

            module.register_forward_pre_hook(hook)
    with torch.random.fork_rng():
        for batch in batches:
            twin(**batch)
    trainer.train()
    assert seen.pop("grads") == [None] * len(list(model.parameters()))
    assert len(seen) == 14
    for name, state in seen.items():
        x = torch.cat(inputs[name.removesuffix(".weight")])
        torch.testing.assert_close(state["gram"], x.T @ x, rtol=1e-3, atol=1e-3)
        assert "lp_lambda" in state  # the first plan was made before the first step
        if importance == "activation":
            rms = x.square().mean(0).sqrt()
            torch.testing.assert_close(state["lp_col"][0].double(), rms / rms.square().mean().sqrt(), rtol=1e-3, atol=0)
    assert measure_sparsity(model).sparsity == 0.5


def test_a_head_that_is_tied_to_the_embedding_can_be_compensated(tmp_path):
    model = tiny_llama(attention_dropout=0.0)
    config = LpDecayConfig(p=0.5, target_sparsity=0.6, target_modules=["lm_head", "up_proj"])
    trainer = trainer_for(tmp_path, config, model=model)
    trainer.train()
    report = measure_sparsity(model, trainer.lp_modules)
    selected = {t.name: t.numel for t in report.tensors if t.selected}
    assert selected.pop("model.embed_tokens.weight") == VOCAB * 32 and len(selected) == 2
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert measure_sparsity(model, ["lm_head", "up_proj"]).to_dict() == report.to_dict()
    assert model.get_input_embeddings().weight is model.lm_head.weight
    with pytest.raises(ValueError, match="end in: down_proj, gate_proj"):  # not an embedding that stands alone
        measure_sparsity(tiny_llama(tie_word_embeddings=False), ["embed_tokens"])
    updates = Compensation(model, {model.lm_head.weight: 1}, optimizer := torch.optim.SGD(model.parameters()))
    features = model.train().model(torch.arange(3, 9)[None]).last_hidden_state.detach().double()[0]
    model.lm_head(features.float())
    gram = optimizer.state[model.lm_head.weight]["lp_gram"][0]
    torch.testing.assert_close(gram.double(), features.T @ features, rtol=1e-4, atol=1e-4)
    updates.finish()


def place_rows_and_columns():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    mesh = init_device_mesh("cpu", (1,))
    weights = [distribute_tensor(torch.ones(4, 6), mesh, [where]) for where in (Shard(0), Shard(1), Replicate())]
    assert [has_whole_rows(weight, 1) for weight in weights] == [True, False, True]
    assert [has_whole_rows(weight, 0) for weight in weights] == [False, True, True]
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weights[0])
    optimizer = torch.optim.SGD(layer.parameters())
    assert not Compensation(layer, {layer.weight: 0}, optimizer)._handles
    assert Compensation(layer, {layer.weight: 1}, optimizer)._handles


def test_a_process_without_whole_rows_leaves_a_weight_alone():
    run_in_processes(place_rows_and_columns, 1)
