"""`mllm-cl compare RUN RUN ...`: runs side by side, with every difference in setting and budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

SHOWN = (
    *("mean_final_accuracy", "mean_finetune_accuracy", "backward_transfer", "forgetting"),
    *("general_final", "general_ability_delta"),
)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs.", show_default=False)],
    output_path: Annotated[
        Path | None,
        typer.Option("--output_path", help="Folder for compare.html and compare.md.", show_default=False),
    ] = None,
) -> None:
    """Put runs side by side. Runs that differ in their seed only become one line with mean ± deviation."""
    from mllm_cl.cli.display import say
    from mllm_cl.errors import RunError
    from mllm_cl.files import explained
    from mllm_cl.reporting import write_comparison

    if len(runs) < 2:
        raise RunError(
            f"{runs[0]}: one run alone cannot be compared.", expected="two or more run folders", fix="add another run."
        )
    show_comparison(runs)
    if output_path is not None:
        with explained(output_path):
            say(f"comparison: {write_comparison(runs, output_path)}")


def show_comparison(runs: Sequence[Path]) -> None:
    """Prints one line per method, and below it what was not equal."""
    from mllm_cl.cli.display import say, show_table
    from mllm_cl.reporting import compare as compare_runs
    from mllm_cl.reporting import comparison_table
    from mllm_cl.reporting.compare import BEHAVIOUR_SHOWN, COSTS_SHOWN
    from mllm_cl.reporting.formatting import change

    comparison = compare_runs(runs)
    show_table(comparison_table(comparison, SHOWN), "comparison (percent; changes in points)")
    show_table(comparison_table(comparison, BEHAVIOUR_SHOWN), "how it answers after the last stage (shares in percent)")
    show_table(comparison_table(comparison, COSTS_SHOWN), "cost of training, over all tasks")
    hidden = ("methods", "version")
    differing = [entry for entry in comparison.differences if entry.name not in hidden and entry.kind not in hidden]
    if differing:
        rows = [[entry.kind, entry.name, *entry.values] for entry in differing]
        show_table([["kind", "not equal", *comparison.labels], *rows], "differences")
    if comparison.paired:
        rows = [["task", "difference", "points", "95 % interval", "p value", "corrected", "test"]]
        for t in comparison.paired:
            interval = f"{change(t.low)} to {change(t.high)}"
            p_values = (f"{t.p_value:.2g}", f"{t.adjusted:.2g}")
            rows.append([t.task, f"{t.other} − {t.first}", change(t.difference), interval, *p_values, t.test])
        show_table(rows, "same test rows after the last stage; p values corrected for several tasks by Holm")
    if comparison.derived:
        rows = [["derived metric", "difference", "points", "95 % interval", "p value"]]
        for d in comparison.derived:
            interval = f"{change(d.low)} to {change(d.high)}"
            rows.append(
                [d.name.replace("_", " "), f"{d.other} − {d.first}", change(d.difference), interval, f"{d.p_value:.2g}"]
            )
        show_table(
            rows, "derived metrics, test rows drawn jointly over stages and runs; the spread over seeds comes on top"
        )
    for note in comparison.notes:
        say(f"note: {note}")
