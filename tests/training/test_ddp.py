"""Two processes (torchrun, gloo) learn what one process with the same global batch learns, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torchrun import assert_same_learning, torchrun

from mllm_cl.methods import METHODS as CATALOGUE
from mllm_cl.methods import method_class

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

# 11 rows divide neither 4 x 2 nor 2 x 2 x 2; every fifth row has no image
SMALL = (
    "stream.limit.train=11",
    "stream.limit.test=5",
    "evaluation.stage_zero=false",
    "evaluation.max_new_tokens=2",
    "evaluation.batch_size=2",
    "training.logging_steps=1",
    # steps in proportion to the gradient: Adam would hide a wrong scale and amplify noise in gradients that are nearly zero
    "training.optim=sgd",
    "training.learning_rate=0.3",
    "training.max_grad_norm=0",
)
ONE, TWO = ("training.per_device_train_batch_size=8",), ("training.per_device_train_batch_size=4",)
ACCUMULATED = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
SINGLE_INQUIRY = [{"inquiry_regularization": {"pool": "POOL", "rollout": 0, "inquiry_memory": 0, "ratio": 0.1}}]
VARIANTS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "finetune": ("finetune", ONE, TWO),
    "stacked": ("finetune", ("model.adapters=stacked", *ONE), ("model.adapters=stacked", *TWO)),
    "joint": ("joint", ONE, TWO),
    "single": ("single", ONE, TWO),
    "replay": ("replay", ONE, TWO),
    "lwf": ("lwf", ONE, TWO),
    "ewc": ("ewc", ONE, TWO),
    "spectral_consolidation": ("spectral_consolidation", ONE, TWO),
    "inquiry_regularization": ("inquiry_regularization", ONE, TWO),
    "llava_c": ("llava_c", ONE, ACCUMULATED),
    "derpp": ("derpp", ONE, ACCUMULATED),
    "agem": ("agem", ONE, ACCUMULATED),
    "gem": ("gem", ONE, ACCUMULATED),
    "si": ("si", ONE, TWO),
    "inflora": ("inflora", ONE, TWO),
    "oracle": ("oracle", ONE, TWO),
    "prototype": ("prototype", ONE, ACCUMULATED),
    # one inquiry in all rows: in most steps one process has none; LoRA in the vision tower: its process has no image
    "few inquiries": (SINGLE_INQUIRY, ("model.train_vision=true", *ONE), ("model.train_vision=true", *TWO)),
    "one image": ("lwf", ("model.train_vision=true", *ONE, "TEXT"), ("model.train_vision=true", *ACCUMULATED, "TEXT")),
}
VARIANTS["llava_c 4bit"] = ("llava_c", ("model.quantization=4bit", *ONE), ("model.quantization=4bit", *TWO))
VARIANTS["fitted"] = ("llava_c", ONE, ("training.auto_find_batch_size=true", *TWO))
ROOM = {
    "fitted": [5, 3]
}  # rows in a pass that fit on each of the two; with an inquiry more than rows, both go on with two
PER_COMMIT = tuple(VARIANTS)
COVERED = {options for options, _, _ in VARIANTS.values() if isinstance(options, str)} | {"task_adapters"}
VARIANTS |= {
    name: (name, ONE, TWO) for name in CATALOGUE if name not in COVERED and "ddp" in method_class(name).supports
}
VARIANTS |= {
    f"{name} {kind}": (options, (f"model.quantization={kind}", *one), (f"model.quantization={kind}", *two))
    for name, (options, one, two) in VARIANTS.items()
    if isinstance(options, str) and "TEXT" not in one and not name.endswith("4bit") and name not in ROOM
    for kind in ("4bit", "8bit")
}
LOOKED_AT = ("inquiry_regularization", "ewc", "replay", "within flops")  # by the tests that are not about every variant
EVERY_VARIANT = [
    *PER_COMMIT,
    *(pytest.param(name, marks=pytest.mark.weekly) for name in VARIANTS if name not in PER_COMMIT),
]
FLOPS = ("budget.kind=flops", "budget.value=6e8")
VARIANTS["within flops"] = ("inquiry_regularization", (*FLOPS, *ONE), (*FLOPS, *TWO))  # steps need not be as many
FSDP = {"ACCELERATE_USE_FSDP": "true"}  # what `accelerate launch` sets for recipes/accelerate/fsdp2.yaml
SHARDED_TEST = "test_weights_in_shards_learn_what_whole_weights_learn"
SHARDED = ("finetune", "replay", "spectral_consolidation", "llava_c", "few inquiries", "one image")
NOT_ALONE = {"inquiry_regularization", "task_adapters"}  # covered by `llava_c`, `prototype`
SHARDED_EVERY = [
    *SHARDED,
    *(
        pytest.param(name, marks=pytest.mark.weekly)
        for name in ("prototype", *(name for name in CATALOGUE if name not in {*SHARDED, *NOT_ALONE}))
        if name == "prototype" or "fsdp2" in method_class(name).supports
    ),
]


@pytest.fixture(scope="module")
def both(request, fork_server, model_folder, stream_file, tmp_path_factory, helpers) -> dict[str, Any]:
    """Folders of the variants that are tested this time, trained by one and by two processes."""
    root = tmp_path_factory.mktemp("ddp")
    mostly_text = helpers.mostly_text(root / "text")
    own = [item for item in request.session.items if item.path == request.path]
    named = [item for item in own if "name" in getattr(getattr(item, "callspec", None), "params", {})]
    asked = [(item.callspec.params["name"], item.originalname) for item in named]
    variants = list(dict.fromkeys([*(name for name, _ in asked), *(LOOKED_AT if len(named) < len(own) else ())]))
    in_shards = [name for name, test in asked if test == SHARDED_TEST]

    def recipe(name: str, overrides: tuple[str, ...], run: str) -> Any:
        make = helpers.recipes(model_folder, stream_file, root / run)
        stream = mostly_text if "TEXT" in overrides else None
        chosen = [override for override in overrides if override != "TEXT"]
        return make(VARIANTS[name][0], *SMALL, *chosen, run=name.replace(" ", "-"), stream=stream)

    twos = {name: recipe(name, VARIANTS[name][2], "two") for name in variants}
    requests = [
        {"name": name, "recipe": two.model_dump(mode="json"), "room": ROOM.get(name, [])} for name, two in twos.items()
    ]
    shards = {name: recipe(name, VARIANTS[name][2], "shards") for name in dict.fromkeys(in_shards)}
    requests += [
        {"name": f"{name} in shards", "recipe": own.model_dump(mode="json"), "environment": FSDP}
        for name, own in shards.items()
    ]
    code, reports, log = torchrun(requests, root)
    folders = {}
    for name in variants:
        one = recipe(name, VARIANTS[name][1], "one")
        status, text = fork_server.run(one)
        assert status == 0, text
        folders[name] = (Path(one.output_dir), Path(twos[name].output_dir))
    sharded = {name: Path(own.output_dir) for name, own in shards.items()}
    return {"code": code, "reports": reports, "log": log, "folders": folders, "root": root, "shards": sharded}


def test_all_variants_complete(both):
    assert both["code"] == 0, both["log"]
    for report in both["reports"]:
        assert {name: text for name, text in report["outcome"].items() if text != "done"} == {}
        assert report["wrappers"] == 0  # one that stays would go on averaging the gradients of the next task


@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_two_processes_learn_what_one_learns(name, both):
    assert_same_learning(*both["folders"][name], name.split()[0], both["log"])


@pytest.mark.parametrize("name", SHARDED_EVERY)
def test_weights_in_shards_learn_what_whole_weights_learn(name, both):
    """FSDP2 against DDP, both on two processes: the same adapters, the same states of the methods, the same matrix."""
    two, shards = both["folders"][name][1], both["shards"][name]
    assert_same_learning(two, shards, name.split()[0], both["log"])
    matrices = [json.loads((run / "matrix.json").read_text()) for run in (two, shards)]
    assert matrices[0]["values"] == matrices[1]["values"]


def test_weights_were_in_shards_while_training(both):
    for report in both["reports"]:
        assert report["pieces"]
        assert all(share == 0.5 for share in report["pieces"])


@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_two_processes_answer_what_one_answers(name, both):
    one, two = both["folders"][name]
    assert json.loads((two / "matrix.json").read_text())["n"] == json.loads((one / "matrix.json").read_text())["n"]
    pairs = []
    for path in sorted(one.glob("evaluation/*/*/predictions.jsonl")):
        lines = [
            [json.loads(line) for line in (run / path.relative_to(one)).read_text().splitlines()] for run in (one, two)
        ]
        assert [line["id"] for line in lines[0]] == [line["id"] for line in lines[1]]
        pairs += [(first["prediction"], second["prediction"]) for first, second in zip(*lines)]
    different = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(different) <= 0.1 * len(pairs)  # a tie may fall either way


def test_a_budget_of_flops_counts_all_processes(both):
    """Two use up what one uses up, up to a step each; a step of two has less padding, as each pads its own rows."""
    for folder in both["folders"]["within flops"]:
        entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        stages = [entry for entry in entries if entry["event"] == "stage_trained"]
        planned = [entry["steps"] for entry in entries if entry["event"] == "budget"]
        assert [stage["steps"] for stage in stages] == planned
        assert sum(stage["flops"] for stage in stages) == pytest.approx(2 * 6e8, rel=0.1)


def test_terms_in_the_log_are_averaged_over_processes(both):
    for run in both["folders"]["inquiry_regularization"]:
        assert (run / "ledger.jsonl").exists()
    losses = [json.loads((run / "ledger.jsonl").read_text().splitlines()[1]) for run in both["folders"]["ewc"]]
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-3)
    assert losses[0]["tokens"] == losses[1]["tokens"]


def test_only_the_main_process_writes(both):
    """Besides its own part of the answers and its own random states."""
    inside = [path for path in both["reports"][1]["written"] if path.startswith(str(both["root"] / "two"))]
    assert inside
    assert {Path(path).name for path in inside} == {"predictions.part1.jsonl"}


def test_another_number_of_processes_is_refused(both, model_folder, stream_file, fork_server, helpers):
    """While there is something to train: the global batch, and so the result, would change."""
    two = both["folders"]["replay"][1]
    recipe = helpers.recipes(model_folder, stream_file, two.parent)("replay", *SMALL, *TWO, run="replay")
    assert fork_server.run(recipe)[0] == 0  # complete: nothing is left to train
    ledger = (two / "ledger.jsonl").read_text().splitlines()
    (two / "ledger.jsonl").write_text("\n".join(ledger[:3]) + "\n")
    code, log = fork_server.run(recipe)
    assert code == 2
    assert "was started with 2 process(es), now there are 1" in log


@pytest.mark.parametrize(
    ("method", "environment"),
    [
        pytest.param("llava_c", {}, id="ddp"),
        pytest.param("spectral_consolidation", FSDP, id="fsdp2", marks=pytest.mark.weekly),
    ],
)
def test_two_processes_killed_and_started_again(method, environment, model_folder, stream_file, tmp_path, helpers):
    saving = ("training.save_strategy=steps", "training.save_steps=1", "model.lora.lora_dropout=0.1")
    make = helpers.recipes(model_folder, stream_file, tmp_path)
    straight, killed = (make(method, *SMALL, *ACCUMULATED, *saving, run=run) for run in ("straight", "killed"))
    requests = [
        {"name": name, "recipe": recipe.model_dump(mode="json"), "environment": environment}
        for name, recipe in (("s", straight), ("k", killed))
    ]
    requests[1]["kill_at"] = 7  # step 2 of the second task
    code, _, log = torchrun(requests, tmp_path)
    assert code != 0
    assert "Signal 9" in log or "SIGKILL" in log
    checkpoints = Path(killed.output_dir) / "stages/02-task-2/checkpoints"
    kept = {"checkpoint-1"} | ({"cache"} if method == "llava_c" else set())
    assert {path.name for path in checkpoints.iterdir()} == kept
    assert (checkpoints / "checkpoint-1/random-1.json").exists()
    code, _, log = torchrun([{key: requests[1][key] for key in ("name", "recipe", "environment")}], tmp_path)
    assert code == 0, log
    found, expected = helpers.contents(Path(killed.output_dir)), helpers.contents(Path(straight.output_dir))
    assert [name for name in expected if found[name] != expected[name]] == []
