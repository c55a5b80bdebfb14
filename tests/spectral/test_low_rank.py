"""`LowRankDelta` against NumPy's dense SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.errors import SpectralError
from mllm_cl.spectral import LowRankDelta

PROPERTY = settings(derandomize=True, max_examples=25, deadline=None, database=None)


def random_lora(out: int, in_: int, rank: int, seed: int = 0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(rank, in_))).to(dtype), torch.tensor(rng.normal(size=(out, rank))).to(dtype)


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def check_invariants(delta: LowRankDelta) -> None:
    eye = torch.eye(delta.rank, dtype=delta.left.dtype)
    tolerance = 1e-12 if delta.left.dtype == torch.float64 else 2e-6
    assert torch.allclose(delta.left.mT @ delta.left, eye, atol=tolerance)
    assert torch.allclose(delta.right.mT @ delta.right, eye, atol=tolerance)
    assert delta.sigma.dtype == torch.float64
    assert (delta.sigma > 0).all()
    assert (delta.sigma.diff() <= 0).all()
    if delta.rank:
        assert (delta.left.gather(0, delta.left.abs().argmax(0, keepdim=True)) > 0).all()


@PROPERTY
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000), st.floats(-3, 3))
def test_from_lora_is_the_dense_svd(out, in_, rank, seed, scaling):
    lora_A, lora_B = random_lora(out, in_, rank, seed)
    delta = LowRankDelta.from_lora(lora_A, lora_B, scaling)
    expected = scaling * lora_B.numpy() @ lora_A.numpy()
    assert delta.shape == (out, in_)
    np.testing.assert_allclose(delta.dense().numpy(), expected, atol=1e-12)
    singular = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(delta.singular_values().numpy(), singular[: delta.rank], atol=1e-12)
    np.testing.assert_allclose(singular[delta.rank :], 0, atol=1e-12)
    check_invariants(delta)


@PROPERTY
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_from_dense_and_both_routes_agree(out, in_, seed):
    lora_A, lora_B = random_lora(out, in_, 3, seed)
    by_factors, by_matrix = LowRankDelta.from_lora(lora_A, lora_B), LowRankDelta.from_dense(lora_B @ lora_A)
    assert by_factors.rank == by_matrix.rank
    np.testing.assert_allclose(by_factors.sigma.numpy(), by_matrix.sigma.numpy(), rtol=1e-9)
    np.testing.assert_allclose(by_factors.dense().numpy(), by_matrix.dense().numpy(), atol=1e-12)
    check_invariants(by_matrix)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "both"])
def test_every_singular_value_is_right_up_to_condition_a_million(condition, dtype, where):
    out, in_, rank = 96, 70, 12
    sigma = np.logspace(0, -np.log10(condition), rank)
    mix = orthonormal(rank, rank, 2)  # hides the spectrum from the columns of the factors
    share = {"lora_A": (0.0, 1.0), "lora_B": (1.0, 0.0), "both": (0.5, 0.5)}[where]
    lora_B = torch.tensor(orthonormal(out, rank, 0) * sigma ** share[0] @ mix).to(dtype)
    lora_A = torch.tensor(mix.T @ (orthonormal(in_, rank, 1) * sigma ** share[1]).T).to(dtype)
    delta = LowRankDelta.from_lora(lora_A, lora_B)
    product = lora_B.double().numpy() @ lora_A.double().numpy()  # the reference sees the rounded factors too
    np.testing.assert_allclose(delta.sigma.numpy(), np.linalg.svd(product, compute_uv=False)[:rank], rtol=1e-5)
    assert np.linalg.norm(delta.dense().double().numpy() - product) <= 1e-5 * np.linalg.norm(product)
    check_invariants(delta)


def test_both_routes_of_the_code_are_used_and_agree():
    # In float32 a well-conditioned update takes the route without Q; a graded one has to form Q to stay orthonormal.
    out, in_, rank = 40, 30, 4
    for smallest in (1e-2, 1e-12):
        sigma = np.array([1.0, 0.5, 0.1, smallest])
        mix = orthonormal(rank, rank, 2)
        lora_B = torch.tensor(orthonormal(out, rank, 0) * sigma @ mix)
        lora_A = torch.tensor(mix.T @ orthonormal(in_, rank, 1).T)
        single = LowRankDelta._from_factors(lora_B, lora_A.mT, torch.float32)
        double = LowRankDelta._from_factors(lora_B, lora_A.mT, torch.float64)
        check_invariants(single)
        np.testing.assert_allclose(single.sigma.numpy(), sigma, rtol=1e-3)
        np.testing.assert_allclose(single.left.numpy(), double.left.numpy(), atol=1e-6)
        np.testing.assert_allclose(single.right.numpy(), double.right.numpy(), atol=1e-6)


def test_signs_and_bytes_are_deterministic():
    lora_A, lora_B = random_lora(20, 15, 4, dtype=torch.float32)
    first, second = (LowRankDelta.from_lora(lora_A, lora_B) for _ in range(2))
    for name in ("left", "sigma", "right"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    flipped = LowRankDelta.from_lora(-lora_A, -lora_B)
    assert torch.allclose(first.left, flipped.left, atol=1e-6)
    check_invariants(first)


@pytest.mark.parametrize(("out", "in_", "rank"), [(1, 5, 3), (5, 1, 3), (1, 1, 1), (3, 4, 9)])
def test_one_row_one_column_and_more_rank_than_the_matrix(out, in_, rank):
    lora_A, lora_B = random_lora(out, in_, rank)
    delta = LowRankDelta.from_lora(lora_A, lora_B)
    assert delta.rank == min(out, in_, rank)
    np.testing.assert_allclose(delta.dense().numpy(), (lora_B @ lora_A).numpy(), atol=1e-12)


def test_rank_deficient_zero_and_empty():
    lora_A, lora_B = random_lora(6, 5, 4)
    lora_B[:, 2:] = lora_B[:, :2]
    assert LowRankDelta.from_lora(lora_A, lora_B).rank == 2
    untrained = LowRankDelta.from_lora(lora_A, torch.zeros(6, 4, dtype=torch.float64))
    assert untrained.rank == 0
    assert untrained.norm() == untrained.norm("nuclear") == untrained.norm("spectral") == 0.0
    assert torch.equal(untrained.dense(), torch.zeros(6, 5, dtype=torch.float64))
    assert LowRankDelta.from_lora(torch.zeros(0, 5), torch.zeros(6, 0)).rank == 0
    assert LowRankDelta.from_dense(torch.zeros(3, 2)).rank == 0
    lora_A, lora_B = LowRankDelta.zeros(6, 5).to_lora(rank=2)
    assert (lora_A.shape, lora_B.shape) == ((2, 5), (6, 2))
    assert not lora_A.any()


def test_repeated_singular_values():
    matrix = torch.tensor(orthonormal(6, 4, 0) * 2.0 @ orthonormal(4, 4, 1).T)
    delta = LowRankDelta.from_dense(matrix)
    np.testing.assert_allclose(delta.sigma.numpy(), 2.0)
    np.testing.assert_allclose(delta.dense().numpy(), matrix.numpy(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_of_the_input_comes_back(dtype):
    lora_A, lora_B = random_lora(12, 10, 3, dtype=dtype)
    delta = LowRankDelta.from_lora(lora_A, lora_B, 2.0)
    expected = 2.0 * lora_B.double() @ lora_A.double()
    out_A, out_B = delta.to_lora()
    assert delta.dense().dtype == out_A.dtype == out_B.dtype == dtype
    assert (delta + delta).dtype == (delta * 0.5).dtype == delta.truncate(rank=1)[0].dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert (delta.dense().double() - expected).norm() <= tolerance * expected.norm()
    assert (out_B.double() @ out_A.double() - expected).norm() <= tolerance * expected.norm()
    # only the result is rounded: the spectrum is that of the exact product
    np.testing.assert_allclose(delta.sigma.numpy(), np.linalg.svd(expected.numpy(), compute_uv=False)[:3], rtol=1e-9)


def test_no_gradient_is_kept():
    lora_A, lora_B = random_lora(4, 3, 2)
    delta = LowRankDelta.from_lora(torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B))
    assert not delta.left.requires_grad
    assert not (delta + delta).right.requires_grad


@PROPERTY
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000), st.floats(-4, 4, allow_subnormal=False))
def test_arithmetic_is_that_of_matrices(out, in_, seed, factor):
    one = LowRankDelta.from_lora(*random_lora(out, in_, 2, seed))
    two = LowRankDelta.from_lora(*random_lora(out, in_, 3, seed + 1))
    a, b = one.dense().numpy(), two.dense().numpy()
    for delta, expected in [
        (one + two, a + b),
        (one - two, a - b),
        (one * factor, a * factor),
        (factor * one, a * factor),
        (-one, -a),
        (one.transpose(), a.T),
    ]:
        np.testing.assert_allclose(delta.dense().numpy(), expected, atol=1e-11)
        check_invariants(delta)


def test_sum_has_the_numerical_rank():
    one = LowRankDelta.from_lora(*random_lora(30, 20, 4, dtype=torch.float32))
    assert (one - one).rank == 0
    assert (one + one).rank == 4
    np.testing.assert_allclose((one + one).sigma.numpy(), 2 * one.sigma.numpy(), rtol=1e-6)
    zero = LowRankDelta.zeros(30, 20)
    assert (one + zero) is one
    assert (zero + one) is one
    assert (zero + zero).rank == 0
    assert (one * 0).rank == 0


@PROPERTY
@given(st.integers(0, 1000), st.integers(0, 6), st.floats(0.05, 1.0))
def test_truncate_is_the_best_approximation_and_reports_its_error(seed, rank, energy):
    delta = LowRankDelta.from_lora(*random_lora(9, 7, 5, seed))
    sigma, matrix = delta.sigma.numpy(), delta.dense().numpy()
    smaller, error = delta.truncate(rank=rank)
    assert smaller.rank == min(rank, 5)
    actual = np.linalg.norm(matrix - smaller.dense().numpy()) / np.linalg.norm(matrix)
    assert error == pytest.approx(actual, abs=1e-9)
    smaller, error = delta.truncate(energy=energy)
    shares = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert shares[smaller.rank - 1] >= energy - 1e-12
    assert smaller.rank == 1 or shares[smaller.rank - 2] < energy
    assert delta.truncate(rank=rank, energy=energy)[0].rank == min(rank, smaller.rank)


def test_norms_are_numpys():
    delta = LowRankDelta.from_lora(*random_lora(9, 7, 5))
    matrix = delta.dense().numpy()
    for kind, order in [("fro", "fro"), ("nuclear", "nuc"), ("spectral", 2)]:
        assert delta.norm(kind) == pytest.approx(np.linalg.norm(matrix, order))


def test_to_lora_round_trip_splits_evenly_and_pads():
    delta = LowRankDelta.from_lora(*random_lora(9, 7, 3))
    lora_A, lora_B = delta.to_lora(rank=5)
    assert (lora_A.shape, lora_B.shape) == ((5, 7), (9, 5))
    assert not lora_A[3:].any()
    assert not lora_B[:, 3:].any()
    np.testing.assert_allclose(lora_A.norm(dim=1).numpy(), lora_B.norm(dim=0).numpy(), atol=1e-12)
    np.testing.assert_allclose((lora_B @ lora_A).numpy(), delta.dense().numpy(), atol=1e-12)
    again = LowRankDelta.from_lora(lora_A, lora_B)
    np.testing.assert_allclose(again.sigma.numpy(), delta.sigma.numpy(), rtol=1e-12)
    assert delta.to("cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LowRankDelta.from_lora(torch.ones(2, 3), torch.ones(4, 5)), ["(2, 3)", "(4, 5)", "same rank"]),
        (lambda: LowRankDelta.from_lora(torch.ones(3), torch.ones(4, 5)), ["lora_A", "(3,)", "sharded"]),
        (lambda: LowRankDelta.from_lora(torch.ones(2, 3), torch.ones(0, 2)), ["lora_B", "(0, 2)"]),
        (lambda: LowRankDelta.from_lora(torch.ones(2, 3).int(), torch.ones(4, 2)), ["int32", "quantized"]),
        (lambda: LowRankDelta.from_lora(torch.ones(2, 3) / 0, torch.ones(4, 2)), ["NaN", "diverged"]),
        (lambda: LowRankDelta.from_dense(torch.tensor([[float("nan")]])), ["NaN"]),
        (lambda: LowRankDelta.from_dense(torch.ones(0)), ["(0,)", "consolidate_vector"]),
        (lambda: LowRankDelta.zeros(2, 2) + LowRankDelta.zeros(2, 3), ["(2, 2)", "(2, 3)"]),
        (lambda: LowRankDelta.from_dense(torch.eye(3)).to_lora(rank=2), ["rank 2", "truncate(rank=2)"]),
        (lambda: LowRankDelta.zeros(2, 2).truncate(), ["no limit", "energy"]),
        (lambda: LowRankDelta.zeros(2, 2).truncate(energy=1.5), ["1.5", "at most 1"]),
        (lambda: LowRankDelta.zeros(2, 2).truncate(rank=-1), ["-1", "at least 0"]),
        (lambda: LowRankDelta.zeros(2, 2).norm("frob"), ["'frob'", "did you mean 'fro'"]),
        (lambda: LowRankDelta.zeros(2, 2) * float("inf"), ["inf", "finite"]),
        (lambda: LowRankDelta.from_dense(torch.eye(2)).with_sigma(torch.tensor([1.0, -1.0])), ["negative"]),
        (lambda: LowRankDelta(torch.ones(2, 1), torch.ones(2), torch.ones(2, 1), torch.float32), ["from_lora"]),
    ],
)
def test_error_messages_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(SpectralError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_operators_refuse_other_types():
    with pytest.raises(TypeError):
        LowRankDelta.zeros(2, 2) + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        LowRankDelta.zeros(2, 2) - 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        LowRankDelta.zeros(2, 2) * "2"  # type: ignore[operator]
