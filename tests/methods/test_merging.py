"""Consolidation after the task: what is deployed is the named merge of the task vectors, on full updates."""

from __future__ import annotations

import math

import pytest
import torch

from mllm_cl.methods import METHODS, build_method, method_class
from mllm_cl.methods._merging import SEQUENCE, Merging
from mllm_cl.methods.model_mix import ModelMix
from mllm_cl.methods.model_tailor import ModelTailor
from mllm_cl.methods.slao import Slao, orthonormal_rows
from mllm_cl.methods.ties import Ties
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas, adapter_names, adapter_parameters, lora_layers
from mllm_cl.recipe import MethodSpec
from mllm_cl.spectral import merge_many

NAMES = [name for name in METHODS if issubclass(method_class(name), Merging)]


def active(model) -> list[str]:
    return next(lora_layers(model))[1].active_adapters


def close(one, two, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(one[name].dense(), two[name].dense(), atol=tolerance) for name in two)


@pytest.mark.parametrize(("name", "start"), [*((name, "base") for name in NAMES), ("magmax", "sequence")])
def test_the_deployed_adapter_is_the_merge_of_the_task_vectors(name, start, begin, disturb, small_stream):
    stream, vectors = small_stream(3, rows=4), []
    method = build_method(MethodSpec(name=name, options={"start": start}))
    learner, ctx = begin(stream, method, max_rank=32)
    for stage in (1, 2, 3):
        first = start == "base" or stage == 1
        assert active(ctx.model) == ([TASK] if first else [SEQUENCE, TASK])
        assert all(".task." in name for name, p in ctx.model.named_parameters() if p.requires_grad)
        assert any(p.requires_grad for p in ctx.model.parameters())
        disturb(ctx.model, TASK, seed=stage)
        own = adapter_deltas(ctx.model, TASK)
        vectors.append(own if first else {module: vectors[-1][module] + update for module, update in own.items()})
        if not first:
            assert close(adapter_deltas(ctx.model, SEQUENCE), vectors[-2])
        learner.end_task(ctx)
        assert SEQUENCE not in adapter_names(learner.model)
        expected, error = merge_many(vectors, name, rank=32, **method.options)  # type: ignore[attr-defined]
        assert error == ctx.cost["merge_truncation_error"]
        assert close(adapter_deltas(learner.model, DEFAULT), expected)
        assert max(float(delta.dense().abs().max()) for delta in expected.values()) > 1e-3
        if stage == 2:  # what is on disk is enough to go on
            restored = build_method(MethodSpec(name=name, options={"start": start}))
            restored.load_state_dict(method.state_dict())
            learner.methods[0] = method = restored
        if stage < 3:
            learner, ctx = begin(stream, learner=learner)


def test_a_merge_that_does_not_fit_says_how_much_is_lost(begin, disturb, small_stream):
    learner, ctx = begin(small_stream(2, rows=4), Ties(), max_rank=4)
    disturb(ctx.model, TASK)
    learner.end_task(ctx)
    assert 0.05 < ctx.cost["merge_truncation_error"] < 1
    assert all(delta.rank <= 4 for delta in adapter_deltas(learner.model, DEFAULT).values())


@pytest.mark.parametrize(("schedule", "weights"), [("constant", [0.5, 0.5]), ("inverse", [0.5, 0.25])])
def test_model_mix_is_the_line_between_the_models(schedule, weights, begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, ModelMix(strength=0.5, schedule=schedule))
    expected: dict[str, torch.Tensor] = {}
    for stage, weight in enumerate(weights, start=1):
        disturb(ctx.model, TASK, seed=stage)
        for name, delta in adapter_deltas(ctx.model, TASK).items():
            expected[name] = expected.get(name, 0) + weight * delta.dense()
        learner.end_task(ctx)
        for name, delta in adapter_deltas(learner.model, DEFAULT).items():
            assert torch.allclose(delta.dense(), expected[name], atol=1e-5)
        if stage == 1:
            learner, ctx = begin(stream, learner=learner)


def test_slao_by_hand(begin, disturb, small_stream):
    stream = small_stream(3, rows=4)
    learner, ctx = begin(stream, method := Slao())
    trained: list[dict[str, torch.Tensor]] = []
    merged: dict[str, torch.Tensor] = {}
    for stage in (1, 2, 3):
        parameters = adapter_parameters(ctx.model, DEFAULT)
        if stage > 1:
            for name, parameter in parameters.items():
                last = trained[-1][name]
                if name.endswith("lora_B"):
                    assert torch.equal(parameter, last)
                else:  # an orthonormal basis of the same rows
                    assert torch.allclose(parameter @ parameter.mT, torch.eye(len(last)), atol=1e-5)
                    assert torch.allclose(last @ parameter.mT @ parameter, last, atol=1e-4)
        disturb(ctx.model, DEFAULT, seed=stage)
        trained.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
        learner.end_task(ctx)
        for name, parameter in adapter_parameters(learner.model, DEFAULT).items():
            own = trained[-1][name]
            if name.endswith("lora_B"):
                past = merged.get(name, own)
                merged[name] = past + (own - past) / math.sqrt(stage)
                assert torch.allclose(parameter, merged[name], atol=1e-6)
            else:
                assert torch.equal(parameter, own)
        if stage < 3:
            again = Slao()
            again.load_state_dict(method.state_dict())
            learner.methods[0] = method = again
            learner, ctx = begin(stream, learner=learner)
    rows = orthonormal_rows(torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8]]))
    rows = orthonormal_rows(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))  # a direction that was lost comes back
    assert torch.allclose(rows @ rows.mT, torch.eye(2), atol=1e-6)


def test_model_tailor_patches_the_output_of_every_layer(begin, disturb, small_stream):
    """On the calibration inputs its update is nearer to the task's than dropping alone would be."""
    from mllm_cl.methods._statistics import sketch_inputs
    from mllm_cl.spectral.compensate import tailored

    learner, ctx = begin(small_stream(2, rows=8), ModelTailor(samples=8, keep=0.3), max_rank=64)
    disturb(ctx.model, TASK)
    fresh = {name: delta.dense() for name, delta in adapter_deltas(ctx.model, TASK).items()}
    moments = sketch_inputs(ctx, 8, 2**31)
    weights = {name: layer.get_base_layer().weight.detach().clone() for name, layer in lora_layers(ctx.model)}
    learner.end_task(ctx)
    assert ctx.cost["merge_truncation_error"] == 0
    better = 0
    for name, delta in adapter_deltas(learner.model, DEFAULT).items():
        dropped = tailored(weights[name], fresh[name], moments.of(name), keep=0.3, compensate=False)
        errors = [((d - fresh[name]) @ moments.of(name) * (d - fresh[name])).sum() for d in (delta.dense(), dropped)]
        better += bool(errors[0] < errors[1])
        assert 0.25 < float((delta.dense().abs() > 1e-6).float().mean()) < 0.4
    assert better == len(fresh)
