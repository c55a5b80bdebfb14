"""Runs side by side: grouping over seeds, budgets that differ, tests on the same rows."""

from __future__ import annotations

import json

import pytest

from mllm_cl.errors import RunError
from mllm_cl.evaluation.statistics import mean_and_std
from mllm_cl.reporting import compare, comparison_table, read_run, write_comparison
from mllm_cl.reporting.compare import BEHAVIOUR_SHOWN, COSTS_SHOWN
from mllm_cl.reporting.report import drift_table, instruction_table
from mllm_cl.reporting.run import predictions_path


def final(folder):
    return read_run(folder).matrix.derived()["mean_final_accuracy"].value


def test_seeds_are_grouped(fake_run):
    seeds = [fake_run(f"ft-{seed}", seed=seed, keep=0.7) for seed in range(3)]
    other = fake_run("replay", methods=[{"replay": {"size": 10}}])
    found = compare([*seeds, other])
    assert [(row.label, row.seeds) for row in found.rows] == [("finetune", (0, 1, 2)), ("replay", (0,))]
    expected = mean_and_std([final(folder) for folder in seeds])
    assert found.rows[0].values["mean_final_accuracy"] == expected
    table = comparison_table(found)
    assert table[0][:3] == ["method", "seeds", "final accuracy"]
    assert table[1][1] == "0, 1, 2"
    assert table[1][2] == f"{expected.mean:.1f} ± {expected.std:.1f}"
    assert "±" not in table[2][2]
    assert len({len(row) for row in table}) == 1


def test_other_settings_are_other_lines(fake_run):
    slow = fake_run("slow", training={"learning_rate": 1e-4, "num_train_epochs": 1})
    found = compare([fake_run("fast"), slow])
    assert [row.label for row in found.rows] == ["finetune (fast)", "finetune (slow)"]
    differences = {(d.kind, d.name): d.values for d in found.differences}
    assert differences == {("setting", "training.learning_rate"): ("0.002", "0.0001")}


def test_differences_of_budget_stream_and_versions(fake_run):
    first, second = fake_run("a"), fake_run("b", seed=1, general=("pope",), rows=20, methods=[{"replay": {"size": 10}}])
    environment = json.loads((second / "environment.json").read_text())
    environment["stream_fingerprint"] = "beef"
    environment["versions"]["torch"] = "2.12.0"
    (second / "environment.json").write_text(json.dumps(environment))
    ledger = (second / "ledger.jsonl").read_text().replace('"train_rows": 500', '"train_rows": 501')
    (second / "ledger.jsonl").write_text(ledger)
    found = {(d.kind, d.name): d.values for d in compare([first, second]).differences}
    assert found["budget", "train rows"] == ("2000", "2004")
    assert found["stream", "fingerprint"] == ("f00d", "beef")
    assert found["stream", "test rows"] == ("60, 60, 60, 60", "20, 20, 20, 20")
    assert found["stream", "general benchmarks"] == ("pope, science", "pope")
    assert found["setting", "seed"] == ("0", "1")
    assert found["setting", "methods"] == ("finetune", "replay")
    assert found["setting", "methods.replay.size"] == ("not set", "10")
    assert found["version", "torch"] == ("2.13.0", "2.12.0")
    assert ("budget", "steps") not in found
    assert ("setting", "output_dir") not in found


def test_unfinished_runs_are_named_and_stand_alone(fake_run):
    found = compare([fake_run("whole"), fake_run("part", finished=2)])
    assert len(found.rows) == 2
    assert found.rows[1].values["mean_final_accuracy"] is None
    assert "part: 03-charts: not trained." in found.notes
    assert comparison_table(found, ["mean_final_accuracy", "steps"])[2][2:] == ["not measured", "64"]


def test_a_number_that_one_seed_lacks_is_said(fake_run):
    first, second = fake_run("s0"), fake_run("s1", seed=1, drop_fields=("tokens",))
    found = compare([first, second])
    assert found.rows[0].values["tokens"].n == 1
    assert "tokens: mean over 1 of 2 runs; s1 lack it." in found.notes


def test_paired_tests_use_the_same_rows(fake_run):
    good, bad = fake_run("good", keep=0.98), fake_run("bad", keep=0.5)
    found = {test.task: test for test in compare([good, bad]).paired}
    assert set(found) == {"plates", "menus", "charts", "signs"}
    assert found["plates"].difference < -40
    assert found["plates"].low <= found["plates"].difference <= found["plates"].high
    assert found["plates"].p_value < 1e-4
    assert found["signs"].p_value == 1  # the last task is the same in both
    assert compare([good, fake_run("short", rows=20)]).paired == ()


def test_files(fake_run, tmp_path):
    runs = [fake_run(f"ft-{seed}", seed=seed) for seed in range(2)] + [
        fake_run("<b>x</b>", methods=["uir"], name="<b>x</b>")
    ]
    path = write_comparison(runs, tmp_path / "out")
    html, markdown = path.read_text(encoding="utf-8"), path.with_name("compare.md").read_text(encoding="utf-8")
    assert "<b>x</b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<script" not in html
    for text in (html, markdown):
        assert "mean ± standard deviation over seeds" in text
        assert "methods" in text
    assert "| method |" in markdown


def test_runs_with_one_name_are_told_apart(fake_run):
    found = compare([fake_run("a", name="same"), fake_run("b", name="same", seed=1)])
    assert found.labels == ("a", "b")


def test_nothing_to_compare(tmp_path):
    with pytest.raises(RunError, match="no run"):
        compare([])
    with pytest.raises(RunError):
        compare([tmp_path])


def test_what_a_method_cost(fake_run):
    """Ratios are those of the sums; computing that is not equal is said in a sentence."""
    plain, other = fake_run("plain"), fake_run("inquiries", methods=["inquiry_regularization"])
    lines = (other / "ledger.jsonl").read_text()
    lines = lines.replace('"flops": 3', '"inquiry_rows": 250, "flops": 6').replace('passes": 0', 'passes": 32')
    (other / "ledger.jsonl").write_text(lines)
    found = compare([plain, other])
    shown = dict(zip(*comparison_table(found, COSTS_SHOWN)[::2]))
    assert shown["inquiries per row"] == "0.50"
    assert shown["training FLOPs"] == "24 TFLOP"
    assert shown["extra forward passes"] == "128"
    assert shown["stored per task"] == "468.8 KiB"
    assert shown["trainable parameters"] == "118.8 k"
    assert "inquiry_regularization: 2.00 × the training FLOPs of finetune." in found.notes
    budget = {d.name: d.values for d in found.differences if d.kind == "budget"}
    assert budget["training FLOPs"] == ("12 TFLOP", "24 TFLOP")
    assert budget["inquiry rows"] == ("not measured", "1000")
    assert "stored bytes" not in budget


def test_a_method_that_measures_less_is_not_unfinished(fake_run):
    """`joint` fills the last row alone; its ledger says that the run is complete."""
    folder = fake_run("joint", methods=["joint"])
    payload = json.loads((folder / "matrix.json").read_text())
    for row in payload["values"][1:-1]:
        row[:] = [None] * len(row)
    (folder / "matrix.json").write_text(json.dumps(payload))
    run = read_run(folder)
    assert run.complete
    assert run.missing == ()
    found = compare([folder, fake_run("plain")])
    assert found.notes == ()
    assert found.rows[0].values["mean_final_accuracy"] is not None
    assert found.rows[0].values["forgetting"] is None


def test_how_a_run_answers_is_that_of_its_report(fake_run):
    """Format collapse, feature shift and instruction following after the last stage: mean ± deviation over seeds."""
    folders = [fake_run(f"s{seed}", seed=seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        measured = {"feature_shift": 0.1 + 0.2 * seed, "one_word_share": 50.0 + 25 * seed, "mean_words": 3.0 - seed}
        entries = [{"event": "drift", "stage": stage, "n": 8, **measured} for stage in (0, 4)]
        entries[0] |= {"feature_shift": 0.0, "one_word_share": 0.0, "mean_words": 9.0}
        with (folder / "ledger.jsonl").open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        run = read_run(folder)
        for task, answers in (("plates", ("dog", "a dog")), ("pope", ("yes", "no", "maybe")[: 2 + seed])):
            asked = "Which? Answer in one word." if task == "plates" else "Is it? Answer yes or no."
            path = predictions_path(run, run.matrix.stages[-1], task)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"question": asked, "prediction": text}) + "\n" for text in answers))
    reports = [(drift_table(read_run(folder))[-1], instruction_table(read_run(folder))[-1]) for folder in folders]
    assert reports[0] == (["04-signs", "0.1", "50.0", "3"], ["04-signs", "50.0", "100.0"])
    assert reports[1] == (["04-signs", "0.3", "75.0", "2"], ["04-signs", "50.0", "66.7"])
    found = compare([*folders, fake_run("plain", methods=["replay"])])
    values = found.rows[0].values
    assert values["feature_shift"] == mean_and_std([0.1, 0.1 + 0.2])
    assert values["one_word_share"] == mean_and_std([50.0, 75.0])
    assert values["mean_words"] == mean_and_std([3.0, 2.0])
    assert values["form_followed"] == mean_and_std([75.0, (50 + 200 / 3) / 2])
    table = comparison_table(found, BEHAVIOUR_SHOWN)
    assert table[1][2:] == ["62.5 ± 17.7", "2.5 ± 0.707", "0.2 ± 0.141", "66.7 ± 11.8"]
    assert table[2][2:] == ["not measured"] * 4


def test_drift_of_an_earlier_stage_is_not_the_last_one(fake_run):
    folder = fake_run("early")
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"event": "drift", "stage": 3, "one_word_share": 1.0, "mean_words": 1.0, "n": 8}) + "\n")
    assert compare([folder]).rows[0].values["one_word_share"] is None
