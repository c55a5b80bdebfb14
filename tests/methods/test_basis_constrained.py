"""InfLoRA, KeepLoRA and CorDA: where A comes from, and that earlier directions are left alone exactly."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.methods._statistics import sketch_gradients, sketch_inputs
from mllm_cl.methods.corda import CorDA, least_used
from mllm_cl.methods.inflora import InfLora
from mllm_cl.methods.keeplora import KeepLora
from mllm_cl.models.adapters import TASK, factors, lora_layers


def layers_of(ctx):
    return dict(lora_layers(ctx.model))


def test_inputs_are_those_of_the_layers(begin, small_stream):
    """Mean of x xᵀ over tokens, padding left out, one statistic for q, k and v."""
    _, ctx = begin(small_stream(2, rows=5), InfLora(samples=5))
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def watch(name):
        def hook(layer, args):
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows.mT @ rows

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers_of(ctx).items()]
    for batch in ctx.calibration(5, 1):
        ctx.model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
        tokens += batch["input_ids"].numel()
    for handle in handles:
        handle.remove()
    found = sketch_inputs(ctx, 5, 10_000, batch_size=2)
    for name, total in sums.items():
        assert torch.allclose(found.of(name), total / tokens, atol=1e-4 * float(total.max()) / tokens + 1e-6)
    leaders = {name.rpartition(".")[2]: found.leader[name].rpartition(".")[2] for name in found.leader if ".0." in name}
    assert leaders["k_proj"] == leaders["v_proj"] == "q_proj"
    assert leaders["up_proj"] == "gate_proj"
    assert leaders["down_proj"] == "down_proj"
    narrow = sketch_inputs(ctx, 5, 6)
    assert all(sketch.shape[1] == 6 for sketch in narrow.values.values())


def test_gradients_are_those_of_the_weights(begin, small_stream):
    _, ctx = begin(small_stream(2, rows=5), InfLora(samples=2))
    found = sketch_gradients(ctx, 5, 10_000, batch_size=2)
    weights = {name: layer.get_base_layer().weight for name, layer in layers_of(ctx).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = sum(ctx.model.eval()(**batch, num_items_in_batch=1).loss for batch in ctx.calibration(5, 1))
    for (name, weight), gradient in zip(weights.items(), torch.autograd.grad(total, list(weights.values()))):
        weight.requires_grad_(False)
        scale = float(gradient.abs().max()) / 5
        assert torch.allclose(found.of(name), gradient.mT / 5, atol=1e-4 * scale + 1e-9)


@pytest.mark.parametrize("make", [lambda: InfLora(samples=5), lambda: KeepLora(samples=5)], ids=["inflora", "keeplora"])
def test_only_b_is_trained_and_protected_directions_are_left_alone(make, begin, disturb, small_stream):
    stream, method = small_stream(2, rows=5), make()
    learner, ctx = begin(stream, method, rank=4)
    for stage in (1, 2):
        for name, layer in layers_of(ctx).items():
            a, b = (factor.weight for factor in factors(layer, TASK))
            assert (a.requires_grad, b.requires_grad) == (False, True)
            leader = name if isinstance(method, KeepLora) else sketch_inputs(ctx, 1, 4).leader[name]
            basis = method.basis.get(leader)
            if basis is not None and basis.shape[1]:
                with torch.no_grad():
                    b.normal_(generator=torch.Generator().manual_seed(stage))
                assert float((b @ a @ basis).detach().abs().max()) < 1e-4  # any B: the update is blind there
        if stage == 1:
            before = {name: basis.clone() for name, basis in method.basis.items()}
            learner.end_task(ctx)
            assert all(torch.equal(method.basis[name][:, : basis.shape[1]], basis) for name, basis in before.items())
            again = make()
            again.load_state_dict(method.state_dict())
            learner.methods[0] = method = again
            learner, ctx = begin(stream, learner=learner)


def test_inflora_takes_the_leading_inputs(begin, small_stream):
    _, ctx = begin(small_stream(2, rows=5), InfLora(samples=5), rank=4)
    found = sketch_inputs(ctx, 5, 10_000)
    for name, layer in layers_of(ctx).items():
        vectors = torch.linalg.eigh(found.of(name).double()).eigenvectors[:, -4:]
        a = factors(layer, TASK)[0].weight.detach().double()
        assert torch.allclose(3 * a.mT @ a, vectors @ vectors.mT, atol=1e-3)


def test_inflora_protects_more_at_every_task(begin, small_stream):
    stream = small_stream(2, rows=5)
    learner, ctx = begin(stream, method := InfLora(samples=5, energy=0.5))
    learner.end_task(ctx)
    sizes = {name: basis.shape[1] for name, basis in method.basis.items()}
    learner, ctx = begin(stream, learner=learner)
    learner.end_task(ctx)
    assert all(method.basis[name].shape[1] > size for name, size in sizes.items())


def test_keeplora_starts_from_the_base_weights(begin, small_stream):
    _, ctx = begin(small_stream(2, rows=5), method := KeepLora(samples=5, base_energy=0.5))
    for name, layer in layers_of(ctx).items():
        weight = layer.get_base_layer().weight.detach().double()
        captured = (weight @ method.basis[name].double()).square().sum() / weight.square().sum()
        fewer = (weight @ method.basis[name][:, :-1].double()).square().sum() / weight.square().sum()
        assert fewer < 0.5 <= captured + 1e-6


def test_corda_starts_in_the_components_that_general_inputs_need_least(begin, small_stream):
    """W C = U Σ Vᵀ: the directions lose less of W C than any others, and the base stays what it is."""
    from mllm_cl.data.builders.general import general_rows

    _, ctx = begin(small_stream(2, rows=4), CorDA(samples=3), rank=4)
    moments = sketch_inputs(ctx, 3, 2**31, rows=general_rows("train", size=3, seed=0))
    for name, layer in layers_of(ctx).items():
        a, b = (factor.weight.detach().double() for factor in factors(layer, TASK))
        assert all(factor.weight.requires_grad for factor in factors(layer, TASK))
        assert float(b.abs().max()) == 0
        moment, weight = moments.of(name).double(), layer.get_base_layer().weight.detach().double()
        moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
        _, sigma, vh = torch.linalg.svd(weight @ moment, full_matrices=False)
        exact = vh[-4:] @ torch.linalg.inv(moment)
        assert torch.allclose(a.norm(dim=1), torch.ones(4).double(), atol=1e-5)
        unit = exact / exact.norm(dim=1, keepdim=True)
        overlap = (a.flip(0) * unit).sum(dim=1).abs()
        distinct = sigma[-5:].diff().abs() > 1e-4 * sigma[0]
        assert torch.allclose(overlap[distinct[-4:]], torch.ones(()).double(), atol=1e-2) or not distinct.any()
    with torch.no_grad():
        inputs = ctx.collate([small_stream(1, rows=4)[0].train[0]])
        started = ctx.model.eval()(**inputs).logits
        with ctx.reference("base"):
            assert torch.equal(ctx.model(**inputs).logits, started)


def test_corda_by_hand():
    """C is the identity: the right singular vectors of W; else a strong input makes a weak weight count."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert torch.allclose(least_used(weight, torch.eye(3), 2), torch.eye(3).double()[[2, 1]])
    assert torch.allclose(least_used(weight, torch.diag(torch.tensor([0.01, 1.0, 9.0])), 1), torch.eye(3).double()[:1])
    assert len(least_used(torch.ones(2, 3), torch.eye(3), 5)) == 2
