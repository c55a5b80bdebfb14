"""Scores written predictions again, without a model: another scorer, another profile, a newer version.

Every line of `predictions.jsonl` holds what a scorer needs (answer, references, row fields, cluster), so neither the
data set nor the images are opened, and the order of the lines does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, CHOICE_LIKELIHOOD
from mllm_cl.evaluation.scoring import Scored, score_answers

PREDICTIONS = "predictions.jsonl"
_KINDS = {str: "a text", list: "a list of accepted answers", dict: "names and values"}


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
            content = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: not valid JSON ({error}).", fix="evaluate again.") from error
        missing = [
            key for key in ("id", "prediction", "references") if not isinstance(content, dict) or key not in content
        ]
        if missing:
            raise EvaluationError(f"{path}, line {number}: lacks {', '.join(missing)}.", fix="evaluate again.")
        for key, kind in (("prediction", str), ("references", list), ("fields", dict)):
            if not isinstance(content.get(key, kind()), kind):
                raise EvaluationError(
                    f"{path}, line {number}: {key} is {content[key]!r}.", expected=_KINDS[kind], fix="evaluate again."
                )
        name = str(content["id"])
        if name in seen:
            raise EvaluationError(f"{path}, line {number}: the id {name!r} came before.", fix="remove one.")
        seen.add(name)
        lines.append(content)
    if not lines:
        raise EvaluationError(f"{path}: is empty.", fix="evaluate again.")
    beside = _result_beside(path)
    return Predictions(path, beside.get("task") or path.parent.name, beside.get("metric") or None, lines)


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
            "id": str(line["id"]),
            "messages": [],
            "images": [f"cluster {line['cluster']}"] if "cluster" in line else [],
            "answers": line["references"],
            **line.get("fields", {}),
        }
        for line in predictions.lines
    ]
    return name, score_answers(name, rows, [line["prediction"] for line in predictions.lines])  # type: ignore[arg-type]


def _result_beside(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # predictions may come alone
        return {}
    return content if isinstance(content, dict) else {}
