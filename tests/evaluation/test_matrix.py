"""The accuracy matrix: cells, derived numbers, and its two files."""

from __future__ import annotations

import csv
import json

import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.matrix import AccuracyMatrix, stage_name


def filled() -> AccuracyMatrix:
    matrix = AccuracyMatrix(
        ["plates", "menus"],
        ["exact_match", "exact_match"],
        general_names=["pope"],
        run={"seed": 0, "versions": {"x": "1"}},
    )
    matrix.set(1, "plates", 80.0, 3.0, 100)
    matrix.set("02-menus", "plates", 60.0, 4.0, 100)
    matrix.set(2, "menus", 90.0, 2.0, 50)
    return matrix


def test_a_new_matrix_knows_nothing():
    matrix = AccuracyMatrix(["plates", "menus"], ["exact_match"] * 2)
    assert matrix.stages == ["01-plates", "02-menus"]
    assert matrix.values == [[None, None], [None, None]]
    assert matrix.complete_stages() == 0
    assert matrix.missing_stages() == ["01-plates", "02-menus"]
    assert matrix.derived()["mean_final_accuracy"].value is None


def test_cells_and_rows():
    matrix = filled()
    assert matrix.row(1) == {"plates": 80.0, "menus": None}
    assert matrix.row(0) == {"plates": None, "menus": None}
    assert matrix.column("plates") == {"01-plates": 80.0, "02-menus": 60.0}
    assert matrix.n == [100, 50]
    assert matrix.complete_stages() == 2
    assert matrix.missing_stages() == []


def test_stage_zero_comes_first_once_measured():
    matrix = filled()
    matrix.set(0, "plates", 10.0)
    matrix.set_general(0, "pope", 70.0, 1.0, 30)
    matrix.set_general("02-menus", "pope", 66.0, 1.0, 30)
    assert matrix.stages == ["0-base", "01-plates", "02-menus"]
    assert matrix.values[0] == [10.0, None]
    assert matrix.row(1)["plates"] == 80.0
    assert matrix.derived()["general_ability_delta"].value == -4.0
    assert [metric.value for metric in matrix.general_deltas()] == [None, -4.0]
    assert stage_name(11, ["t"] * 11) == "11-t"


def test_derived_numbers_over_all_or_the_first_tasks():
    matrix = filled()
    assert matrix.derived()["backward_transfer"].value == -20.0
    assert matrix.derived_stderr()["backward_transfer"] == pytest.approx(5.0)
    assert matrix.derived(through=1)["mean_final_accuracy"].value == 80.0
    assert matrix.derived_stderr(through=1)["mean_final_accuracy"] == pytest.approx(3.0)
    matrix.single, matrix.joint = [81.0, 92.0], [79.0, 91.0]
    assert matrix.derived()["forward_transfer_to_learning"].value == pytest.approx(-1.5)
    assert matrix.derived()["intransigence_last"].value == pytest.approx(1.0)
    assert matrix.derived(through=1)["intransigence"].value is None  # a joint run saw all tasks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "menu", 1.0), "did you mean 'menus'"),
        ((3, "menus", 1.0), "stage 3"),
        (("03-x", "menus", 1.0), "no stage"),
        ((1, "menus", float("nan")), "finite numbers"),
        ((1, "menus", 1.0, -1.0), "finite numbers"),
        ((1, "plates", 1.0, None, 7), "same test rows"),
    ],
)
def test_wrong_cells_are_refused(arguments, message):
    with pytest.raises(EvaluationError, match=message):
        filled().set(*arguments)


@pytest.mark.parametrize("base", [False, True])
def test_round_trip(tmp_path, base):
    matrix = filled()
    if base:
        matrix.set(0, "menus", 0.0, 0.0, 50)
        matrix.set_general(0, "pope", 70.0, 1.0, 30)
    path = matrix.write(tmp_path)
    assert AccuracyMatrix.read(tmp_path) == matrix
    assert AccuracyMatrix.read(path) == matrix
    before = path.read_bytes()
    AccuracyMatrix.read(tmp_path).write(tmp_path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["matrix.csv", "matrix.json"]


def test_schema_of_the_file(tmp_path):
    payload = json.loads(filled().write(tmp_path).read_text())
    assert payload["schema_version"] == 1
    assert payload["unit"] == "percent"
    assert payload["values"] == [[80.0, None], [60.0, 90.0]]
    assert payload["n"] == [100, 50]
    assert payload["derived"]["mean_final_accuracy"] == 75.0
    assert payload["derived"]["forward_transfer"] is None
    details = payload["derived_details"]
    assert "untouched model" in details["forward_transfer"]["reason"]
    assert details["backward_transfer"]["divisor"] == 1
    assert details["backward_transfer"]["stderr"] == pytest.approx(5.0)
    assert payload["run"] == {"seed": 0, "versions": {"x": "1"}}
    assert payload["general"]["names"] == ["pope"]


def test_csv_leaves_unmeasured_fields_empty(tmp_path):
    filled().write(tmp_path)
    rows = list(csv.reader((tmp_path / "matrix.csv").open()))
    assert rows == [
        ["stage", "plates", "menus", "general/pope"],
        ["01-plates", "80.0", "", ""],
        ["02-menus", "60.0", "90.0", ""],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: "[]", "not an accuracy matrix"),
        (lambda text: '{"model": "x"}', "not an accuracy matrix"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema_version 9"),
        (lambda text: text.replace("80.0", "NaN"), "NaN"),
        (lambda text: text.replace("80.0", '"80"'), "'80'"),
        (lambda text: text.replace('"unit": "percent"', '"unit": "share"'), "unit 'share'"),
        (lambda text: text.replace('"stderr": [', '"odd": ['), "no stderr"),
        (lambda text: text.replace('"01-plates",', ""), "1 stages for 2 tasks"),
        (lambda text: text.replace('"n": [\n    100,', '"n": ['), "1 entries in n"),
        (lambda text: text.replace('"tasks": [', '"tasks": 3, "t": ['), "wrong type"),
    ],
)
def test_foreign_and_broken_files_are_refused(tmp_path, change, message):
    path = filled().write(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(EvaluationError, match=message) as caught:
        AccuracyMatrix.read(tmp_path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(EvaluationError, match=r"matrix\.json: cannot be read"):
        AccuracyMatrix.read(tmp_path)
