"""Standard errors, paired tests and spreads against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.statistics import (
    binomial_standard_error,
    bootstrap_derived,
    derived_standard_errors,
    mcnemar_exact,
    mean_and_std,
    pair_by_id,
    paired_bootstrap,
    standard_error,
)

NAN = float("nan")


def test_standard_error_of_a_mean():
    found = standard_error([0, 1, 1, 0, 1])
    assert found.mean == pytest.approx(0.6)
    assert found.stderr == pytest.approx(math.sqrt(0.3 / 5))
    assert found.n == 5
    assert standard_error([1.0]).stderr is None


def test_binomial_and_sample_errors_agree_for_many_rows():
    scores = np.array([1] * 1800 + [0] * 1200)
    sample = standard_error(scores).stderr
    assert binomial_standard_error(0.6, 3000) == pytest.approx(sample, rel=1e-3)
    assert 100 * binomial_standard_error(0.6, 3000) == pytest.approx(0.894, abs=0.001)


@pytest.mark.parametrize("bad", [[], [[1, 0]], [1, NAN]])
def test_bad_scores_are_refused(bad):
    with pytest.raises(EvaluationError):
        standard_error(bad)
    with pytest.raises(EvaluationError):
        binomial_standard_error(1.5, 10)


def test_propagation_is_exact_for_linear_metrics():
    values, errors = [[80, NAN], [60, 90]], [[3, NAN], [4, 2]]
    found = derived_standard_errors(values, errors, zero_shot=[10, 20], zero_shot_stderr=[1, 1])
    assert found["mean_final_accuracy"] == pytest.approx(math.hypot(4, 2) / 2)
    assert found["mean_finetune_accuracy"] == pytest.approx(math.hypot(3, 2) / 2)
    assert found["backward_transfer"] == pytest.approx(5)
    assert found["forgetting"] == pytest.approx(5)
    # delta method: d(60/80) in percent
    assert found["retention"] == pytest.approx(100 * math.hypot(4 / 80, 60 * 3 / 80**2), rel=1e-6)
    assert found["forward_transfer"] is None  # a[1,2] was not measured


def test_forward_transfer_uses_the_error_of_the_untouched_model():
    found = derived_standard_errors([[80, 30], [60, 90]], np.ones((2, 2)), zero_shot=[10, 20], zero_shot_stderr=[1, 2])
    assert found["forward_transfer"] == pytest.approx(math.hypot(1, 2))
    unknown = derived_standard_errors([[80, 30], [60, 90]], np.ones((2, 2)), zero_shot=[10, 20])
    assert unknown["forward_transfer"] is None


def test_an_unknown_error_makes_the_result_unknown():
    found = derived_standard_errors([[80, NAN], [60, 90]], [[NAN, NAN], [4, 2]], single=[1, 1])
    assert found["backward_transfer"] is None
    assert found["mean_final_accuracy"] is not None
    assert found["forward_transfer_to_learning"] is None


def test_joint_bootstrap_sees_what_independent_cells_hide():
    rng = np.random.default_rng(0)
    learnt = (rng.random(400) < 0.8).astype(float)
    kept = learnt * (rng.random(400) < 0.95)  # nearly the same rows are right: differences are sure, levels are not
    new = (rng.random(300) < 0.9).astype(float)
    boot = bootstrap_derived([[learnt, None], [kept, new]], draws=400)
    values = [[100 * learnt.mean(), NAN], [100 * kept.mean(), 100 * new.mean()]]
    errors = [[100 * standard_error(learnt).stderr, NAN], [100 * standard_error(s).stderr for s in (kept, new)]]
    independent = derived_standard_errors(values, errors)
    assert boot["backward_transfer"].mean == pytest.approx(values[1][0] - values[0][0])
    assert boot["backward_transfer"].stderr < 0.6 * independent["backward_transfer"]
    assert boot["mean_final_accuracy"].stderr == pytest.approx(independent["mean_final_accuracy"], rel=0.15)
    assert boot["forward_transfer"] is None
    assert bootstrap_derived([[learnt, None], [kept, new]], draws=400) == boot


def test_bootstrap_refuses_other_rows_at_another_stage():
    with pytest.raises(EvaluationError, match="rows in different stages"):
        bootstrap_derived([[[1, 0], None], [[1, 0, 1], [1, 1]]], draws=2)


def test_paired_bootstrap():
    rng = np.random.default_rng(1)
    a = (rng.random(1000) < 0.6).astype(float)
    b = np.where(rng.random(1000) < 0.05, 1 - a, a)
    same = paired_bootstrap(a, a, draws=500)
    assert same.difference == 0
    assert same.p_value == 1
    better = paired_bootstrap(a, np.maximum(b, a), draws=500)
    assert better.difference > 0
    assert better.low > 0
    assert better.p_value == pytest.approx(1 / 500)  # never 0
    assert paired_bootstrap(a, b, draws=500) == paired_bootstrap(a, b, draws=500)


def test_clusters_widen_the_error():
    rng = np.random.default_rng(2)
    images = rng.normal(size=50).repeat(10)
    clusters = [str(i) for i in np.arange(50).repeat(10)]
    plain = paired_bootstrap(np.zeros(500), images, draws=500)
    clustered = paired_bootstrap(np.zeros(500), images, clusters=clusters, draws=500)
    assert clustered.stderr > 2 * plain.stderr


def test_mcnemar_matches_the_sign_test():
    # 1 against 7 discordant rows: 2 · (C(8,0) + C(8,1)) / 2^8
    a, b = [1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]
    found = mcnemar_exact(a, b)
    assert (found.only_a, found.only_b, found.n) == (1, 7, 10)
    assert found.p_value == pytest.approx(2 * 9 / 256)
    assert mcnemar_exact([1, 0], [1, 0]).p_value == 1
    with pytest.raises(EvaluationError, match="neither 0 nor 1"):
        mcnemar_exact([0.3], [1])
    with pytest.raises(EvaluationError, match="cannot be paired"):
        mcnemar_exact([1], [1, 0])


def test_pairing_is_by_id_not_by_order():
    first, second = pair_by_id({"a": 1.0, "b": 0.0}, {"b": 0.5, "a": 0.25})
    assert first.tolist() == [1.0, 0.0]
    assert second.tolist() == [0.25, 0.5]
    with pytest.raises(EvaluationError, match="'c'"):
        pair_by_id({"a": 1.0}, {"a": 1.0, "c": 0.0})


def test_spread_over_seeds():
    assert mean_and_std([70, 72, 74]).std == pytest.approx(2)
    assert mean_and_std([70]).std is None
