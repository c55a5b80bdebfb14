"""`mllm-cl pull REPO_ID --out RUN`: a published run as a run folder of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_cl.hub import Pulled
    from mllm_cl.recipe import Recipe


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; must be missing or empty.")],
    revision: Annotated[str, typer.Option(help="Branch or commit: main, stage-01, ...")] = "main",
) -> None:
    """Fetch a published run: its adapters, matrix and recipe; and go on with it, if its state was pushed."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.hub import pull as pull_run

    with make_progress() as progress, progress.waiting(f"pulling {repo_id}"):
        pulled = pull_run(repo_id, out, revision=revision)
    say(f"run:    {pulled.folder}, {pulled.stage_name}")
    for line in notes(pulled):
        say(line)


def notes(pulled: Pulled) -> list[str]:
    """Returns what a person should know about a pulled run: what is missing, what it would execute, how to go on."""
    lines = [f"note:   {name}: its adapter is not on the Hub." for name in pulled.missing]
    recipe = pulled.recipe
    foreign = [spec.name for spec in recipe.methods if ":" in spec.name]
    if recipe.model.trust_remote_code:
        lines.append("note:   the recipe says `trust_remote_code: true`: running it executes code of the base model.")
    if foreign:
        lines.append(f"note:   the recipe names methods of other packages: {', '.join(foreign)}.")
    if pulled.complete:
        return [*lines, "complete: see it with `mllm-cl report`, `mllm-cl evaluate`."]
    if not pulled.continuable:
        return [*lines, "note:   pushed without the methods' state (--with-state): it cannot be continued."]
    path = "" if recipe.stream.path is None else " stream.path=PATH"
    return [*lines, f"go on:  mllm-cl run {pulled.folder / 'recipe.yaml'}{path}"]


def resume_from_hub(recipe: Recipe) -> None:
    """Fetches a run that `hub.push` has published, if this machine has nothing of it.

    Raises:
        HubError: the repository holds another run, or one that cannot be continued.
    """
    folder = Path(recipe.output_dir)
    if not recipe.hub.push or (folder / "recipe.yaml").exists():
        return
    from mllm_cl.cli.display import say
    from mllm_cl.errors import HubError
    from mllm_cl.hub import pull as pull_run
    from mllm_cl.hub.pull import find_published

    if not find_published(recipe):
        return
    pulled = pull_run(recipe.hub.repo_id or "", folder)
    if not pulled.continuable:
        raise HubError(
            f"{recipe.hub.repo_id}: holds this run up to {pulled.stage_name}, but not the methods' state.",
            fix="change hub.repo_id to start anew, or push it again with --with-state.",
        )
    say(f"resumes from {recipe.hub.repo_id} after {pulled.stage_name}")
