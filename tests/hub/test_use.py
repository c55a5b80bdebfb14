"""What a person does with a published run: the code of its card, without mllm_cl; a merged model; the verbs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm_cl.cli.push import hub_section, publish
from mllm_cl.hub import gather, push

PLAIN = """
import json, sys
sys.modules["mllm_cl"] = None  # an import of it would fail
import torch
torch.set_num_threads(1)
for blocks in json.load(open("blocks.json")):
    space = {}
    for block in blocks:
        exec(compile(block, "card", "exec"), space)
"""


def call(*args: object) -> Any:
    from mllm_cl.cli.app import app

    return CliRunner().invoke(app, [str(arg) for arg in args])


def blocks(card: bytes) -> list[str]:
    return [part.split("```")[0] for part in card.decode().split("```python\n")[1:]]


def answers(run: Path, stage: str, task: str) -> dict[str, str]:
    lines = (run / "evaluation" / stage / task / "predictions.jsonl").read_text().splitlines()
    return {line["id"]: line["prediction"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_the_code_of_the_cards_answers_as_the_runs_did(
    hub: Any, finished: Path, routed: Path, stream_file: Path, tmp_path: Path
) -> None:
    section = hub_section({}, base_model=None, licence=None)
    push(publish(finished, "owner/one", 1, section))
    push(publish(routed, "owner/routed", None, section))
    push(gather(routed, "owner/named"))  # its loader picks an adapter by the name of its task
    cards = [hub.tree(name)["README.md"] for name in ("owner/one", "owner/routed", "owner/named")]
    (tmp_path / "blocks.json").write_text(json.dumps([blocks(card) for card in cards]))
    shutil.copy(stream_file.parent / "0.png", tmp_path / "photo.jpg")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    measured = ((finished, "01-colour"), (routed, "02-is.red"))
    expected = [answers(run, stage, "colour")["colour-0"] for run, stage in measured]
    assert said[:2] == expected
    assert all(expected)
    assert len(said) == 3


def test_a_merged_model_answers_as_base_and_adapter(finished: Path, stream_file: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mllm_cl.evaluation.engine import GenerationSettings, generate
    from mllm_cl.streams import read_stream

    outcome = call("export", finished, "--merge", "--out", tmp_path / "merged")
    assert outcome.exit_code == 0, outcome.output
    assert not list((tmp_path / "merged").glob("adapter*"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    recipe_model = json.loads((finished / "stages/02-is.red/adapter/adapter_config.json").read_text())
    base = AutoModelForImageTextToText.from_pretrained(recipe_model["base_model_name_or_path"])
    changed = [name for name, value in base.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert changed
    assert all("language_model" in name and "proj" in name for name in changed)
    for task in read_stream(stream_file):
        said = generate(model, processor, task.test, GenerationSettings(max_new_tokens=2, batch_size=4))
        assert said == [answers(finished, "02-is.red", task.name)[row["id"]] for row in task.test]


def test_adapters_that_a_router_chooses_from_are_not_merged(routed: Path, tmp_path: Path) -> None:
    outcome = call("export", routed, "--merge", "--out", tmp_path / "merged")
    assert outcome.exit_code == 2
    assert "a router chooses" in outcome.output
    one = routed / "stages/02-is.red/adapter/colour"
    assert call("export", one, "--merge", "--out", tmp_path / "merged").exit_code == 0
    assert call("export", one, "--merge", "--out", tmp_path / "merged").exit_code == 2


def test_experts_are_published_with_their_gates_and_not_merged(
    hub: Any, gated: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    push(publish(gated, "owner/experts", None, hub_section({}, base_model=None, licence=None)))
    tree = hub.tree("owner/experts")
    assert "run/stages/02-is.red/method/00-branchlora/state.safetensors" in tree
    shutil.copy(stream_file.parent / "0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(tree["README.md"])
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip() == answers(gated, "02-is.red", "colour")["colour-0"]
    for place, words in (
        (gated, "gates depend on what is asked"),
        (gated / "stages/02-is.red/adapter", "RUN/stages/NN"),
    ):
        outcome = call("export", place, "--merge", "--out", tmp_path / "merged")
        assert outcome.exit_code == 2
        assert words in outcome.output


def test_export_without_merging_writes_what_a_push_uploads(finished: Path, tmp_path: Path) -> None:
    outcome = call("export", finished, "--out", tmp_path / "folder", "--repo_id", "owner/one")
    assert outcome.exit_code == 0, outcome.output
    publication = publish(finished, "owner/one", None, hub_section({}, base_model=None, licence=None))
    written = {path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*.*")}
    assert {file.path for file in publication.files} <= written


def test_dry_run_lists_every_file_and_asks_nobody(hub: Any, finished: Path) -> None:
    outcome = call("push", finished, "owner/one", "--all-stages", "--dry-run")
    assert outcome.exit_code == 0, outcome.output
    for text in (
        "owner/one, stage-01: 01-colour",
        "owner/one, main: 02-is.red",
        "README.md",
        "adapter_model.safetensors",
    ):
        assert text in outcome.output
    assert "nothing was uploaded" in outcome.output
    assert not hub.log


def test_push_and_pull_by_the_command_line(hub: Any, finished: Path, tmp_path: Path) -> None:
    outcome = call("push", finished, "owner/one", "--all-stages", "--with-state", "--private", "--license", "mit")
    assert outcome.exit_code == 0, outcome.output
    assert set(hub.repositories["owner/one"].branches) == {"main", "stage-01", "stage-02"}
    assert "hf_" not in outcome.output
    listed = {line.split()[0] for line in outcome.output.splitlines() if line.strip()}
    assert set(hub.tree("owner/one")) - {".gitattributes"} <= listed
    outcome = call("pull", "owner/one", "--out", tmp_path / "pulled")
    assert outcome.exit_code == 0, outcome.output
    assert "02-is.red" in outcome.output
    assert call("matrix", tmp_path / "pulled").exit_code == 0
    outcome = call("pull", "owner/one", "--out", tmp_path / "early", "--revision", "stage-01")
    assert f"mllm-cl run {tmp_path / 'early' / 'recipe.yaml'} stream.path=PATH" in outcome.output
    assert call("push", finished, "owner/one", "--stage", "1", "--all-stages").exit_code == 2
