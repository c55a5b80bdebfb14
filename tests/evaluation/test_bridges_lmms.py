"""The bridge to lmms-eval, with a stand-in that writes files in the layout of lmms-eval 0.7.3 (read off a real run)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_cl import __version__
from mllm_cl.cli.evaluate_lmms import split_tasks
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.bridges import lmms_environment
from mllm_cl.evaluation.bridges.lmms_environment import VARIABLE, LmmsEnvironment, find_lmms_eval
from mllm_cl.evaluation.bridges.lmms_run import LmmsOptions, run_lmms_eval
from mllm_cl.evaluation.rescoring import find_predictions, read_predictions

VERSIONS = {"lmms-eval": "0.7.3", "mllm_cl": __version__, "torch": "2", "transformers": "5", "peft": "0.21"}
STAND_IN = """#!PYTHON
import json, pathlib, sys
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
out = pathlib.Path(flags["--output_path"]) / "model"
given = dict(part.split("=") for part in flags["--model_args"].split(","))
print("measuring", given["run"])
pathlib.Path(given["provenance"]).write_text(json.dumps({"checkpoint": "base", "weights": "abc"}))
MIDDLE
out.mkdir(parents=True)
results = {"results": {"mme": {"alias": "mme", "points,none": 1510.5, "points_stderr,none": "N/A", " ": " "},
                       "pope": {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 0.75}},
           "versions": {"mme": 0.0, "pope": 1.0},
           "n-samples": {name: {"original": 9, "effective": 2} for name in ("mme", "pope")}}
(out / "20260101_010101_results.json").write_text(json.dumps(results))
for task, metric in (("mme", "points"), ("pope", "acc")):
    lines = [{"doc_id": n, "target": "yes", "filtered_resps": ["no\\u2028"], "input": "Is it?", metric: n} for n in ROWS]
    with (out / f"20260101_010101_samples_{task}.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\\n")
"""

StandIn = Callable[..., LmmsEnvironment]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    def make(middle: str = "", rows: str = "(0, 1)") -> LmmsEnvironment:
        path = tmp_path / "python"
        path.write_text(STAND_IN.replace("PYTHON", sys.executable).replace("MIDDLE", middle).replace("ROWS", rows))
        path.chmod(0o755)
        return LmmsEnvironment(path, VERSIONS)

    return make


def run(environment: LmmsEnvironment, output: Path, *tasks: str):
    return run_lmms_eval(environment, "base", tasks or ("mme", "pope"), output, LmmsOptions(), stage="base")


def test_results_are_copied_into_our_schema(stand_in: StandIn, tmp_path: Path) -> None:
    outcomes = run(stand_in(), tmp_path / "out")
    assert [outcome.result.task for outcome in outcomes] == ["lmms:mme", "lmms:pope"]
    content = json.loads((tmp_path / "out" / "lmms-pope" / "result.json").read_text())
    assert (content["score"], content["stderr"], content["n"]) == (0.5, 0.25, 2)
    assert content["metrics"]["f1@strict"] == {"value": 0.75, "stderr": None}
    assert content["scorer"] == "lmms-eval/0.7.3/pope/1.0"
    assert content["provenance"]["versions"] == VERSIONS
    points = json.loads((tmp_path / "out" / "lmms-mme" / "result.json").read_text())
    assert (points["score"], points["stderr"], points["unit"]) == (1510.5, None, "as lmms-eval gives it")
    assert points["key"] != content["key"]
    lines = (tmp_path / "out" / "lmms-pope" / "predictions.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["score"] for line in lines] == [0.0, 1.0]
    assert json.loads(lines[0])["prediction"] == "no\u2028"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lmms-mme", "lmms-pope"]


@pytest.mark.parametrize(
    ("middle", "rows", "tasks", "message"),
    [
        ("raise SystemError('out of luck')", "(0, 1)", (), "out of luck"),
        ("raise SystemExit(0)", "(0, 1)", (), "wrote 0 result files"),
        ("", "(0,)", (), "mme has 1 answers"),
        ("", "(0, 1)", ("gqa",), "no result for gqa"),
    ],
)
def test_what_is_not_complete_is_an_error_and_leaves_nothing(
    stand_in: StandIn, tmp_path: Path, middle: str, rows: str, tasks: tuple[str, ...], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        run(stand_in(middle, rows), tmp_path / "out", *tasks)
    assert "measuring base" in str(caught.value)  # its last lines
    assert not list((tmp_path / "out").iterdir())


def test_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EvaluationError, match="no environment") as caught:
        find_lmms_eval()
    assert str(tmp_path / "mllm_cl" / "lmms-eval") in str(caught.value)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    with pytest.raises(EvaluationError, match="does not run"):
        find_lmms_eval()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"lmms-eval": None}, "lmms-eval not installed"),
        ({"lmms-eval": "0.6.1"}, "has lmms-eval 0.6.1"),
        ({"mllm_cl": "0.0.1"}, "has mllm_cl 0.0.1"),
        ({}, None),
    ],
)
def test_an_environment_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: dict[str, str | None], message: str | None
) -> None:
    answer = {name: value for name, value in {**VERSIONS, **versions}.items() if value is not None}
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nprint('''{json.dumps(answer)}''')\n")
    path.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(path))
    if message is None:
        assert lmms_environment.find_lmms_eval().versions == VERSIONS
        return
    with pytest.raises(EvaluationError, match=message):
        find_lmms_eval()


def test_names_of_tasks() -> None:
    assert split_tasks("gqa,lmms:mme,pope, own:compass") == (["gqa", "compass"], ["mme", "pope"])
    assert split_tasks("compass,coin-count") == (["compass", "coin-count"], [])


@pytest.mark.parametrize(
    ("target", "texts"), [("'yes'", ["yes"]), ("7", ["7"]), ("['a', 'b']", ["a", "b"]), ("[0.5, 1]", ["0.5", "1"])]
)
def test_targets_become_texts(stand_in: StandIn, tmp_path: Path, target: str, texts: list[str]) -> None:
    environment = stand_in()
    script = environment.python.read_text().replace('"target": "yes"', f'"target": {target}')
    environment.python.write_text(script)
    run(environment, tmp_path / "out")
    [path] = [path for path in find_predictions(tmp_path / "out") if "pope" in str(path.relative_to(tmp_path))]
    assert read_predictions(path).lines[0]["references"] == texts
