"""Mixtures of LoRA experts: gates, what is trained and what is deployed, by hand on dense matrices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mllm_cl.data.collate import Collator
from mllm_cl.errors import MethodError
from mllm_cl.methods import RouteBatch
from mllm_cl.methods._routing import top_gates, top_probability
from mllm_cl.methods.branchlora import BranchLoRA
from mllm_cl.methods.clmoe import CLMoE, merge_experts, old_shares
from mllm_cl.methods.finetune import Finetune
from mllm_cl.methods.moelora import MoELoRA
from mllm_cl.methods.sd_lora import SDLoRA, direction
from mllm_cl.methods.smolora import SMoLoRA, mean_over
from mllm_cl.models import extra_parameters
from mllm_cl.models.adapters import DEFAULT, TASK, active, adapter_deltas, adapter_state, factors, lora_layers


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def one_layer(model):
    """A LoRA layer with its name, and its weights in numpy: W, A, B and the scaling."""
    module, layer = list(lora_layers(model))[3]
    lora_a, lora_b = factors(layer, DEFAULT)
    weights = [w.detach().double().numpy() for w in (layer.get_base_layer().weight, lora_a.weight, lora_b.weight)]
    return module, layer, *weights, layer.scaling[DEFAULT]


def tokens(layer, rows: int = 3, length: int = 4) -> torch.Tensor:
    return torch.randn(rows, length, layer.in_features, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def learning(begin, disturb, small_stream):
    """A learner in the middle of its first task, with an update that is not zero."""

    def story(method, **settings):
        stream = small_stream(2, rows=4)
        learner, ctx = begin(stream, method, **settings)
        disturb(ctx.model, DEFAULT)
        ctx.model.eval()
        return learner, ctx, stream

    return story


def test_moelora_is_the_softmax_mixture_of_its_experts_for_every_token(learning):
    method = MoELoRA(experts=2)
    _, ctx, _ = learning(method)
    module, layer, base, lora_a, lora_b, scaling = one_layer(ctx.model)
    router = method.parameters(ctx)[module].detach().double().numpy()
    inputs = tokens(layer)
    x = inputs.double().numpy()
    expected = x @ base.T
    for expert, own in enumerate((slice(0, 2), slice(2, 4))):
        gate = softmax(x @ router.T)[..., expert : expert + 1]
        expected = expected + scaling * gate * (x @ lora_a[own].T @ lora_b[:, own].T)
    with torch.no_grad():
        np.testing.assert_allclose(layer(inputs).numpy(), expected, atol=1e-5)
        alone = torch.cat([layer(row[None, :k]) for row, k in zip(inputs, (4, 4, 4))])
        assert torch.allclose(alone, layer(inputs), atol=1e-6)  # no row sees another
        with active(ctx.model, []):
            assert torch.equal(layer(inputs), layer.get_base_layer()(inputs))


def test_one_expert_is_plain_fine_tuning(make_learner, small_stream, train_task):
    stream, results = small_stream(2, rows=16), []
    for method in (Finetune(), MoELoRA(experts=1)):
        learner = make_learner(method, policy="one")
        for _ in stream:
            train_task(learner, stream)
        results.append(adapter_state(learner.model, DEFAULT))
    # the gate's gradients are 0, but change the order of sums on some processors
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=2e-4, rtol=0)


def test_routers_are_trained_and_kept(make_learner, small_stream, train_task):
    method, stream = MoELoRA(experts=2), small_stream(2, rows=8)
    learner = make_learner(method)
    train_task(learner, stream, num_train_epochs=3)
    first = {name: tensor.clone() for name, tensor in method.gates.items()}
    assert first.keys() == {name for name, _ in lora_layers(learner.model)}
    assert not extra_parameters.attached(learner.model)
    train_task(learner, stream)
    moved = [name for name in first if not torch.equal(first[name], method.gates[name])]
    assert len(moved) == len(first)
    again = MoELoRA(experts=2)
    again.load_state_dict(method.state_dict())
    assert all(torch.equal(again.gates[name], method.gates[name]) for name in first)


def test_experts_must_divide_the_rank(begin, small_stream):
    with pytest.raises(MethodError, match=r"rank 4 cannot be split over 3 experts(.|\n)*set model\.lora\.r"):
        begin(small_stream(1, rows=4), MoELoRA(experts=3))


def test_gates_follow_an_adapter_that_was_loaded_again(learning, tmp_path):
    method = MoELoRA(experts=2)
    learner, ctx, stream = learning(method)
    learner.end_task(ctx)
    _, layer, *_ = one_layer(learner.model)
    inputs = tokens(layer)
    with torch.no_grad():
        before = layer(inputs)
        learner.save_adapters(tmp_path / "adapter")
        learner.save_states(tmp_path / "method")
        learner.load_stage(tmp_path / "adapter", tmp_path / "method", 1)
        assert not torch.allclose(layer(inputs), before, atol=1e-4)  # the experts added up, nobody has routed yet
        method.route(learner.context(stream[0], stream, None), RouteBatch([], []))
        assert torch.equal(layer(inputs), before)


def test_top_gates_are_a_softmax_over_the_largest():
    gates = top_gates(torch.tensor([[[1.0, 3.0, 2.0], [0.0, 0.0, -9.0]]]), 2)
    e = np.exp(1.0)
    np.testing.assert_allclose(gates[0, 0].numpy(), [0.0, e / (1 + e), 1 / (1 + e)], rtol=1e-6)
    assert gates[0, 1].tolist() == [0.5, 0.5, 0.0]
    assert torch.equal(top_gates(torch.zeros(2, 1), 5), torch.ones(2, 1))


def test_branchlora_shares_its_trunk_and_routes_every_row_by_its_task(learning, begin, disturb):
    method = BranchLoRA(experts=2, top=1, freeze=1, samples=2)
    learner, ctx, stream = learning(method)
    learner.end_task(dataclasses.replace(ctx, embed=lambda rows: torch.tensor([[1.0, 0.0]] * len(rows))))
    _, ctx = begin(stream, learner=learner)
    module, layer, *_ = one_layer(ctx.model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for own in method.parameters(ctx).values():
            own.copy_(torch.randn(own.shape, generator=generator))
    assert all(name.startswith("2/") for name in method.parameters(ctx))  # the first task's routers are frozen
    learner.end_task(dataclasses.replace(ctx, embed=lambda rows: torch.tensor([[0.0, 1.0]] * len(rows))))
    ctx = dataclasses.replace(learner.context(stream[1], stream, None), embed=lambda rows: torch.tensor(rows))
    module, layer, base, lora_a, lora_b, scaling = one_layer(ctx.model)
    assert np.array_equal(lora_a[:2], lora_a[2:])  # the trunk, once per branch
    inputs = tokens(layer)
    x = inputs.double().numpy()
    assert method.route(ctx, RouteBatch([[0.1, 2.0], [3.0, 0.0], [1.0, 0.9]], [None] * 3)) is None
    with torch.no_grad():
        found = layer(inputs).numpy()
    for row, task in enumerate((2, 1, 1)):
        scores = x[row] @ method.gates[f"{task}/{module}"].double().numpy().T
        for token, best in enumerate(scores.argmax(axis=1)):
            branch = lora_b[:, slice(0, 2) if best == 0 else slice(2, 4)]
            expected = base @ x[row, token] + scaling * branch @ lora_a[:2] @ x[row, token]
            np.testing.assert_allclose(found[row, token], expected, atol=1e-5)
    with pytest.raises(MethodError, match="for 3 routed rows"):
        layer(inputs[:2])


@pytest.mark.parametrize("top", [1, 3])
def test_branchlora_counts_the_branches_that_tokens_use(learning, top):
    """As many as `top` says for every token, neither more nor fewer."""
    method = BranchLoRA(experts=4, top=top, freeze=1, samples=2)
    learner, ctx, _ = learning(method)
    used: dict[str, torch.Tensor] = {}
    note = method.note

    def watch(module, gates):
        used[module] = used.get(module, 0) + (gates > 0).flatten(0, -2).sum(dim=0)
        note(module, gates)

    method.note = watch
    learner.end_task(ctx)
    for module, counts in used.items():
        (frozen,) = method.frozen[module].nonzero().flatten().tolist()
        assert counts[frozen] == counts.max()


def test_branchlora_freezes_the_branches_that_were_used_most(learning, begin, disturb):
    method = BranchLoRA(experts=4, top=2, freeze=2, samples=2)
    learner, ctx, stream = learning(method)
    used = {module: counts for module, (_, counts) in method.measure(ctx).items()}
    learner.end_task(ctx)
    for module, counts in used.items():
        assert counts.sum() > 0
        assert set(counts.topk(2).indices.tolist()) == set(method.frozen[module].nonzero().flatten().tolist())
    _, ctx = begin(stream, learner=learner)
    before = adapter_state(ctx.model, DEFAULT)
    disturb(ctx.model, DEFAULT)
    method.after_step(ctx)
    for module, layer in lora_layers(ctx.model):
        key = f"base_model.model.{module}.lora_B.weight"
        same = (factors(layer, DEFAULT)[1].weight.detach() == before[key]).all(dim=0)
        assert same.tolist() == method.frozen[module].tolist()  # rank 4, so one column per branch
    learner.end_task(ctx)
    assert all(int(frozen.sum()) == 3 for frozen in method.frozen.values())  # one stays tuned
    again = BranchLoRA(experts=4, top=2, freeze=2, samples=2)
    again.load_state_dict(method.state_dict())
    assert again.tasks == ["colours", "yes.no"]
    assert all(torch.equal(again.frozen[module], method.frozen[module]) for module in used)


def test_gates_of_a_row_need_the_language_model(make_learner, small_stream):
    learner = make_learner(BranchLoRA(experts=2), bridge=True)
    from accelerate import Accelerator

    with pytest.raises(MethodError, match="reach the language model only"):
        learner.begin_task(small_stream(1, rows=4)[0], small_stream(1, rows=4), Accelerator(cpu=True))


def test_clmoe_merges_every_expert_with_its_own_momentum():
    new, old = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    share = old_shares(new, old, 0.75)
    assert share.tolist() == [0.75, 0.25, 0.75, 0.75]
    lora_a, lora_b = torch.ones(4, 3), torch.full((2, 4), 2.0)
    merge_experts([lora_a, lora_b], [torch.zeros(4, 3), torch.zeros(2, 4)], share)
    assert lora_a[:, 0].tolist() == [0.25, 0.75, 0.25, 0.25]  # what is left of the new weights
    assert lora_b[1].tolist() == [0.5, 1.5, 0.5, 0.5]


def test_clmoe_mixes_the_gates_of_token_and_task(learning, begin, disturb):
    method = CLMoE(experts=2, balance=0.25, momentum=0.75, important=1, samples=3)
    learner, ctx, stream = learning(method)
    module, layer, base, lora_a, lora_b, scaling = one_layer(ctx.model)
    learner.end_task(dataclasses.replace(ctx, embed=lambda rows: torch.tensor([[1.0, 0.0]] * len(rows))))
    assert np.array_equal(factors(layer, DEFAULT)[0].weight.detach().numpy(), lora_a)  # nothing to merge yet
    _, ctx = begin(stream, learner=learner)
    before, old = adapter_state(ctx.model, DEFAULT), method.relied_on[module].clone()
    disturb(ctx.model, DEFAULT, seed=3)
    trained = adapter_state(ctx.model, DEFAULT)
    learner.end_task(dataclasses.replace(ctx, embed=lambda rows: torch.tensor([[0.0, 1.0]] * len(rows))))
    merged, new = adapter_state(ctx.model, DEFAULT), method.relied_on[module] & ~old
    assert method.task_gates[module].shape == (2, 2)
    assert torch.allclose(method.task_gates[module].sum(dim=1), torch.ones(2))
    key = f"base_model.model.{module}.lora_A.weight"
    for expert, own in enumerate((slice(0, 2), slice(2, 4))):
        kept = 0.25 if new[expert] else 0.75
        expected = kept * before[key][own] + (1 - kept) * trained[key][own]
        assert torch.allclose(merged[key][own], expected, atol=1e-6)
    ctx = dataclasses.replace(learner.context(stream[1], stream, None), embed=lambda rows: torch.tensor(rows))
    module, layer, base, lora_a, lora_b, scaling = one_layer(ctx.model)
    inputs = tokens(layer, rows=2)
    x = inputs.double().numpy()
    method.route(ctx, RouteBatch([[0.1, 2.0], [3.0, 0.0]], [None] * 2))
    with torch.no_grad():
        found = layer(inputs).numpy()
    for row, task in enumerate((1, 0)):
        gates = 0.25 * softmax(x[row] @ method.gates[module].double().numpy().T)
        gates = gates + 0.75 * method.task_gates[module][task].double().numpy()
        states = (x[row] @ lora_a.T) * gates.repeat(2, axis=-1)
        np.testing.assert_allclose(found[row], x[row] @ base.T + scaling * states @ lora_b.T, atol=1e-5)


def test_clmoe_takes_the_gates_of_the_task_before_it_is_learnt(learning):
    """Of the first layer, whose inputs no adapter changes: the mean of its router's gates over all tokens of the rows."""
    method = CLMoE(experts=2, balance=0.25, samples=3)
    _, ctx, _ = learning(method)
    module, layer = next(iter(lora_layers(ctx.model)))
    router = method.parameters(ctx)[module].detach().double().numpy()
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double().numpy()))
    with torch.no_grad():
        for batch in ctx.calibration(3, 1):
            ctx.model(**batch)
        handle.remove()
        of_task = softmax(np.concatenate(seen) @ router.T).mean(axis=0)
        inputs = tokens(layer)
        found = layer(inputs).numpy()
    lora_a, lora_b = (factor.weight.detach().double().numpy() for factor in factors(layer, DEFAULT))
    x, base = inputs.double().numpy(), layer.get_base_layer().weight.detach().double().numpy()
    gates = 0.25 * softmax(x @ router.T) + 0.75 * of_task
    states = (x @ lora_a.T) * gates.repeat(2, axis=-1)
    np.testing.assert_allclose(found, x @ base.T + layer.scaling[DEFAULT] * states @ lora_b.T, atol=1e-5)


def test_top_probability_keeps_its_gradient():
    scores = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    gates = top_probability(scores)
    p = softmax(np.array([2.0, 1.0, 0.0]))
    np.testing.assert_allclose(gates.detach().numpy(), [[p[0], 0.0, 0.0]], rtol=1e-6)
    (gradient,) = torch.autograd.grad(gates.sum(), scores)
    np.testing.assert_allclose(gradient.numpy()[0], p[0] * (np.eye(3)[0] - p), rtol=1e-5)
    assert mean_over(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist() == [[2.0]]


def test_smolora_routes_by_what_is_seen_and_what_is_asked(learning):
    method = SMoLoRA(blocks=2)
    _, ctx, _ = learning(method)
    module, layer, base, lora_a, lora_b, scaling = one_layer(ctx.model)
    own = {name: tensor.detach().double().numpy() for name, tensor in method.parameters(ctx).items()}
    inputs, mask = tokens(layer, rows=2), torch.tensor([[True, True, False, False], [False, True, True, True]])
    method._prompt, method._asked = mask, torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    x, asked = inputs.double().numpy(), method._asked.double().numpy()
    with torch.no_grad():
        found = layer(inputs).numpy()
    for row in range(2):
        seen = softmax(own[f"visual/{module}"] @ x[row][mask[row].numpy()].mean(axis=0))
        said = softmax(own[f"asked/{module}"] @ asked[row])
        for token in range(4):
            outputs = []
            for half, p in ((0, seen), (2, said)):
                block = half + p.argmax()  # rank 4, so one entry per block
                outputs.append(p.max() * scaling * lora_b[:, block] * (lora_a[block] @ x[row, token]))
            weights = softmax(np.array([own[f"fusion/{module}"][side] @ outputs[side] for side in (0, 1)]))
            expected = base @ x[row, token] + weights[0] * outputs[0] + weights[1] * outputs[1]
            np.testing.assert_allclose(found[row, token], expected, atol=1e-5)


def test_smolora_has_the_same_gates_in_training_and_in_generation(learning, make_row):
    """The answer, the padding and the tokens that are added do not matter."""
    method = SMoLoRA(blocks=2)
    _, ctx, _ = learning(method)
    rows = [make_row("a", "What colour is this?", "red"), make_row("b", "Is it?", "a long blue answer", None)]
    with torch.no_grad():
        ctx.model(**Collator(ctx.processor)(rows))
        trained, asked = dict(method._visual), method._asked.clone()
        prompts = Collator(ctx.processor, for_generation=True)(rows)
        ctx.model(**prompts)
        assert torch.allclose(method._asked, asked, atol=1e-6)
        assert not torch.allclose(asked[0], asked[1], atol=1e-2)
        for module, gates in method._visual.items():
            assert torch.allclose(gates, trained[module], atol=1e-5)
        before = dict(method._visual)
        ctx.model.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert all(torch.allclose(method._visual[module], before[module], atol=1e-6) for module in before)
        assert method._prompt is None  # the last forward pass added a token


def test_smolora_trains_its_routers_in_the_first_task_only(make_learner, small_stream, train_task):
    method, stream = SMoLoRA(blocks=2), small_stream(2, rows=8)
    learner = make_learner(method)
    train_task(learner, stream, num_train_epochs=3)
    first = {name: tensor.clone() for name, tensor in method.gates.items()}
    train_task(learner, stream)
    moved = {name.split("/")[0] for name in first if not torch.equal(first[name], method.gates[name])}
    assert moved == {"fusion"}


def test_smolora_refuses_layers_that_are_run_again(make_learner, small_stream, train_task):
    with pytest.raises(MethodError, match="activation_checkpointing"):
        train_task(make_learner(SMoLoRA(blocks=1)), small_stream(1, rows=4), activation_checkpointing=True)


def test_directions_have_norm_one_and_magnitudes_the_rest():
    lora_a, lora_b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0], [0.0]])
    own_a, own_b, size = direction(lora_a, lora_b, 0.5)
    assert own_a[0].tolist() == pytest.approx([0.6, 0.8])
    assert own_b[:, 0].tolist() == [0.0, 1.0, 0.0]
    assert size.tolist() == [5.0]  # 0.5 x 5 x 2
    assert torch.equal(direction(lora_a, torch.zeros(3, 1), 0.5)[2], torch.zeros(1))


def test_sd_lora_learns_magnitudes_of_frozen_directions(begin, disturb, small_stream):
    stream, method = small_stream(2, rows=4), SDLoRA()
    learner, ctx = begin(stream, method, max_rank=16)
    disturb(ctx.model, TASK)
    first = {name: delta.dense() for name, delta in adapter_deltas(ctx.model, TASK).items()}
    with torch.no_grad():
        for own in method.parameters(ctx).values():
            own.fill_(3.0)
    learner.end_task(ctx)
    deployed = {name: delta.dense() for name, delta in adapter_deltas(learner.model, DEFAULT).items()}
    assert all(torch.allclose(deployed[name], 3 * first[name], atol=1e-4) for name in first)

    again = SDLoRA()
    again.load_state_dict(method.state_dict())
    learner.methods[0] = method = again
    learner, ctx = begin(stream, learner=learner)
    module, layer, *_ = one_layer(ctx.model)
    inputs = tokens(layer)
    with torch.no_grad():
        expected = inputs @ (layer.get_base_layer().weight + deployed[module]).mT
        assert torch.allclose(layer(inputs), expected, atol=1e-4)  # a task starts where the last one ended
        disturb(ctx.model, TASK, seed=1)
        second = {name: delta.dense() for name, delta in adapter_deltas(ctx.model, TASK).items()}
        for own in method.parameters(ctx).values():
            assert own.shape == (2,)
            own.copy_(torch.tensor([0.5, 2.0]))
        weight = layer.get_base_layer().weight
        moved = inputs @ (weight + 0.5 * deployed[module] + 2 * second[module]).mT
        assert torch.allclose(layer(inputs), moved, atol=1e-4)
        with ctx.reference("previous"):
            assert torch.allclose(layer(inputs), expected, atol=1e-4)
    frozen = adapter_state(ctx.model, DEFAULT)
    key = f"base_model.model.{module}.lora_A.weight"
    learner.end_task(ctx)
    for name, delta in adapter_deltas(learner.model, DEFAULT).items():
        assert torch.allclose(delta.dense(), 0.5 * deployed[name] + 2 * second[name], atol=1e-4)
    assert torch.equal(method.directions_a[module][:4], frozen[key])
    assert learner.truncation_error == 0
    for kept in method.directions_b.values():
        assert torch.allclose(kept.reshape(len(kept), 2, 4).norm(dim=(0, 2)), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: MoELoRA(experts=2), lambda: BranchLoRA(experts=2, samples=2), SDLoRA])
def test_layers_that_are_run_again_have_the_same_gates(make, make_learner, small_stream, train_task):
    results, stream = [], small_stream(2, rows=8)
    for section in ({}, {"activation_checkpointing": True}):
        learner = make_learner(make())
        for _ in stream:
            train_task(learner, stream, num_train_epochs=2, optim="sgd", learning_rate=0.3, **section)
        results.append(adapter_deltas(learner.model, DEFAULT))
    for name, delta in results[0].items():
        assert torch.allclose(results[1][name].dense(), delta.dense(), atol=1e-6)
    assert max(float(delta.dense().abs().max()) for delta in results[0].values()) > 1e-3
