"""Shared by all tests: one thread, and a model with random weights (50 thousand parameters) that nobody downloads."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Loaded = tuple[Any, Any]
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that two processes are done at the same time."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_everywhere():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the fixture model and its processor."""
    from mllm_cl.models.tiny import build_fixture

    return build_fixture(tmp_path_factory.mktemp("model") / "fixture")


@pytest.fixture(scope="session")
def loaded(fixture_folder: Path) -> Loaded:
    """The fixture model and its processor; for reading only."""
    import gc

    from mllm_cl.models.load import load_model

    model, processor = load_model(str(fixture_folder), dtype="float32")
    gc.collect()
    gc.freeze()  # every training run collects garbage, which is slow over all that was imported by now
    return model, processor


@pytest.fixture(scope="session")
def fresh(loaded: Loaded) -> Callable[[], Loaded]:
    """Returns the fixture model as a copy that a test may change, and the processor."""
    return lambda: (copy.deepcopy(loaded[0]), loaded[1])


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a row about one plain picture."""
    from PIL import Image

    from mllm_cl.data.rows import assistant_message, user_message

    def make(row_id: str, question: str, answer: str, colour: tuple[int, int, int] | None = (9, 99, 199)) -> dict:
        images = [] if colour is None else [Image.new("RGB", (32, 32), colour)]
        return {
            "id": row_id,
            "messages": [user_message(question, len(images)), assistant_message(answer)],
            "images": images,
            "answers": [answer],
        }

    return make


@pytest.fixture(scope="session")
def small_stream(make_row: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Returns a function that makes a stream of up to three very easy tasks, all held in memory."""
    from mllm_cl.data.rows import Rows
    from mllm_cl.streams import Stream, Task

    tasks = {
        "colours": ("What colour is this?", lambda index: ["red", "blue"][index % 2]),
        "yes.no": ("Is this red?", lambda index: ["yes", "no"][index % 2]),
        "cats": ("Describe this.", lambda index: "a cat"),
    }

    def make(count: int = 2, rows: int = 24) -> Stream:
        made = []
        for name, (question, answer) in list(tasks.items())[:count]:
            train = [
                make_row(
                    f"{name}/{index}",
                    f"{question}{'!' * (index % 3)}",
                    answer(index),
                    list(COLOURS.values())[index % 2],
                )
                for index in range(rows)
            ]
            made.append(Task(name, Rows(train), Rows(train[:6])))
        return Stream("small", tuple(made), fingerprint="small")

    return make


@pytest.fixture(scope="session")
def make_learner(fresh: Callable[[], Loaded]) -> Callable[..., Any]:
    """Returns a function that makes a learner around a copy of the fixture model."""
    from peft import LoraConfig

    from mllm_cl.training.learner import Learner

    def make(*methods: Any, rank: int = 4, dropout: float = 0.0, **settings: Any) -> Any:
        model, processor = fresh()
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
        return Learner(model, processor, methods, lora, **settings)

    return make


@pytest.fixture
def train_task(tmp_path: Path) -> Callable[..., Any]:
    """Returns a function that trains the learner's next task of a stream and gives the trainer back."""
    from mllm_cl.training.arguments import training_arguments
    from mllm_cl.training.trainer import ContinualTrainer

    def train(learner: Any, stream: Any, *callbacks: Any, **section: Any) -> Any:
        stage = learner.stage + 1
        defaults = {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "include_num_input_tokens_seen": "no",
        }
        args = training_arguments(defaults | section, tmp_path / "checkpoints", seed=stage)
        trainer = ContinualTrainer(args=args, task=stream[stage - 1], stream=stream, learner=learner)
        for callback in callbacks:
            trainer.add_callback(callback)
        if trainer.rows:
            trainer.train()
        else:
            learner.end_task(trainer.ctx)
        return trainer

    return train


@pytest.fixture(scope="session")
def public_streams() -> Any:
    """The module that makes small folders of the public streams, `tests/fixtures/public_streams.py`."""
    file = Path(__file__).parent / "fixtures" / "public_streams.py"
    spec = importlib.util.spec_from_file_location("public_streams", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def public_folder(public_streams: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a public stream, made once; a test that changes files copies it first."""
    made: dict[Any, Path] = {}

    def folder(name: str) -> Path:
        maker = public_streams.MAKERS[name]
        if maker not in made:
            made[maker] = tmp_path_factory.mktemp(name)
            maker(made[maker])
        return made[maker]

    return folder
