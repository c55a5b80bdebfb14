"""The table of methods and its plot, on runs that nobody trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import measured as measured_runs
import methods_table
import study
from measured import Measured, numbers_of
from methods_plot import Point, front, write_pareto
from run_grid import Job, finished, general_at, spread


@pytest.fixture
def measured(tmp_path):
    return Measured(tmp_path / "measured" / "numbers.jsonl")


@pytest.fixture
def made(tmp_path, fake_run, measured):
    """Returns a function that fabricates a finished run of a job, whose numbers are kept."""

    def make(job, **options):
        folder = fake_run(job.folder, seed=job.seed, methods=job.methods, **options)
        (tmp_path / f"{job.folder}.yaml").write_text(json.dumps(job.recipe(tmp_path)))
        measured.add(job, numbers_of(finished(job, tmp_path)))
        return folder

    return make


def cells(lines, method):
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| {method} |"))


def test_means_over_the_runs_that_exist(tmp_path, made, measured):
    jobs = methods_table.jobs_of(["finetune", "replay", "ewc"], ["quickstart"], ["given", "reversed"], [0, 1])
    assert [(job.methods[0], job.order_name, job.seed) for job in jobs[:4]] == [
        ("finetune", "given", 0), ("replay", "given", 0), ("ewc", "given", 0), ("finetune", "reversed", 0),
    ]  # fmt: skip
    chosen = [job for job in jobs if job.methods == ["finetune"] and job.seed == 0]
    for job in chosen:
        made(job, keep=0.3 if job.order_name == "given" else 0.6)
    made(jobs[1], keep=0.95)
    runs = [finished(job, tmp_path) for job in chosen]
    lines = methods_table.table_of(methods_table.of_stream(jobs, "quickstart", measured))
    own = dict(zip([cell.strip() for cell in lines[0].split("|")[1:-1]], cells(lines, "finetune")))
    assert own["final average"] == spread([run["derived"]["mean_final_accuracy"] for run in runs])
    assert own["change of general ability"] == "-6.0 ± 0.0"
    assert own["training TFLOP"] == "12.00 ± 0.00"
    assert own["runs"] == "2 of 4"
    assert cells(lines, "replay")[-1] == "1 of 4"
    assert lines[2].startswith("| replay |")  # the best first
    assert lines[-1] == "Not run yet: ewc."
    assert general_at(runs[0], 0) == 70.0


def test_other_budgets_and_other_options_are_not_read(tmp_path, made, measured):
    settings = {"changed": {"num_train_epochs": 1}, "rows": 48, "test_rows": 24}
    small = methods_table.jobs_of(["finetune"], ["quickstart"], ["given"], [0], **settings)
    usual = methods_table.jobs_of(["finetune"], ["quickstart"], ["given"], [0])
    made(small[0])
    assert finished(small[0], tmp_path) is not None
    assert finished(usual[0], tmp_path) is None
    assert measured.get(small[0])
    assert measured.get(usual[0]) is None
    assert small[0].folder != usual[0].folder
    assert small[0].recipe(tmp_path)["stream"]["limit"] == {"test": 24, "validation": 80, "train": 48}
    changed = json.loads((tmp_path / f"{small[0].folder}.yaml").read_text())
    changed["training"]["learning_rate"] = 1.0
    (tmp_path / f"{small[0].folder}.yaml").write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="another recipe"):
        finished(small[0], tmp_path)


def test_what_another_machine_has_measured_is_not_run_again(tmp_path, made, measured, monkeypatch):
    jobs = methods_table.jobs_of(["finetune", "replay"], ["quickstart"], ["given"], [0])
    made(jobs[0])
    elsewhere = Measured(measured.path)
    assert elsewhere.get(jobs[0]) == measured.get(jobs[0])
    lines = methods_table.table_of(methods_table.of_stream(jobs, "quickstart", elsewhere))
    assert lines == methods_table.table_of(methods_table.of_stream(jobs, "quickstart", measured))
    asked: list[str] = []
    monkeypatch.setattr(measured_runs, "run", lambda job, output: asked.extend(job.methods))
    (failure,) = elsewhere.run_missing(jobs, tmp_path / "empty")
    assert asked == ["replay"]
    assert "without being complete" in failure


def test_groups_of_runs_keep_their_mean_and_deviation(tmp_path):
    jobs = [Job("finetune", ["finetune"], seed=seed) for seed in range(4)]
    recipe = {key: value for key, value in json.loads(jobs[0].identity).items() if key != "seed"}
    for seeds, sd in (([0, 1], 4.0), ([0, 1, 2], 1.5)):
        line = {
            "recipe": recipe,
            "seeds": seeds,
            "mean": {"mean_final_accuracy": 50.0},
            "sd": {"mean_final_accuracy": sd},
        }
        path = tmp_path / f"{len(seeds)}.jsonl"
        path.write_text(json.dumps(line) + "\n")
        measured = Measured(path)
        assert measured.get(jobs[len(seeds)]) is None
        runs = [measured.get(job) or {} for job in jobs[: len(seeds)]]
        assert spread([run["mean_final_accuracy"] for run in runs], 6) == f"50.000000 ± {sd:.6f}"
    measured.add(jobs[3], {"mean_final_accuracy": 60.0})
    (row,) = [line for line in study.results(jobs, Measured(path)) if "finetune" in line]
    assert row.startswith("| finetune | 52.5 ± 5.1 | – |")  # three of 50 ± 1.5, and 60
    assert row.endswith("| 4 |")


def test_a_job_is_known_by_its_recipe_and_not_by_its_folders(tmp_path):
    changes = {"model": {"name_or_path": "{output}/captioner"}}
    job = Job("finetune", ["finetune"], changes=changes)
    assert job.recipe(tmp_path)["model"] == {"name_or_path": (tmp_path / "captioner").as_posix()}
    assert str(tmp_path) not in job.identity
    assert Job("another label", ["finetune"], changes=changes).identity == job.identity
    assert Job("finetune", ["finetune"], changes=changes, seed=1).identity != job.identity


def test_the_page_keeps_what_a_person_wrote(made, measured):
    jobs = methods_table.jobs_of(["finetune"], ["quickstart", "study-letters"], ["given"], [0], {"num_train_epochs": 3})
    made(jobs[0])
    first = methods_table.page(jobs, measured)
    assert methods_table.reading_of(first) == ""
    assert "`num_train_epochs: 3`" in first
    assert "at most 256 train rows and at most 80 test rows per task" in first
    assert first.rstrip().endswith("*Not run yet.*")  # the second stream
    second = methods_table.page(jobs, measured, "Replay wins; EWC does not.")
    assert methods_table.reading_of(second) == "Replay wins; EWC does not."
    assert methods_table.page(jobs, measured, methods_table.reading_of(second)) == second


def test_running_a_part_leaves_the_rest_on_the_page(tmp_path, made, measured, monkeypatch):
    replay, *_ = methods_table.jobs_of(["replay"], ["study-letters"], ["reversed"], [2])
    made(replay)
    page = tmp_path / "page.md"
    monkeypatch.setattr(methods_table, "PAGE", page)
    monkeypatch.setattr(methods_table, "FIGURE", tmp_path / "plot.png")
    asked = ["--methods", "finetune", "--streams", "quickstart", "--orders", "given", "--seeds", "0", "--report-only"]
    monkeypatch.setattr(sys, "argv", ["methods_table.py", *asked, "--measured", str(measured.path)])
    methods_table.main()
    assert cells(page.read_text(encoding="utf-8").splitlines(), "replay")[-1] == "1 of 6"


def test_a_method_that_measures_less_has_a_dash_and_no_place_in_the_plot(tmp_path, made, measured):
    jobs = methods_table.jobs_of(["single"], ["quickstart"], ["given"], [0])
    folder = made(jobs[0])
    payload = json.loads((folder / "matrix.json").read_text())
    payload["derived"]["mean_final_accuracy"] = None
    (folder / "matrix.json").write_text(json.dumps(payload))
    measured.add(jobs[0], numbers_of(finished(jobs[0], tmp_path)))
    found = methods_table.of_stream(jobs, "quickstart", measured)
    assert cells(methods_table.table_of(found), "single")[1] == "–"
    assert methods_table.points_of(found) == []


def test_the_front_holds_what_no_other_method_beats(tmp_path):
    points = [
        Point("best", 90.0, -1.0, 100.0),
        Point("small", 60.0, -2.0, 10.0),
        Point("worse", 80.0, -1.0, 100.0),
        Point("twin", 90.0, -1.0, 100.0),
        Point("kind", 10.0, 0.0, 500.0),
    ]
    assert front(points) == {"best", "small", "twin", "kind"}
    figures = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in figures:
        write_pareto({"quickstart": points, "nothing": []}, path)
    assert figures[0].read_bytes() == figures[1].read_bytes()
    assert figures[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_method_of_the_catalogue_has_a_recipe_that_is_accepted(tmp_path):
    from mllm_cl.recipe import load_recipe
    from mllm_cl.training.capabilities import build_methods

    jobs = methods_table.jobs_of(list(methods_table.METHODS), ["quickstart"], ["reversed"], [0], rows=8)
    for job in jobs:
        assert build_methods(load_recipe(job.recipe(tmp_path)))
    assert len({job.folder for job in jobs}) == len(jobs)


def test_every_chapter_of_the_study_has_a_place_in_its_page():
    text = study.PAGE.read_text(encoding="utf-8")
    assert set(study.RUN) == set(study.chapters([0, 1, 2]))
    for name in study.CHAPTERS:
        assert f"<!-- chosen -->{name}" in study.put(text, name, [f"<!-- chosen -->{name}"])
    with pytest.raises(SystemExit, match="no place marked <!-- study:rates -->"):
        study.put(text, "rates", [])
