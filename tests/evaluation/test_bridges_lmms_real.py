"""The real lmms-eval, in another environment, on a task of our own: both ways, without a network.

Runs when `MLLM_CL_LMMS_EVAL_PYTHON` names an interpreter with lmms-eval 0.7 and mllm_cl installed.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm_cl.cli.app import app
from mllm_cl.evaluation.bridges.lmms_environment import VARIABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name an interpreter with lmms-eval"),
]

TASK = """
task: local_colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function local_utils.doc_to_visual
doc_to_text: !function local_utils.doc_to_text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, do_sample: false}
process_results: !function local_utils.process_results
metric_list:
  - {metric: answered, aggregation: mean, higher_is_better: true}
  - {metric: right, aggregation: mean, higher_is_better: true}
metadata: {version: 0.5}
"""
FUNCTIONS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]


def doc_to_text(doc):
    return doc["question"]


def process_results(doc, results):
    return {"answered": float(bool(results[0])), "right": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for number, (name, colour) in enumerate((("red", (220, 20, 20)), ("blue", (20, 20, 220)), ("grey", (90, 90, 90)))):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        doc = {
            "question": "What colour is this?" + "!" * number,
            "answer": name,
            "picture": str(folder / f"{name}.png"),
        }
        lines.append(json.dumps(doc) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "local_utils.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "local_colours.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")), encoding="utf-8")
    return folder


def test_our_command_runs_lmms_eval(
    tasks: Path, fixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_cl.evaluation.engine import GenerationSettings, generate
    from mllm_cl.models.load import load_model

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = ["evaluate", fixture_folder, "--tasks", "lmms:local_colours", "--include_path", tasks]
    result = CliRunner().invoke(
        app, [str(arg) for arg in [*args, "--output_path", tmp_path / "out", "--device", "cpu"]]
    )
    assert result.exit_code == 0, result.output
    place = tmp_path / "out" / "lmms-local_colours"
    content = json.loads((place / "result.json").read_text(encoding="utf-8"))
    assert (content["task"], content["profile"], content["n"]) == ("lmms:local_colours", "lmms_eval", 3)
    assert set(content["metrics"]) == {"answered", "right"}
    assert content["provenance"]["model"]["weights"]
    assert content["scorer"].endswith("/local_colours/0.5")
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    model, processor = load_model(str(fixture_folder), dtype="float32")
    options = (("stop_strings", ("\n\n",)),)
    rows: Any = rows_of(tasks)
    own = generate(model, processor, rows, GenerationSettings(3, options=options))
    assert [line["prediction"] for line in lines] == [answer.strip() for answer in own]
    assert [line["references"] for line in lines] == [["red"], ["blue"], ["grey"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lmms-local_colours"]


def rows_of(tasks: Path) -> list[dict[str, Any]]:
    """The rows of the task as our engine takes them."""
    from mllm_cl.data.rows import user_message

    docs = [json.loads(line) for line in (tasks / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return [
        {"id": doc["answer"], "messages": [user_message(doc["question"], 1)], "images": [Image.open(doc["picture"])]}
        for doc in docs
    ]


def plain_adapter(base: Path, folder: Path) -> Path:
    """A LoRA folder as PEFT writes it, with random factors that change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mllm_cl.models.load import load_model

    model, _ = load_model(str(base), dtype="float32")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    return folder


def routed_stage(base: Path, tasks: Path, folder: Path) -> Path:
    """The second stage of a run whose method chooses one of two adapters for every row."""
    own = []
    for name, question, answers in (
        ("colour", "What colour is this?", {"red": "red", "blue": "blue"}),
        ("warm", "Is this warm?", {"red": "yes", "blue": "no"}),
    ):
        turns = [
            {
                "id": f"{name}-{number}",
                "image": f"{picture}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answers[picture]},
                ],
            }
            for number, picture in enumerate(["red", "blue"] * 4)
        ]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(turns), encoding="utf-8")
        files = {"train": f"{name}.json", "test": f"{name}.json"}
        own.append({"name": name, "image_folder": str(tasks), "metric": "exact_match", **files})
    (folder / "stream.yaml").write_text(json.dumps({"name": "two", "tasks": own}), encoding="utf-8")
    recipe = {
        "name": "routed",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base), "lora": {"r": 2, "lora_alpha": 4}},
        "stream": {"path": str(folder / "stream.yaml")},
        "methods": [{"task_adapters": {"samples": 4, "reject": None}}],
        "training": {"learning_rate": 5.0e-2, "num_train_epochs": 4, "per_device_train_batch_size": 4},
        "evaluation": {"max_new_tokens": 2, "batch_size": 4, "stage_zero": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    result = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    return folder / "run" / "stages" / "02-warm"


@pytest.mark.parametrize("kind", ["adapter", "routed"])
def test_lmms_eval_measures_adapters(
    kind: str, tasks: Path, fixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA folder, and a stage with several adapters and a router: the answers are those of our own engine."""
    from mllm_cl.evaluation.engine import GenerationSettings, generate
    from mllm_cl.models.load import load_model
    from mllm_cl.training.checkpoint_loading import find_checkpoint, load_checkpoint

    place = (
        plain_adapter(fixture_folder, tmp_path / "lora")
        if kind == "adapter"
        else routed_stage(fixture_folder, tasks, tmp_path / "routed")
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = ["evaluate", place, "--tasks", "lmms:local_colours", "--include_path", tasks, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(arg) for arg in [*args, "--output_path", tmp_path / "out"]])
    assert result.exit_code == 0, result.output
    written = tmp_path / "out" / "lmms-local_colours"
    lines = [json.loads(line) for line in (written / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    checkpoint = load_checkpoint(find_checkpoint(str(place)))
    checkpoint.activate()
    settings = GenerationSettings(3, options=(("stop_strings", ("\n\n",)),))
    rows: Any = rows_of(tasks)
    own = generate(checkpoint.model, checkpoint.processor, rows, settings, checkpoint.route(None))
    assert [line["prediction"] for line in lines] == [answer.strip() for answer in own]
    base, processor = load_model(str(fixture_folder), dtype="float32")
    assert own != generate(base, processor, rows, settings)
    content = json.loads((written / "result.json").read_text(encoding="utf-8"))
    assert content["provenance"]["model"]["weights"] == checkpoint.weights
    assert content["stage"] == place.name


def test_their_command_finds_our_model(tasks: Path, fixture_folder: Path, tmp_path: Path) -> None:
    python = os.environ[VARIABLE]
    flags = ["--model", "mllm_cl", "--model_args", f"run={fixture_folder},device=cpu", "--tasks", "local_colours"]
    flags += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-m", "lmms_eval", *flags], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    found = list((tmp_path / "out").rglob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads(found[0].read_text(encoding="utf-8"))
    assert content["n-samples"]["local_colours"]["effective"] == 3


def test_a_crash_leaves_nothing_behind(
    tasks: Path, fixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = ["evaluate", fixture_folder, "--tasks", "lmms:no_such_task", "--include_path", tasks]
    result = CliRunner().invoke(app, [str(arg) for arg in [*args, "--output_path", tmp_path / "out"]])
    assert result.exit_code != 0
    assert "no_such_task" in str(result.exception) + result.output
    assert not list((tmp_path / "out").iterdir())
