"""A run folder that nobody trained: right in its schema, made up in its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mllm_cl.evaluation.matrix import AccuracyMatrix, stage_name

NASTY = "<script>alert('x')</script> | *bold* `code` <img src=x onerror=alert(1)> ✓ 日本語"


def write_fake_run(
    folder: Path,
    tasks: tuple[str, ...] = ("plates", "menus", "charts", "signs"),
    *,
    finished: int | None = None,
    seed: int = 0,
    methods: list[Any] | None = None,
    training: dict[str, Any] | None = None,
    base: bool = True,
    general: tuple[str, ...] = ("pope", "science"),
    rows: int = 60,
    keep: float = 0.8,
    drop_fields: tuple[str, ...] = (),
    name: str | None = None,
) -> Path:
    """Writes a run folder; `finished` stages of `tasks` are done, all by default."""
    finished = len(tasks) if finished is None else finished
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    recipe = {
        "name": name or folder.name,
        "output_dir": str(folder),
        "seed": seed,
        "model": {"name_or_path": "tiny-llava", "lora": {"r": 8, "lora_alpha": 16}},
        "stream": {"name": "quickstart", "order": None},
        "methods": methods or [],
        "training": training or {"learning_rate": 2e-3, "num_train_epochs": 1},
        "evaluation": {"general": list(general)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    versions = {"mllm_cl": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    environment = {"seed": seed, "stream_fingerprint": "f00d", "versions": versions}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    matrix = AccuracyMatrix(
        list(tasks),
        ["exact_match"] * len(tasks),
        general_names=list(general),
        run={"seed": seed, "recipe_sha256": "ab12"},
    )
    ledger: list[dict[str, Any]] = [{"event": "started", "tasks": list(tasks)}]
    right: dict[str, np.ndarray] = {}
    for stage in range(0 if base else 1, finished + 1):
        if stage:
            event = {"event": "stage_trained", "stage": stage, "task": tasks[stage - 1], "seconds": 61.5 + stage}
            event |= {"train_rows": 500, "steps": 32, "tokens": 40_000 + stage, "trainable_parameters": 118_784}
            event |= {"flops": 3.0e12 + stage, "extra_forward_passes": 0}
            event |= {"stored_bytes": 480_000 * stage, "peak_memory_mib": 812.5, "train_loss": 0.4 / stage}
            ledger.append({key: value for key, value in event.items() if key not in drop_fields})
        for position, task in enumerate(tasks):
            if position >= stage > 0:
                continue
            if stage == 0:
                state = rng.random(rows) < 0.1
            elif position == stage - 1:
                state = rng.random(rows) < 0.9
            else:
                state = right[task] & (rng.random(rows) < keep)
            right[task] = state
            score, name_of_stage = 100 * float(state.mean()), stage_name(stage, tasks)
            stderr = 100 * float(state.std(ddof=1)) / rows**0.5
            matrix.set(stage, task, score, stderr, rows)
            ledger.append({"event": "cell", "stage": name_of_stage, "task": task, "seconds": 2.5})
            _write_cell(folder / "evaluation" / name_of_stage / task, task, name_of_stage, state, score, stderr)
        for k, benchmark in enumerate(general):
            matrix.set_general(stage, benchmark, 70.0 - 8 * k - 1.5 * stage, 1.0, 400)
    matrix.write(folder)
    if finished == len(tasks):
        ledger.append({"event": "run_complete"})
    text = "".join(json.dumps(event) + "\n" for event in ledger)
    (folder / "ledger.jsonl").write_text(text, encoding="utf-8")
    return folder


def _write_cell(folder: Path, task: str, stage: str, state: np.ndarray, score: float, stderr: float) -> None:
    folder.mkdir(parents=True)
    lines = [
        {
            "id": f"{task}/test/{i}",
            "prediction": f"answer {i}" if good else (NASTY if i % 3 == 0 else "" if i % 3 == 1 else "something else"),
            "score": float(good),
            "references": [f"answer {i}"],
            "question": f"What is shown here? {NASTY}",
            "images": ["train2017/000000012345.jpg"],
        }
        for i, good in enumerate(state)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    result = {"task": task, "stage": stage, "metric": "exact_match", "score": score, "stderr": stderr, "n": len(state)}
    (folder / "result.json").write_text(json.dumps({**result, "seconds": 2.5}), encoding="utf-8")


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns `write_fake_run` with the folder's name as first argument."""
    return lambda folder="run", /, **options: write_fake_run(tmp_path / folder, **options)
