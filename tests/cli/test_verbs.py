"""Every verb does what it says, on a stream of two tasks with eight rows each and a model with random weights."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_cl.cli.demo_recipes import METHODS, demo_recipe, recipe_text

ROOT = Path(__file__).resolve().parents[2]
VERBS = ["demo", "run", "evaluate", "matrix", "report", "compare", "consolidate", "data", "methods", "doctor"]
VERBS += ["push", "pull", "export"]
HELPED = [*([verb] for verb in VERBS), *(["data", verb] for verb in ("list", "show", "validate", "prepare"))]

Call = Callable[..., Any]
RunOf = Callable[..., Path]


def ok(outcome: Any) -> Any:
    assert outcome.code == 0, outcome.out + outcome.err + outcome.trace
    return outcome


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# starting up ---------------------------------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from mllm_cl.cli.app import app; app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'rich', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_libraries_are_imported_in_silence() -> None:
    code = "from mllm_cl.cli.quiet import be_quiet; be_quiet(); import peft, bitsandbytes"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout + said.stderr == ""


def test_public_names_are_there() -> None:
    import mllm_cl

    for name in mllm_cl.__all__:
        assert getattr(mllm_cl, name) is not None
        assert name in dir(mllm_cl)
    with pytest.raises(AttributeError, match="no attribute 'Taks'"):
        _ = mllm_cl.Taks


def test_version(call: Call) -> None:
    from importlib import metadata

    assert ok(call("--version")).out == f"mllm-cl {metadata.version('mllm_cl')}\n"


@pytest.mark.parametrize("verb", HELPED, ids=" ".join)
def test_help_has_an_example(call: Call, verb: list[str]) -> None:
    text = ok(call(*verb, "--help")).out
    assert verb == ["data"] or f"Example: mllm-cl {' '.join(verb)}" in text


def test_dashes_are_underscores(call: Call, finished: RunOf, tmp_path: Path) -> None:
    args = ["compare", finished(), finished("replay")]
    ok(call(*args, "--output-path", tmp_path / "one"))
    ok(call(*args, "--output_path", tmp_path / "two"))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["compare.html", "compare.md"]
    assert (tmp_path / "two" / "compare.html").is_file()


# run -----------------------------------------------------------------------------------------------------------------


def test_run_writes_everything_and_prints_the_matrix(call: Call, base_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**base_recipe, "output_dir": str(tmp_path / "run")}))

    outcome = ok(call("run", recipe, "seed=3", "training.max_steps=1"))

    for name in ("recipe.yaml", "ledger.jsonl", "matrix.json", "matrix.csv", "report.html", "report.md"):
        assert (tmp_path / "run" / name).is_file()
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["seed"] == 3
    for text in ("01-colour", "02-same", "Mean final accuracy", "Backward transfer", str(tmp_path / "run/report.html")):
        assert text in outcome.out
    assert "02-same: training: 8 rows" in outcome.err
    for noise in ("Warning", "train_runtime", "{'loss'"):
        assert noise not in outcome.out + outcome.err

    ledger = (tmp_path / "run/ledger.jsonl").read_bytes()
    ok(call("run", recipe, "seed=3", "training.max_steps=1"))
    assert (tmp_path / "run/ledger.jsonl").read_bytes() == ledger


def test_interruption_says_that_the_same_command_continues(
    call: Call, base_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_cl.training import loop

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**base_recipe, "output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(loop.Run, "learn", interrupt)
    outcome = call("run", recipe)
    assert outcome.code == 130
    assert "the same command continues" in outcome.err


def test_unexpected_errors_keep_their_traceback(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_cl.recipe.load_recipe", lambda *_: 1 / 0)
    outcome = call("run", tmp_path / "recipe.yaml")
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.trace


def test_verbose_shows_where_an_error_comes_from(call: Call, tmp_path: Path) -> None:
    assert "Traceback" in call("--verbose", "report", tmp_path).err
    assert "Traceback" not in call("report", tmp_path).err


# evaluate ------------------------------------------------------------------------------------------------------------


def evaluate(call: Call, checkpoint: Path | str, folder: Path, *more: str, tasks: str = "colour,same") -> Any:
    return ok(call("evaluate", checkpoint, "--tasks", tasks, "--output_path", folder, *more))


def test_evaluate_a_run_gives_the_answers_of_the_run(call: Call, finished: RunOf, tmp_path: Path) -> None:
    run = finished()
    outcome = evaluate(call, run, tmp_path)
    assert "colour" in outcome.out
    assert "02-same" in outcome.out
    for task in ("colour", "same"):
        own = run / "evaluation" / "02-same" / task
        assert lines(tmp_path / task / "predictions.jsonl") == lines(own / "predictions.jsonl")
        result = json.loads((tmp_path / task / "result.json").read_text())
        assert result["score"] == json.loads((own / "result.json").read_text())["score"]


def test_evaluate_a_plain_adapter_answers_as_peft_does(
    call: Call, finished: RunOf, fixture_folder: Path, stream_file: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from mllm_cl.evaluation.engine import GenerationSettings, generate
    from mllm_cl.models.load import load_model
    from mllm_cl.streams import read_stream

    adapter = finished("spectral_consolidation") / "stages" / "01-colour" / "adapter"
    evaluate(call, adapter, tmp_path, "--stream", str(stream_file), "--max_new_tokens", "4", "--batch_size", "2")

    model, processor = load_model(str(fixture_folder))
    settings = GenerationSettings(max_new_tokens=4, batch_size=2)
    tasks = read_stream(stream_file)
    untouched = [generate(model, processor, task.test, settings) for task in tasks]
    peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    for task, base in zip(tasks, untouched):
        expected = generate(peft, processor, task.test, settings)
        assert expected != base
        predictions = lines(tmp_path / task.name / "predictions.jsonl")
        assert [line["prediction"] for line in predictions] == expected


def test_evaluate_a_stage_whose_method_routes(call: Call, finished: RunOf, tmp_path: Path) -> None:
    run = finished({"task_adapters": {"samples": 4, "reject": None}})
    evaluate(call, run / "stages" / "02-same", tmp_path)
    for task in ("colour", "same"):
        own = run / "evaluation" / "02-same" / task / "predictions.jsonl"
        assert lines(tmp_path / task / "predictions.jsonl") == lines(own)


def test_evaluate_the_base_by_both_names(call: Call, fixture_folder: Path, stream_file: Path, tmp_path: Path) -> None:
    stream = ("--stream", str(stream_file), "--limit", "2", "--split", "validation")
    evaluate(call, "base", tmp_path / "one", *stream, "--base_model", str(fixture_folder), tasks="same")
    evaluate(call, fixture_folder, tmp_path / "two", *stream, tasks="same")
    answers = [lines(tmp_path / name / "same" / "predictions.jsonl") for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    assert all(line["id"].startswith("same-validation") for line in answers[0])


def test_evaluate_a_stage_that_was_copied_out_of_its_run(
    call: Call, finished: RunOf, stream_file: Path, tmp_path: Path
) -> None:
    import shutil

    stage = Path(shutil.copytree(finished() / "stages" / "01-colour", tmp_path / "copied"))
    evaluate(call, stage, tmp_path / "results", "--stream", str(stream_file))
    assert (tmp_path / "results" / "same" / "result.json").is_file()


@pytest.mark.slow
def test_evaluate_a_general_benchmark(call: Call, finished: RunOf, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    evaluate(call, finished(), tmp_path, "--limit", "6", tasks="quickstart-general")
    assert json.loads((tmp_path / "quickstart-general" / "result.json").read_text())["n"] == 6


# matrix, report, compare ---------------------------------------------------------------------------------------------


def test_matrix_as_table_csv_and_json(call: Call, finished: RunOf) -> None:
    run = finished()
    table = ok(call("matrix", run)).out
    assert "percent ± standard error" in table
    assert re.search(r"01-colour\s+\d+\.\d ± \d+\.\d", table)
    rows = list(csv.reader(io.StringIO(ok(call("matrix", run, "--csv")).out)))
    assert rows[0] == ["stage", "colour", "same"]
    assert rows[1][2] == ""
    content = json.loads(ok(call("matrix", run, "--json")).out)
    assert content["tasks"] == ["colour", "same"]


def test_matrix_of_an_unfinished_run_says_what_is_missing(call: Call, own_run: Path) -> None:
    content = json.loads((own_run / "matrix.json").read_text())
    content["values"][-1] = [None, None]
    content["stderr"][-1] = [None, None]
    (own_run / "matrix.json").write_text(json.dumps(content))
    events = (own_run / "ledger.jsonl").read_text().splitlines()
    (own_run / "ledger.jsonl").write_text("\n".join(line for line in events if "run_complete" not in line) + "\n")
    outcome = ok(call("matrix", own_run))
    assert "over the first 1 of 2 tasks" in outcome.out
    assert "note: 02-same: not measured on colour, same" in outcome.out


def test_report_with_a_baseline(call: Call, own_run: Path, finished: RunOf) -> None:
    (own_run / "report.html").unlink()
    outcome = ok(call("report", own_run, "--baseline", finished("replay")))
    assert str(own_run / "report.html") in outcome.out
    assert "replay" in (own_run / "report.html").read_text()


def test_compare_names_what_is_not_equal(call: Call, finished: RunOf) -> None:
    out = ok(call("compare", finished(), finished(seed=1), finished("replay"))).out
    assert re.search(r"finetune\s+0, 1\s+\d", out)
    assert re.search(r"budget\s+train rows", out)


# data ----------------------------------------------------------------------------------------------------------------


def test_data_list(call: Call) -> None:
    out = ok(call("data", "list")).out
    assert re.search(r"quickstart\s+stream", out)
    assert re.search(r"quickstart-general\s+general benchmark", out)


def test_data_show_by_file_and_by_folder(call: Call, stream_file: Path) -> None:
    out = ok(call("data", "show", stream_file)).out
    assert "tiny: 2 tasks" in out
    assert "yes/no 100%" in out
    assert "50.0 % ('blue')" in out
    assert ok(call("data", "show", stream_file.parent)).out == out


def test_data_validate(call: Call, stream_file: Path) -> None:
    assert "tiny: no errors" in ok(call("data", "validate", stream_file)).out


def test_data_validate_lists_every_problem(call: Call, tmp_path: Path, stream_file: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(stream_file.parent, tmp_path / "stream"))
    rows = json.loads((folder / "same/train.json").read_text())
    rows[1]["image"], rows[4]["conversations"][1]["value"] = "nope.png", ""
    rows[6]["id"] = rows[5]["id"]
    (folder / "same/train.json").write_text(json.dumps(rows))
    outcome = call("data", "validate", folder / "stream.yaml")
    assert outcome.code == 2
    for text in ("row 2", "nope.png", "row 5", "answer is empty", "warning:", "row 7", "to fix:", "same/train.json"):
        assert text in outcome.out
    assert "2 errors" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "quickstart-general"])
def test_data_prepare(call: Call, name: str) -> None:
    pytest.importorskip("skimage")
    assert f"{name}: nothing to download" in ok(call("data", "prepare", name)).out


# methods and doctor --------------------------------------------------------------------------------------------------


def test_methods_lists_the_catalogue(call: Call) -> None:
    from mllm_cl.methods import METHODS as CATALOGUE

    out = ok(call("methods")).out
    for name in CATALOGUE:
        assert re.search(rf"^ {name} ", out, re.MULTILINE)


def test_methods_describes_one_with_its_options(call: Call) -> None:
    out = ok(call("methods", "replay")).out
    assert "experience replay" in out
    assert "needs: past_rows" in out
    assert re.search(r"share\s+float, above 0, below 1\s+0\.25\s+share of replayed rows", out)
    assert "in a recipe: `- replay:" in out


@pytest.mark.parametrize("name", ["finetune", "spectral_consolidation", "inquiry_regularization", "task_adapters"])
def test_methods_describes_each(call: Call, name: str) -> None:
    assert f"- {name}" in ok(call("methods", name)).out


def test_doctor(call: Call) -> None:
    out = ok(call("doctor")).out
    assert re.search(r"transformers\s+ok\s+5", out)
    assert re.search(r"tiny-llava\s+ok", out)
    assert "everything required works" in out


def test_doctor_estimates_a_recipe(
    call: Call, base_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_cl.cli import environment, recipe_check

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(base_recipe | {"name": "x", "output_dir": "x"}), encoding="utf-8")
    monkeypatch.setattr(environment, "check_model", lambda: environment.Check("tiny-llava", "ok", "left out"))
    out = ok(call("doctor", recipe_file)).out
    for part in ("weights", "adapters", "optimizer", "activations", "methods", "evaluation", "peak"):
        assert re.search(rf"{part}\s+[\d.]+ [MG]iB", out), part
    assert "tokens" in out
    monkeypatch.setattr(recipe_check, "free_bytes", lambda: 2**20)
    outcome = call("doctor", recipe_file)
    assert outcome.code == 2
    assert "does not fit" in outcome.err
    assert "gradient_accumulation_steps" in outcome.err
    outcome = call("doctor", recipe_file, "training.deepspeed={zero_optimization: {stage: 3}}")
    assert outcome.code == 2
    assert "zero3 was asked for, and there is one process" in outcome.err


def test_doctor_finds_the_rank_of_auto(
    call: Call, base_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable
) -> None:
    from peft import LoraConfig, get_peft_model

    from mllm_cl.cli import environment
    from mllm_cl.models.parts import lora_targets

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(base_recipe | {"name": "x", "output_dir": "x"}), encoding="utf-8")
    monkeypatch.setattr(environment, "check_model", lambda: environment.Check("tiny-llava", "ok", "left out"))
    budget = "budget={kind: trainable_parameters, value: 50000}"
    out = ok(call("doctor", recipe_file, budget, "model.lora={r: auto}")).out
    model = fresh()[0]
    per_rank = get_peft_model(model, LoraConfig(r=1, target_modules=lora_targets(model))).get_nb_trainable_parameters()[
        0
    ]
    rank = re.search(r"rank\s+(\d+)", out)
    assert rank, out
    assert int(rank[1]) == 50000 // per_rank > 1
    outcome = call("doctor", recipe_file, "budget={kind: trainable_parameters, value: 10}", "model.lora={r: auto}")
    assert outcome.code == 2
    assert "with rank 1 this recipe already trains" in outcome.err


def test_doctor_reports_what_is_broken(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_cl.cli import environment

    monkeypatch.setitem(environment.REQUIRED, "torch", "99.0")
    monkeypatch.setitem(environment.REQUIRED, "not-a-package-at-all", "1.0")
    monkeypatch.setattr(environment, "check_model", lambda: environment.Check("tiny-llava", "ok", "left out"))
    outcome = call("doctor")
    assert outcome.code == 2
    assert "not-a-package-at-all: not installed" in outcome.err
    assert "99.0 or later is required" in outcome.out


# demo ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_those_of_the_demo(name: str) -> None:
    from mllm_cl.recipe import load_recipe
    from mllm_cl.training.capabilities import build_methods

    path = ROOT / "recipes" / "quickstart" / f"{name}.yaml"
    assert path.read_text(encoding="utf-8") == recipe_text(name), (
        "python -m mllm_cl.cli.demo_recipes recipes/quickstart"
    )
    recipe = load_recipe(path)
    assert recipe.sha256 == load_recipe(demo_recipe(name, "elsewhere")).sha256
    assert build_methods(recipe)


def test_demo_compares_its_methods(
    call: Call, base_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verb itself, with the small stream and model in place of the quickstart."""

    def small(name: str, output_dir: str, seed: int = 0) -> dict[str, Any]:
        recipe = demo_recipe(name, output_dir, seed)
        return {**base_recipe, "name": recipe["name"], "output_dir": output_dir, "methods": recipe["methods"]}

    monkeypatch.setattr("mllm_cl.cli.demo_recipes.demo_recipe", small)
    command = ("demo", "--output-dir", tmp_path / "demo", "--methods", "finetune,replay")
    outcome = ok(call(*command))
    assert (tmp_path / "demo" / "compare.html").is_file()
    assert str(tmp_path / "demo" / "compare.html") in outcome.out
    assert re.search(r"^ replay\s+0\s+\d", outcome.out, re.MULTILINE)
    assert "[2/2] replay, 02-same: training: 11 rows" in outcome.err
    ledger = (tmp_path / "demo/replay/ledger.jsonl").read_bytes()
    ok(call(*command))
    assert (tmp_path / "demo/replay/ledger.jsonl").read_bytes() == ledger


def test_a_demo_that_fails_shows_why_and_continues(
    call: Call, base_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"finetune"}

    def small(name: str, output_dir: str, seed: int = 0) -> dict[str, Any]:
        methods = [{"replay": {"size": -1}}] if name in broken else []
        return {**base_recipe, "name": name, "output_dir": output_dir, "methods": methods}

    monkeypatch.setattr("mllm_cl.cli.demo_recipes.demo_recipe", small)
    command = ("demo", "--output-dir", tmp_path / "demo", "--methods", "finetune,joint")
    outcome = call(*command)
    assert outcome.code == 2
    assert "[1/2] finetune: the run ended with exit code 2" in outcome.err
    assert "size" in outcome.err
    assert (tmp_path / "demo/joint/report.html").is_file(), "the other run was brought to its end"
    broken.clear()
    ok(call(*command))


# several processes ---------------------------------------------------------------------------------------------------


TRAIN = ROOT / "recipes" / "train.py"


def launch(tmp_path: Path, *args: str | Path, script: Path = TRAIN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(script), *map(str, args)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes(base_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**base_recipe, "output_dir": str(tmp_path / "run")}))
    done = launch(tmp_path, recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean final accuracy") == 1
    assert done.stderr.count("01-colour: training") == 1
    assert "Warning" not in done.stderr
    assert lines(tmp_path / "run/ledger.jsonl")[0]["processes"] == 2
    assert [line["event"] for line in lines(tmp_path / "run/ledger.jsonl")].count("run_complete") == 1


ONE_SIDED = """
import os, runpy, sys
from mllm_cl.errors import RunError
from mllm_cl.training import loop

def fail(*_):
    raise RunError("the disk of the second process is full.", fix="free some space.")

if os.environ["RANK"] == "1":
    loop.Run._start = fail
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_a_mistake_that_one_process_meets_stops_both(base_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe, script = tmp_path / "recipe.yaml", tmp_path / "one_sided.py"
    recipe.write_text(yaml.safe_dump({**base_recipe, "output_dir": str(tmp_path / "run")}))
    script.write_text(ONE_SIDED)
    failed = launch(tmp_path, TRAIN, recipe, script=script)
    assert failed.returncode != 0
    assert failed.stderr.count("error: the disk of the second process is full.") == 1
    assert "Error: " not in failed.stderr.split("torch/distributed/elastic")[0]
    assert re.search(r"exitcode\s*: 2 ", failed.stderr)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_say_a_mistake_once(tmp_path: Path) -> None:
    failed = launch(tmp_path, tmp_path / "nope.yaml")
    assert failed.returncode != 0
    assert failed.stderr.count("no such recipe file") == 1
    assert re.search(r"exitcode\s*: 2 ", failed.stderr)
