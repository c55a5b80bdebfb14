"""Every mistake ends with exit code 2 and one message that names the place and the remedy; nothing is half-written."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

RunOf = Callable[..., Path]
REMEDY = re.compile(r"expected:|to fix:|did you mean|one of|missing; add|should be|must be|exactly one")

ROUTER = """
from mllm_cl.methods import Method

class Second(Method):
    name, summary, adapters = "second", "routes too", "per_task"

    def route(self, ctx, batch):
        return [{} for _ in batch.rows]
"""


class Lab:
    """What a case may use to make its mistake; `out` is where a run would be written."""

    def __init__(
        self, folder: Path, recipe: dict[str, Any], model: Path, stream: Path, finished: RunOf, call: Callable[..., Any]
    ) -> None:
        self.folder, self.base, self.model, self.stream_file = folder, recipe, model, stream
        self.finished, self.call = finished, call
        self.out = folder / "out"

    def recipe(self, **changes: Any) -> Path:
        """Writes the valid recipe with changes; `model__dtype=...` changes a nested key."""
        content = copy.deepcopy({**self.base, "output_dir": str(self.out)})
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = content
            for parent in parents:
                node = node[parent]
            node[last] = value
        return self.text(yaml.safe_dump(content, sort_keys=False))

    def text(self, content: str | bytes) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def stream(self, edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Writes a stream file with a mistake, and returns the section that names it."""
        content = yaml.safe_load(self.stream_file.read_text())
        for task in content["tasks"]:
            for key in ("train", "test", "validation", "image_folder"):
                task[key] = str(self.stream_file.parent / task[key])
        edit(content)
        path = self.folder / "stream.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return {"path": str(path)}

    def rows(self, edit: Callable[[list[dict[str, Any]]], object]) -> dict[str, Any]:
        """The same with a mistake in the training rows of `colour`."""
        rows = json.loads((self.stream_file.parent / "colour" / "train.json").read_text())
        edit(rows)
        path = self.folder / "train.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return self.stream(lambda content: content["tasks"][0].update(train=str(path)))

    def model_without(self, *names: str) -> Path:
        folder = Path(shutil.copytree(self.model, self.folder / "model"))
        for name in names:
            (folder / name).unlink()
        return folder

    def run(self) -> Path:
        """A finished run at `out`, to be damaged."""
        return Path(shutil.copytree(self.finished(), self.out))

    def damaged(self, name: str, edit: Callable[[str], str]) -> Path:
        run = self.run()
        (run / name).write_text(edit((run / name).read_text()), encoding="utf-8")
        return run

    def module(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (self.folder / "third_party_router.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(self.folder)


def methods(*entries: Any) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(methods=list(entries))]


def training(**settings: Any) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(training=settings)]


def changed(**changes: Any) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(**changes)]


def stream_edit(edit: Callable[[dict[str, Any]], object]) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(stream=lab.stream(edit))]


def row_edit(edit: Callable[[list[dict[str, Any]]], object]) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(stream=lab.rows(edit))]


def override(text: str) -> Callable[[Lab], list[Any]]:
    return lambda lab: ["run", lab.recipe(methods=["replay"]), text]


def with_stream(lab: Lab, **settings: Any) -> list[Any]:
    return ["run", lab.recipe(stream={"path": str(lab.stream_file), **settings})]


def evaluate(lab: Lab, checkpoint: str | Path, *more: str, tasks: str = "colour") -> list[Any]:
    return ["evaluate", checkpoint, "--tasks", tasks, "--output_path", lab.folder / "results", *more]


def occupied(lab: Lab) -> list[Any]:
    lab.out.mkdir()
    (lab.out / "thesis.txt").write_text("mine")
    return ["run", lab.recipe()]


def out_is_a_file(lab: Lab) -> list[Any]:
    lab.out.write_text("mine")
    return ["run", lab.recipe()]


def other_stream(lab: Lab) -> list[Any]:
    """The rows behind the same stream file change after the run was started."""
    folder = Path(shutil.copytree(lab.stream_file.parent, lab.folder / "data"))
    recipe = lab.recipe(stream={"path": str(folder / "stream.yaml")})
    assert lab.call("run", recipe).code == 0
    rows = json.loads((folder / "same" / "train.json").read_text())
    (folder / "same" / "train.json").write_text(json.dumps(rows[:-1]))
    return ["run", recipe]


def results_is_a_file(lab: Lab) -> list[Any]:
    (lab.folder / "results").write_text("mine")
    return evaluate(lab, lab.finished())


def without_matrix(lab: Lab) -> list[Any]:
    (lab.run() / "matrix.json").unlink()
    return ["matrix", lab.out]


def without_stages(lab: Lab) -> list[Any]:
    (lab.run() / "ledger.jsonl").unlink()
    return evaluate(lab, lab.out)


def plain_text_adapter(lab: Lab) -> list[Any]:
    folder = lab.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return evaluate(lab, folder, "--stream", str(lab.stream_file))


def first_task(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["tasks"][0].update(changes)


def row(index: int, **changes: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[index].update(changes)


EMPTY_ANSWER = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": " "}]
NO_ANSWER = EMPTY_ANSWER[:1]
TWO_IMAGES = [{"from": "human", "value": "<image><image>What is this?"}, {"from": "gpt", "value": "red"}]

CASES: dict[str, tuple[Callable[[Lab], list[Any]], tuple[str, ...]]] = {
    # the recipe file
    "recipe missing": (lambda lab: ["run", lab.folder / "nope.yaml"], ("nope.yaml", "no such recipe")),
    "recipe is a folder": (lambda lab: ["run", lab.folder], ("cannot be read",)),
    "recipe not YAML": (lambda lab: ["run", lab.text("name: [a\nb: {")], ("recipe.yaml", "not valid YAML")),
    "recipe empty": (lambda lab: ["run", lab.text("")], ("recipe.yaml", "instead of a mapping")),
    "recipe a list": (lambda lab: ["run", lab.text("- a\n- b\n")], ("holds list", "keys such as")),
    "recipe not UTF-8": (lambda lab: ["run", lab.text(b"name: \xff\xfe")], ("UTF-8",)),
    "unknown key": (changed(modle={"dtype": "auto"}), ("modle: unknown key", "did you mean 'model'?")),
    "unknown nested key": (changed(model__dtyp="auto"), ("model.dtyp: unknown key", "did you mean 'dtype'?")),
    "wrong type": (changed(seed="many"), ("seed", "integer", "'many'")),
    "negative seed": (changed(seed=-1), ("seed", "greater than or equal to 0")),
    "name with a slash": (changed(name="a/b"), ("name", "'a/b'")),
    "no output_dir": (lambda lab: ["run", lab.text("name: a\nstream: {name: quickstart}")], ("output_dir: missing",)),
    "dtype unknown": (changed(model__dtype="float31"), ("model.dtype", "'float31'", "bfloat16")),
    "batch size 0": (changed(evaluation__batch_size=0), ("evaluation.batch_size", "at least 1")),
    # methods
    "unknown method": (methods("repaly"), ("'repaly'", "did you mean 'replay'?")),
    "methods not a list": (changed(methods={"replay": {}}), ("methods", "must be a list")),
    "unknown option": (methods({"replay": {"sise": 3}}), ("replay.sise", "did you mean 'size'?")),
    "option of a method without": (methods({"finetune": {"size": 3}}), ("finetune.size", "no options")),
    "option out of range": (
        methods({"replay": {"share": 2}}),
        ("replay.share", "less than 1", "mllm-cl methods replay"),
    ),
    "option of the wrong type": (methods({"replay": {"size": "many"}}), ("replay.size", "'many'")),
    "unknown rate": (methods({"spectral_consolidation": {"rate": "powerup"}}), ("'powerup'", "power_up")),
    "unknown preset": (methods({"inquiry_regularization": {"preset": "uir"}}), ("'uir'",)),
    "pool missing": (methods({"inquiry_regularization": {"pool": "nope.txt"}}), ("pool", "nope.txt")),
    "third party missing": (methods("nowhere_at_all:Method"), ("nowhere_at_all:Method", "cannot be imported")),
    "ewc with spectral_consolidation": (methods("ewc", "spectral_consolidation"), ("ewc", "stacked", "remove")),
    "joint with replay": (methods("joint", "replay"), ("joint is a baseline", "replay")),
    "task_adapters with lwf": (methods("task_adapters", "lwf"), ("lwf needs the previous stage",)),
    "task_adapters with UIR": (
        methods("task_adapters", "inquiry_regularization"),
        ("inquiry_regularization needs the previous stage", "mllm-cl methods inquiry_regularization"),
    ),
    "two routers": (methods("task_adapters", "third_party_router:Second"), ("task_adapters and second", "keep one")),
    "listed twice": (methods("replay", "replay"), ("replay is listed twice", "keep one")),
    "policy against the recipe": (
        lambda lab: ["run", lab.recipe(methods=["spectral_consolidation"], model__adapters="one")],
        ("spectral_consolidation needs adapters: stacked", "model.adapters"),
    ),
    # training arguments
    "warmup_ratio": (training(warmup_ratio=0.03), ("training.warmup_ratio", "transformers 4", "warmup_steps: 0.03")),
    "group_by_length": (training(group_by_length=True), ("training.group_by_length", "train_sampling_strategy")),
    "no_cuda": (training(no_cuda=True), ("training.no_cuda", "use_cpu: true")),
    "evaluation_strategy": (
        training(evaluation_strategy="steps"),
        ("training.evaluation_strategy", "evaluation.tasks"),
    ),
    "logging_dir": (training(logging_dir="logs"), ("training.logging_dir", "TENSORBOARD_LOGGING_DIR")),
    "reserved argument": (training(output_dir="x"), ("training.output_dir", "decided by the run")),
    "reserved seed": (training(seed=3), ("training.seed", "seed at the top")),
    "unknown argument": (training(learning_rat=1.0), ("training.learning_rat", "did you mean 'learning_rate'?")),
    "learning rate below 0": (training(learning_rate=-1), ("training.learning_rate", "above 0")),
    "refused value": (training(lr_scheduler_type="cosinus"), ("training", "cosinus")),
    # LoRA
    "bad LoRA key": (changed(model__lora={"rank": 8}), ("model.lora.rank", "unknown key")),
    "r is 0": (changed(model__lora={"r": 0}), ("model.lora.r", "at least 1")),
    "use_dora": (changed(model__lora={"use_dora": True}), ("model.lora.use_dora", "not supported")),
    "target modules absent": (changed(model__lora={"target_modules": ["nope"]}), ("nope",)),
    # the stream
    "unknown stream": (changed(stream={"name": "quickstar"}), ("stream.name", "quickstart", "stream.path")),
    "name and path": (changed(stream={"name": "quickstart", "path": "x.yaml"}), ("stream", "exactly one")),
    "neither name nor path": (changed(stream={"seed": 0}), ("stream", "exactly one")),
    "stream file missing": (changed(stream={"path": "no/stream.yaml"}), ("no/stream.yaml", "does not exist")),
    "no tasks": (stream_edit(lambda content: content.update(tasks=[])), ("tasks", "at least one task")),
    "no test split": (stream_edit(lambda content: content["tasks"][0].pop("test")), ("tasks[0].test", "missing")),
    "unknown metric": (stream_edit(first_task(metric="exact_mach")), ("task colour", "did you mean 'exact_match'?")),
    "unknown key of a task": (stream_edit(first_task(metrics="x")), ("tasks[0].metrics", "did you mean 'metric'?")),
    "unknown format": (stream_edit(first_task(format="lava")), ("tasks[0].format", "'lava'", "llava")),
    "task name with a slash": (stream_edit(first_task(name="a/b")), ("tasks[0].name", "letters")),
    "two tasks of one name": (stream_edit(first_task(name="same")), ("tasks[1].name", "own name")),
    "data file missing": (stream_edit(first_task(train="nope.json")), ("tasks[0].train", "nope.json")),
    "image folder missing": (stream_edit(first_task(image_folder="nope")), ("tasks[0].image_folder", "nope")),
    "order with an unknown task": (
        lambda lab: with_stream(lab, order=["colour", "sam"]),
        ("'sam'", "did you mean 'same'?"),
    ),
    "order without a task": (lambda lab: with_stream(lab, order=["same"]), ("missing: colour", "exactly once")),
    "limit 0": (lambda lab: with_stream(lab, limit=0), ("limit", "0", "at least 1")),
    "limit negative": (lambda lab: with_stream(lab, limit={"train": -4}), ("limit.train", "-4", "at least 1")),
    "validation share": (lambda lab: with_stream(lab, validation_share=1.5), ("validation_share", "less than 1")),
    "unknown benchmark": (changed(evaluation__general=["quickstart-genera"]), ("did you mean 'quickstart-general'?",)),
    "no validation rows": (
        lambda lab: [
            *("run", lab.recipe(stream=lab.stream(lambda content: content["tasks"][1].pop("validation")))),
            "evaluation.split=validation",
        ],
        ("task same", "no validation rows", "validation_share"),
    ),
    # rows
    "image missing": (row_edit(row(2, image="nope.png")), ("train.json", "row 3", "nope.png", "does not exist")),
    "empty answer": (row_edit(row(1, conversations=EMPTY_ANSWER)), ("row 2", "final answer is empty")),
    "no answer": (row_edit(row(1, conversations=NO_ANSWER)), ("row 2", "does not end with an answer")),
    "placeholders": (row_edit(row(4, conversations=TWO_IMAGES)), ("row 5", "image")),
    "no training rows": (row_edit(lambda rows: rows.clear()), ("train.json",)),
    # the model
    "model missing": (
        lambda lab: ["run", lab.recipe(model__name_or_path=str(lab.folder / "nope"))],
        ("nope", "cannot be loaded"),
    ),
    "model without weights": (
        lambda lab: ["run", lab.recipe(model__name_or_path=str(lab.model_without("model.safetensors")))],
        ("model", "cannot be loaded"),
    ),
    "model without template": (
        lambda lab: ["run", lab.recipe(model__name_or_path=str(lab.model_without("chat_template.jinja")))],
        ("no chat template", "chat_template.jinja"),
    ),
    # the run folder
    "output_dir is a file": (out_is_a_file, ("is a file", "change output_dir")),
    "output_dir is not empty": (occupied, ("not empty and not a run", "change output_dir")),
    "output_dir of another recipe": (
        lambda lab: [*("run", lab.recipe(output_dir=str(lab.run()))), "training.learning_rate=0.5"],
        ("another recipe", "training.learning_rate: 0.05 -> 0.5"),
    ),
    "stream changed": (other_stream, ("the rows of the stream changed", "another output_dir")),
    "ledger damaged": (
        lambda lab: ["run", lab.recipe(output_dir=str(lab.damaged("ledger.jsonl", lambda text: "{" + text)))],
        ("ledger.jsonl", "not JSON"),
    ),
    "stage damaged": (
        lambda lab: evaluate(lab, lab.damaged("stages/02-same/adapter/adapter_config.json", lambda text: text[:20])),
        ("adapter", "cannot be read"),
    ),
    # overrides
    "override without =": (override("seed"), ("'seed'", "section.key=value")),
    "override into a value": (override("name.x=1"), ("name is a value", "shorten")),
    "override into a list": (override("methods.0=replay"), ("methods.0", "is a list")),
    "override of an absent method": (override("methods.ewc.weight=1"), ("no method 'ewc'",)),
    "override not YAML": (override("seed=[1"), ("the value is not YAML", "quote it")),
    # other verbs
    "evaluate nothing": (lambda lab: evaluate(lab, lab.folder / "nope"), ("does not exist", "PEFT adapter folder")),
    "evaluate any folder": (lambda lab: evaluate(lab, lab.folder), ("none of these", "PEFT adapter folder")),
    "evaluate an unknown task": (lambda lab: evaluate(lab, lab.finished(), tasks="colur"), ("did you mean 'colour'?",)),
    "evaluate no task": (lambda lab: evaluate(lab, lab.finished(), tasks=","), ("--tasks", "colour, same")),
    "evaluate on another base": (
        lambda lab: evaluate(lab, lab.finished() / "stages/01-colour", "--base_model", "tiny-llava"),
        ("another base model", "--base_model"),
    ),
    "adapter on another base": (
        lambda lab: evaluate(
            lab,
            lab.finished() / "stages/01-colour/adapter",
            *("--stream", str(lab.stream_file), "--base_model", "tiny-llava"),
        ),
        ("does not fit this base model", "same base model"),
    ),
    "adapter without a base": (plain_text_adapter, ("which base model", "--base_model")),
    "evaluate an unfinished run": (without_stages, ("has not completed a stage", "`base`")),
    "evaluate into a file": (results_is_a_file, ("is a file", "--output_path")),
    "evaluate with batch size 0": (
        lambda lab: evaluate(lab, lab.finished(), "--batch_size", "0"),
        ("--batch_size", "neither `auto` nor"),
    ),
    "evaluate with limit 0": (lambda lab: evaluate(lab, lab.finished(), "--limit", "0"), ("--limit",)),
    "evaluate with an unknown stream": (
        lambda lab: evaluate(lab, lab.finished(), "--stream", "quickstar"),
        ("'quickstar'", "built-in stream"),
    ),
    "compare one run": (lambda lab: ["compare", lab.finished()], ("cannot be compared", "two or more")),
    "compare with no run": (lambda lab: ["compare", lab.finished(), lab.folder], ("no recipe.yaml", "folder of a run")),
    "report of no run": (lambda lab: ["report", lab.folder], ("no recipe.yaml", "folder of a run")),
    "matrix of no run": (lambda lab: ["matrix", lab.folder / "nope"], ("no such folder", "folder of a run")),
    "matrix cut off": (
        lambda lab: ["matrix", lab.damaged("matrix.json", lambda text: text[: len(text) // 2])],
        ("matrix.json", "not valid JSON", "evaluate again"),
    ),
    "matrix not there": (without_matrix, ("no matrix.json", "mllm-cl run")),
    "matrix as two formats": (
        lambda lab: ["matrix", lab.finished(), "--csv", "--json"],
        ("--csv", "--json", "not both"),
    ),
    "show an unknown stream": (lambda lab: ["data", "show", "quickstar"], ("'quickstar'", "built-in stream")),
    "prepare an unknown stream": (lambda lab: ["data", "prepare", "quickstar"], ("'quickstar'", "quickstart")),
    "validate broken rows": (
        lambda lab: ["data", "validate", lab.rows(row(2, image="nope.png"))["path"]],
        ("1 error in the data", "validate again"),
    ),
    "describe an unknown method": (lambda lab: ["methods", "repaly"], ("did you mean 'replay'?",)),
    "demo of an unknown method": (lambda lab: ["demo", "--methods", "finetun"], ("did you mean 'finetune'?",)),
    "unknown verb": (lambda lab: ["rnu"], ("rnu",)),
    "unknown option of a verb": (lambda lab: ["report", lab.folder, "--pdf"], ("--pdf",)),
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Names and contents of everything below a folder, or of the file."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def lab(
    tmp_path: Path,
    base_recipe: dict[str, Any],
    fixture_folder: Path,
    stream_file: Path,
    finished: RunOf,
    call: Callable[..., Any],
) -> Lab:
    return Lab(tmp_path, base_recipe, fixture_folder, stream_file, finished, call)


@pytest.mark.parametrize("case", CASES)
def test_mistake(case: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    lab.module(ROUTER, monkeypatch)
    build, says = CASES[case]
    args = build(lab)
    before, existed = snapshot(lab.out), lab.out.exists()

    outcome = lab.call(*args)

    assert outcome.trace == ""
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    for fragment in says:
        assert fragment in outcome.err, outcome.err
    usage = outcome.err.startswith("Usage:")
    assert usage or (outcome.err.count("error: ") >= 1 and REMEDY.search(outcome.err)), outcome.err
    assert lab.out.exists() == existed
    assert snapshot(lab.out) == before
    results = lab.folder / "results"
    assert not results.exists() or results.is_file()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 45
