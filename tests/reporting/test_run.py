"""Reading run folders: whole, partial, damaged, and folders that are none."""

from __future__ import annotations

import json

import pytest

from mllm_cl.errors import EvaluationError, RunError
from mllm_cl.reporting import read_run, write_report
from mllm_cl.reporting.answers import find_changes


def test_a_finished_run(fake_run):
    run = read_run(fake_run("llava-c", methods=[{"replay": {"size": 10}}, "uir"], seed=3))
    assert run.complete
    assert run.missing == ()
    assert (run.name, run.method, run.seed, run.model, run.stream) == (
        "llava-c",
        "replay + uir",
        3,
        "tiny-llava",
        "quickstart",
    )
    assert run.stream_fingerprint == "f00d"
    assert [stage.name for stage in run.stages] == ["01-plates", "02-menus", "03-charts", "04-signs"]
    assert run.total("steps") == 128
    assert run.largest("peak_memory_mib") == 812.5
    assert run.final("stored_bytes") == 4 * 480_000
    assert run.stages[1].evaluation_seconds == 5.0
    assert run.stages[1].inquiry_rows is None
    assert run.total("inquiry_rows") is None


def test_a_partial_run_says_what_is_missing(fake_run):
    folder = fake_run(finished=2)
    run = read_run(folder)
    assert not run.complete
    assert run.missing == ("03-charts: not trained.", "04-signs: not trained.")
    assert run.total("steps") == 64
    event = {"event": "stage_trained", "stage": "03-charts", "task": "charts", "seconds": 5}
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps(event) + "\n")
    run = read_run(folder)
    assert run.missing[0] == "03-charts: not measured on plates, menus, charts."
    assert run.total("steps") is None  # the third stage did not say
    assert run.total("seconds") == pytest.approx(62.5 + 63.5 + 5)


def test_before_the_first_evaluation(fake_run):
    folder = fake_run(finished=0, base=False)
    (folder / "matrix.json").unlink()
    run = read_run(folder)
    assert run.matrix is None
    assert [stage.task for stage in run.stages] == ["plates", "menus", "charts", "signs"]
    (folder / "ledger.jsonl").unlink()
    (folder / "environment.json").unlink()
    run = read_run(folder)
    assert run.stages == ()
    assert "no task is known yet" in run.missing[0]
    assert run.seed == 0


def test_a_killed_writer_costs_its_last_line_only(fake_run):
    folder = fake_run(finished=1)
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"event": "stage_tr')
    (folder / "environment.json").write_text("{")
    run = read_run(folder)
    assert len(run.problems) == 2
    assert "environment.json" in run.problems[0]
    assert "ledger.jsonl, line" in run.problems[1]
    assert run.stages[0].trained


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no recipe.yaml"), ("", "holds no recipe"), ("- a\n", "holds no recipe"), ("a: [", "cannot be read")],
)
def test_folders_that_are_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_a_cut_off_matrix_is_an_error(fake_run):
    folder = fake_run()
    path = folder / "matrix.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(EvaluationError, match="not valid JSON"):
        read_run(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["tasks", 0], 3.5),
        (["stages", 1], None),
        (["metric", 0], {}),
        (["stderr", 1, 0], -1),
        (["values", 1, 0], 10**400),
        (["values", 1, 0], "50"),
    ],
)
def test_a_matrix_with_something_else_in_a_cell_is_an_error(fake_run, path, value):
    folder = fake_run()
    content = json.loads((folder / "matrix.json").read_text())
    *outer, last = path
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    (folder / "matrix.json").write_text(json.dumps(content))
    with pytest.raises(EvaluationError):
        read_run(folder)


@pytest.mark.parametrize("value", [None, True, "x", [1], {}, -1, 10**400])
@pytest.mark.parametrize("field", ["stage", "task", "seconds", "feature_shift", "one_word_share", "mean_words"])
def test_a_ledger_with_something_else_in_a_field_still_makes_a_report(fake_run, field, value):
    folder = fake_run()
    drift = {"event": "drift", "stage": 1, "feature_shift": 0.1, "one_word_share": 5.0, "mean_words": 2.0}
    cell = {"event": "cell", "stage": 1, "task": "plates", "seconds": 1.0}
    with (folder / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(entry | {field: value}) + "\n" for entry in (drift, cell))
    write_report(folder)
    assert (folder / "report.html").exists()


def test_a_recipe_with_a_number_for_a_section_is_an_error(fake_run):
    folder = fake_run()
    (folder / "recipe.yaml").write_text("name: a\ntraining: 5\n")
    with pytest.raises(RunError, match="holds no recipe"):
        read_run(folder)


def test_lost_answers(fake_run):
    folder = fake_run(tasks=("plates", "menus", "charts"), rows=4)
    states = {"01-plates": [1, 1, 0, 1], "02-menus": [1, 0, 1, 1], "03-charts": [0, 0, 0, 1]}
    for stage, scores in states.items():
        lines = [
            {
                "id": str(i),
                "prediction": f"{stage} {i}",
                "score": s,
                "references": ["r", "q"],
                "question": "?",
                "images": [],
            }
            for i, s in enumerate(scores)
        ]
        path = folder / "evaluation" / stage / "plates" / "predictions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))  # order on disk does not matter
    changes, examples = find_changes(read_run(folder))
    plates = changes[0]
    assert (plates.rows, plates.right_before, plates.lost, plates.gained) == (4, 3, 2, 0)
    found = {e.id: (e.right_stage, e.before, e.wrong_stage, e.after) for e in examples if e.task == "plates"}
    assert found == {
        "0": ("02-menus", "02-menus 0", "03-charts", "03-charts 0"),
        "1": ("01-plates", "01-plates 1", "02-menus", "02-menus 1"),
        "2": ("02-menus", "02-menus 2", "03-charts", "03-charts 2"),  # learnt late, lost again
    }
    assert [e.references for e in examples if e.task == "plates"] == ["r / q"] * 3
    assert all(change.task != "charts" for change in changes)  # learnt last, nothing can be lost yet


def test_without_predictions_nothing_is_claimed(fake_run):
    assert find_changes(read_run(fake_run(finished=1, base=False))) == ([], [])
