"""A model with random weights, a stream on disk and recipes over it: everything small enough for hundreds of runs."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from method_options import SMALL
from PIL import Image

from mllm_cl.methods import METHODS as CATALOGUE
from mllm_cl.models.load import load_model
from mllm_cl.models.tiny import build_fixture
from mllm_cl.recipe import Recipe, load_recipe
from mllm_cl.streams import Stream, read_stream

torch.set_num_threads(1)

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20), "white": (240, 240, 240)}
METHODS: dict[str, list[Any]] = {
    "finetune": ["finetune"],
    "joint": ["joint"],
    "single": ["single"],
    "replay": [{"replay": {"size": 8, "share": 0.3}}],
    "lwf": ["lwf"],
    "ewc": [{"ewc": {"strength": 5.0, "samples": 6}}],
    "spectral_consolidation": ["spectral_consolidation"],
    "inquiry_regularization": [
        {"inquiry_regularization": {"pool": "POOL", "rollout": 2, "inquiry_memory": 4, "ratio": 0.5}}
    ],
    "llava_c": [
        {"spectral_consolidation": {"strength": 0.7}},
        {"inquiry_regularization": {"pool": "POOL", "rollout": 2, "inquiry_memory": 4, "ratio": 0.5}},
    ],
    "derpp": [{"derpp": {"size": 8, "ratio": 0.4}}],
    "agem": [{"agem": {"size": 8, "batch": 4}}],
    "gem": [{"gem": {"size": 8, "batch": 4}}],
    "si": [{"si": {"strength": 5.0, "damping": 0.1}}],
    "inflora": [{"inflora": {"samples": 6, "energy": 0.5}}],
    "oracle": [{"task_adapters": {"router": "oracle"}}],
    "prototype": [{"task_adapters": {"router": "prototype", "samples": 6}}],
}
METHODS |= {name: [{name: SMALL.get(name, {})}] for name in CATALOGUE if name not in METHODS | {"task_adapters": 0}}


@pytest.fixture(scope="session", autouse=True)
def _fast_collection() -> None:
    """Every task ends with a garbage collection, which is slow over everything that was imported."""
    importlib.import_module("mllm_cl.training.loop")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fixture(tmp_path_factory.mktemp("model") / "fixture")


def write_stream(
    folder: Path, *, tasks: int = 2, train: int = 24, test: int = 6, images: bool = True, seed: int = 0
) -> Path:
    """Writes tasks about coloured squares: `stream.yaml`, a JSON file per split and a few pictures."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for colour, value in COLOURS.items():
        Image.new("RGB", (16, 16), value).save(folder / f"{colour}.png")
    questions = ["What is this?", "Is this red?", "Which digit is this?"]
    entries = []
    for number in range(1, tasks + 1):
        name = f"task-{number}"
        for split, count in (("train", train), ("test", test), ("validation", 4)):
            rows = []
            for index in range(count):
                colour = rng.choice(list(COLOURS))
                with_image = images and not (split == "train" and index % 5 == 4)  # some rows are text only
                question = f"{rng.choice(questions)} {number}{'' if with_image else ' ' + colour}"
                row: dict[str, Any] = {
                    "id": f"{name}/{split}/{index}",
                    "conversations": [
                        {"from": "human", "value": ("<image>\n" if with_image else "") + question},
                        {"from": "gpt", "value": f"{colour} {'yes' if number % 2 else 'no'}"},
                    ],
                }
                rows.append(row | ({"image": f"{colour}.png"} if with_image else {}))
            (folder / f"{name}-{split}.json").write_text(json.dumps(rows))
        entries.append(
            {"name": name, "image_folder": "."}
            | {split: f"{name}-{split}.json" for split in ("train", "test", "validation")}
        )
    (folder / "pool.txt").write_text("What is this?\nIs this red?\nWhich digit is this?\na photo of a cat\n")
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "squares", "tasks": entries}))
    return path


def mostly_text(folder: Path) -> Path:
    """Writes a stream in which most batches hold no image at all."""
    path = write_stream(folder, images=False)
    rows = json.loads((folder / "task-1-train.json").read_text())
    rows[3]["image"] = "red.png"
    rows[3]["conversations"][0]["value"] = "<image>\nWhat is this?"
    (folder / "task-1-train.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def recipe_for(model_folder: Path, stream_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Returns recipes: name of the methods (or a list), overrides `section.key=value`."""
    return recipe_factory(model_folder, stream_file, tmp_path)


def recipe_factory(model_folder: Path, stream_file: Path, root: Path) -> Callable[..., Recipe]:
    def build(
        methods: str | list[Any] = "finetune", *overrides: str, run: str = "run", stream: Path | None = None
    ) -> Recipe:
        path = stream or stream_file
        entries = METHODS[methods] if isinstance(methods, str) else methods
        pool = json.dumps(str(path.parent / "pool.txt"))
        content = {
            "name": "small",
            "output_dir": str(root / run),
            "model": {"name_or_path": str(model_folder), "dtype": "float32", "lora": {"r": 4, "lora_alpha": 8}},
            "stream": {"path": str(path)},
            "methods": json.loads(json.dumps(entries).replace('"POOL"', pool)),
            "training": {
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 8,
                "logging_steps": 1,
                "save_strategy": "no",
                "warmup_steps": 0,
            },
            "evaluation": {"batch_size": 4, "max_new_tokens": 3, "num_workers": 0},
        }
        return load_recipe(content, overrides)

    return build


class ForkServer:
    """Runs recipes in forked children of one warm process; see `fork_server.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, recipe: Recipe, **request: Any) -> tuple[int, str]:
        """Returns the exit code (-9: killed) and what was printed."""
        self.count += 1
        log = self.folder / f"{self.count}.log"
        content = recipe.model_dump(mode="json")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"recipe": content, "log": str(log), **request}) + "\n")
        self.process.stdin.flush()
        return int(self._answer()), log.read_text(errors="replace")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


def contents(run: Path) -> dict[str, Any]:
    """What two equal runs have in common: bytes of the stages, the matrix, answers and scores, finished work."""
    kept: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "result.json":
            kept[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        elif path.is_file() and path.name not in ("ledger.jsonl", "recipe.yaml"):
            kept[name] = path.read_bytes()
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    kept["ledger"] = [
        (line["event"], line.get("stage"), line.get("task"), line.get("adapter_sha256")) for line in lines
    ]
    return kept


@pytest.fixture
def new_model(model_folder: Path) -> Callable[[], tuple[Any, Any]]:
    """Returns the model with random weights and its processor, fresh from disk."""
    return lambda: load_model(str(model_folder), dtype="float32")


@pytest.fixture(scope="session")
def stream(stream_file: Path) -> Stream:
    return read_stream(stream_file)


class Helpers:
    """The functions above, for tests (which cannot import a conftest)."""

    methods = METHODS
    recipes = staticmethod(recipe_factory)
    write_stream = staticmethod(write_stream)
    mostly_text = staticmethod(mostly_text)
    contents = staticmethod(contents)


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers
