"""Edit similarity, SARI, the first letter and being contained, by hand."""

from __future__ import annotations

import pytest

from mllm_cl.evaluation.scorers import get_scorer
from mllm_cl.evaluation.scorers.overlap import contained, edit_similarity, fcit_contained, first_letter, sari


def test_edit_similarity() -> None:
    assert edit_similarity("return x", ["return x"]) == 1.0
    assert edit_similarity("abcd", ["bcde"]) == pytest.approx(2 * 3 / 8)
    assert edit_similarity("abcd", ["zz", "abcd "]) == pytest.approx(8 / 9)
    assert edit_similarity("", ["a"]) == edit_similarity("a", [""]) == edit_similarity("", [""]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("A", "A\nBecause it is.", 1.0),
        ("Answer: B\nBecause", "B", 1.0),
        ("(C) because", "Answer: C", 1.0),
        ("B", "A\nBecause", 0.0),
        ("Apples", "A", 0.0),
        ("", "A", 0.0),
        ("the answer is A", "A", 0.0),
    ],
)
def test_first_letter(prediction: str, reference: str, score: float) -> None:
    assert first_letter(prediction, [reference]) == score


def test_contained() -> None:
    assert fcit_contained("Yes", ["yes."]) == 1.0
    assert fcit_contained("", ["yes."]) == 1.0
    assert contained(" ", ["yes."]) == 0.0
    assert contained("Yes", ["yes."]) == 1.0
    assert fcit_contained("yes indeed", ["yes."]) == 0.0


def test_sari_by_hand() -> None:
    # unigrams of source "a b", answer "a c", reference "a c": kept a, added c, deleted b: all right
    assert sari("a c", ["a c"], question="a b") == pytest.approx(1.0)
    # the source as it is: nothing added (wanted c), a kept and b kept wrongly, nothing deleted (wanted b)
    unigram = (0 + 2 * (1 / 2 * 1) / (1 / 2 + 1) + 0) / 3
    bigram = (0 + 0 + 0) / 3  # wanted: a c added, a b deleted
    assert sari("a b", ["a c"], question="a b") == pytest.approx((unigram + bigram + 1 + 1) / 4)
    assert sari("", ["a"], question="a b") == 0.0
    assert sari("a", ["a"], question="") == pytest.approx(1.0)


def test_sari_counts_several_references() -> None:
    one, both = sari("a", ["a"], question="a b"), sari("a", ["a", "b"], question="a b")
    assert one == pytest.approx(1.0)
    assert both < one
    assert 0 <= both <= 1


@pytest.mark.parametrize("name", ["edit_similarity", "first_letter", "sari", "fcit_contained", "contained"])
def test_they_are_in_the_catalogue_and_stay_between_0_and_1(name: str) -> None:
    scorer = get_scorer(name)
    for prediction in ("", "A", "\ud83d", "a b c d e", "1" * 500):
        assert 0 <= scorer(prediction, ["A", "b c d", ""], question="x y") <= 1
