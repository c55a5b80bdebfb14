"""`mllm-cl matrix RUN`: the accuracy matrix of a run, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_cl.evaluation.matrix import AccuracyMatrix


def matrix(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print the accuracy matrix of a run and what derives from it."""
    if as_csv and as_json:
        raise typer.BadParameter("give one of --csv and --json, not both")
    if not (as_csv or as_json):
        show_run(run)
        return
    found = _read(run)
    typer.echo(found.to_csv().rstrip("\n") if as_csv else json.dumps(found.to_json(), indent=2, ensure_ascii=False))


def _read(folder: Path) -> AccuracyMatrix:
    from mllm_cl.errors import RunError
    from mllm_cl.reporting import read_run

    run = read_run(folder)
    if run.matrix is None:
        raise RunError(
            f"{folder}: has no matrix.json, nothing has been measured yet.",
            expected="a run that has measured at least one stage",
            fix="start or continue it with `mllm-cl run`.",
        )
    return run.matrix


def show_run(folder: Path) -> None:
    """Prints matrix, derived metrics with standard errors, and what is missing."""
    from mllm_cl.cli.display import say, show_matrix, show_table
    from mllm_cl.reporting import read_run
    from mllm_cl.reporting.report import metric_rows

    found, run = _read(folder), read_run(folder)
    show_matrix(found, f"{run.name}: {run.method} on {run.stream}, seed {run.seed} (percent ± standard error)")
    rows, through = metric_rows(run)
    measured = [[row.label, row.value, row.divisor] for row in rows if row.measured]
    if measured:
        scope = "" if through == len(found.tasks) else f", over the first {through} of {len(found.tasks)} tasks"
        show_table([["metric", "value", "divisor"], *measured], f"derived{scope}")
    left_out = [row.label for row in rows if not row.measured]
    if left_out:
        say(f"not measured (the report says why): {', '.join(left_out)}")
    for sentence in (*run.missing, *run.problems):
        say(f"note: {sentence}")
