"""The named merges against NumPy on dense matrices, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_cl.errors import SpectralError
from mllm_cl.spectral import MERGES, LowRankDelta, merge, merge_many
from mllm_cl.spectral.merges import limited

OUT, IN, RANK = 7, 9, 3


def updates(count: int = 3, rank: int = RANK, seed: int = 0) -> list[LowRankDelta]:
    """Float64 updates, so that NumPy can be met to the last digits."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        a = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
        b = torch.randn(OUT, rank, generator=generator, dtype=torch.float64)
        made.append(LowRankDelta.from_lora(a, b))
    return made


def dense(deltas: list[LowRankDelta]) -> list[np.ndarray]:
    return [delta.dense().numpy() for delta in deltas]


def ties(matrices: list[np.ndarray], density: float) -> np.ndarray:
    keep = round(density * matrices[0].size)
    trimmed = []
    for matrix in matrices:
        order = np.argsort(-np.abs(matrix), axis=None)[:keep]
        kept = np.zeros(matrix.size)
        kept[order] = matrix.ravel()[order]
        trimmed.append(kept.reshape(matrix.shape))
    result = np.zeros_like(matrices[0])
    for place in np.ndindex(result.shape):
        column = [matrix[place] for matrix in trimmed]
        sign = np.sign(sum(column))
        agreeing = [value for value in column if value != 0 and np.sign(value) == sign]
        result[place] = np.mean(agreeing) if agreeing else 0.0
    return result


def star(matrices: list[np.ndarray], share: float) -> np.ndarray:
    result = np.zeros_like(matrices[0])
    for matrix in matrices:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        count = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum() - 1e-12)
        result += (u[:, :count] * s[:count] * s.sum() / s[:count].sum()) @ vt[:count]
    return result / len(matrices)


def polar(columns: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(columns, full_matrices=False)
    return u @ vt


def tsv(matrices: list[np.ndarray]) -> np.ndarray:
    keep = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(matrix) for matrix in matrices]
    u = np.concatenate([u[:, :keep] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:keep] for _, s, _ in parts])
    v = np.concatenate([vt[:keep].T for _, _, vt in parts], axis=1)
    return polar(u) @ np.diag(s) @ polar(v).T


def opcm(matrices: list[np.ndarray], share: float) -> np.ndarray:
    """The paper's recursion, rescaled after every step."""
    merged, norms = matrices[0], [np.linalg.norm(matrices[0])]
    factor = 1.0
    for matrix in matrices[1:]:
        u, s, vt = np.linalg.svd(merged)
        rank = int((s > 1e-10).sum())
        inside = u.T @ matrix @ vt.T
        inside[range(rank), range(rank)] = 0
        k = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum() - 1e-12)
        inside[:k, :k] = 0
        whole = factor * merged + u @ inside @ vt
        norms.append(np.linalg.norm(matrix))
        factor = np.linalg.norm(whole) / np.mean(norms)
        merged = whole / factor
    return merged


def knots(matrices: list[np.ndarray], density: float, then: str) -> np.ndarray:
    u, s, vt = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    rank = int((s > 1e-10).sum())
    parts = [vt[:rank, i * IN : (i + 1) * IN].T for i in range(len(matrices))]
    merged = ties(parts, density) if then == "ties" else np.mean(parts, axis=0)
    return u[:, :rank] @ np.diag(s[:rank]) @ merged.T


def iso(matrices: list[np.ndarray]) -> np.ndarray:
    u, s, vt = np.linalg.svd(sum(matrices), full_matrices=False)
    return s.mean() * u @ vt


CASES = {
    "task_arithmetic": ({"scale": 0.3}, lambda m: 0.3 * sum(m)),
    "ties": ({"density": 0.3, "scale": 2.0}, lambda m: 2 * ties(m, 0.3)),
    "magmax": ({"scale": 0.5}, lambda m: 0.5 * np.choose(np.argmax(np.abs(m), axis=0), m)),
    "star": ({"share": 0.5}, lambda m: star(m, 0.5)),
    "tsv": ({}, tsv),
    "opcm": ({"share": 0.5}, lambda m: opcm(m, 0.5)),
    "knots": ({"density": 0.4, "scale": 0.6}, lambda m: 0.6 * knots(m, 0.4, "ties")),
    "iso": ({}, iso),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_merges_are_their_formulas_on_dense_matrices(name, count):
    options, formula = CASES[name]
    deltas = updates(count, rank=IN if name == "iso" else RANK)  # Iso-C needs full rank to be the paper's
    merged, error = merge(deltas, name, **options)
    np.testing.assert_allclose(merged.dense().numpy(), formula(dense(deltas)), atol=1e-9)
    assert error == 0


def test_every_merge_has_a_case():
    assert set(CASES) | {"dare"} == set(MERGES)


def test_dare_keeps_the_expectation_and_is_repeatable():
    delta = LowRankDelta.from_dense(torch.ones(60, 50))
    merged = merge([delta, delta], "dare", drop=0.8, seed=3)[0].dense()
    values = set(merged.round(decimals=3).flatten().tolist())
    assert values == {0.0, 5.0, 10.0}  # the two tasks are dropped independently
    assert merged.mean().item() == pytest.approx(2.0, rel=0.1)
    assert torch.equal(merge([delta, delta], "dare", drop=0.8, seed=3)[0].dense(), merged)
    assert not torch.equal(merge([delta, delta], "dare", drop=0.8, seed=4)[0].dense(), merged)
    exact = updates(2)
    np.testing.assert_allclose(merge(exact, "dare", drop=0.0)[0].dense().numpy(), sum(dense(exact)), atol=1e-9)
    both = merge(exact, "dare", drop=0.0, then="ties", density=0.3)[0].dense().numpy()
    np.testing.assert_allclose(both, ties(dense(exact), 0.3), atol=1e-9)


def test_orthogonal_tasks_are_all_kept_by_the_spectral_merges():
    one = LowRankDelta.from_dense(torch.diag(torch.tensor([3.0, 0, 0, 0])))
    two = LowRankDelta.from_dense(torch.diag(torch.tensor([0.0, 0, 2, 0])))
    assert torch.allclose(merge([one, two], "tsv")[0].dense(), one.dense() + two.dense(), atol=1e-6)
    mixed = merge([one, two], "opcm")[0].dense()
    assert torch.allclose(mixed / mixed[0, 0], (one.dense() + two.dense()) / 3, atol=1e-6)
    assert float(mixed.norm()) == pytest.approx(2.5)


def test_merging_factors_separately_is_another_matrix():
    """What PEFT's `linear` combination does: (B_1 + B_2)(A_1 + A_2) has cross terms."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, RANK, IN, generator=generator), torch.randn(2, OUT, RANK, generator=generator)
    exact = merge([LowRankDelta.from_lora(a[i], b[i]) for i in (0, 1)], "task_arithmetic")[0].dense()
    assert torch.allclose(exact, b[0] @ a[0] + b[1] @ a[1], atol=1e-5)
    apart = b.sum(0) @ a.sum(0)
    assert float((apart - exact).norm() / exact.norm()) > 0.5


def test_a_limited_rank_reports_its_error(monkeypatch):
    deltas = updates(2)
    full = merge(deltas, "magmax")[0]
    cut, error = merge(deltas, "magmax", rank=2)
    assert cut.rank == 2
    assert error == pytest.approx(float((full.dense() - cut.dense()).norm() / full.norm()), rel=1e-9)
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(80, 3, generator=generator) @ torch.randn(3, 60, generator=generator)
    large = large + 1e-3 * torch.randn(80, 60, generator=generator)
    exact, expected = limited(large.double(), 3, torch.float64)
    monkeypatch.setattr("mllm_cl.spectral.merges._EXACT_SIZE", 8)  # the route of large matrices
    close, measured = limited(large.double(), 3, torch.float64)
    np.testing.assert_allclose(close.dense().numpy(), exact.dense().numpy(), atol=1e-6)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_opcm_of_a_model_takes_the_norm_of_all_matrices():
    tasks = [dict(zip("qk", updates(2, seed=seed))) for seed in (1, 2)]
    merged, _ = merge_many(tasks, "opcm")
    whole = [np.sqrt(sum(update.norm() ** 2 for update in own.values())) for own in (*tasks, merged)]
    assert whole[2] == pytest.approx((whole[0] + whole[1]) / 2)
    alone = merge([own["q"] for own in tasks], "opcm")[0]
    ratio = merged["q"].norm() / alone.norm()
    np.testing.assert_allclose(merged["q"].dense().numpy(), ratio * alone.dense().numpy(), atol=1e-9)


@pytest.mark.parametrize("name", MERGES)
def test_nothing_learnt_is_nothing_merged(name):
    zero = LowRankDelta.zeros(OUT, IN)
    merged, error = merge([zero, zero], name)
    assert float(merged.dense().abs().max()) == 0
    assert error == 0
    assert merge([zero, updates(1)[0]], name)[0].shape == (OUT, IN)


def test_mistakes_are_refused():
    with pytest.raises(SpectralError, match="'tie' is unknown"):
        merge(updates(), "tie")
    with pytest.raises(SpectralError, match="no option 'dens'"):
        merge(updates(), "ties", dens=0.1)
    with pytest.raises(SpectralError, match="density is 2"):
        merge(updates(), "ties", density=2)
    with pytest.raises(SpectralError, match="cannot be merged"):
        merge([updates()[0], LowRankDelta.zeros(2, 2)], "ties")
    with pytest.raises(SpectralError, match="cannot be merged"):
        merge_many([{"q": updates()[0]}, {"k": updates()[0]}], "ties")
    with pytest.raises(SpectralError, match="cannot be merged"):
        merge([], "tsv")
