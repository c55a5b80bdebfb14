"""`mllm-cl demo`: four methods on the quickstart stream, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm_cl.cli.demo_recipes import METHODS


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for the runs.")] = Path("runs/demo"),
    methods: Annotated[str, typer.Option(help="Which of the methods, with commas.")] = ",".join(METHODS),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Methods at the same time, each with one thread.")] = 2,
) -> None:
    """Teach six small tasks with several methods and compare what is kept: minutes, nothing to download.

    LLaVA-c (spectral consolidation and inquiry regularization) beside plain fine-tuning, replay and joint training.
    The same command continues a demo that was interrupted.
    """
    from mllm_cl.cli.compare import show_comparison
    from mllm_cl.cli.demo_recipes import write_demo_recipe
    from mllm_cl.cli.display import say
    from mllm_cl.cli.side_by_side import run_side_by_side
    from mllm_cl.errors import MethodError, suggest
    from mllm_cl.reporting import write_comparison, write_report

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    for name in names:
        if name not in METHODS:
            raise MethodError(f"--methods: {name!r} is not part of the demo.", expected=suggest(name, METHODS))
    if not names:
        raise MethodError("--methods: none is named.", expected=",".join(METHODS))
    folders = [output_dir / name for name in names]
    recipes = [write_demo_recipe(name, output_dir, seed) for name in names]
    labels = [f"[{number}/{len(names)}] {name}" for number, name in enumerate(names, start=1)]
    run_side_by_side(dict(zip(labels, zip(recipes, folders))), jobs)
    if len(folders) > 1:
        show_comparison(folders)
        say(f"comparison: {write_comparison(folders, output_dir)}")
    for folder in folders:
        others = [other for other in folders if other != folder]
        say(f"report:     {write_report(folder, baselines=others)}")
