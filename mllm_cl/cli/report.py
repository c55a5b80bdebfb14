"""`mllm-cl report RUN`: report.html, report.md and figures, written into the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.", show_default=False)],
    baseline: Annotated[
        list[Path] | None, typer.Option("--baseline", help="Another run to compare with; may be repeated.")
    ] = None,
) -> None:
    """Write the report of a run again."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.reporting import write_report

    with make_progress() as progress, progress.waiting("writing the report"):
        place = write_report(run, baselines=baseline or ())
    say(f"report: {place}")
