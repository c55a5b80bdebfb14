"""The tasks of `mllm-cl evaluate` that begin with `lmms:`: measured by lmms-eval in its own environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mllm_cl.evaluation.bridges.lmms_run import LmmsOptions


def split_tasks(tasks: str) -> tuple[list[str], list[str]]:
    """Returns (our tasks, tasks of lmms-eval without `lmms:`); after `lmms:mme,pope` each further name is lmms-eval's.

    A name of ours after one of lmms-eval's is written `own:name`.
    """
    ours: list[str] = []
    theirs: list[str] = []
    current = ours
    for name in (part.strip() for part in tasks.split(",")):
        prefix, colon, rest = name.partition(":")
        if colon and prefix in ("lmms", "own"):
            current, name = (theirs if prefix == "lmms" else ours), rest
        if name:
            current.append(name)
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))


def refuse_flags(given: Mapping[str, object]) -> None:
    """Refuses flags that mean nothing to lmms-eval, instead of leaving them out."""
    for flag, value in given.items():
        if value:
            raise typer.BadParameter(
                "does not apply to `lmms:` tasks; measure those with another command", param_hint=flag
            )


def measure_with_lmms_eval(
    names: Sequence[str],
    labels: Sequence[str],
    tasks: Sequence[str],
    output: Path,
    options: LmmsOptions,
    base_model: str | None,
) -> None:
    """Measures every checkpoint and shows the scores.

    Raises:
        EvaluationError: lmms-eval is not there, crashed, or its results are incomplete.
    """
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.evaluation.bridges.lmms_environment import find_lmms_eval
    from mllm_cl.evaluation.bridges.lmms_run import run_lmms_eval

    environment = find_lmms_eval()
    rows = [["task", "checkpoint", "metric", "score", "standard error", "rows"]]
    for name, label in zip(names, labels):
        place = output if len(names) == 1 else output / label
        with make_progress() as progress, progress.waiting(f"{label}: lmms-eval is measuring {', '.join(tasks)}"):
            outcomes = run_lmms_eval(environment, name, tasks, place, options, stage=label, base_model=base_model)
        for result in (outcome.result for outcome in outcomes):
            for metric, value in result.metrics.items():
                error = "" if value["stderr"] is None else f"{value['stderr']:.4f}"
                rows.append([result.task, label, metric, f"{value['value']:.4f}", error, str(result.n)])
    show_table(rows, f"scores of lmms-eval {environment.versions['lmms-eval']}, as it gives them")
    say(f"results: {output}")
