"""SAC: the consolidated adapter against the formula on dense matrices, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_cl.errors import MethodError, MllmClError
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas
from mllm_cl.models.parts import bridge_names


def dense(model, name: str) -> dict[str, np.ndarray]:
    return {module: delta.dense().double().numpy() for module, delta in adapter_deltas(model, name).items()}


def power_up(update: np.ndarray, strength: float, gamma: float, match: bool, cap: float | None = None) -> np.ndarray:
    """W += U diag(c sigma) V^T, c proportional to (sigma / sigma_1)^gamma, norm = strength times that of the update."""
    left, sigma, right = np.linalg.svd(update, full_matrices=False)
    rate = (sigma / sigma[0]) ** gamma
    factor = strength * np.linalg.norm(sigma) / np.linalg.norm(rate * sigma) if match else strength
    rate = factor * rate if cap is None else np.minimum(factor * rate, cap)
    return left @ np.diag(rate * sigma) @ right


def saturate(update: np.ndarray, strength: float) -> np.ndarray:
    """W += U diag(c sigma) V^T, c sigma proportional to tanh(sigma / mean sigma), norm = strength times the update's."""
    left, sigma, right = np.linalg.svd(update, full_matrices=False)
    rank = int((sigma > 1e-5 * sigma[0]).sum())  # the update is of low rank, up to float32
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    mean = sigma.mean()
    scaled = mean * np.tanh(sigma / mean)
    return left @ np.diag(scaled * strength * np.linalg.norm(sigma) / np.linalg.norm(scaled)) @ right


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda d, t: 0.9 * d),
        ({"rate": "saturate"}, lambda d, t: saturate(d, 0.9)),
        ({"rate": "power_up"}, lambda d, t: power_up(d, 0.9, 1.0, True)),
        (
            {"rate": "power_up", "rate_options": {"gamma": 2.0}, "strength": 0.5},
            lambda d, t: power_up(d, 0.5, 2.0, True),
        ),
        ({"rate": "power_up", "match": "none", "strength": 0.5}, lambda d, t: power_up(d, 0.5, 1.0, False)),
        ({"rate": "power_up", "match": "none", "cap": 0.3}, lambda d, t: power_up(d, 0.9, 1.0, False, 0.3)),
        ({"rate": "power_up", "schedule": "inverse", "strength": 1.0}, lambda d, t: power_up(d, 1.0 / t, 1.0, True)),
        (
            {"rate": "power_up", "schedule": "inverse_sqrt", "strength": 1.0},
            lambda d, t: power_up(d, 1.0 / np.sqrt(t), 1.0, True),
        ),
        ({"rate": "uniform", "strength": 0.5}, lambda d, t: 0.5 * d),
        ({"strength": 0.0}, lambda d, t: 0.0 * d),
    ],
)
def test_consolidation_is_the_formula_on_dense_matrices(options, formula, begin, disturb, small_stream):
    stream = small_stream(3, rows=4)
    learner, ctx = begin(stream, SpectralConsolidation(**options))
    expected: dict[str, np.ndarray] = {}
    for stage in (1, 2, 3):
        disturb(ctx.model, TASK, seed=stage)
        for name, update in dense(ctx.model, TASK).items():
            expected[name] = expected.get(name, 0.0) + formula(update, stage)
        learner.end_task(ctx)
        for name, matrix in dense(learner.model, DEFAULT).items():
            assert np.allclose(matrix, expected[name], atol=1e-5 * max(np.abs(expected[name]).max(), 1e-3))
        if stage < 3:
            learner, ctx = begin(stream, learner=learner)


def test_a_continued_adapter_is_consolidated_by_what_it_has_changed(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, SpectralConsolidation(adapter="continued", rate="power_up", strength=0.5))
    disturb(ctx.model, DEFAULT, seed=1)
    expected = {name: power_up(update, 0.5, 1.0, True) for name, update in dense(ctx.model, DEFAULT).items()}
    learner.end_task(ctx)
    before = dense(learner.model, DEFAULT)
    assert all(np.allclose(before[name], expected[name], atol=1e-5) for name in expected)
    learner, ctx = begin(stream, learner=learner)
    disturb(ctx.model, DEFAULT, seed=2)
    now = dense(ctx.model, DEFAULT)
    rank = ctx.model.peft_config[DEFAULT].r
    learner.end_task(ctx)
    for name, matrix in dense(learner.model, DEFAULT).items():
        whole = before[name] + power_up(now[name] - before[name], 0.5, 1.0, True)
        left, sigma, right = np.linalg.svd(whole)
        cut = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        assert np.allclose(matrix, cut, atol=1e-4 * np.abs(whole).max())


def test_the_bridge_has_a_rate_of_its_own(begin, disturb, small_stream):
    stream = small_stream(1, rows=4)
    learner, ctx = begin(stream, SpectralConsolidation(rate="power_up", strength=0.5), bridge=True)
    disturb(ctx.model, TASK, seed=1)
    updates = dense(ctx.model, TASK)
    bridge = [name for name in updates if name.startswith(tuple(bridge_names(ctx.model.get_base_model())))]
    assert 0 < len(bridge) < len(updates)
    learner.end_task(ctx)
    for name, matrix in dense(learner.model, DEFAULT).items():
        expected = 0.5 * updates[name] if name in bridge else power_up(updates[name], 0.5, 1.0, True)
        assert np.allclose(matrix, expected, atol=1e-5 * max(np.abs(expected).max(), 1e-3))


def test_overlap_reads_what_was_consolidated_before(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, SpectralConsolidation(rate="overlap", strength=1.0, match="none"))
    disturb(ctx.model, TASK, seed=1)
    first = dense(ctx.model, TASK)
    learner.end_task(ctx)
    assert all(np.allclose(matrix, first[name], atol=1e-5) for name, matrix in dense(learner.model, DEFAULT).items())
    learner, ctx = begin(stream, learner=learner)
    disturb(ctx.model, TASK, seed=2)
    second = dense(ctx.model, TASK)
    learner.end_task(ctx)
    for name, matrix in dense(learner.model, DEFAULT).items():
        assert np.linalg.norm(matrix - first[name]) < np.linalg.norm(second[name])


def test_wrong_options_are_refused_before_training():
    with pytest.raises(MethodError, match="rate"):
        SpectralConsolidation(rate="power_sideways")
    with pytest.raises(MethodError, match="tau"):
        SpectralConsolidation(rate="power_up", rate_options={"tau": 1.0})
    assert issubclass(MethodError, MllmClError)
