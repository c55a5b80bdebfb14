"""Exact match: what is normalised, and what is not."""

from __future__ import annotations

import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.scorers import SCORERS, get_scorer
from mllm_cl.evaluation.scorers.exact_match import NORMALISATION, normalise


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("yes", "yes", 1),
        (" Yes.\n", "yes", 1),
        ("YES .", "yes", 1),
        ("a  red\tbus", "A red bus.", 1),
        ("STRASSE", "straße", 1),
        ("ＡＢ１２３", "ab123", 1),  # full width
        ("cafe\u0301", "caf\u00e9", 1),  # decomposed
        ("ǰ", "\u01f0", 1),
        ("yesterday", "yes", 0),
        ("the bus", "bus", 0),
        ("yes!", "yes", 0),
        ("yes..", "yes", 0),
        ("two", "2", 0),
        ("3.5", "35", 0),
        ("", "yes", 0),
        ("   ", "yes", 0),
        (".", "yes", 0),
        ("", ".", 0),
        ("", "", 0),  # an empty answer is never right
        (" \n", "", 0),
    ],
)
def test_exact_match(prediction, reference, expected):
    assert get_scorer("exact_match")(prediction, [reference]) == expected


def test_any_reference_counts_and_row_fields_are_accepted():
    assert get_scorer("exact_match")("b", ["a", "B"], question="?", choices=["a", "b"]) == 1.0


def test_strict():
    strict = get_scorer("exact_match_strict")
    assert strict("Yes", ["Yes"]) == 1.0
    assert strict("yes", ["Yes"]) == strict("Yes.", ["Yes"]) == strict("", ["Yes"]) == strict("", [""]) == 0.0


@pytest.mark.parametrize("name", ["exact_match", "exact_match_strict"])
@pytest.mark.parametrize("references", [[], "yes"])
def test_a_row_without_references_is_refused(name, references):
    with pytest.raises(EvaluationError, match="references"):
        get_scorer(name)("yes", references)


@pytest.mark.parametrize("text", ["A. B.", " x ", "İ", "ß.", "...", "ﬁ"])
def test_normalising_twice_changes_little(text):
    once = normalise(text)
    assert normalise(once).rstrip(".") == once.rstrip(".")


def test_unknown_name_is_answered_with_a_suggestion():
    with pytest.raises(EvaluationError, match="did you mean 'exact_match'"):
        get_scorer("exactmatch")


def test_catalogue():
    assert all(entry.description for entry in SCORERS.values())
    assert NORMALISATION
