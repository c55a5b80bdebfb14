"""Model Tailor's compensation: its sign, its optimum, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.spectral.compensate import tailored


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, update and correlated inputs (in, samples)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    update = 0.1 * torch.randn(12, 20, generator=generator)
    inputs = torch.randn(20, 6, generator=generator) @ torch.randn(6, 200, generator=generator)
    return weight, update, inputs + 0.1 * torch.randn(20, 200, generator=generator)


def test_the_output_error_goes_down(layer):
    weight, update, inputs = layer
    moment = inputs @ inputs.mT
    for mix in (0.0, 0.5, 1.0):
        dropped = tailored(weight, update, moment, mix=mix, keep=0.3, compensate=False)
        patched = tailored(weight, update, moment, mix=mix, keep=0.3)
        assert torch.equal(dropped != 0, patched != 0)  # one block: the same entries
        before, after = (((delta - update) @ inputs).norm() for delta in (dropped, patched))
        assert after < 0.9 * before
        wrong = 2 * dropped - patched  # the released code's sign
        assert ((wrong - update) @ inputs).norm() > before


def test_compensation_is_least_squares_on_the_later_columns(layer):
    """With only the first column dropped, the best change of the others has a closed form."""
    _, update, inputs = layer
    update = update.clone().double()
    update[:, 0] = 1e-3  # the smallest entries by far
    update[:, 1:] += update[:, 1:].sign()
    moment = (inputs @ inputs.mT).double()
    patched = tailored(torch.zeros_like(update), update, moment, mix=1.0, keep=19 / 20, damping=1e-9)
    assert float(patched[:, 0].abs().max()) == 0
    best = update[:, 1:] + update[:, :1] @ moment[:1, 1:] @ torch.linalg.inv(moment[1:, 1:])
    assert torch.allclose(patched[:, 1:], best, atol=1e-5)


def test_blocks_of_columns_hand_on_their_error():
    generator = torch.Generator().manual_seed(1)
    update, inputs = torch.randn(3, 300, generator=generator), torch.randn(300, 40, generator=generator)
    moment = inputs @ inputs.mT
    patched = tailored(torch.zeros(3, 300), update, moment, keep=0.5)
    dropped = tailored(torch.zeros(3, 300), update, moment, keep=0.5, compensate=False)
    assert 0.45 < float((patched != 0).double().mean()) < 0.55
    assert ((patched - update) @ inputs).norm() < 0.5 * ((dropped - update) @ inputs).norm()


def test_keeping_everything_changes_nothing(layer):
    weight, update, inputs = layer
    assert torch.equal(tailored(weight, update, inputs @ inputs.mT, keep=1.0), update)
