"""A stream of two tasks with eight rows each, and a way to call a verb in this process."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

ROWS = {"train": 8, "validation": 4, "test": 4}
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line ended with."""

    code: int
    out: str
    err: str
    trace: str


def run_verb(*args: str | Path) -> Outcome:
    """Runs `mllm-cl ARGS` in this process."""
    from mllm_cl.cli.app import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    trace = "".join(traceback.format_exception(*result.exc_info)) if unexpected and result.exc_info else ""
    return Outcome(result.exit_code, result.stdout, result.stderr, trace)


def write_stream(folder: Path) -> Path:
    """Writes `stream.yaml` with the tasks `colour` and `same`, in LLaVA JSON, and their images."""
    tasks = []
    for task, question in (("colour", "What is this?"), ("same", "Is this red?")):
        images = folder / task / "images"
        images.mkdir(parents=True)
        for split, count in ROWS.items():
            rows = []
            for number in range(count):
                name = ("red", "blue")[number % 2]
                file = f"{split}-{number}.png"
                Image.new("RGB", (32, 32), tuple(v + number for v in COLOURS[name])).save(images / file)
                answer = name if task == "colour" else ("yes", "no")[number % 2]
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                rows.append({"id": f"{task}-{split}-{number}", "image": file, "conversations": turns})
            (folder / task / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
        tasks.append({"name": task, "image_folder": f"{task}/images", "metric": "exact_match"})
        tasks[-1] |= {split: f"{task}/{split}.json" for split in ROWS}
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "tasks": tasks}, sort_keys=False), encoding="utf-8")
    return path


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def call() -> Callable[..., Outcome]:
    """`call("matrix", folder)` runs `mllm-cl matrix FOLDER` in this process."""
    return run_verb


@pytest.fixture(scope="session")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="session")
def base_recipe(fixture_folder: Path, stream_file: Path) -> dict[str, Any]:
    """A valid recipe without `output_dir`."""
    return {
        "name": "tiny",
        "model": {"name_or_path": str(fixture_folder), "lora": {"r": 2, "lora_alpha": 4}},
        "stream": {"path": str(stream_file)},
        "methods": [],
        "training": {"learning_rate": 5.0e-2, "num_train_epochs": 4, "per_device_train_batch_size": 4},
        "evaluation": {"max_new_tokens": 2, "batch_size": 4, "stage_zero": False},
    }


RunOf = Callable[..., Path]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base_recipe: dict[str, Any]) -> RunOf:
    """Returns the folder of a finished run with these methods; made once, not to be changed."""
    made: dict[str, Path] = {}

    def run_of(*methods: Any, seed: int = 0) -> Path:
        key = json.dumps([methods, seed])
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            content = {**base_recipe, "methods": list(methods), "seed": seed, "output_dir": str(folder / "run")}
            outcome = run_verb("run", write_recipe(folder / "recipe.yaml", content))
            assert outcome.code == 0, outcome.err + outcome.trace
            made[key] = folder / "run"
        return made[key]

    return run_of


@pytest.fixture
def own_run(finished: RunOf, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may damage."""
    return Path(shutil.copytree(finished(), tmp_path / "own-run"))
