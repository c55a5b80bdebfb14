"""DeepSpeed ZeRO-1, 2 and 3 on two processes (torchrun, gloo) learn what DDP learns. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from torchrun import assert_same_learning, torchrun

from mllm_cl.methods import METHODS as CATALOGUE
from mllm_cl.methods import method_class

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not INSTALLED, reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install 'mllm_cl[deepspeed]'"
)
SMALL = (
    "stream.limit.train=11",
    "stream.limit.test=5",
    "evaluation.stage_zero=false",
    "evaluation.max_new_tokens=2",
    "evaluation.batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
)
SGD = ("training.optim=sgd", "training.learning_rate=0.3", "training.max_grad_norm=0")
ADAMW = ("training.optim=adamw_torch", "training.learning_rate=0.01", "training.max_grad_norm=0.05")
STAGES = ("zero1", "zero2", "zero3")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("finetune", SGD),
    "replay": ("replay", SGD),
    "spectral_consolidation": ("spectral_consolidation", SGD),
    "llava_c": ("llava_c", SGD),
    "adamw": ("finetune", ADAMW),
    "bf16": ("finetune", ("model.dtype=bfloat16", "training.bf16=true", *SGD)),
    "one image": ("finetune", SGD),  # the vision tower is not run on both processes
}
PER_COMMIT = tuple(VARIANTS)
PARTS = {"llava_c": ("spectral_consolidation", "inquiry_regularization"), "prototype": ("task_adapters",)}
COVERED = {*PER_COMMIT, "inquiry_regularization", "task_adapters"}
VARIANTS |= {name: (name, SGD) for name in ("prototype", *(name for name in CATALOGUE if name not in COVERED))}


def stages(name: str) -> list[str]:
    """Stages that all methods of a variant support."""
    options = VARIANTS[name][0]
    parts = [method_class(part).supports for part in PARTS.get(options, (options,))]
    return [stage for stage in STAGES if all(stage in supports for supports in parts)]


CASES = [
    pytest.param(name, stage, marks=[] if name in PER_COMMIT else pytest.mark.weekly, id=f"{name}-{stage}")
    for name in VARIANTS
    for stage in stages(name)
]


def switches(launcher: str) -> dict[str, str]:
    """What `accelerate launch` sets for recipes/accelerate/zero1.yaml to zero3.yaml."""
    if launcher == "ddp":
        return {}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": launcher[-1]}


@pytest.fixture(scope="module")
def runs(request, model_folder, stream_file, tmp_path_factory, helpers) -> dict[str, Any]:
    """The variants that are tested this time under DDP and their stages, one after another in the same two processes."""
    root, requests, folders = tmp_path_factory.mktemp("zero"), [], {}
    asked = [
        item.callspec.params for item in request.session.items if item.path == request.path if "callspec" in vars(item)
    ]
    chosen = dict.fromkeys([*(own["name"] for own in asked if "stage" in own), "finetune"])
    text = helpers.mostly_text(root / "text")
    for name in chosen:
        method, overrides = VARIANTS[name]
        for launcher in ("ddp", *stages(name)):
            make = helpers.recipes(model_folder, stream_file, root / launcher)
            stream = text if name == "one image" else None
            recipe = make(method, *SMALL, *overrides, run=name.replace(" ", "-"), stream=stream)
            folders[name, launcher] = Path(recipe.output_dir)
            content = recipe.model_dump(mode="json")
            requests.append({"name": f"{name} {launcher}", "recipe": content, "environment": switches(launcher)})
    code, reports, log = torchrun(requests, root)
    return {"code": code, "reports": reports, "log": log, "folders": folders}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ddp
def test_all_complete_and_leave_nothing_behind(runs):
    assert runs["code"] == 0, runs["log"]
    assert len(runs["reports"]) == 2
    for report in runs["reports"]:
        assert {name: text for name, text in report["outcome"].items() if text != "done"} == {}
        assert report["wrappers"] == 0  # neither an engine nor its optimizer


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ddp
def test_optimizer_states_were_in_shards(runs):
    for report in runs["reports"]:
        assert set(report["partitions"]) == {f"{name} {stage}" for name, stage in runs["folders"] if stage != "ddp"}
        for share in report["partitions"].values():
            assert share == pytest.approx(0.5, abs=0.01)  # the last one is padded


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_the_engine_learns_what_ddp_learns(name, stage, runs):
    """The same adapters, the same states of the methods, the same matrix."""
    ddp, zero = runs["folders"][name, "ddp"], runs["folders"][name, stage]
    rounding = 1e-4 if name == "bf16" else 1e-5  # the sums of two processes have another order
    assert_same_learning(ddp, zero, VARIANTS[name][0], runs["log"], rounding)
    matrices = [json.loads((run / "matrix.json").read_text()) for run in (ddp, zero)]
    assert matrices[0]["values"] == matrices[1]["values"]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ddp
def test_a_killed_task_starts_again_from_its_beginning(model_folder, stream_file, tmp_path, helpers):
    make = helpers.recipes(model_folder, stream_file, tmp_path)
    straight, killed = (make("spectral_consolidation", *SMALL, *SGD, run=run) for run in ("straight", "killed"))
    requests = [
        {"name": name, "recipe": recipe.model_dump(mode="json"), "environment": switches("zero2")}
        for name, recipe in (("s", straight), ("k", killed))
    ]
    code, _, log = torchrun([requests[0], requests[1] | {"kill_at": 7}], tmp_path)  # step 2 of the second task
    assert code != 0
    assert "Signal 9" in log or "SIGKILL" in log
    run = Path(killed.output_dir)
    assert (run / "stages/02-task-2/checkpoints").is_dir()
    assert list(run.glob("stages/02-task-2/checkpoints/*")) == []
    code, _, log = torchrun([requests[1]], tmp_path)
    assert code == 0, log
    found, expected = helpers.contents(run), helpers.contents(Path(straight.output_dir))
    assert [name for name in expected if found.get(name) != expected[name]] == []


def test_every_method_that_supports_the_engine_is_compared():
    compared = {(part, case.values[1]) for case in CASES for part in PARTS.get(str(case.values[0]), (case.values[0],))}
    assert {(name, stage) for name in CATALOGUE for stage in STAGES if stage in method_class(name).supports} <= compared
