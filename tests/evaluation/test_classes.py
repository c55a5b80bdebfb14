"""Macro-F1 by hand and against scikit-learn, and the form of answers by SMoLoRA's rules."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mllm_cl.evaluation.scorers import get_scorer
from mllm_cl.evaluation.scorers.classes import macro_f1


def values(prediction: list[str], references: list[list[str]], **fields: Any) -> dict[str, float]:
    return macro_f1(prediction, references, **fields).values()  # type: ignore[return-value]


def test_by_hand() -> None:
    # peace: TP 2, FP 1, FN 0 -> 4/5; anger: TP 0, FN 1 -> 0; happiness: TP 1, FN 1 -> 2/3; an unknown word is only a miss
    said = ["Peace.", "peace", "Peace", "happiness", "cheerful"]
    truth = [["Peace"], ["Peace"], ["Anger"], ["Happiness"], ["Happiness"]]
    found = values(said, truth)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 0 + 2 / 3) / 3)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert get_scorer("macro_f1")(said, truth)["macro_f1"] == found["macro_f1"]  # type: ignore[index]


def test_as_scikit_learn_and_in_draws() -> None:
    rng = random.Random(0)
    names = ["a", "b", "c", "d"]
    truth = [rng.choice(names) for _ in range(200)]
    said = [rng.choice([*names, own, own]) for own in truth]
    tally = macro_f1(said, [[own] for own in truth])
    assert tally.values()["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    draws = tally.statistics[np.random.default_rng(0).integers(0, 200, (3, 200))].sum(axis=1)
    assert tally.measures(draws)["macro_f1"].shape == (3,)
    only_a = tally.statistics[[row for row in range(200) if truth[row] == said[row] == "a"]].sum(axis=0)
    assert tally.measures(only_a)["macro_f1"] == 1.0  # classes outside the draw are left out


def test_letters_stand_for_their_choices() -> None:
    choices = [["Peace", "Anger"], ["Anger", "Peace"], ["Peace", "Anger"]]
    found = values(["A", "B.", "A"], [["A"], ["B"], ["B"]], choices=choices, label=["Peace", "Peace", "Anger"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 * 2 / 5 + 0) / 2)


MIF = [
    ("letter", " b ", [], 1), ("letter", "B.", [], 0), ("letter", "", [], 0), ("letter", "1", [], 0),
    ("short", "red bus", [], 1), ("short", "a red bus", [], 0), ("short", "A Red Bus", ["a red bus"], 1),
    ("short", "", [], 1),
    ("caption", "Two dogs run over grass.", [], 1), ("caption", "Two dogs run over grass", [], 0),
    ("caption", "Dogs run.", ["Two dogs run."], 1), ("caption", "Dogs run.", ["A cat."], 0),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "references", "score"), MIF)
def test_the_form_of_an_answer(form: str, answer: str, references: list[str], score: int) -> None:
    assert get_scorer("mif")(answer, references, answer_form=form) == score


def test_a_row_without_a_form_has_no_answer_in_form() -> None:
    assert get_scorer("mif")("red", ["red"]) == 0.0
