"""The pilot pair of the LLaVA-c study: one pair of checkpoints, every SAC variant applied to it after training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from run_grid import NOT_RUN, ROOT, Job, finished, run, table

from mllm_cl.data.rows import Row, reference_answers
from mllm_cl.evaluation import get_scorer
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.models.adapters import load_adapter, set_active
from mllm_cl.models.load import load_model
from mllm_cl.models.lora_folders import read_updates, write_updates
from mllm_cl.spectral import LowRankDelta, consolidate_many
from mllm_cl.streams import load_benchmark, load_stream

ORDER = ("face-check", "compass", "digit-parity")  # yes or no, then an abbreviation: two formats; then one word
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
RATES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "power_up": {},
    "power_up, gamma 0.5": {"gamma": 0.5},
    "power_down": {},
    "wiener": {},
    "soft_threshold": {},
    "saturate": {},
    "rank_linear": {},
    "overlap": {},
}
FIGURES = ROOT / "docs" / "figures"


def pair_job(changes: dict[str, Any]) -> Job:
    """Plain fine-tuning with a fresh adapter per task, nothing consolidated: W_1, and W_2 = W_1 + D."""
    label = "short pair" if changes else "pair"
    only = {
        "stream": {**changes.get("stream", {}), "tasks": list(ORDER)},
        "model": {"adapters": "stacked", "max_rank": 64},
    }
    return Job(label, ["finetune"], order=ORDER, order_name="pair", split="validation", changes=changes | only)


def updates_of(folder: Path, job: Job, stage: int) -> dict[str, LowRankDelta]:
    """The consolidated update after a stage."""
    name = f"{stage:02d}-{ORDER[stage - 1]}"
    return read_updates(folder / job.folder / "stages" / name / "adapter").updates


def task_updates(folder: Path, job: Job, stage: int) -> dict[str, LowRankDelta]:
    """D_t = W_t - W_{t-1}, at its true rank."""
    now = updates_of(folder, job, stage)
    if stage == 1:
        return {name: update.truncate(rank=8)[0] for name, update in now.items()}
    before = updates_of(folder, job, stage - 1)
    return {name: (update + before[name] * -1.0).truncate(rank=8)[0] for name, update in now.items()}


def pilot_rows(folder: Path, changes: dict[str, Any], report_only: bool) -> list[str]:
    """Trains the pair, scores every variant, writes the figure; returns the lines of the table."""
    job, scores_file = pair_job(changes), folder / "scores.json"
    if not report_only and finished(job, folder) is None:
        print(run(job, folder), flush=True)
    if finished(job, folder) is None:
        return NOT_RUN
    scores: dict[str, list[float]] = json.loads(scores_file.read_text()) if scores_file.exists() else {}
    if not report_only:
        _score(folder, job, scores, scores_file)
    rows = []
    for rate in RATES:
        for strength in STRENGTHS:
            found = scores.get(f"{rate} {strength}")
            if found:
                rows.append([rate, str(strength), *(f"{value:.1f}" for value in found)])
    for name in ("before the second task", "after the second task, not consolidated"):
        if name in scores:
            rows.append([name, "", *(f"{value:.1f}" for value in scores[name])])
    if not changes:
        _frontier(scores)
    return table(["rate", "strength (norm kept)", "old task", "new task", "general"], rows)


def _score(folder: Path, job: Job, scores: dict[str, list[float]], scores_file: Path) -> None:
    model, processor = load_model("tiny-llava")
    stream = load_stream("quickstart")
    rows = [list(stream[name].validation)[:60] for name in ORDER[:2]]
    rows.append(list(load_benchmark("quickstart-general", "validation"))[::4])
    first, update = updates_of(folder, job, 1), task_updates(folder, job, 2)
    config = read_updates(folder / job.folder / "stages" / f"01-{ORDER[0]}" / "adapter").config

    def measure(name: str, updates: dict[str, LowRankDelta]) -> None:
        nonlocal model
        if name in scores:
            return
        with tempfile.TemporaryDirectory() as place:
            write_updates(Path(place), config, updates)
            model = load_adapter(model, Path(place), "default")
        set_active(model, ["default"])
        scores[name] = [_accuracy(model, processor, some) for some in rows]
        scores_file.write_text(json.dumps(scores, indent=1))
        print(name, scores[name], flush=True)

    measure("before the second task", first)
    measure("after the second task, not consolidated", {name: first[name] + update[name] for name in first})
    for rate, options in RATES.items():
        for strength in STRENGTHS:
            kept = consolidate_many(update, rate.split(",")[0], strength=strength, previous=first, **options)
            measure(f"{rate} {strength}", {name: first[name] + kept[name] for name in first})


def _accuracy(model: Any, processor: Any, rows: Sequence[Row]) -> float:
    score = get_scorer("exact_match")
    answers = generate(model, processor, rows, GenerationSettings(max_new_tokens=16))
    return 100 * sum(score(answer, reference_answers(row)) for answer, row in zip(answers, rows)) / len(rows)


def _frontier(scores: dict[str, list[float]]) -> None:
    """New-task against old-task score, one line per rate over its strengths."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, rate in enumerate(RATES):
        points = [scores[f"{rate} {strength}"] for strength in STRENGTHS if f"{rate} {strength}" in scores]
        if points:
            style = {"lw": 2.4, "color": "black"} if rate == "uniform" else {"lw": 1.3, "color": f"C{number}"}
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", ms=4, label=rate, **style)
    axes.set_xlabel("old task, percent")
    axes.set_ylabel("new task, percent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "sac_frontier.png", dpi=110, metadata={"Software": None})


def spectra_rows(folder: Path) -> list[str]:
    """Singular values of the updates of each stage: how concentrated they are, and how much consecutive ones overlap."""
    job = pair_job({})
    if finished(job, folder) is None:
        return NOT_RUN
    rows, before = [], None
    for stage, task in enumerate(ORDER, start=1):
        updates = task_updates(folder, job, stage)
        shares = [update.sigma.double().square() / update.sigma.double().square().sum() for update in updates.values()]
        ranks = [torch.exp(-(p * p.clamp_min(1e-30).log()).sum()).item() for p in shares]
        first = [p[0].item() for p in shares]
        half = [p[: len(p) // 2].sum().item() for p in shares]
        met = [_overlap(before[name], update) for name, update in updates.items()] if before else []
        means = [sum(values) / len(values) if values else None for values in (ranks, first, half, met)]
        texts = ["–" if value is None else f"{value:.2f}" for value in means]
        rows.append([task, *texts])
        before = updates
    header = ["task", "effective rank (of 8)", "energy in the first direction", "energy in the first half"]
    return table([*header, "overlap with the update before"], rows)


def _overlap(one: LowRankDelta, other: LowRankDelta, count: int = 2) -> float:
    """Mean squared cosine between the leading left subspaces of two updates: 1 if they are the same."""
    cosines = torch.linalg.svdvals(one.left[:, :count].double().T @ other.left[:, :count].double())
    return cosines.square().mean().item()
