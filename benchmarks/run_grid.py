"""Recipes run one per process and read back: what the pages of results share. A finished run is never run again."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import runpy
import statistics
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAINING = {"learning_rate": 5e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16}
GENERAL = "quickstart-general"
NOT_RUN = ["*Not run yet.*"]  # what a page says where nothing has been measured
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mllm_cl.training.loop"])  # ten seconds of imports, once


Run = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: a method on a stream in some order with a seed.

    Args:
        label: the method's name in tables.
        methods: as in a recipe.
        split: `validation` to choose, `test` to report.
        changes: further sections of the recipe, merged into it; `{output}` in their texts is the folder of all runs.
    """

    label: str
    methods: list[Any]
    stream: str = "quickstart"
    order: tuple[str, ...] | None = None
    order_name: str = "given"
    seed: int = 0
    split: str = "test"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        parts = [self.label, *([] if self.stream == "quickstart" else [self.stream])]
        parts += [] if self.order_name == "given" else [self.order_name]
        parts += [] if self.split == "test" else [self.split]
        return re.sub(r"[^a-z0-9]+", "-", "-".join([*parts, str(self.seed)]).lower())

    def recipe(self, output: Path) -> dict[str, Any]:
        """The recipe of the run below `output`."""
        content = json.loads(self.identity.replace("{output}", output.resolve().as_posix()))
        name = f"{self.label}, {self.stream}, {self.order_name} order, seed {self.seed}"
        return {"name": name, "output_dir": str(output / self.folder), **content}

    @property
    def identity(self) -> str:
        """The recipe as JSON, but for its name and place: tells whether a run is the one asked for."""
        stream: dict[str, Any] = {"name": self.stream, "limit": {"test": 160, "validation": 80}}
        stream |= {"order": list(self.order)} if self.order else {}
        content: dict[str, Any] = {
            "seed": self.seed,
            "stream": stream,
            "methods": self.methods,
            "training": dict(TRAINING),
            "evaluation": {"general": [GENERAL], "split": self.split},
        }
        for section, changes in self.changes.items():
            content[section] = {**content.get(section, {}), **changes}
        return json.dumps(content, sort_keys=True)


def run(job: Job, output: Path) -> str:
    """Runs a job in a process of its own with one thread; one that was interrupted continues.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{job.folder}.yaml"
    path.write_text(json.dumps(job.recipe(output)), encoding="utf-8")  # JSON is YAML
    log = path.with_suffix(".log")
    os.environ["OMP_NUM_THREADS"] = "1"  # what the server of the processes starts with
    process = PROCESSES.Process(target=_train, args=(path, log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{job.folder} failed:\n{log.read_text(encoding='utf-8')}")
    return f"{job.folder}: done"


def _train(recipe: Path, log: Path) -> None:
    """In a process of its own: what `python recipes/train.py RECIPE` does, with its output in a file."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what was imported is not looked through again
    sys.argv = [str(ROOT / "recipes" / "train.py"), str(recipe)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with_parent() -> None:
    """Ends this process when the benchmark that asked for it is gone, however it ended; the run continues next time."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def finished(job: Job, output: Path) -> Run | None:
    """Returns the matrix of a finished run, with the ledger's entries of trained stages and drift; else `None`.

    Raises:
        SystemExit: the folder holds a run of another recipe.
    """
    written, ledger = output / f"{job.folder}.yaml", output / job.folder / "ledger.jsonl"
    if not (written.exists() and ledger.exists()):
        return None
    recipe = json.loads(written.read_text(encoding="utf-8"))
    if recipe | {"name": "", "output_dir": ""} != job.recipe(output) | {"name": "", "output_dir": ""}:
        raise SystemExit(f"{output / job.folder} was run with another recipe: move it away or give another --output.")
    entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    if not any(entry["event"] == "run_complete" for entry in entries):
        return None
    matrix = json.loads((output / job.folder / "matrix.json").read_text(encoding="utf-8"))
    events = {event: [e for e in entries if e["event"] == event] for event in ("stage_trained", "drift")}
    return matrix | {"trained": events["stage_trained"], "drift": events["drift"]}


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation over runs; a dash when nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def general_at(matrix: Run, stage: int) -> float | None:
    """Score on the general benchmark at a row of the matrix (0: the untouched model, -1: the last stage)."""
    return matrix["general"]["values"][stage][0]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
