"""Sketches, protected bases and allowed directions, by hand and against NumPy."""

from __future__ import annotations

import numpy as np
import torch

from mllm_cl.spectral.subspace import (
    allowed_directions,
    extend_basis,
    minor_directions,
    project_out,
    sketch_matrix,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_projection_is_orthogonal_and_idempotent():
    basis = torch.linalg.qr(random(6, 2)).Q
    rest = project_out(random(6, 4, seed=1), basis)
    assert torch.allclose(basis.mT @ rest, torch.zeros(2, 4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(project_out(rest, basis), rest, atol=1e-12)


def test_the_energy_rule_is_numpys():
    sketch = random(6, 5)
    u, s, _ = np.linalg.svd(sketch.numpy(), full_matrices=False)
    for energy in (0.3, 0.6, 0.9, 0.99, 1.0):
        count = next(k for k in range(1, 6) if (s[:k] ** 2).sum() >= energy * (s**2).sum() - 1e-9)
        basis = extend_basis(torch.zeros(6, 0), sketch, energy)
        assert basis.shape == (6, count)
        np.testing.assert_allclose((basis @ basis.mT).numpy(), u[:, :count] @ u[:, :count].T, atol=1e-9)
        grown = extend_basis(basis, random(6, 3, seed=2), 0.999)
        assert torch.allclose(grown.mT @ grown, torch.eye(grown.shape[1], dtype=torch.float64), atol=1e-9)
        assert torch.equal(grown[:, :count], basis)  # what is protected stays protected
        assert extend_basis(grown, sketch, energy).shape == grown.shape  # and already counts


def test_a_full_basis_leaves_nothing():
    full = torch.eye(4)
    assert extend_basis(full, random(4, 3), 1.0).shape == (4, 4)
    assert allowed_directions(full, random(4, 3), 2).abs().max() == 0
    assert extend_basis(torch.zeros(4, 0), torch.zeros(4, 3), 0.9).shape == (4, 0)


def test_allowed_directions_lead_outside_the_basis():
    basis, sketch = torch.linalg.qr(random(6, 2)).Q, random(6, 5, seed=3)
    rows = allowed_directions(basis, sketch, 2)
    u, _, _ = np.linalg.svd(project_out(sketch, basis).numpy(), full_matrices=False)
    np.testing.assert_allclose((rows.mT @ rows).numpy(), u[:, :2] @ u[:, :2].T, atol=1e-9)
    assert torch.allclose(rows @ basis, torch.zeros(2, 2, dtype=torch.float64), atol=1e-9)


def test_a_sketch_finds_the_leading_directions():
    matrix = random(50, 3) @ random(3, 40, seed=1)
    omega = sketch_matrix(40, 10)
    assert omega is not None
    sketch = matrix @ omega.double()
    exact = extend_basis(torch.zeros(50, 0), matrix, 1.0)
    found = extend_basis(torch.zeros(50, 0), sketch, 1.0)
    assert exact.shape == found.shape == (50, 3)
    assert torch.allclose(exact @ exact.mT, found @ found.mT, atol=1e-8)
    assert sketch_matrix(40, 40) is None
    wide = sketch_matrix(3, 2000) if sketch_matrix(2000, 1000) is None else sketch_matrix(2000, 1000)
    assert wide is not None
    assert float(wide.square().sum()) / 2000 == 1.0 or abs(float(wide.square().sum()) / 2000 - 1) < 0.01


def test_minor_directions_are_the_weakest():
    matrix = random(5, 8)
    u, _, _ = np.linalg.svd(matrix.numpy())
    columns = minor_directions(matrix, 2)
    np.testing.assert_allclose((columns @ columns.mT).numpy(), u[:, 3:] @ u[:, 3:].T, atol=1e-9)
