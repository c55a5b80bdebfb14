"""Predictions scored again without a model, in any order; samples for other harnesses."""

from __future__ import annotations

import json
import random

import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation import cell
from mllm_cl.evaluation.cell import evaluate_cell
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.rescoring import distinct_names, find_predictions, read_predictions, rescore
from mllm_cl.evaluation.samples import write_samples
from mllm_cl.training.standalone import Measured


@pytest.fixture
def written(loaded, make_row, monkeypatch, tmp_path):
    """A cell of eight yes-or-no rows on four pictures, answered without a model."""
    rows = []
    for number in range(8):
        row = make_row(f"r{number}", "Is it?", ("yes", "no")[number % 2], (number // 2, 9, 9))
        row["images"] = rows[-1]["images"] if number % 2 else row["images"]
        rows.append({**row, "choices": ["a", "b"], "odd": object()})

    def answers(model, processor, rows, batches, settings, route=None, engine_type=None, prepared=None):
        for batch in batches:
            yield batch, [("Yes.", "nope", "No", "no\u2028")[index % 4] for index in batch]

    monkeypatch.setattr(cell, "generate_batches", answers)

    def write(metric="pope", name="cell"):
        return evaluate_cell(
            None, loaded[1], rows, folder=tmp_path / name, stage="s", task="t", metric=metric,
            settings=GenerationSettings(batch_size=4), key=f"key {metric}",
        )  # fmt: skip

    return write


def test_the_same_score_comes_out(written, tmp_path):
    result = written()
    name, scored = rescore(read_predictions(tmp_path / "cell" / "predictions.jsonl"))
    assert name == "pope"
    assert (scored.value, scored.stderr, scored.clusters) == (result.score, result.stderr, 4)


def test_order_does_not_matter_and_profiles_do(written, tmp_path):
    written()
    path = tmp_path / "cell" / "predictions.jsonl"
    before = {
        profile: rescore(read_predictions(path), profile=profile)[1].value
        for profile in ("strict", "llava", "lmms_eval")
    }
    assert len(set(before.values())) == 3
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    after = {profile: rescore(read_predictions(path), profile=profile)[1].value for profile in before}
    assert after == before
    assert rescore(read_predictions(path), metric="yes_no")[1].value == pytest.approx(100 * 4 / 8)


def test_row_fields_are_kept_where_they_can_be(written, tmp_path):
    written()
    line = read_predictions(tmp_path / "cell" / "predictions.jsonl").lines[0]
    assert line["fields"] == {"choices": ["a", "b"]}


def test_predictions_without_a_score(written, tmp_path):
    result = written(metric=None)
    assert result.score != result.score  # NaN: there is none
    content = json.loads((tmp_path / "cell" / "result.json").read_text())
    assert (content["score"], content["n"]) == (None, 8)
    predictions = read_predictions(tmp_path / "cell" / "predictions.jsonl")
    assert "score" not in predictions.lines[0]
    with pytest.raises(EvaluationError, match="nothing says how it was scored"):
        rescore(predictions)
    assert rescore(predictions, metric="yes_no")[1].value == 50.0
    assert written(metric=None).n == 8  # read from disk


def test_broken_predictions_are_named(written, tmp_path):
    written()
    path = tmp_path / "cell" / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for broken, message in [
        ([*lines, lines[0]], "line 9: the id 'r0' came before"),
        ([*lines, "{"], "line 9: not valid JSON"),
        ([*lines, '{"id": "x"}'], "line 9: lacks prediction, references"),
        ([], "is empty"),
        (['{"id": 1, "prediction": 5, "references": []}'], "line 1: prediction is 5"),
        (['{"id": 1, "prediction": "x", "references": "x"}'], "line 1: references is 'x'"),
        (['{"id": 1, "prediction": "x", "references": [], "fields": 3}'], "line 1: fields is 3"),
        (['{"id": 1, "prediction": "x", "references": ["x", null]}'], "line 1: None in references"),
        (['{"id": 1, "prediction": "x", "references": [4]}'], "line 1: 4 in references"),
        (['{"id": null, "prediction": "x", "references": ["x"]}'], "line 1: id is None"),
        (["[" * 100_000], "line 1: not valid JSON"),
        (['{"id": 1, "prediction": "x", "references": []}'] * 2, "line 2: the id '1' came before"),
    ]:
        path.write_text("\n".join(broken), encoding="utf-8")
        with pytest.raises(EvaluationError, match=message):
            read_predictions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_predictions(path)
    with pytest.raises(EvaluationError, match=r"holds no predictions.jsonl"):
        find_predictions(tmp_path / "nothing")


def test_fields_never_stand_in_for_what_is_compared(tmp_path):
    fields = {"id": "z", "answers": 5, "images": 7, "messages": 1, "prediction": "y", "references": ["y"], "choices": 3}
    line = {"id": "a", "prediction": "x", "references": ["x"], "fields": fields}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    for metric in ("exact_match", "multiple_choice", "macro_f1"):
        assert rescore(read_predictions(path), metric)[1].rows == [1.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ('{"task": 3}', "task is 3"),
        ('{"metric": ["x"]}', r"metric is \['x'\]"),
        ('{"task": "../../other"}', r"the task is '../../other'"),
        ('{"task": "/other"}', "the task is '/other'"),
    ],
)
def test_a_result_beside_that_cannot_be_used_is_named(tmp_path, result, message):
    (tmp_path / "predictions.jsonl").write_text('{"id": "a", "prediction": "x", "references": ["x"]}\n')
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(EvaluationError, match=message):
        read_predictions(tmp_path / "predictions.jsonl")


def test_predictions_of_one_task_by_several_checkpoints_have_names_of_their_own(tmp_path):
    for place in ("first/same", "second/same", "second/other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "predictions.jsonl").write_text('{"id": "a", "prediction": "x", "references": ["x"]}\n')
    several = [read_predictions(path) for path in find_predictions(tmp_path)]
    assert distinct_names(several) == ["first/same/predictions", "other", "second/same/predictions"]
    assert distinct_names(several[:2]) == ["same", "other"]


def test_samples_have_the_fields_of_other_harnesses(written, tmp_path):
    written(name="t")
    [path] = write_samples(tmp_path, [Measured("t", [], "pope", 4, False)])
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(samples) == 8
    assert {"doc_id", "doc", "target", "resps", "filtered_resps", "doc_hash", "pope"} <= set(samples[0])
    assert samples[0]["filtered_resps"] == ["Yes."]
