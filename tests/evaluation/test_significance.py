"""Paired tests against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.significance import holm, paired_t


def test_paired_t_is_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40) + 0.1
    expected = stats.ttest_rel(b, a)
    found = paired_t(a, b)
    assert found.t == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees == 39


def test_rows_of_one_image_count_once():
    rng = np.random.default_rng(1)
    a, b = rng.random(20), rng.random(20)
    single = paired_t(a, b)
    doubled = paired_t(np.repeat(a, 2), np.repeat(b, 2), [str(i) for i in range(20) for _ in range(2)])
    assert doubled.p_value == pytest.approx(single.p_value)
    assert paired_t(np.repeat(a, 2), np.repeat(b, 2)).p_value < single.p_value  # overconfident


def test_no_spread():
    assert paired_t([0.5, 0.5], [0.5, 0.5]).p_value == 1.0
    assert paired_t([0.0, 0.0], [1.0, 1.0]).p_value == 0.0
    assert paired_t([0.0, 0.0], [1.0, 0.0], ["x", "x"]).p_value == 1.0  # one image shows nothing
    with pytest.raises(EvaluationError, match="cannot be paired"):
        paired_t([0.0], [0.0, 1.0])


def test_paired_tests_see_what_two_error_bars_hide():
    rng = np.random.default_rng(2)
    a = (rng.random(3000) < 0.6).astype(float)
    b = a.copy()
    b[rng.choice(np.flatnonzero(a == 0), 60, replace=False)] = 1.0  # two points better, nothing worse
    assert paired_t(a, b).p_value < 1e-6
    assert stats.ttest_ind(a, b).pvalue > 0.05


def test_holm():
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    with pytest.raises(EvaluationError, match="p values"):
        holm([0.5, float("nan")])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_never_helps(p_values):
    adjusted = holm(p_values)
    assert all(given <= corrected <= 1 for given, corrected in zip(p_values, adjusted))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)
