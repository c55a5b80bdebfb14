"""DeepSpeed ZeRO-1 and 2 on two processes (torchrun, gloo) learn what DDP learns. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchrun import torchrun

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
METHODS = ("finetune", "replay", "spectral_consolidation")
VARIANTS = {name: (name, SGD) for name in METHODS} | {
    "adamw": ("finetune", ADAMW),
    "bf16": ("finetune", ("model.dtype=bfloat16", "training.bf16=true", *SGD)),
}
STAGES = ("zero1", "zero2")


def switches(launcher: str) -> dict[str, str]:
    """What `accelerate launch` sets for recipes/accelerate/zero1.yaml and zero2.yaml."""
    if launcher == "ddp":
        return {}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": launcher[-1]}


@pytest.fixture(scope="module")
def runs(model_folder, stream_file, tmp_path_factory, helpers) -> dict[str, Any]:
    """Every variant under DDP and both stages, one after another in the same two processes."""
    root, requests, folders = tmp_path_factory.mktemp("zero"), [], {}
    for name, (method, overrides) in VARIANTS.items():
        for launcher in ("ddp", *STAGES):
            make = helpers.recipes(model_folder, stream_file, root / launcher)
            recipe = make(method, *SMALL, *overrides, run=name)
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
        assert set(report["partitions"]) == {f"{name} {stage}" for name in VARIANTS for stage in STAGES}
        for share in report["partitions"].values():
            assert share == pytest.approx(0.5, abs=0.01)  # the last one is padded


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("launcher", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_learns_what_ddp_learns(name, launcher, runs):
    """The same adapters, the same states of the methods, the same matrix."""
    ddp, zero = runs["folders"][name, "ddp"], runs["folders"][name, launcher]
    files = sorted(path.relative_to(ddp) for path in ddp.glob("stages/*/*/**/*.safetensors"))
    assert files, runs["log"]
    learnt = 0.0
    for file in files:
        expected, found = load_file(ddp / file), load_file(zero / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, f=file, k=key: f"{f} {k}: {m}"
            )
            if key.endswith("lora_B.weight"):
                learnt = max(learnt, tensor.abs().max().item())
    assert learnt > 1e-3
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
    for stage in STAGES:
        assert {name for name in CATALOGUE if stage in method_class(name).supports} == set(METHODS)
