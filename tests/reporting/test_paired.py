"""Which paired test answers for which kind of score."""

from __future__ import annotations

import pytest

from mllm_cl.reporting import compare
from mllm_cl.reporting.paired import _test


def lines(scores, answers=None, clusters=None, **more):
    return {
        f"r{i:02d}": {
            "id": f"r{i:02d}",
            "score": score,
            "prediction": (answers or [""] * len(scores))[i],
            "references": [("yes", "no")[i % 2]],
            **({"cluster": clusters[i]} if clusters else {}),
            **more,
        }
        for i, score in enumerate(scores)
    }


def test_right_or_wrong_answers():
    interval, p_value, test, scale = _test(lines([0.0] * 6 + [1.0]), lines([1.0] * 7), "exact_match", 200)
    assert (test, scale) == ("exact McNemar", 100.0)
    assert p_value == 2 / 2**6
    assert 0 < interval.low <= interval.difference


def test_rows_that_share_images():
    clusters = [0, 0, 0, 1, 1, 1]
    _, p_value, test, _ = _test(
        lines([0.0] * 6, clusters=clusters), lines([1.0, 1, 1, 0, 0, 0], clusters=clusters), "exact_match", 200
    )
    assert test == "paired t"
    assert abs(p_value - 0.5) < 1e-9  # two images: t = 1 with one degree of freedom


def test_soft_scores():
    assert _test(lines([0.3, 0.6, 0.9]), lines([0.6, 0.9, 1.0]), "vqa_accuracy", 200)[2] == "paired t"


def test_scores_of_whole_sets():
    right = ["yes", "no"] * 20
    wrong = ["no" if i % 4 == 0 else answer for i, answer in enumerate(right)]
    first, other = lines([0.0] * 40, wrong), lines([1.0] * 40, right)
    interval, p_value, test, scale = _test(first, other, "pope_strict", 300)
    assert (test, scale) == ("paired bootstrap of f1", 100.0)
    assert interval.difference > 0.2
    assert p_value < 0.05
    for line in first.values():
        del line["prediction"]  # not enough to score the set again: the rows' own scores are compared
    assert _test(first, other, "pope_strict", 300)[2] == "exact McNemar"


def test_derived_metrics_are_drawn_jointly(fake_run):
    good, bad = fake_run("good", keep=1.0, rows=80), fake_run("bad", keep=0.5, rows=80)
    comparison = compare([good, bad])
    found = {entry.name: entry for entry in comparison.derived}
    matrices = [run.matrix.derived() for run in comparison.runs]
    for name, entry in found.items():
        assert entry.difference == pytest.approx(matrices[1][name].value - matrices[0][name].value)
        assert entry.low <= entry.difference <= entry.high
    assert found["forgetting"].low > 0
    assert found["forgetting"].p_value <= 0.01
    same = {entry.name: entry for entry in compare([good, fake_run("again", keep=1.0, rows=80)]).derived}
    assert same["forgetting"].difference == 0.0
    assert same["forgetting"].p_value == 1.0
    assert compare([good, fake_run("short", rows=20)]).derived == ()
