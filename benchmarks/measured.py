"""The numbers of finished runs, kept in docs/measured/runs.jsonl: pages grow over days and machines, nothing runs twice.

One JSON line per run, found by its recipe: `{"recipe": …, "numbers": {name: value}}`. Runs whose single numbers have not been
kept are one line per group: `{"recipe": … without a seed, "seeds": […], "mean": {…}, "sd": {…}}`, two or three of them.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run_grid import ROOT, Job, Run, finished, general_at, run, spread

MEASURED = ROOT / "docs" / "measured" / "runs.jsonl"
DERIVED = ("mean_final_accuracy", "mean_finetune_accuracy", "backward_transfer", "forgetting")
# values around 0 with a standard deviation of 1
_AROUND = {2: (-math.sqrt(0.5), math.sqrt(0.5)), 3: (-1.0, 0.0, 1.0)}

Numbers = dict[str, float | None]


def numbers_of(run: Run) -> Numbers:
    """What the pages show of a run, percent and points where nothing else is said; `None` is what it does not measure."""
    before, after = general_at(run, 0), general_at(run, -1)
    work = [stage.get("flops") for stage in run["trained"]]
    drift = run["drift"][-1] if run["drift"] else {}
    numbers: Numbers = {name: run["derived"][name] for name in DERIVED}
    numbers |= {
        "general": after,
        "general_change": None if before is None or after is None else after - before,
        "feature_shift": drift.get("feature_shift"),
        "one_word_share": drift.get("one_word_share"),
        "tflop": None if None in work else sum(work) / 1e12,
        "seconds": sum(stage["seconds"] for stage in run["trained"]),
        "stored_kb": run["trained"][-1]["stored_bytes"] / 1000,
    }
    return {name: None if value is None else round(value, 4) for name, value in numbers.items()}


class Measured:
    """The numbers of runs, wherever they were run.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path = MEASURED) -> None:
        self.path, self._lock = path, threading.Lock()
        self._of: dict[str, Numbers] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            entry = json.loads(line)
            if "numbers" in entry:
                self._of[json.dumps(entry["recipe"], sort_keys=True)] = entry["numbers"]
                continue
            # stand-ins with the same mean and deviation as the runs, alone and together with further ones
            for seed, place in zip(entry["seeds"], _AROUND[len(entry["seeds"])], strict=True):
                own = {name: mean + place * entry["sd"][name] for name, mean in entry["mean"].items()}
                self._of[json.dumps(entry["recipe"] | {"seed": seed}, sort_keys=True)] = own

    def get(self, job: Job) -> Numbers | None:
        """The numbers of a job's run, if it was ever run."""
        return self._of.get(job.identity)

    def add(self, job: Job, numbers: Numbers) -> None:
        """Keeps the numbers of a run."""
        with self._lock:
            self._of[job.identity] = numbers
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"recipe": json.loads(job.identity), "numbers": numbers}) + "\n")

    def by_label(self, jobs: Iterable[Job]) -> dict[str, list[Numbers]]:
        """The numbers of the runs that exist by label, labels in the order of the jobs."""
        found: dict[str, list[Numbers]] = {}
        for job in jobs:
            own = self.get(job)
            found.setdefault(job.label, []).extend([own] if own else [])
        return found

    def run_missing(self, jobs: Sequence[Job], output: Path, at_once: int = 1) -> list[str]:
        """Runs what nobody has measured; returns what went wrong with which. One failure does not stop the others."""
        output.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(at_once) as pool:
            return [text for text in pool.map(lambda job: self._attempt(job, output), jobs) if text]

    def _attempt(self, job: Job, output: Path) -> str | None:
        if self.get(job):
            return None
        try:
            ended = finished(job, output)
            if ended is None:
                print(run(job, output), flush=True)
                ended = finished(job, output)
        except SystemExit as failure:
            return str(failure)
        if ended is None:
            return f"{job.folder} ended without being complete"
        self.add(job, numbers_of(ended))
        return None


def column(runs: Sequence[Numbers], name: str) -> list[float | None]:
    """One number of several runs; `None` where a run has not kept it."""
    return [run.get(name) for run in runs]


def cells(runs: Sequence[Numbers], columns: Mapping[str, tuple[str, int]]) -> list[str]:
    """Mean ± standard deviation over runs, a cell for each column of a page: its title -> name of the number, decimals."""
    return [spread(column(runs, name), decimals) for name, decimals in columns.values()]
