"""Consolidation: the invariants of llava_c.md section 6.5 (numbered), calibration, granularity, schedules, messages."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.errors import SpectralError
from mllm_cl.spectral import (
    RATES,
    LowRankDelta,
    consolidate,
    consolidate_many,
    consolidate_vector,
    layer_type,
    strength_at,
)

PROPERTY = settings(derandomize=True, max_examples=20, deadline=None, database=None)
BY_SIGMA = [name for name in RATES if name != "overlap"]
HOMOGENEOUS = ["power_up", "power_down", "energy_cut", "rank_linear"]
INCREASING = ["power_up", "wiener", "soft_threshold"]  # energy_cut and rank_linear: see their own tests
NORMS = {"fro": "fro", "nuclear": "nuc", "spectral": 2}


def matrix(out: int, in_: int, rank: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(out, rank)) * np.arange(1, rank + 1) ** -0.8 @ rng.normal(size=(rank, in_))


def orthogonal(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def delta_of(array: np.ndarray) -> LowRankDelta:
    return LowRankDelta.from_dense(torch.tensor(array))


def result(array: np.ndarray, rate, **options) -> np.ndarray:
    return consolidate(delta_of(array), rate, **options).dense().numpy()


def half_threshold(rate: str) -> dict[str, float]:
    """At the median, its default, soft_threshold removes a spectrum of one value completely."""
    return {"factor": 0.5} if rate == "soft_threshold" else {}


def reference(array: np.ndarray, c_of_sigma, strength: float, norm) -> np.ndarray:
    """Dense NumPy consolidation: scale the singular values, then the whole."""
    u, s, v = np.linalg.svd(array, full_matrices=False)
    kept = u @ np.diag([c_of_sigma(x, s) * x for x in s]) @ v
    return kept * strength * np.linalg.norm(array, norm) / np.linalg.norm(kept, norm)


@PROPERTY
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 500), st.floats(0.01, 2), st.sampled_from(sorted(NORMS)))
def test_1_uniform_is_interpolation_of_the_weights(out, in_, seed, strength, match):
    before, after = matrix(out, in_, 2, seed), matrix(out, in_, 3, seed + 1)
    expected = (1 - strength) * before + strength * after
    for options in ({"match": match}, {"match": "none"}):
        merged = before + result(after - before, "uniform", strength=strength, **options)
        np.testing.assert_allclose(merged, expected, atol=1e-11)


def test_2_rate_one_is_the_update_itself_and_rate_zero_is_nothing():
    delta = delta_of(matrix(6, 5, 3))
    for match in ("none", *NORMS):
        assert consolidate(delta, "uniform", strength=1.0, match=match) is delta
        assert consolidate(delta, "uniform", strength=1.0, match=match, cap=1.0) is delta
        assert consolidate(delta, torch.ones_like, strength=1.0, match=match) is delta
        for strength in np.linspace(0.05, 2, 40).tolist():
            kept = consolidate(delta, "uniform", strength=strength, match=match)
            assert torch.equal(kept.sigma, delta.sigma * strength), "to the bit"
        for rate in BY_SIGMA:
            nothing = consolidate(delta, rate, strength=0.0, match=match)
            assert nothing.rank == 0
            assert not nothing.dense().any()
    assert consolidate(delta, torch.zeros_like).rank == 0


@pytest.mark.parametrize("rate", BY_SIGMA)
def test_3_transposing_commutes(rate):
    array = matrix(7, 5, 4)
    np.testing.assert_allclose(result(array.T, rate), result(array, rate).T, atol=1e-12)


@pytest.mark.parametrize("rate", BY_SIGMA)
def test_4_orthogonal_changes_of_basis_commute(rate):
    array, p, q = matrix(7, 5, 4), orthogonal(7, 1), orthogonal(5, 2)
    np.testing.assert_allclose(result(p @ array @ q, rate), p @ result(array, rate) @ q, atol=1e-11)


@pytest.mark.parametrize("rate", HOMOGENEOUS)
@pytest.mark.parametrize("match", ["none", *NORMS])
def test_5_homogeneous(rate, match):
    array = matrix(7, 5, 4)
    for factor in (1e-6, 3.0, -2.0):
        scaled = result(factor * array, rate, match=match)
        np.testing.assert_allclose(scaled, factor * result(array, rate, match=match), rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("rate", [*BY_SIGMA, lambda s: s / (1 + s)])
@pytest.mark.parametrize("match", NORMS)
@PROPERTY
@given(st.integers(0, 500), st.floats(0.05, 3))
def test_6_the_norm_is_strength_times_that_of_the_update(rate, match, seed, strength):
    array = matrix(7, 5, 4, seed)
    kept = result(array, rate, strength=strength, match=match)
    norm = NORMS[match]
    np.testing.assert_allclose(np.linalg.norm(kept, norm), strength * np.linalg.norm(array, norm), rtol=1e-10)


@pytest.mark.parametrize("rate", BY_SIGMA)
def test_7_the_lora_route_is_the_dense_route(rate):
    rng = np.random.default_rng(0)
    lora_A, lora_B = torch.tensor(rng.normal(size=(3, 7))), torch.tensor(rng.normal(size=(9, 3)))
    by_factors = consolidate(LowRankDelta.from_lora(lora_A, lora_B, 2.0), rate)
    by_matrix = consolidate(LowRankDelta.from_dense(2.0 * lora_B @ lora_A), rate)
    np.testing.assert_allclose(by_factors.dense().numpy(), by_matrix.dense().numpy(), atol=1e-11)
    out_A, out_B = by_factors.to_lora(rank=3)
    np.testing.assert_allclose((out_B @ out_A).numpy(), by_matrix.dense().numpy(), atol=1e-11)


@pytest.mark.parametrize("rate", BY_SIGMA)
def test_8_repeated_singular_values_do_not_depend_on_the_basis(rate):
    u, v = orthogonal(6, 0)[:, :5], orthogonal(7, 1)[:, :5]
    sigma = np.array([3.0, 3.0, 3.0, 1.0, 1.0])
    mix = np.zeros((5, 5))
    mix[:3, :3], mix[3:, 3:] = orthogonal(3, 2), orthogonal(2, 3)
    one = result(u * sigma @ v.T, rate, **half_threshold(rate))
    two = result((u @ mix) * sigma @ (v @ mix).T, rate, **half_threshold(rate))
    np.testing.assert_allclose(one, two, atol=1e-12)
    c = [np.linalg.norm(u[:, i] @ one) / sigma[i] for i in range(5)]
    assert np.ptp(c[:3]) < 1e-9
    assert np.ptp(c[3:]) < 1e-9


@pytest.mark.parametrize("rate", BY_SIGMA)
def test_9_zero_thin_deficient_and_half_precision(rate, caplog):
    assert consolidate(LowRankDelta.zeros(4, 3), rate).rank == 0
    for array in (matrix(1, 5, 1), matrix(5, 1, 1), matrix(6, 5, 2)):
        kept = result(array, rate, **half_threshold(rate))
        assert np.linalg.norm(kept) == pytest.approx(0.5 * np.linalg.norm(array))
    rng = np.random.default_rng(0)
    lora = [torch.tensor(rng.normal(size=shape)) for shape in ((3, 7), (9, 3))]
    for dtype in (torch.bfloat16, torch.float16):
        low = consolidate(LowRankDelta.from_lora(*[x.to(dtype) for x in lora]), rate)
        high = consolidate(LowRankDelta.from_lora(*[x.to(dtype).double() for x in lora]), rate)
        assert low.dense().dtype == dtype
        np.testing.assert_allclose(low.sigma.numpy(), high.sigma.numpy(), rtol=1e-9)
        assert (low.dense().double() - high.dense()).norm() <= 2 * torch.finfo(dtype).eps * high.norm()
    assert not caplog.records


@pytest.mark.parametrize("rate", INCREASING)
@PROPERTY
@given(st.integers(0, 500))
def test_10_increasing_families_keep_the_order(rate, seed):
    delta = delta_of(matrix(7, 6, 5, seed))
    kept = consolidate(delta, rate)
    # same directions in the same places, so g(sigma) is monotone
    assert torch.equal(kept.left, delta.left[:, : kept.rank])
    assert (kept.sigma.diff() <= 0).all()


@pytest.mark.parametrize("match", NORMS)
def test_whole_operator_against_numpy(match):
    array = matrix(8, 6, 5)
    for rate, c_of_sigma in [
        ("power_up", lambda x, s: x / s[0]),
        ("wiener", lambda x, s: x**2 / (x**2 + np.median(s[s > 1e-9]) ** 2)),
        (lambda s: 1 / (1 + s), lambda x, s: 1 / (1 + x)),
    ]:
        expected = reference(array, c_of_sigma, 0.3, NORMS[match])
        np.testing.assert_allclose(result(array, rate, strength=0.3, match=match), expected, atol=1e-11)


def test_match_none_multiplies_the_rate_by_the_strength():
    delta = delta_of(np.diag([4.0, 2.0]))
    kept = consolidate(delta, "power_up", strength=0.5, match="none")
    assert kept.sigma.tolist() == [2.0, 0.5]
    assert consolidate(delta, "uniform", strength=3.0, match="none", cap=0.5).sigma.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("rate", ["power_up", "power_down", "wiener", "saturate", "rank_linear"])
@pytest.mark.parametrize("match", NORMS)
@pytest.mark.parametrize("strength", [0.5, 0.8, 0.97])
def test_cap_is_kept_and_the_norm_still_matches(rate, match, strength):
    array = matrix(9, 8, 7)
    delta = delta_of(array)
    options = {"last": 0.1} if rate == "rank_linear" else {}  # rate 0 in the last direction cannot be made up for
    kept = consolidate(delta, rate, strength=strength, match=match, cap=1.0, **options)
    raw = RATES[rate](delta.sigma, **options)
    assert kept.norm(match) == pytest.approx(strength * delta.norm(match), rel=1e-10)
    c = ((delta.left.mT @ kept.dense() @ delta.right).diagonal() / delta.sigma).numpy()
    assert c.max() <= 1 + 1e-9
    # below the cap all rates are in the proportion of the raw rate: c = min(k raw, 1)
    free = c < 1 - 1e-9
    if free.any():
        np.testing.assert_allclose(np.ptp(c[free] / raw.numpy()[free]), 0, atol=1e-8)


def test_cap_that_cannot_be_reached_warns_and_gives_the_most_it_can(caplog):
    delta = delta_of(np.diag([4.0, 3.0]))
    with caplog.at_level(logging.WARNING):
        kept = consolidate(delta, "energy_cut", share=0.5, strength=0.9, cap=1.0)
    assert kept.sigma.tolist() == [4.0]
    assert "0.8 of the fro norm" in caplog.text
    assert "looks healthy" in caplog.text


@pytest.mark.parametrize("options", [{"tau": 5.0}, {}])
def test_rate_that_keeps_nothing_warns(options, caplog):
    with caplog.at_level(logging.WARNING):
        assert consolidate(delta_of(orthogonal(4, 0)), "soft_threshold", **options).rank == 0
    assert "nothing of this task" in caplog.text


def test_overlap_spares_earlier_directions():
    delta, previous = delta_of(np.diag([2.0, 1.0])), delta_of(np.diag([0.0, 5.0]))
    kept = consolidate(delta, "overlap", previous=previous, match="none", strength=1.0)
    np.testing.assert_allclose(kept.dense().numpy(), np.diag([2.0, 0.0]), atol=1e-12)
    first = consolidate(delta, "overlap", previous=LowRankDelta.zeros(2, 2), strength=1.0)
    np.testing.assert_allclose(first.dense().numpy(), delta.dense().numpy())


def some_deltas() -> dict[str, LowRankDelta]:
    kinds = [("q_proj", 4, 6), ("v_proj", 5, 6)]
    return {
        f"layers.{i}.{kind}": delta_of(matrix(out, in_, 3, seed=i) * (1 + 4 * i))
        for i in range(3)
        for kind, out, in_ in kinds
    }


@pytest.mark.parametrize("rate", BY_SIGMA)
@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("match", ["none", *NORMS])
def test_granularity_against_one_block_diagonal_matrix(rate, cap, match):
    # global = consolidating the block-diagonal matrix of all updates; layer_type = one such matrix per type
    deltas = some_deltas()
    for granularity, group in [
        ("global", list(deltas)),
        ("layer_type", [n for n in deltas if "q_proj" in n]),
        ("matrix", ["layers.1.v_proj"]),
    ]:
        done = consolidate_many(deltas, rate, strength=0.4, match=match, cap=cap, granularity=granularity)
        assert list(done) == list(deltas)
        blocks = torch.block_diag(*[deltas[n].dense() for n in group])
        expected = consolidate(LowRankDelta.from_dense(blocks), rate, strength=0.4, match=match, cap=cap).dense()
        actual = torch.block_diag(*[done[n].dense() for n in group])
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-9)


def test_scale_gives_what_the_global_granularity_gives():
    deltas = some_deltas()
    shared = torch.cat([d.singular_values() for d in deltas.values()])
    done = consolidate_many(deltas, "wiener", cap=1.0, granularity="global")
    for name, delta in deltas.items():
        alone = consolidate(delta, "wiener", cap=1.0, scale=shared)
        np.testing.assert_allclose(alone.dense().numpy(), done[name].dense().numpy(), atol=1e-12)


def test_many_with_overlap_and_with_a_function():
    deltas = some_deltas()
    previous = {name: delta.truncate(rank=1)[0] for name, delta in deltas.items()}
    for granularity in ("matrix", "layer_type", "global"):
        done = consolidate_many(deltas, "overlap", previous=previous, granularity=granularity)
        before = math.sqrt(sum(d.norm() ** 2 for d in deltas.values()))
        assert math.sqrt(sum(d.norm() ** 2 for d in done.values())) == pytest.approx(0.5 * before)
    by_name = consolidate_many(deltas, "power_up", granularity="global")
    by_function = consolidate_many(deltas, lambda s: s / s.max(), granularity="global")
    for name in deltas:
        assert torch.equal(by_name[name].sigma, by_function[name].sigma)
    assert consolidate_many({}, granularity="global") == {}


def test_layer_type_groups_by_everything_but_numbers():
    assert layer_type("model.layers.3.mlp.up_proj") == layer_type("model.layers.31.mlp.up_proj")
    assert layer_type("vision.layers.3.q_proj") != layer_type("language.layers.3.q_proj")
    assert layer_type("mm_projector.0") == "mm_projector.*"
    assert layer_type("block1.fc2") == "block1.fc2"


def test_schedules():
    assert [strength_at(0.5, "constant", t) for t in (1, 7)] == [0.5, 0.5]
    assert [strength_at(0.5, "inverse", t) for t in (1, 2, 5)] == [0.5, 0.25, 0.1]
    assert strength_at(1.0, "inverse_sqrt", 4) == 0.5


def test_inverse_schedule_is_the_running_mean():
    models = [matrix(4, 3, 3, seed) for seed in range(4)]
    merged = np.zeros((4, 3))
    for t, model in enumerate(models, start=1):
        merged = merged + result(model - merged, "uniform", strength=strength_at(1.0, "inverse", t))
    np.testing.assert_allclose(merged, np.mean(models, axis=0), atol=1e-12)


def test_vectors():
    change = torch.tensor([2.0, -4.0], dtype=torch.bfloat16)
    assert consolidate_vector(change, 1.0) is change
    assert not consolidate_vector(change * math.inf, 0.0).any()
    assert consolidate_vector(change, 0.25).tolist() == [0.5, -1.0]
    assert consolidate_vector(change, 0.25).dtype == torch.bfloat16


def test_a_function_cannot_change_the_update_in_place():
    delta = delta_of(np.diag([4.0, 2.0]))
    consolidate(delta, lambda s: s.mul_(0.5))
    assert delta.sigma.tolist() == [4.0, 2.0]


EYE = LowRankDelta.from_dense(torch.eye(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: consolidate(EYE, "power_upp"), ["'power_upp'", "did you mean 'power_up'"]),
        (lambda: consolidate(EYE, "power_up", gama=1), ["'gama'", "did you mean 'gamma'"]),
        (lambda: consolidate(EYE, "uniform", gamma=1), ["no option 'gamma'", "leave 'gamma' out"]),
        (lambda: consolidate(EYE, torch.ones_like, gamma=1), ["gamma", "functools.partial"]),
        (lambda: consolidate(EYE, lambda s: s[:1]), ["usable", "2 finite numbers"]),
        (lambda: consolidate(EYE, lambda s: -s), ["usable"]),
        (lambda: consolidate(EYE, lambda s: s / 0), ["usable"]),
        (lambda: consolidate(EYE, match="frob"), ["'frob'", "did you mean 'fro'"]),
        (lambda: consolidate(EYE, strength=-0.1), ["strength", "-0.1"]),
        (lambda: consolidate(EYE, strength=float("nan")), ["strength", "nan"]),
        (lambda: consolidate(EYE, cap=0), ["cap", "above 0"]),
        (lambda: consolidate(EYE, strength=0.8, cap=0.5), ["strength 0.8", "cap 0.5", "match='none'"]),
        (lambda: consolidate(EYE, "overlap"), ["needs `previous`", "LowRankDelta.zeros"]),
        (lambda: consolidate(EYE, "overlap", previous=LowRankDelta.zeros(2, 3)), ["(2, 2)", "(2, 3)"]),
        (lambda: consolidate(EYE, "overlap", previous=EYE, scale=torch.ones(1)), ["scale", "consolidate_many"]),
        (lambda: consolidate_many({"a": EYE}, granularity="layer"), ["'layer'", "layer_type"]),
        (lambda: consolidate_many({"a": EYE}, "overlap", previous={"b": EYE}), ["'a'", "1 missing"]),
        (lambda: strength_at(0.5, "invers", 1), ["'invers'", "did you mean 'inverse'"]),
        (lambda: strength_at(0.5, "inverse", 0), ["stage is 0"]),
        (lambda: consolidate_vector(torch.ones(2), -1), ["strength is -1"]),
    ],
)
def test_messages(call, words):
    with pytest.raises(SpectralError) as error:
        call()
    for word in words:
        assert word in str(error.value)
