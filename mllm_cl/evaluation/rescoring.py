"""Scores written predictions again, without a model: another scorer, another profile, a newer version.

Every line of `predictions.jsonl` holds what a scorer needs (answer, references, row fields, cluster), so neither the
data set nor the images are opened, and the order of the lines does not matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, CHOICE_LIKELIHOOD
from mllm_cl.evaluation.scoring import Scored, score_answers
from mllm_cl.parse import parse_json

PREDICTIONS = "predictions.jsonl"
_KINDS = {
    "id": ((str, int), "a text or a number"),
    "prediction": (str, "a text"),
    "references": (list, "a list of accepted answers"),
    "fields": (dict, "names and values"),
}


@dataclass(frozen=True)
class Predictions:
    """One file of predictions.

    Args:
        name: of the task, as the result beside it says, else of the folder.
        metric: the one it was scored with; `None` when it was not scored or nothing says so.
        lines: as written.
    """

    path: Path
    name: str
    metric: str | None
    lines: Sequence[Mapping[str, Any]]


def find_predictions(place: Path) -> list[Path]:
    """Returns a predictions file, or all of those below a folder.

    Raises:
        EvaluationError: there is none.
    """
    found = [place] if place.is_file() else sorted(place.rglob(PREDICTIONS))
    if not found:
        raise EvaluationError(
            f"{place}: holds no {PREDICTIONS}.", expected="such a file, or a folder that `mllm-cl evaluate` wrote"
        )
    return found


def read_predictions(path: Path) -> Predictions:
    """Reads one file of predictions.

    Raises:
        EvaluationError: the file cannot be read, a line is broken, lacks `id`, `prediction` or `references` or has
            something else in their place, or an id comes twice.
    """
    lines: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).", expected="JSON lines in UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # answers may hold other separators, such as U+2028
        if not line:
            continue
        try:
            content = parse_json(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: not valid JSON ({error}).", fix="evaluate again.") from error
        missing = [
            key for key in ("id", "prediction", "references") if not isinstance(content, dict) or key not in content
        ]
        if missing:
            raise EvaluationError(f"{path}, line {number}: lacks {', '.join(missing)}.", fix="evaluate again.")
        for key, (kind, expected) in _KINDS.items():
            if key in content and not isinstance(content[key], kind):
                raise EvaluationError(
                    f"{path}, line {number}: {key} is {content[key]!r}.", expected=expected, fix="evaluate again."
                )
        for reference in content["references"]:
            if not isinstance(reference, str):
                raise EvaluationError(
                    f"{path}, line {number}: {reference!r} in references.", expected="texts", fix="evaluate again."
                )
        name = str(content["id"])
        if name in seen:
            raise EvaluationError(f"{path}, line {number}: the id {name!r} came before.", fix="remove one.")
        seen.add(name)
        lines.append(content)
    if not lines:
        raise EvaluationError(f"{path}: is empty.", fix="evaluate again.")
    task, metric = _task_and_metric_beside(path)
    return Predictions(path, task or path.parent.name, metric, lines)


def rescore(predictions: Predictions, metric: str | None = None, profile: str | None = None) -> tuple[str, Scored]:
    """Returns the name of the metric and the score.

    Args:
        metric: instead of the one that the predictions were scored with.
        profile: whose rule, where the metric belongs to a benchmark that has several.

    Raises:
        EvaluationError: no metric is known, there is none of that name, or the lines lack what it needs.
    """
    name = metric or predictions.metric
    if name is None:
        raise EvaluationError(
            f"{predictions.path}: nothing says how it was scored.", fix="name a scorer with --metric."
        )
    benchmark = name.partition(":")[0]
    if profile is not None:
        if benchmark not in BENCHMARK_SCORERS:
            raise EvaluationError(f"{name}: has no profiles.", expected="one of: " + ", ".join(BENCHMARK_SCORERS))
        name = f"{benchmark}:{profile}"
    if predictions.metric != name and CHOICE_LIKELIHOOD in (predictions.metric, name):
        raise EvaluationError(
            f"{predictions.path}: was measured by {predictions.metric or 'generated answers'}, not by {name}.",
            expected=f"{CHOICE_LIKELIHOOD} only where the likeliest choice was asked for, since nothing is generated there",
            fix=f"evaluate with --metric {name}.",
        )
    rows = [
        {
            **line.get("fields", {}),
            "id": str(line["id"]),
            "messages": [],
            "images": [f"cluster {line['cluster']}"] if "cluster" in line else [],
            "answers": line["references"],
        }
        for line in predictions.lines
    ]
    return name, score_answers(name, rows, [line["prediction"] for line in predictions.lines])  # type: ignore[arg-type]


def distinct_names(several: Sequence[Predictions]) -> list[str]:
    """Returns the name of each, and where another has it too, the place of its file below the folder of all."""
    names = [predictions.name for predictions in several]
    places = [predictions.path.resolve().with_suffix("") for predictions in several]
    shared = os.path.commonpath([place.parent for place in places]) if places else ""
    return [name if names.count(name) == 1 else str(place.relative_to(shared)) for name, place in zip(names, places)]


def _task_and_metric_beside(path: Path) -> tuple[str | None, str | None]:
    """Returns what the result beside predictions says; `None` for what it does not, as predictions may come alone.

    Raises:
        EvaluationError: task or metric is no text, or the task is no name of a folder below that of the results.
    """
    result = path.parent / "result.json"
    try:
        content = parse_json(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    found = [content.get(key) or None if isinstance(content, dict) else None for key in ("task", "metric")]
    for key, value in zip(("task", "metric"), found):
        if not isinstance(value, (str, type(None))):
            raise EvaluationError(f"{result}: {key} is {value!r}.", expected="a text", fix="evaluate again.")
    task, metric = found
    if task is not None and (Path(task).is_absolute() or ".." in Path(task).parts):
        raise EvaluationError(f"{result}: the task is {task!r}.", expected="a name", fix="evaluate again.")
    return task, metric
