"""`mllm-cl doctor [RECIPE]`: versions, devices, optional parts, what will and will not work here, and the memory of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_cl.cli.environment import Check


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="Say also whether this recipe can run here, and estimate its memory.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over the file's.")
    ] = None,
) -> None:
    """Check this machine: versions, devices, optional parts, and what will and will not work."""
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.cli.environment import check_environment
    from mllm_cl.errors import MllmClError

    with make_progress() as progress, progress.waiting("looking at this machine"):
        checks = check_environment()
    _show(checks)
    broken = [check for check in checks if check.state == "broken"]
    if broken:
        raise MllmClError(
            "this installation does not work: " + "; ".join(f"{check.name}: {check.found}" for check in broken),
            fix="see `meaning` above; `make venv` builds an environment that is known to work.",
        )
    warned = sum(check.state == "warning" for check in checks)
    say("everything required works" + (f"; {warned} warning(s), see above." if warned else "."))
    if recipe is None:
        return
    from mllm_cl.cli.recipe_check import check_recipe

    with make_progress() as progress, progress.waiting("estimating the memory"):
        parts, verdict = check_recipe(recipe, overrides or ())
    show_table([["memory", "estimate", "what it is"], *parts])
    say(verdict.found + (f"; {verdict.meaning}" if verdict.meaning else ""))
    if verdict.state == "broken":
        raise MllmClError(f"{recipe}: {verdict.found}.", fix=verdict.meaning)


def _show(checks: list[Check]) -> None:
    from mllm_cl.cli.display import show_table

    show_table([["what", "state", "found", "meaning"], *([c.name, c.state, c.found, c.meaning] for c in checks)])
