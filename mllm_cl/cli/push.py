"""`mllm-cl push RUN REPO_ID`: a stage of a run as a repository of the Hub; and the pushing of `run` with `hub.push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm_cl.parse import parse_json

if TYPE_CHECKING:
    from mllm_cl.hub import Publication, Router
    from mllm_cl.recipe import HubSection, Recipe


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    stage: Annotated[int | None, typer.Option(min=1, help="Push this stage; the last one when not given.")] = None,
    all_stages: Annotated[
        bool, typer.Option("--all-stages", help="Push every stage to a branch of its own too: stage-01, ...")
    ] = False,
    with_state: Annotated[
        bool, typer.Option("--with-state", help="Push the methods' state too: the run can be continued elsewhere.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if the recipe names a folder of this machine.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence of the adapter: apache-2.0, mit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Publish a stage: a plain PEFT adapter, a model card with the results, figures.

    Every file is listed before anything is uploaded. A stage arrives as one commit, or not at all.
    """
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.errors import RunError
    from mllm_cl.hub import push as push_stage
    from mllm_cl.hub.layout import trained_stages
    from mllm_cl.hub.push import MAIN
    from mllm_cl.reporting import read_run

    if all_stages and stage is not None:
        raise RunError("--stage and --all-stages are given both.", expected="one of them")
    summary = read_run(run)
    section = hub_section(summary.recipe, base_model=base_model, licence=licence)
    stages: list[int | None] = [*trained_stages(summary)] if all_stages else []
    parcels = [(publish(run, repo_id, number, section, with_state), False) for number in stages]
    parcels.append((publish(run, repo_id, stage, section, with_state), True))
    for publication, to_main in parcels:
        show_files(publication, MAIN if to_main else publication.branch)
    if dry_run:
        say("dry run: nothing was uploaded.")
        return
    with make_progress() as progress:
        for publication, to_main in parcels:
            branch = MAIN if to_main else publication.branch
            with progress.waiting(f"pushing {publication.stage_name} to {repo_id} ({branch})"):
                commit = push_stage(publication, branch=branch, private=private)
            say(f"pushed: {repo_id}, {branch}, {publication.stage_name}, commit {commit}")


def publish(run: Path, repo_id: str, stage: int | None, section: HubSection, with_state: bool = False) -> Publication:
    """Returns what a push of a stage would upload; the router is shown in the card where that is possible."""
    from mllm_cl.hub import gather

    router = prototype_router(run, stage)
    return gather(run, repo_id, stage, section=section, router=router, with_state=with_state)


def hub_section(recipe: dict, *, base_model: str | None, licence: str | None) -> HubSection:
    """Returns the `hub` section of a run's recipe with what the command line adds."""
    from mllm_cl.recipe import HubSection

    given = {"base_model": base_model, "license": licence}
    return HubSection.model_validate(
        (recipe.get("hub") or {}) | {key: value for key, value in given.items() if value is not None}
    )


def show_files(publication: Publication, branch: str) -> None:
    """Prints every file with its size."""
    from mllm_cl.cli.display import say, show_table
    from mllm_cl.reporting.formatting import size

    rows = [["file", "size"], *([file.path, size(file.size)] for file in publication.files)]
    show_table(rows, f"{publication.repo_id}, {branch}: {publication.stage_name}")
    say(f"{len(publication.files)} files, {size(publication.size)}")


def prototype_router(run: Path, stage: int | None) -> Router | None:
    """Returns the router of `task_adapters` as a card can show it; `None` for every other way to route, or none."""

    from mllm_cl.hub import Router
    from mllm_cl.methods.task_adapters import TaskAdapters
    from mllm_cl.recipe import load_recipe
    from mllm_cl.reporting import read_run
    from mllm_cl.training.capabilities import build_methods

    methods = build_methods(load_recipe(run / "recipe.yaml"))
    found = [(place, method) for place, method in enumerate(methods) if type(method) is TaskAdapters]
    if not found or found[0][1].router != "prototype":
        return None
    place, method = found[0]
    trained = [record for record in read_run(run).stages if record.trained]
    if stage is not None:
        trained = [record for record in trained if record.index == stage]
    if not trained:
        return None
    folder = Path("stages") / trained[-1].name / "method" / f"{place:02d}-{method.name}"
    similarity = parse_json((run / folder / "state.json").read_text(encoding="utf-8"))["data"]["similarity"]
    return Router(
        f"run/{folder.as_posix()}/state.safetensors",
        {task: method.lowest_similarity(mean, deviation) for task, (mean, deviation) in similarity.items()},
    )


class StagePusher:
    """Pushes the stages of a run as it goes; a stage that could not be pushed does not stop the training.

    Args:
        recipe: with `hub.repo_id`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.section = recipe.hub
        self.failed: dict[int, str] = {}

    def __call__(self, run: Path, stage: int) -> str | None:
        """Pushes a stage to its branch, and to main if no later one is trained; returns the place, `None` on failure."""
        import logging

        from mllm_cl.errors import HubError
        from mllm_cl.hub import push as push_stage
        from mllm_cl.hub.layout import trained_stages
        from mllm_cl.hub.push import MAIN
        from mllm_cl.reporting import read_run

        repo_id = self.section.repo_id or ""
        publication = publish(run, repo_id, stage, self.section, with_state=True)
        branches = [publication.branch, *([MAIN] if stage == max(trained_stages(read_run(run))) else [])]
        try:
            commits = [push_stage(publication, branch=branch, private=self.section.private) for branch in branches]
        except HubError as error:
            self.failed[stage] = str(error)
            logging.getLogger(__name__).warning("stage %d was not pushed, the run goes on. %s", stage, error)
            return None
        return f"{repo_id}@{commits[-1]}"

    def check(self) -> None:
        """Ends a run with an error if one of its stages is not on the Hub.

        Raises:
            HubError: names the stages; everything else about the run is complete.
        """
        from mllm_cl.errors import HubError

        if self.failed:
            stages = ", ".join(map(str, self.failed))
            raise HubError(
                f"{self.section.repo_id}: stage {stages} could not be pushed; the run itself is complete.",
                fix="give the same command again: it only pushes what is missing.",
            )
