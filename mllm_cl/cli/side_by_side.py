"""Several recipes at the same time, each in a process and with a thread of its own.

Small models gain nothing from a second thread; two runs beside each other use two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import typer

from mllm_cl.cli.display import console, live_bars
from mllm_cl.errors import RunError
from mllm_cl.training.ledger import Ledger

LAST_LINES = 30
"""Lines of a run that are shown when it fails."""

Report = Callable[[str, Path], None]
"""Is called with every line of a run and the run's folder."""


def run_side_by_side(recipes: Mapping[str, tuple[Path, Path]], at_once: int) -> None:
    """Runs recipes in processes of their own, `at_once` at a time, and shows how far each is.

    Args:
        recipes: what stands in front of a run's lines -> its recipe file and its run folder.
        at_once: processes at the same time.

    Raises:
        RunError: a run failed; the others were brought to their end, and the message has the run's last lines.
        typer.Exit: a run was interrupted.
    """
    target = console(stderr=True)
    if not target.is_terminal:
        _run_all(recipes, at_once, lambda name: lambda line, _: target.print(f"{name}, {line}", soft_wrap=True))
        return
    with live_bars(target) as progress:

        def bar(name: str) -> Report:
            shown = progress.add_task(name, total=None)

            def report(line: str, folder: Path) -> None:
                ledger = Ledger(folder / "ledger.jsonl", writable=False).entries
                tasks = [task for entry in ledger if entry["event"] == "started" for task in entry["tasks"]]
                trained = sum(entry["event"] == "stage_trained" for entry in ledger)
                progress.update(shown, description=f"{name}, {line}", completed=trained, total=len(tasks) or None)

            return report

        _run_all(recipes, at_once, bar)


def _run_all(recipes: Mapping[str, tuple[Path, Path]], at_once: int, reports: Callable[[str], Report]) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        started = [pool.submit(_run, name, *paths, reports(name)) for name, paths in recipes.items()]
    for future in started:
        future.result()


def _run(name: str, recipe: Path, folder: Path, report: Report) -> None:
    command = [sys.executable, "-m", "mllm_cl", "run", str(recipe)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            last.append(line.rstrip())
            report(last[-1], folder)
    if process.returncode == 130:
        raise typer.Exit(130)
    if process.returncode:
        raise RunError(
            f"{name}: the run ended with exit code {process.returncode}. Its last lines:\n" + "\n".join(last),
            fix="the same command continues what is complete.",
        )
