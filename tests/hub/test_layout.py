"""What would be published: files, card, metadata, results; and what must not be among it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from mllm_cl.cli.push import prototype_router
from mllm_cl.errors import HubError, RunError
from mllm_cl.evaluation.matrix import AccuracyMatrix
from mllm_cl.hub import gather
from mllm_cl.recipe import HubSection

REPO = "owner/colours"


def texts(publication: Any) -> dict[str, str]:
    large = (".safetensors", ".png")
    return {file.path: file.read().decode() for file in publication.files if not file.path.endswith(large)}


def test_one_adapter_is_a_plain_peft_folder_with_its_results(finished: Path) -> None:
    publication = gather(finished, REPO)
    paths = [file.path for file in publication.files]
    assert paths == sorted(paths)
    adapter = finished / "stages" / "02-is.red" / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = next(file for file in publication.files if file.path == name)
        assert file.read() == (adapter / name).read_bytes()
        assert file.size == (adapter / name).stat().st_size
    for path in ("README.md", "figures/accuracy_matrix.png", "run/recipe.yaml", "run/ledger.jsonl", "run/matrix.json"):
        assert path in paths
    assert "run/evaluation/02-is.red/colour/result.json" in paths
    assert not [path for path in paths if "predictions" in path or "/method/" in path]
    assert publication.size == sum(file.size for file in publication.files)
    again = gather(finished, REPO)
    assert [file.read() for file in again.files] == [file.read() for file in publication.files]


def test_the_state_of_the_methods_comes_on_demand(finished: Path, routed: Path) -> None:
    state = "run/stages/02-is.red/method/00-replay/state.json"
    assert state in texts(gather(finished, REPO, with_state=True))
    assert "run/stages/02-is.red/method/00-task_adapters/state.json" in texts(gather(routed, REPO))


def test_the_card_says_what_the_hub_and_a_reader_need(finished: Path, fixture_folder: Path) -> None:
    section = HubSection(license="mit", base_model="owner/base", datasets={"colour": "owner/colours:test"})
    publication = gather(finished, REPO, section=section)
    card = ModelCard(texts(publication)["README.md"])
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "peft"
    assert data["license"] == "mit"
    assert data["datasets"] == ["owner/colours"]
    assert {"continual-learning", "mllm-cl", "lora", "replay"} <= set(data["tags"])
    matrix = AccuracyMatrix.read(finished)
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results["colour", "exact_match"] == pytest.approx(matrix.values[1][0], abs=1e-4)
    derived = {metric: value for (name, metric), value in results.items() if name.endswith("(2 tasks)")}
    assert derived["mean_final_accuracy"] == pytest.approx(sum(v or 0 for v in matrix.values[1]) / 2, abs=1e-4)
    assert "backward_transfer" in derived
    for text in (
        "colour, is.red",
        "replay.size",
        "training.learning_rate",
        "mllm-cl run recipe.yaml",
    ):
        assert text in card.text
    assert "seed: 0" in card.text
    assert 'PeftModel.from_pretrained(model, "owner/colours")' in card.text.replace("'", '"')
    config = json.loads(texts(publication)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    assert str(fixture_folder) not in card.text.split("<details>")[0]


def test_eval_results_are_entries_of_data_sets_on_the_hub(finished: Path) -> None:
    datasets = {"colour": "owner/colours:test", "is.red": "owner/red"}
    files = texts(gather(finished, REPO, section=HubSection(datasets=datasets)))
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/colour.yaml"]))
    assert [(entry.dataset_id, entry.task_id) for entry in entries] == [("owner/colours", "test")]
    assert entries[0].value == pytest.approx(AccuracyMatrix.read(finished).values[1][0], abs=1e-4)
    assert parse_eval_result_entries(yaml.safe_load(files[".eval_results/is.red.yaml"]))[0].task_id == "default"
    assert not [path for path in texts(gather(finished, REPO)) if path.startswith(".eval_results")]
    with pytest.raises(HubError, match=r"no 'colur'"):
        gather(finished, REPO, section=HubSection(datasets={"colur": "owner/colours"}))


def test_an_earlier_stage_shows_nothing_of_what_came_later(finished: Path) -> None:
    publication = gather(finished, REPO, 1, section=HubSection(datasets={"is.red": "owner/red"}))
    files = texts(publication)
    assert publication.branch == "stage-01"
    assert json.loads(files["run/matrix.json"])["tasks"] == ["colour"]
    assert not [path for path in files if "02-" in path or path.startswith(".eval_results")]
    events = [json.loads(line) for line in files["run/ledger.jsonl"].splitlines()]
    assert {event["event"] for event in events} == {"started", "stage_trained", "cell"}
    assert all(event.get("stage", 0) <= 1 for event in events)
    assert "is.red" not in files["README.md"]
    first = next(file for file in publication.files if file.path == "adapter_model.safetensors")
    assert first.read() == (finished / "stages/01-colour/adapter/adapter_model.safetensors").read_bytes()


def test_a_routed_run_has_a_folder_per_task_and_a_short_loader(routed: Path) -> None:
    files = texts(gather(routed, REPO, router=prototype_router(routed, None)))
    assert "adapters/colour/adapter_config.json" in files
    assert "adapters/is.red/adapter_config.json" in files
    assert "adapter_config.json" not in files
    loader = files["README.md"].split("```python\n")[1].split("```")[0]
    assert len(loader.splitlines()) <= 20
    assert "def route(" in loader
    by_name = texts(gather(routed, REPO))["README.md"].split("```python\n")[1].split("```")[0]
    assert len(by_name.splitlines()) <= 20
    assert "set_adapter" in by_name
    assert "def route(" not in by_name


def test_no_folder_of_this_machine_but_the_base_model_is_named(finished: Path, fixture_folder: Path) -> None:
    for path, text in texts(gather(finished, REPO)).items():
        assert str(finished) not in text, path
        assert str(finished.parent) not in text.replace(str(fixture_folder), ""), path
    recipe = yaml.safe_load(texts(gather(finished, REPO))["run/recipe.yaml"])
    assert recipe["stream"]["path"] == "stream.yaml"
    assert recipe["output_dir"] == "run"


@pytest.mark.parametrize("token", ["hf_" + "a1" * 17, "the-token-of-somebody"])
def test_a_token_is_never_published(
    finished: Path, tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-token-of-somebody")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stream"]["options"] = {"password": token}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(HubError, match="access token") as refused:
        gather(run, REPO)
    assert token not in str(refused.value)


def test_what_is_not_there_cannot_be_published(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no trained stage 3"):
        gather(finished, REPO, 3)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "stages/02-is.red/adapter")
    with pytest.raises(RunError, match="holds no adapter"):
        gather(run, REPO)
    with pytest.raises(RunError, match="exists already"):
        gather(finished, REPO).write(tmp_path)


def test_a_run_without_scores_says_so(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "matrix.json").unlink()
    files = texts(gather(run, REPO))
    assert "not measured" in files["README.md"]
    assert "model-index" not in files["README.md"]
    assert not [path for path in files if path.startswith("figures/")]
