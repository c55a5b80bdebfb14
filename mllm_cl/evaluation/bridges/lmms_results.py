"""What lmms-eval 0.7 wrote -> `predictions.jsonl` and `result.json` of our schema.

It writes `MODEL/TIME_results.json` (results, versions, n-samples, config, ...) and `MODEL/TIME_samples_TASK.jsonl`. Metrics are
named `acc,none`, with `acc_stderr,none` beside it. Values are kept as lmms-eval gives them, without a factor: some are
shares, others points, and the file does not say which; `unit` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.cell import CellResult
from mllm_cl.files import write_json, write_text
from mllm_cl.parse import parse_json

PROFILE = "lmms_eval"
UNIT = "as lmms-eval gives it"


@dataclass(frozen=True)
class Outcome:
    """A task of lmms-eval in our words: the result, a line per answered row, and where both come from."""

    result: CellResult
    lines: Sequence[Mapping[str, Any]]
    provenance: Mapping[str, Any]


def read_outcomes(
    folder: Path, tasks: Sequence[str], versions: Mapping[str, str], *, stage: str, seconds: float
) -> list[Outcome]:
    """Returns an outcome for every task that was asked for, and for the members of a group.

    Args:
        folder: holds `out`, what lmms-eval wrote, and `provenance.json`, what our model wrote.
        versions: of the packages in lmms-eval's environment.
        seconds: of the whole run.

    Raises:
        EvaluationError: a file, a task, a score or a row is missing.
    """
    files = sorted((folder / "out").rglob("*_results.json"))
    if len(files) != 1:
        raise EvaluationError(f"lmms-eval wrote {len(files)} result files.", expected="one")
    content, model = _json(files[0]), _json(folder / "provenance.json")
    results = content.get("results") or {}
    missing = [task for task in tasks if task not in results]
    if missing:
        raise EvaluationError(f"lmms-eval has no result for {', '.join(missing)}.")
    time_stamp = files[0].name.removesuffix("_results.json")
    outcomes = []
    for task, values in results.items():
        metrics = _metrics(values)
        if not metrics:
            if task in tasks and not (content.get("group_subtasks") or {}).get(task):
                raise EvaluationError(f"lmms-eval has no score for {task}.", fix="it may need a judge or a server.")
            continue
        samples = files[0].with_name(f"{time_stamp}_samples_{task}.jsonl")
        primary = next(iter(metrics))
        lines = _lines(samples, task, primary) if task in (content.get("n-samples") or {}) else []
        n = _row_count(content, task)
        if n != len(lines) and task in (content.get("n-samples") or {}):
            raise EvaluationError(f"lmms-eval: {task} has {len(lines)} answers.", expected=f"{n}")
        version = (content.get("versions") or {}).get(task)
        provenance = {
            "harness": "lmms-eval",
            "versions": dict(versions),
            "task_version": version,
            "task_config": (content.get("configs") or {}).get(task),
            "task_hash": (content.get("task_hashes") or {}).get(task),
            "n_shot": (content.get("n-shot") or {}).get(task),
            "higher_is_better": (content.get("higher_is_better") or {}).get(task),
            "date": content.get("date"),
            "settings": {
                key: (content.get("config") or {}).get(key) for key in ("batch_size", "limit", "offset", "gen_kwargs")
            },
            "model": model,
        }
        kept = {key: value for key, value in provenance.items() if key != "date"}
        result = CellResult(
            stage=stage,
            task=f"lmms:{task}",
            metric=f"lmms:{task}:{primary}",
            score=metrics[primary]["value"] or 0.0,
            stderr=metrics[primary]["stderr"],
            n=n,
            seconds=seconds,
            key=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
            unit=UNIT,
            profile=PROFILE,
            scorer=f"lmms-eval/{versions['lmms-eval']}/{task}/{version}",
            metrics=metrics,
        )
        outcomes.append(Outcome(result, lines, provenance))
    return outcomes


def write_outcomes(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes `output/lmms-TASK/predictions.jsonl` and `result.json`, each in one step."""
    for outcome in outcomes:
        place = output / outcome.result.task.replace(":", "-")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in outcome.lines)
        write_text(place / "predictions.jsonl", text)
        write_json(place / "result.json", asdict(outcome.result) | {"provenance": dict(outcome.provenance)})


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"lmms-eval: {path.name} is missing or unreadable ({error}).") from error


def _number(value: object) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None  # type: ignore[arg-type]


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns metric -> value and standard error; a filter other than `none` stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, rule = key.partition(",")
        number = _number(value)
        if not comma or number is None or "_stderr" in name:  # `samples`, aliases, and errors beside their metric
            continue
        shown = name if rule == "none" else f"{name}@{rule}"
        found[shown] = {"value": number, "stderr": _number(values.get(f"{name}_stderr,{rule}"))}
    return found


def _row_count(content: Mapping[str, Any], task: str) -> int:
    counts = content.get("n-samples") or {}
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_row_count(content, member) for member in (content.get("group_subtasks") or {}).get(task, ()))


def _texts(target: Any) -> list[str]:
    """Returns a target as accepted answers: a task has one or a list, and numbers among them."""
    several = target if isinstance(target, list) else [target]
    return [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in several]


def _lines(path: Path, task: str, primary: str) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            samples = [parse_json(line) for line in file]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"lmms-eval: the answers of {task} are missing or unreadable ({error}).") from error
    lines = []
    for number, sample in enumerate(samples):
        answer = sample["filtered_resps"]
        while isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        score = _number(sample.get(primary.partition("@")[0]))
        line = {
            "id": str(sample["doc_id"]),
            "prediction": answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
            "references": _texts(sample["target"]),
            "question": sample["input"] if isinstance(sample["input"], str) else "",
            "images": [],
            "cluster": number,
        }
        lines.append(line if score is None else {**line, "score": score})
    return lines
