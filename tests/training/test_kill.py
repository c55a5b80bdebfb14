"""A run that is killed at any moment and started again ends with the same bytes as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAINER = "mllm_cl.training.trainer:ContinualTrainer"
LEARNER = "mllm_cl.training.learner:Learner"
GREEDY = "transformers.generation.utils:GenerationMixin.generate"

# two tasks of three steps, a checkpoint after each; batches of 4 answers, two per cell; cells: 2 of stage 0, 1, 2
LLAVA_C: dict[str, dict[str, Any]] = {
    "before the environment": {"at": "replace:environment.json"},
    "in the first line of the ledger": {"at": "append:started", "torn": "ledger"},
    "first evaluation, between batches": {"at": GREEDY, "n": 2},
    "rollouts of the first task": {"at": GREEDY, "n": 5},
    "first step": {"at": f"{TRAINER}.training_step", "n": 1},
    "a later step": {"at": f"{TRAINER}.training_step", "n": 3},
    "in a checkpoint": {"at": "mllm_cl.training.checkpoint:save_tree", "n": 6},
    "before a checkpoint gets its name": {"at": "replace:checkpoint-2"},
    "after a checkpoint": {"at": "replace:checkpoint-2", "when": "after"},
    "between two checkpoints": {"at": "mllm_cl.training.checkpoint:rotate_checkpoints", "n": 2},
    "after the last step": {"at": f"{LEARNER}.end_task"},
    "in the consolidation": {"at": f"{LEARNER}._fold"},
    "before the adapter gets its name": {"at": "replace:adapter"},
    "between adapter and method": {"at": f"{LEARNER}.save_states"},
    "before the ledger": {"at": "append:stage_trained"},
    "in a line of the ledger": {"at": "append:stage_trained", "torn": "ledger"},
    "after the ledger": {"at": "append:stage_trained", "when": "after"},
    "in a line of answers": {"at": GREEDY, "n": 9, "torn": "predictions"},
    "before the result": {"at": "replace:result.json", "n": 3},
    "before the cell's line": {"at": "append:cell", "n": 3},
    "before the matrix": {"at": "replace:matrix.json", "n": 2},
    "between the tasks": {"at": f"{TRAINER}.__init__", "n": 2},
    "rollouts of the second task": {
        "at": "mllm_cl.methods.inquiry_regularization:InquiryRegularization._hold",
        "n": 3,
    },
    "a step of the second task": {"at": f"{TRAINER}.training_step", "n": 5},
    "the second adapter": {"at": "replace:adapter", "n": 2},
    "in the last evaluation": {"at": "replace:predictions.jsonl", "n": 5},
    "before the end": {"at": "append:run_complete"},
}
# replay, dropout, accumulation, two epochs, a checkpoint every second step, bfloat16
DROPOUT: dict[str, dict[str, Any]] = {
    "a step": {"at": f"{TRAINER}.training_step", "n": 7},
    "the first step of the second epoch": {"at": f"{TRAINER}.training_step", "n": 9},
    "in the middle of an accumulated batch": {"at": f"{TRAINER}.training_step", "n": 10},
    "after the last step": {"at": f"{LEARNER}.end_task"},
    "after the replay memory": {"at": "mllm_cl.methods.replay:Replay.end_task", "when": "after"},
    "drawing the replayed rows": {"at": "mllm_cl.methods.replay:Replay.train_rows", "n": 2, "when": "after"},
    "a step of the second task": {"at": f"{TRAINER}.training_step", "n": 21},
    "the last evaluation": {"at": "replace:result.json", "n": 3},
}
SMALL = ("stream.limit.train=12", "stream.limit.test=6", "training.per_device_train_batch_size=4")
RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llava_c": ("llava_c", (*SMALL, "training.save_strategy=steps", "training.save_steps=1")),
    "dropout": (
        [{"replay": {"size": 8, "share": 0.3}}],
        (
            *SMALL,
            "model.lora.lora_dropout=0.1",
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.num_train_epochs=2",
            "training.save_strategy=steps",
            "training.save_steps=2",
            "training.bf16=true",
            "evaluation.stage_zero=false",
        ),
    ),
}
CASES = [("llava_c", name) for name in LLAVA_C] + [("dropout", name) for name in DROPOUT]


@pytest.fixture(scope="module")
def straight(fork_server, model_folder, stream_file, tmp_path_factory, helpers) -> Callable[[str], Any]:
    """What the run leaves when nothing happens to it; run once per recipe."""
    kept: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in kept:
            recipe = helpers.recipes(model_folder, stream_file, tmp_path_factory.mktemp(name))(*flat(name))
            code, log = fork_server.run(recipe)
            assert code == 0, log
            kept[name] = helpers.contents(Path(recipe.output_dir))
        return kept[name]

    return run


def flat(name: str) -> tuple[Any, ...]:
    methods, overrides = RECIPES[name]
    return methods, *overrides


@pytest.mark.parametrize(("recipe_name", "point"), CASES, ids=[f"{recipe}: {point}" for recipe, point in CASES])
def test_a_killed_run_ends_with_the_same_bytes(recipe_name, point, recipe_for, fork_server, straight, helpers):
    recipe = recipe_for(*flat(recipe_name))
    code, log = fork_server.run(recipe, fault={"llava_c": LLAVA_C, "dropout": DROPOUT}[recipe_name][point])
    assert code == -9, log
    code, log = fork_server.run(recipe)
    assert code == 0, log
    assert_same(helpers.contents(Path(recipe.output_dir)), straight(recipe_name))


@pytest.mark.slow
def test_killed_again_and_again(recipe_for, fork_server, straight, helpers):
    """Every session gets a little further than the one before."""
    recipe, sessions, code, log = recipe_for(*flat("llava_c")), 0, -9, ""
    while code == -9 and sessions < 60:
        code, log = fork_server.run(recipe, fault={"at": "any", "n": 12})
        sessions += 1
    assert code == 0, log
    assert sessions > 8
    assert_same(helpers.contents(Path(recipe.output_dir)), straight("llava_c"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert not different


def test_a_complete_run_is_left_alone(recipe_for, fork_server, straight, helpers):
    recipe = recipe_for(*flat("dropout"))
    assert fork_server.run(recipe)[0] == 0
    root = Path(recipe.output_dir)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert fork_server.run(recipe)[0] == 0
    rewritten = {root / "matrix.json", root / "matrix.csv"}
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= rewritten
    assert_same(helpers.contents(root), straight("dropout"))


@pytest.mark.parametrize("name", ["adapter", "method", "checkpoint-2", "result.json", "matrix.json"])
def test_a_full_disk_loses_nothing(name, recipe_for, fork_server, straight, helpers):
    recipe = recipe_for(*flat("llava_c"))
    code, log = fork_server.run(recipe, fail={"name": name, "errno": "ENOSPC"})
    assert code == 2, log
    assert "RunError" in log
    assert "the disk is full" in log
    assert "start the same command again" in log
    assert not list(Path(recipe.output_dir).rglob("*.partial"))
    code, log = fork_server.run(recipe)
    assert code == 0, log
    assert_same(helpers.contents(Path(recipe.output_dir)), straight("llava_c"))


def test_an_unwritable_folder_is_named(recipe_for, fork_server):
    recipe = recipe_for(*flat("dropout"))
    code, log = fork_server.run(recipe, fail={"name": "recipe.yaml", "errno": "EACCES"})
    assert code == 2, log
    assert "recipe.yaml: not writable" in log
    assert "choose another output_dir" in log


def test_the_last_stage_stays_loadable_when_the_disk_fills_up(recipe_for, fork_server, straight):
    """RLIMIT_FSIZE: real failed writes, in the middle of a file and inside safetensors."""
    recipe = recipe_for(*flat("dropout"))
    code, log = fork_server.run(recipe, fault={"at": f"{TRAINER}.__init__", "n": 2})
    assert code == -9, log
    stage = Path(recipe.output_dir) / "stages/01-task-1"
    before = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    code, log = fork_server.run(recipe, largest_file=4096)
    assert code == 2, log
    assert "the disk is full" in log
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == before
    code, log = fork_server.run(recipe)
    assert code == 0, log
    ledger = [json.loads(line) for line in (Path(recipe.output_dir) / "ledger.jsonl").read_text().splitlines()]
    assert ledger[-1]["event"] == "run_complete"
