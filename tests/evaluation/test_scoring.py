"""Sets of answers: soft scores, scores of whole sets, their standard errors, clusters of rows on one image."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.resampling import (
    cluster_of,
    clustered_standard_error,
    paired_tally_bootstrap,
    tally_standard_errors,
)
from mllm_cl.evaluation.scorers import SCORERS, get_scorer
from mllm_cl.evaluation.scoring import score_answers
from mllm_cl.evaluation.statistics import standard_error


def row(row_id, answers, image=None, **fields):
    return {"id": row_id, "messages": [], "images": [] if image is None else [image], "answers": answers, **fields}


def test_one_row_per_cluster_is_the_plain_standard_error():
    scores = np.random.default_rng(0).random(50)
    plain, clustered = standard_error(scores), clustered_standard_error(scores, [str(i) for i in range(50)])
    assert clustered.mean == plain.mean
    assert clustered.stderr == pytest.approx(plain.stderr)


def test_equal_rows_of_a_cluster_count_once():
    scores = [1.0, 0.0, 1.0, 1.0]
    doubled = clustered_standard_error(np.repeat(scores, 2), [name for name in "abcd" for _ in range(2)])
    assert doubled.stderr == pytest.approx(standard_error(scores).stderr)
    assert clustered_standard_error([1.0, 0.0], ["a", "a"]).stderr is None


def test_rows_cluster_by_image():
    assert cluster_of(row("1", ["a"], "x.png")) == cluster_of(row("2", ["b"], "x.png")) != cluster_of(row("3", ["b"]))
    embedded = {"bytes": b"x", "path": None}
    assert cluster_of(row("1", ["a"], embedded)) == cluster_of(row("2", ["a"], dict(embedded)))
    crops = [{"path": "x.png", "crop": (0, 0, side, side)} for side in (4, 5)]
    assert cluster_of(row("1", ["a"], crops[0])) != cluster_of(row("1", ["a"], crops[1]))


def test_a_mean_score():
    rows = [row(str(i), ["yes"], f"{i // 2}.png") for i in range(4)]
    scored = score_answers("exact_match", rows, ["yes", "Yes.", "no", "no"])
    assert (scored.value, scored.clusters, scored.rows) == (50.0, 2, [1.0, 1.0, 0.0, 0.0])
    assert scored.stderr == pytest.approx(50.0)  # two images, not four rows
    assert scored.identity == "exact_match/strict/2"


def test_row_fields_reach_the_scorer():
    rows = [row("1", ["B"], choices={"A": "a cat", "B": "a dog"})]
    assert score_answers("multiple_choice", rows, ["a dog"]).value == 100.0
    assert score_answers("scienceqa:llava", rows, ["a dog"]).value == 0.0


def test_a_row_without_references_is_refused():
    with pytest.raises(EvaluationError, match="row 1: has no accepted answers"):
        score_answers("exact_match", [row("1", [])], ["x"])


def test_pope_is_f1_of_the_set():
    rows = [row(str(i), [label]) for i, label in enumerate(["yes", "no", "no", "yes", "yes", "no"])]
    scored = score_answers("pope:llava", rows, ["Yes", "No", "Yes", "No", "Yes", "Yes"])
    assert scored.value == pytest.approx(100 * 0.5714285714)
    assert scored.metrics["accuracy"]["value"] == 0.5
    assert list(scored.rows) == [1, 1, 0, 0, 1, 0]
    assert scored.stderr is not None
    assert scored.profile == "llava"


def test_mme_is_points():
    rows = [row(str(i), [("Yes", "No")[i % 2]], question_id=f"i{i // 2}", category="color") for i in range(4)]
    answers = ["Yes", "No", "Yes", "Yes"]
    points = score_answers("mme:lmms_eval", rows, answers)
    assert (points.unit, points.value) == ("points", (200 + 50) / 2)
    share = score_answers("mme", rows, answers)
    assert (share.unit, share.value) == ("percent", 100 * 125 / 200)
    assert share.metrics["perception"]["value"] == points.value


def test_mmbench_needs_every_rotation():
    options = ["cat", "dog"]
    rows = [
        row(str(i), ["BA"[i % 2]], choices=options[i % 2 :] + options[: i % 2], index=i % 2 * 1_000_000 + i // 2)
        for i in range(4)
    ]
    scored = score_answers("mmbench", rows, ["B", "A", "B", "B"])
    assert scored.value == 50.0
    assert scored.metrics["vanilla"]["value"] == 0.75


@pytest.mark.parametrize("index", [["7", "1000007"], [7.0, 1000007.0], ["7.0", 1000007]])
def test_mmbench_numbers_may_be_texts_or_have_a_decimal_point(index):
    assert get_scorer("mmbench_circular")(["A", "C"], ["A", "B"], choices=["x", "y", "z"], index=index) == 0.0


def test_mmbench_questions_may_have_any_mark():
    fields = {"choices": ["x", "y"], "index": [[1], [1], {}]}
    assert get_scorer("mmbench_circular")(["A", "C", "A"], ["A", "B", "A"], **fields) == 0.5


def test_the_error_of_a_set_is_that_of_its_mean_where_it_is_one():
    rng = np.random.default_rng(1)
    answers = [("yes", "no")[int(rng.random() < 0.4)] for _ in range(400)]
    rows = [row(str(i), ["yes"]) for i in range(400)]
    tally = SCORERS["pope_strict"].scorer.tally(answers, [["yes"]] * 400)
    errors = tally_standard_errors(tally, [str(i) for i in range(400)])
    share = answers.count("yes") / 400
    assert errors["accuracy"] == pytest.approx(math.sqrt(share * (1 - share) / 400), rel=0.1)
    assert score_answers("yes_no", rows, answers).stderr == pytest.approx(100 * errors["accuracy"], rel=0.1)


def test_captions_have_an_error_and_a_score_per_row():
    texts = ["a cat on a mat", "two dogs run", "a red bus", "a man rides"]
    rows = [row(str(i), [text, text + " now"]) for i, text in enumerate(texts)]
    perfect = score_answers("captions", rows, texts)
    worse = score_answers("captions", rows, [*texts[:3], "blue"])
    assert perfect.value > worse.value > 0
    assert worse.rows[3] == 0.0
    assert perfect.value == pytest.approx(100 * sum(perfect.rows) / 4)
    assert 0 < worse.stderr < worse.value
    assert worse.metrics["Bleu_4"]["stderr"] > 0


def test_the_mean_of_seven_needs_meteor(monkeypatch):
    monkeypatch.setattr("mllm_cl.evaluation.scorers.meteor.meteor_available", lambda: False)
    rows = [row("1", ["a cat"]), row("2", ["a dog"])]
    with pytest.raises(EvaluationError, match=r"ucit_caption: METEOR, average_percent cannot be computed here"):
        score_answers("ucit_caption", rows, ["a cat", "a dog"])


def test_a_metric_refuses_rows_that_lack_what_it_reads():
    rows = [row("1", ["red"], answer_form="short"), row("2", ["red"])]
    with pytest.raises(EvaluationError, match=r"(?s)row 2: metric mif reads `answer_form`, which is None.*caption"):
        score_answers("mif", rows, ["red", "red"])
    assert score_answers("mif", rows[:1], ["a long and wrong answer"]).value == 0


def test_paired_bootstrap_of_a_set_score():
    rng = np.random.default_rng(2)
    labels = ["yes" if rng.random() < 0.5 else "no" for _ in range(300)]
    wrong = {"yes": "no", "no": "yes"}
    weak = [wrong[label] if rng.random() < 0.4 else label for label in labels]
    strong = [label if rng.random() < 0.7 else given for label, given in zip(labels, weak)]
    tallies = [
        SCORERS["pope_strict"].scorer.tally(answers, [[label] for label in labels]) for answers in (weak, strong)
    ]
    ids = [str(i) for i in range(300)]
    found = paired_tally_bootstrap(*tallies, "f1", ids)
    assert found.difference > 0
    assert found.low > 0
    assert found.p_value <= 0.01
    same = paired_tally_bootstrap(tallies[0], tallies[0], "f1", ids)
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_order_of_rows_does_not_matter():
    rows = [row(str(i), ["yes" if i % 3 else "no"]) for i in range(20)]
    answers = ["yes" if i % 2 else "no" for i in range(20)]
    order = np.random.default_rng(3).permutation(20)
    for metric in ("exact_match", "pope", "captions"):
        first = score_answers(metric, rows, answers)
        second = score_answers(metric, [rows[i] for i in order], [answers[i] for i in order])
        assert first.value == pytest.approx(second.value)
