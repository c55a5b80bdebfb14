"""`mllm-cl run RECIPE [section.key=value ...]`: the whole protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_cl.recipe import Recipe
    from mllm_cl.training.run_folder import RunFolder


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over the file's.")
    ] = None,
) -> None:
    """Teach the tasks of a recipe one after another and measure what is kept.

    A run that was interrupted continues when the same command is given again.
    """
    from mllm_cl.cli.pull import resume_from_hub
    from mllm_cl.recipe import load_recipe

    content = load_recipe(recipe, overrides or ())
    resume_from_hub(content)
    execute(content)


def execute(recipe: Recipe, prefix: str = "", details: bool = True) -> RunFolder:
    """Runs a recipe with progress shown, writes the report and, with `details`, prints matrix and metrics."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.cli.matrix import show_run
    from mllm_cl.cli.push import StagePusher
    from mllm_cl.reporting import write_report
    from mllm_cl.training.loop import run_stream

    pusher = StagePusher(recipe) if recipe.hub.push else None
    with make_progress(prefix) as progress:
        folder = run_stream(recipe, progress, pusher)
        with progress.waiting("writing the report"):
            report = write_report(folder.root)
    if details:
        show_run(folder.root)
        say(f"run:    {folder.root}\nreport: {report}")
    if pusher is not None:
        pusher.check()
    return folder
