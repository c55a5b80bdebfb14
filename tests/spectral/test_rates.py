"""Each named rate against its formula, written again in NumPy, one value at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.errors import SpectralError
from mllm_cl.spectral import RATES, LowRankDelta

PROPERTY = settings(derandomize=True, max_examples=25, deadline=None, database=None)
SPECTRUM = [8.0, 5.0, 3.0, 3.0, 1.0, 0.5, 0.125]
OTHER = [20.0, 9.0, 4.0, 2.0, 1.0, 0.25]  # a scale that comes from other matrices


def power_up(s, ref, gamma=1.0):
    return (s / max(ref)) ** gamma


def power_down(s, ref, gamma=0.5, ceiling=10.0):
    return min((np.mean(ref) / s) ** gamma, ceiling)


def level(ref, tau, quantile, factor):
    return factor * np.quantile(ref, quantile) if tau is None else tau


def wiener(s, ref, tau=None, quantile=0.5, factor=1.0):
    return s**2 / (s**2 + level(ref, tau, quantile, factor) ** 2)


def soft_threshold(s, ref, tau=None, quantile=0.5, factor=1.0):
    return max(1 - level(ref, tau, quantile, factor) / s, 0)


def energy_cut(s, ref, share=0.9, low=0.0, mass="energy"):
    ref = sorted(ref, reverse=True)
    weights = [x**2 if mass == "energy" else x for x in ref]
    count = next(k for k in range(1, len(ref) + 1) if sum(weights[:k]) >= share * sum(weights) - 1e-12)
    return 1.0 if s >= ref[count - 1] - 1e-9 else low


def saturate(s, ref, factor=1.0):
    top = factor * np.mean(ref)
    return top / s * math.tanh(s / top)


def rank_linear(s, ref, first=1.0, last=0.0):
    def place(x):
        above = sum(r**2 for r in ref if r > x + 1e-9)
        return above + sum(r**2 for r in ref if abs(r - x) <= 1e-9) / 2

    top, bottom = place(max(ref)), place(min(ref))
    share = min(max((place(s) - top) / (bottom - top), 0), 1)
    return first + (last - first) * share


CASES = [
    ("uniform", lambda s, ref: 1.0, {}),
    ("power_up", power_up, {}),
    ("power_up", power_up, {"gamma": 0.25}),
    ("power_up", power_up, {"gamma": 2}),
    ("power_down", power_down, {}),
    ("power_down", power_down, {"gamma": 1.0, "ceiling": 3.0}),
    ("wiener", wiener, {}),
    ("wiener", wiener, {"tau": 2.0}),
    ("wiener", wiener, {"quantile": 0.3, "factor": 2.0}),
    ("soft_threshold", soft_threshold, {}),
    ("soft_threshold", soft_threshold, {"tau": 0.75}),
    ("soft_threshold", soft_threshold, {"quantile": 0.9, "factor": 0.5}),
    ("energy_cut", energy_cut, {}),
    ("energy_cut", energy_cut, {"share": 0.4, "low": 0.2, "mass": "nuclear"}),
    ("energy_cut", energy_cut, {"share": 1.0}),
    ("saturate", saturate, {}),
    ("saturate", saturate, {"factor": 0.5}),
    ("rank_linear", rank_linear, {}),
    ("rank_linear", rank_linear, {"first": 0.0, "last": 1.0}),
]


@pytest.mark.parametrize(("name", "reference", "options"), CASES)
@pytest.mark.parametrize("scale", [None, OTHER])
def test_formula(name, reference, options, scale):
    sigma = torch.tensor(SPECTRUM, dtype=torch.float64)
    shared = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    expected = [reference(s, scale or SPECTRUM, **options) for s in SPECTRUM]
    np.testing.assert_allclose(RATES[name](sigma, scale=shared, **options).numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "reference", "options"), CASES)
def test_order_of_the_input_does_not_matter_and_zeros_are_not_counted(name, reference, options):
    sigma = torch.tensor(SPECTRUM, dtype=torch.float64)
    shuffled = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    plain = RATES[name](sigma, **options)
    assert torch.allclose(RATES[name](sigma[shuffled], **options), plain[shuffled])
    padded = RATES[name](torch.cat([sigma, torch.zeros(3)]), **options)
    assert torch.allclose(padded[:7], plain)
    assert torch.isfinite(padded).all()


@pytest.mark.parametrize("name", [name for name in RATES if name != "overlap"])
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [2.0], [2.0, 2.0]])
def test_degenerate_spectra_give_finite_rates(name, values):
    c = RATES[name](torch.tensor(values))
    assert c.shape == (len(values),)
    assert c.dtype == torch.float64
    assert torch.isfinite(c).all()
    assert (c >= 0).all()


@PROPERTY
@given(st.sampled_from([n for n in RATES if n != "overlap"]), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_rates_with_default_options_are_free_of_scale(name, seed, factor):
    # with an explicit tau, wiener and soft_threshold are not: tau is in the units of the weights
    sigma = torch.tensor(np.sort(np.random.default_rng(seed).exponential(size=9))[::-1].copy())
    assert torch.allclose(RATES[name](sigma * factor), RATES[name](sigma), atol=1e-9)


@PROPERTY
@given(st.integers(0, 1000))
def test_direction_of_each_family(seed):
    sigma = torch.tensor(np.sort(np.random.default_rng(seed).exponential(size=9) + 0.01)[::-1].copy())
    for name in ("power_up", "wiener", "energy_cut", "soft_threshold", "rank_linear"):
        assert (RATES[name](sigma).diff() <= 1e-12).all(), f"{name} keeps strong directions"
        assert ((RATES[name](sigma) * sigma).diff() <= 1e-12).all(), f"{name} keeps the order"
    for name in ("power_down", "saturate"):
        assert (RATES[name](sigma).diff() >= -1e-12).all(), f"{name} shrinks strong directions"


def test_known_values_of_the_uncalibrated_mass():
    # the table in llava_c.md section 6.2, sigma_i ~ i^-0.8: nuclear mass and energy that are kept
    sigma = torch.arange(1, 65, dtype=torch.float64) ** -0.8

    def kept(c):
        return (c * sigma).sum() / sigma.sum(), (c * sigma).square().sum() / sigma.square().sum()

    for c, nuclear, energy in [
        (0.5 * RATES["uniform"](sigma), 0.50, 0.25),
        (RATES["power_up"](sigma), 0.30, 0.54),
        (RATES["wiener"](sigma), 0.76, 0.90),
        (RATES["soft_threshold"](sigma), 0.51, 0.70),
        # its power_down refers to sigma_1 (which is 1 here) instead of the mean, without a ceiling, at strength 0.5
        (0.5 * RATES["power_down"](sigma, scale=torch.ones(1), gamma=1.0, ceiling=1e9), 4.53, 7.445),
    ]:
        assert kept(c)[0] == pytest.approx(nuclear, abs=0.006)
        assert kept(c)[1] == pytest.approx(energy, abs=0.006)


def test_overlap_by_hand():
    # the earlier update is in the first axis: u_1 is at 45 degrees to it and v_1 inside, u_2 and v_2 are outside
    half = math.sqrt(0.5)
    previous = LowRankDelta.from_dense(torch.diag(torch.tensor([9.0, 1.0, 0.0])))
    left = torch.tensor([[half, 0.0], [half, 0.0], [0.0, 1.0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    delta = LowRankDelta(left, torch.tensor([2.0, 1.0], dtype=torch.float64), right, torch.float64)
    c = RATES["overlap"](delta.sigma, delta=delta, previous=previous)
    np.testing.assert_allclose(c.numpy(), [1 - half, 1.0], atol=1e-6)


def test_overlap_against_numpy():
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(7, 3)) @ rng.normal(size=(3, 6)), rng.normal(size=(7, 4)) @ rng.normal(size=(4, 6))
    u, _, v = np.linalg.svd(new)
    p, s, q = np.linalg.svd(old)
    for mass in (0.3, 0.5, 0.99):
        k = int(np.argmax(np.cumsum(s) / s.sum() >= mass)) + 1
        rho = np.linalg.norm(p[:, :k].T @ u[:, :3], axis=0) * np.linalg.norm(q[:k] @ v[:3].T, axis=0)
        delta, previous = LowRankDelta.from_dense(torch.tensor(new)), LowRankDelta.from_dense(torch.tensor(old))
        c = RATES["overlap"](delta.sigma, delta=delta, previous=previous, mass=mass)
        np.testing.assert_allclose(c.numpy(), 1 - rho, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("power_up", {"gamma": -1}, ["power_up: gamma", "-1", "at least 0"]),
        ("power_up", {"gamma": "a"}, ["power_up: gamma", "'a'"]),
        ("power_down", {"ceiling": 0}, ["power_down: ceiling", "above 0"]),
        ("wiener", {"tau": float("nan")}, ["wiener: tau", "nan"]),
        ("wiener", {"quantile": 2}, ["wiener: quantile", "at most 1"]),
        ("soft_threshold", {"factor": -1}, ["soft_threshold: factor"]),
        ("energy_cut", {"share": 0}, ["energy_cut: share", "above 0"]),
        ("energy_cut", {"mass": "fro"}, ["'fro'", "energy or nuclear"]),
        ("saturate", {"factor": 0}, ["saturate: factor"]),
        ("rank_linear", {"first": -1}, ["rank_linear: first"]),
    ],
)
def test_options_out_of_range_are_named(name, options, words):
    with pytest.raises(SpectralError) as error:
        RATES[name](torch.tensor(SPECTRUM), **options)
    for word in words:
        assert word in str(error.value)
