"""Answers that were right and became wrong: what forgetting looks like on single rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_cl.reporting.formatting import shorten
from mllm_cl.reporting.run import RunSummary, predictions_path, read_json_lines

RIGHT = 0.5
"""An answer with at least this score counts as right."""


@dataclass(frozen=True)
class LostAnswer:
    """One row, its answer at the last stage where it was right, and at the next one measured."""

    task: str
    id: str
    question: str
    references: str
    images: str
    right_stage: str
    before: str
    wrong_stage: str
    after: str


@dataclass(frozen=True)
class AnswerChanges:
    """How many rows of a task changed between learning it and the last stage measured."""

    task: str
    first_stage: str
    last_stage: str
    rows: int
    right_before: int
    lost: int
    gained: int


def find_changes(run: RunSummary, per_task: int = 4) -> tuple[list[AnswerChanges], list[LostAnswer]]:
    """Returns, per task, counts of lost and gained answers, and up to `per_task` lost ones spread over the test rows.

    Only tasks with predictions at their own stage and at a later one appear. A lost answer was right at some stage from
    its own on and is wrong at the last one; `right_stage` is the last stage at which it was right.
    """
    changes: list[AnswerChanges] = []
    examples: list[LostAnswer] = []
    for position, stage in enumerate(run.stages):
        names = [later.name for later in run.stages[position:]]
        problems: list[str] = []
        answers = {name: read_json_lines(predictions_path(run, name, stage.task), problems) for name in names}
        measured = {name: {str(line.get("id")): line for line in lines} for name, lines in answers.items() if lines}
        if stage.name not in measured or len(measured) < 2:
            continue
        order, first, last = list(measured), measured[stage.name], measured[list(measured)[-1]]
        both = [key for key in first if key in last and _scored(first[key]) and _scored(last[key])]
        changes.append(
            AnswerChanges(
                stage.task,
                stage.name,
                order[-1],
                len(both),
                sum(_right(first[key]) for key in both),
                sum(_right(first[key]) and not _right(last[key]) for key in both),
                sum(_right(last[key]) and not _right(first[key]) for key in both),
            )
        )
        lost = [key for key in both if not _right(last[key]) and _last_right(key, measured) is not None]
        step = max(1, len(lost) // per_task) if per_task else 1
        examples += [_example(stage.task, key, measured) for key in lost[::step][:per_task]]
    return changes, examples


def _last_right(key: str, measured: dict[str, dict[str, Any]]) -> int | None:
    right = [i for i, lines in enumerate(measured.values()) if key in lines and _right(lines[key])]
    return right[-1] if right else None


def _example(task: str, key: str, measured: dict[str, dict[str, Any]]) -> LostAnswer:
    stages, right = list(measured), _last_right(key, measured)
    assert right is not None, "only rows that were right once are shown"
    wrong = next(i for i in range(right + 1, len(stages)) if key in measured[stages[i]])
    before, after = measured[stages[right]][key], measured[stages[wrong]][key]
    return LostAnswer(
        task,
        shorten(key, 80),
        shorten(_text(before.get("question"))),
        shorten(_text(before.get("references")), 120),
        shorten(_text(before.get("images")), 120),
        stages[right],
        shorten(_text(before.get("prediction")), 160),
        stages[wrong],
        shorten(_text(after.get("prediction")), 160),
    )


def _scored(line: dict[str, Any]) -> bool:
    return isinstance(line.get("score"), (int, float))


def _right(line: dict[str, Any]) -> bool:
    return _scored(line) and line["score"] >= RIGHT


def _text(value: object) -> str:
    if value is None:
        return ""
    return " / ".join(str(item) for item in value) if isinstance(value, list) else str(value)
