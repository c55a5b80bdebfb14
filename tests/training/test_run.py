"""The run folder: what is in it, when it may be continued, what the matrix holds; the same recipe gives the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MllamaConfig

from mllm_cl.errors import ModelError, RunError, StreamError
from mllm_cl.methods.replay import Replay
from mllm_cl.models.load import load_model
from mllm_cl.models.tiny import build_fixture
from mllm_cl.training import run_folder
from mllm_cl.training.ledger import Ledger
from mllm_cl.training.loop import run_stream
from mllm_cl.training.seeds import derived_seed
from mllm_cl.training.states import load_states, save_states

SMALL = ("stream.limit.train=8", "stream.limit.test=2", "evaluation.stage_zero=false", "evaluation.max_new_tokens=2")


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("stages/*/adapter/**/*.safetensors"))
    }


def ledger_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def matrix_of(run: Path) -> dict:
    return json.loads((run / "matrix.json").read_text())


@pytest.fixture(scope="module")
def done(model_folder, stream_file, tmp_path_factory, helpers) -> Path:
    """A complete run; tests that change it work on a copy."""
    make = helpers.recipes(model_folder, stream_file, tmp_path_factory.mktemp("done"))
    return run_stream(make("llava_c", *SMALL, "training.save_strategy=steps", "training.save_steps=1")).root


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def same_recipe(run: Path, **changes):
    from mllm_cl.recipe import load_recipe

    content = yaml.safe_load((run / "recipe.yaml").read_text())
    return load_recipe(content | {"output_dir": str(run)} | changes)


def test_what_is_in_the_folder(done):
    names = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    states = {
        f"method/{m}/state.{kind}"
        for m in ("00-spectral_consolidation", "01-inquiry_regularization")
        for kind in ("json", "safetensors")
    }
    stage = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} | states
    cells = {
        f"evaluation/{stage}/{task}"
        for stage, task in (("01-task-1", "task-1"), ("02-task-2", "task-1"), ("02-task-2", "task-2"))
    }
    assert names == (
        {"recipe.yaml", "environment.json", "ledger.jsonl", "matrix.json", "matrix.csv"}
        | {f"stages/{name}/{file}" for name, file in product(("01-task-1", "02-task-2"), stage)}
        | {f"{cell}/{file}" for cell, file in product(cells, ("predictions.jsonl", "result.json", "key.txt"))}
    )


def test_the_ledger_says_what_was_done(done):
    events = [(line["event"], line.get("stage"), line.get("task")) for line in ledger_of(done)]
    assert events == [
        ("started", None, None),
        ("stage_trained", 1, "task-1"),
        ("cell", 1, "task-1"),
        ("drift", 1, None),
        ("stage_trained", 2, "task-2"),
        ("cell", 2, "task-1"),
        ("cell", 2, "task-2"),
        ("drift", 2, None),
        ("run_complete", None, None),
    ]
    trained = ledger_of(done)[1]
    assert trained["train_rows"] == 8
    assert trained["steps"] == 1
    assert trained["inquiry_rows"] == 4
    assert trained["trainable_parameters"] > 0
    assert trained["seconds"] > 0
    assert trained["tokens"] > 8
    assert trained["stored_bytes"] == sum(
        p.stat().st_size for p in (done / "stages/01-task-1").rglob("*") if p.is_file()
    )


def test_the_environment_says_what_a_reader_needs(done):
    environment = json.loads((done / "environment.json").read_text())
    assert environment.keys() >= {
        "versions",
        "python",
        "platform",
        "device",
        "processes",
        "threads",
        "seed",
        "recipe_sha256",
    }
    assert environment["versions"].keys() >= {"mllm_cl", "torch", "transformers", "peft", "accelerate"}
    assert environment["recipe_sha256"] == same_recipe(done).sha256
    assert matrix_of(done)["run"]["recipe_sha256"] == environment["recipe_sha256"]


def test_plain_peft_loads_the_adapter(done, model_folder):
    model, _ = load_model(str(model_folder), dtype="float32")
    loaded = PeftModel.from_pretrained(model, str(done / "stages/02-task-2/adapter"))
    stored = load_file(done / "stages/02-task-2/adapter/adapter_model.safetensors")
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert parameter.equal(stored[name.replace(".default", "")])


def test_another_recipe_is_refused(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"run of another recipe \(seed: 0 -> 1\)"):
        run_stream(same_recipe(copy, seed=1))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_another_name_or_place_is_the_same_run(copy):
    assert run_stream(same_recipe(copy, name="renamed")).root == copy
    assert ledger_of(copy)[-1]["event"] == "run_complete"


def test_a_changed_stream_is_refused(copy, stream_file, tmp_path):
    moved = Path(shutil.copytree(stream_file.parent, tmp_path / "moved" / stream_file.parent.name)) / "stream.yaml"
    text = (copy / "recipe.yaml").read_text().replace(str(stream_file), str(moved))
    (copy / "recipe.yaml").write_text(text)
    recipe = same_recipe(copy, stream=yaml.safe_load(text)["stream"])
    assert run_stream(recipe).root == copy  # the same rows at another place
    train = moved.parent / "task-2-train.json"
    train.write_text(train.read_text().replace("blue yes", "blue maybe").replace("blue no", "blue maybe"))
    with pytest.raises(StreamError, match="the rows of the stream changed since this run was started"):
        run_stream(recipe)


def test_a_changed_base_is_refused(copy, tmp_path):
    other = build_fixture(tmp_path / "other", seed=1)
    text = (copy / "recipe.yaml").read_text()
    section = yaml.safe_load(text)["model"]
    (copy / "recipe.yaml").write_text(text.replace(section["name_or_path"], str(other)))
    with pytest.raises(StreamError, match="the weights of the base model changed"):
        run_stream(same_recipe(copy, model=section | {"name_or_path": str(other)}))


def test_a_foreign_folder_is_refused(recipe_for, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="is not empty and not a run"):
        run_stream(recipe_for("finetune", *SMALL))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="is a file"):
        run_stream(recipe_for("finetune", *SMALL))


def test_a_mistake_leaves_no_folder_behind(recipe_for, tmp_path):
    from mllm_cl.errors import ModelError

    with pytest.raises(ModelError):
        run_stream(recipe_for("finetune", *SMALL, "model.name_or_path=/no/such/model"))
    assert not (tmp_path / "run").exists()


def test_two_at_once_are_refused(copy, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / "report.md.partial").write_text("half of what the other one writes")
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.1)
    handle = os.open(copy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another process is running this run"):
        run_stream(same_recipe(copy))
    assert (copy / "report.md.partial").exists()
    os.close(handle)  # as when the other one is killed
    run_stream(same_recipe(copy))
    assert not (copy / "report.md.partial").exists()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_broken_ledger_is_refused(copy):
    lines = (copy / "ledger.jsonl").read_text().splitlines()
    for broken in (lines[2][:20], "[]", '{"stage": 1}', '{"event": []}', '{"event": "stage_trained", "stage": 1}'):
        (copy / "ledger.jsonl").write_text("\n".join([*lines[:2], broken, *lines[3:]]) + "\n")
        with pytest.raises(RunError, match=r"ledger\.jsonl: line 3 is not JSON of a run"):
            run_stream(same_recipe(copy))


def test_a_changed_adapter_is_noticed(copy):
    shutil.rmtree(copy / "evaluation/02-task-2")
    with (copy / "stages/02-task-2/adapter/adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(RunError, match="not what the ledger says this stage has learnt"):
        run_stream(same_recipe(copy))


def test_a_changed_state_of_a_method_is_noticed(copy):
    """It steers what is learnt next, and a wrong one would not be seen in any score."""
    shutil.rmtree(copy / "evaluation/02-task-2")
    state = next((copy / "stages/02-task-2/method").glob("*/state.safetensors"))
    state.write_bytes(state.read_bytes() + b" ")
    with pytest.raises(RunError, match="method: is not what the ledger says this stage has learnt"):
        run_stream(same_recipe(copy))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"version": 1}', '{"version": 1, "data": []}', "[" * 9999, "nonsense"]
)
def test_a_state_that_nobody_has_written_is_refused(content, tmp_path):
    """In folders that no ledger vouches for, such as an adapter's that is evaluated by itself."""
    method = Replay()
    save_states(tmp_path, [method])
    load_states(tmp_path, [method])
    (tmp_path / "00-replay/state.json").write_text(content)
    with pytest.raises(RunError, match="replay"):
        load_states(tmp_path, [method])


def test_a_state_of_other_contents_is_refused(tmp_path):
    save_states(tmp_path, [Replay()])
    path = tmp_path / "00-replay/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {}}))
    with pytest.raises(RunError, match="not what replay has written"):
        load_states(tmp_path, [Replay()])
    (tmp_path / "00-replay/state.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RunError, match="cannot be read"):
        load_states(tmp_path, [Replay()])


def test_deleted_cells_are_measured_with_their_own_stage(copy, done):
    """Also those of stages before the last: never with the weights of another stage."""
    for name in ("01-task-1", "02-task-2"):
        shutil.rmtree(copy / "evaluation" / name / "task-1")
    run_stream(same_recipe(copy))
    for name in ("01-task-1", "02-task-2"):
        file = f"evaluation/{name}/task-1/predictions.jsonl"
        assert (copy / file).read_bytes() == (done / file).read_bytes()
    assert matrix_of(copy) == matrix_of(done)


def test_leftovers_are_removed(copy):
    (copy / "stages/02-task-2/checkpoints/checkpoint-1").mkdir(parents=True)
    (copy / "stages/02-task-2/adapter.partial").mkdir()
    (copy / "matrix.json.partial").write_text("{")
    run_stream(same_recipe(copy))
    assert not list(copy.rglob("*.partial"))
    assert not list(copy.rglob("checkpoints"))


# the matrix --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["finetune", "moelora", "clmoe", "smolora", "branchlora", "sd_lora", "l2p", "prototype"]
)
def test_stage_zero_is_a_row_of_its_own(method, recipe_for):
    """Also for methods that route or gate, which know nothing before the first task."""
    overrides = [override for override in SMALL if "stage_zero" not in override]
    matrix = matrix_of(run_stream(recipe_for(method, *overrides, "stream.limit.train=4")).root)
    assert matrix["stages"] == ["0-base", "01-task-1", "02-task-2"]
    assert [[cell is None for cell in row] for row in matrix["values"]] == [
        [False, False],
        [False, True],
        [False, False],
    ]


def test_all_tasks_fill_the_upper_triangle(recipe_for):
    matrix = matrix_of(run_stream(recipe_for("finetune", *SMALL, "evaluation.tasks=all")).root)
    assert matrix["stages"] == ["01-task-1", "02-task-2"]
    assert not any(cell is None for row in matrix["values"] for cell in row)


def test_the_validation_split(recipe_for):
    run = run_stream(recipe_for("finetune", *SMALL, "evaluation.split=validation", "stream.limit.validation=3")).root
    assert matrix_of(run)["n"] == [3, 3]
    lines = (run / "evaluation/02-task-2/task-1/predictions.jsonl").read_text().splitlines()
    assert all("/validation/" in json.loads(line)["id"] for line in lines)


@pytest.mark.parametrize(
    ("method", "measured"), [("joint", [[False, False], [True, True]]), ("single", [[True, False], [False, True]])]
)
def test_anchors_leave_cells_empty(method, measured, recipe_for):
    run = run_stream(recipe_for(method, *SMALL)).root
    assert [[cell is not None for cell in row] for row in matrix_of(run)["values"]] == measured
    rows = [line["train_rows"] for line in ledger_of(run) if line["event"] == "stage_trained"]
    assert rows == ([0, 16] if method == "joint" else [8, 8])
    assert run_stream(recipe_for(method, *SMALL)).root == run  # continued: nothing to do
    assert ledger_of(run)[-1]["event"] == "run_complete"


# determinism --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["llava_c", "replay"])
def test_the_same_seed_gives_the_same_bytes(method, recipe_for):
    overrides = (*SMALL, "model.lora.lora_dropout=0.1", f"seed={2**32 - 1}")
    one = run_stream(recipe_for(method, *overrides, run="one")).root
    two = run_stream(recipe_for(method, *overrides, run="two")).root
    other = run_stream(recipe_for(method, *overrides, f"seed={2**32 - 2}", run="other")).root
    assert adapter_bytes(one) == adapter_bytes(two)
    assert all(adapter_bytes(other)[name] != content for name, content in adapter_bytes(one).items())


def test_derived_seeds_keep_apart():
    seeds = [0, 1, 2, 2**31, 2**31 + 1, 2**32 - 1]
    drawn = {
        (seed, purpose, stage): derived_seed(seed, purpose, stage)
        for seed in seeds
        for purpose in ("training", "adapter", "methods", "calibration")
        for stage in range(100)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(0 <= value < 2**32 for value in drawn.values())
    ordered = sorted(drawn[0, "training", stage] for stage in range(100))
    assert min(later - earlier for earlier, later in pairwise(ordered)) > 1000  # a loader adds its epoch


# ledger -------------------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    first.append("cell", what="ä\u2028")
    with path.open("ab") as file:
        file.write('{"event": "cell", "score": "ä'.encode()[:-1])
    reader = Ledger(path, writable=False)
    assert [entry["event"] for entry in reader.entries] == ["cell"]
    assert not path.read_bytes().endswith(b"\n")  # only the main process repairs
    again = Ledger(path)
    again.append("cell", stage=1)
    assert [entry["event"] for entry in Ledger(path).entries] == ["cell", "cell"]
    assert again.find("cell", stage=1) is not None
    assert again.find("cell", stage=2) is None


def test_layers_that_not_all_processes_run_are_refused_before_loading(monkeypatch, recipe_for, tmp_path):
    """Mllama skips layers for rows without images; its configuration is enough to know."""
    MllamaConfig(text_config={"cross_attention_layers": [1], "num_hidden_layers": 2}).save_pretrained(
        tmp_path / "mllama"
    )
    monkeypatch.setattr("mllm_cl.training.loop.launcher", lambda training: "fsdp2")
    asked = recipe_for("finetune", f"model.name_or_path={tmp_path / 'mllama'}")
    with pytest.raises(ModelError, match="fsdp2: this model skips"):
        run_stream(asked)
