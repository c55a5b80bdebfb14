"""The folder of a run: where everything is, and whether it may be continued."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mllm_cl.errors import RunError
from mllm_cl.files import PARTIAL, explained, write_json, write_text
from mllm_cl.parse import parse_yaml
from mllm_cl.recipe import Recipe
from mllm_cl.training.arguments import runs_on_cpu

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds: processes that read rows for a run outlive its being killed by five
PACKAGES = ("mllm_cl", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pillow")


class RunFolder:
    """Paths of a run folder; see DESIGN "A run on disk"."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.environment = self.root / "environment.json"
        self.ledger = self.root / "ledger.jsonl"

    def stage(self, name: str) -> Path:
        """Folder of a stage (`01-plates`): adapter/, method/ and, while it trains, checkpoints/."""
        return self.root / "stages" / name

    def cell(self, stage: str, measured: str) -> Path:
        """Folder of one evaluation cell: the stage's name and what is measured."""
        return self.root / "evaluation" / stage / measured


def find_run(recipe: Recipe) -> RunFolder:
    """Returns the folder of a run, new or to be continued; writes nothing.

    Raises:
        RunError: the folder holds something else or another recipe's run.
    """
    folder = RunFolder(recipe.output_dir)
    if folder.recipe.exists():
        _check_same(folder, recipe)
        return folder
    if folder.root.exists() and not folder.root.is_dir():
        raise RunError(f"{folder.root}: is a file.", expected="a folder for the run", fix="change output_dir.")
    if folder.root.exists() and any(path.name != folder.recipe.name + PARTIAL for path in folder.root.iterdir()):
        raise RunError(
            f"{folder.root}: is not empty and not a run.", expected="a new folder", fix="change output_dir or empty it."
        )
    return folder


@contextlib.contextmanager
def claimed(recipe: Recipe) -> Iterator[RunFolder]:
    """The folder of a run, new or to be continued, which no other run writes into meanwhile. A killed one has let go.

    Raises:
        RunError: it is in use, cannot be made, or holds something else.
    """
    folder = find_run(recipe)  # all processes check before one of them writes
    if not PartialState(cpu=runs_on_cpu(recipe.training)).is_main_process:
        yield folder
        return
    made = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    with explained(folder.root):
        folder.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.root, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield folder
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty: something has been written
            for path in made:
                path.rmdir()


def _lock(handle: int, folder: RunFolder) -> None:
    patient_until = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > patient_until:
                raise RunError(
                    f"{folder.root}: another process is running this run.",
                    expected="one at a time",
                    fix="wait until it has ended, or stop it and give the same command again; or change output_dir.",
                ) from error
            time.sleep(0.2)
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): take care that no second run works in it", folder.root, error)
            return None


def start_run(folder: RunFolder, recipe: Recipe) -> None:
    """Writes the recipe and the environment, unless they are there.

    Raises:
        RunError: the folder cannot be written.
    """
    if not folder.recipe.exists():  # first of all: this file makes the folder a run
        write_text(folder.recipe, recipe.to_yaml())
    if not folder.environment.exists():
        write_json(folder.environment, environment(recipe))


def _check_same(folder: RunFolder, recipe: Recipe) -> None:
    try:
        stored = Recipe.model_validate(parse_yaml(folder.recipe.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.recipe}: cannot be read ({error}).", fix="change output_dir.") from error
    if stored.sha256 == recipe.sha256:
        return
    differences = recipe_differences(stored, recipe)
    raise RunError(
        f"{folder.root}: is the run of another recipe ({'; '.join(differences[:6])}).",
        expected="the recipe that the run was started with",
        fix="change output_dir for the new recipe, or give the old one to continue.",
    )


def recipe_differences(first: Recipe, second: Recipe) -> list[str]:
    """Returns `key: old -> new` for every setting that differs, `output_dir`, `name` and `hub` left out."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            parts = [flatten(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
            return {key: child for part in parts for key, child in part.items()}
        return {prefix: value}

    one = flatten(first.model_dump(mode="json", exclude={"output_dir", "name", "hub"}))
    two = flatten(second.model_dump(mode="json", exclude={"output_dir", "name", "hub"}))
    return [
        f"{key}: {one.get(key)} -> {two.get(key)}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]


def environment(recipe: Recipe) -> dict[str, Any]:
    """Returns what a reader needs to repeat the run elsewhere: versions, machine, processes, seed."""
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "recipe_sha256": recipe.sha256,
    }
