"""Loads what somebody wants to measure: a run, one of its stages, a plain PEFT adapter, or a base model alone.

`find_checkpoint` says what a name means without loading a weight; `load_checkpoint` then loads it. A stage whose
methods route is rebuilt with its methods, so that every sample meets the adapter it was meant for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from transformers import ProcessorMixin

from mllm_cl.data.rows import Row
from mllm_cl.errors import ModelError, RunError
from mllm_cl.evaluation.cell import Answers
from mllm_cl.evaluation.matrix import BASE_STAGE
from mllm_cl.files import folder_sha256, is_gated
from mllm_cl.methods.base import overrides
from mllm_cl.models import adapters
from mllm_cl.models.load import base_fingerprint, load_from_section
from mllm_cl.models.tiny import TINY_LLAVA
from mllm_cl.parse import parse_json
from mllm_cl.recipe import ModelSection, Recipe, load_recipe
from mllm_cl.streams import Stream, Task
from mllm_cl.training.capabilities import build_methods
from mllm_cl.training.learner import Learner
from mllm_cl.training.ledger import Ledger
from mllm_cl.training.run_folder import RunFolder

BASE = "base"

Router = Callable[[Sequence[Row]], list[dict[str, float]] | None]


@dataclass(frozen=True)
class Found:
    """What a checkpoint's name means.

    Args:
        kind: a base model, a plain adapter folder, or a stage of a run.
        label: what results call it.
        model: which base model to load, and how.
        folder (`Path`, *optional*): the adapter folder, or the stage's.
        recipe (`Recipe`, *optional*): of the run it belongs to.
        tasks: names of the tasks learnt up to this stage.
        base (`str`, *optional*): fingerprint of the base weights that the run was trained on.
    """

    kind: Literal["base", "adapter", "stage"]
    label: str
    model: ModelSection
    folder: Path | None = None
    recipe: Recipe | None = None
    tasks: tuple[str, ...] = ()
    base: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to answer.

    Args:
        weights: identifies base weights, adapter and dtype, for the keys of cells.
        route: task -> routing function; `None` for tasks whose rows are not routed.
        activate: makes this checkpoint the one that `model` answers as, where several share a base model.
        answers: what answers where `model` is `None`, since another engine has it.
    """

    label: str
    model: Any
    processor: ProcessorMixin
    weights: str
    route: Callable[[str | None], Router | None]
    activate: Callable[[], None] = lambda: None
    answers: Answers | None = None


def find_checkpoint(name: str, base_model: str | None = None) -> Found:
    """Returns what `name` means: `base`, a run folder, a stage folder, a PEFT folder, or a model.

    Args:
        name: a path, a Hub id of a model, `tiny-llava` or `base`.
        base_model: the base model, instead of the one that the checkpoint names.

    Raises:
        ModelError: nothing usable is there.
        RunError: a run that has not completed a stage.
    """
    folder = Path(name)
    if name == BASE:
        return Found("base", BASE_STAGE, _section(base_model or TINY_LLAVA))
    if (folder / "recipe.yaml").is_file():
        return _last_stage(folder, base_model)
    if (folder / "adapter").is_dir():
        return _stage(folder, base_model)
    if (folder / "adapter_config.json").is_file():
        _refuse_gated(folder)
        return Found("adapter", folder.resolve().name, _section(base_model or _base_of(folder)), folder)
    is_model = (folder / "config.json").is_file() or (not folder.exists() and _may_be_hub_id(name))
    if not is_model:
        given = "is none of these" if folder.exists() else "does not exist"
        raise ModelError(
            f"{name}: {given}.",
            expected="a run folder, RUN/stages/NN-task, a PEFT adapter folder, a model, or `base`",
            fix="correct the path.",
        )
    return Found("base", folder.name, _section(name))


def load_checkpoint(found: Found) -> Checkpoint:
    """Loads the base model and, if there is one, the adapter (the adapters and their router).

    Raises:
        ModelError: the base model does not load, or the adapter belongs to another one.
    """
    return load_checkpoints([found])[0]


def load_checkpoints(several: Sequence[Found]) -> list[Checkpoint]:
    """Loads checkpoints that share a base model: the base once, every adapter beside it, in the order given.

    `activate` switches between them. A stage that routes cannot share; it must come alone.

    Raises:
        ModelError: as `load_checkpoint`.
    """
    model, processor = load_from_section(several[0].model)
    base = base_fingerprint(model)
    for found in several:
        if found.base is not None and found.base != base:
            raise ModelError(
                f"{found.folder}: was trained on another base model than {found.model.name_or_path}.",
                expected="the base model of the run, unchanged",
                fix="give it with --base_model.",
            )
    place = torch.device(PartialState(cpu=not torch.cuda.is_available()).device or "cpu")
    if routes(several[0]):
        return [_routed(several[0], model, processor, base, place)]
    named: list[tuple[Found, list[str], str]] = []
    for number, found in enumerate(several):
        if found.folder is None:
            named.append((found, [], base))
            continue
        folder = found.folder / "adapter" if found.kind == "stage" else found.folder
        name = f"{adapters.DEFAULT}{number or ''}"
        model = adapters.load_adapter(model, folder, name)
        named.append((found, [name], f"{base}/{folder_sha256(folder)}"))
    model.to(place)  # type: ignore[arg-type]
    model.eval()
    dtype = next(model.parameters()).dtype
    loaded = [
        Checkpoint(found.label, model, processor, f"{weights}/{dtype}", lambda task: None, _activation(model, names))
        for found, names, weights in named
    ]
    loaded[0].activate()
    return loaded


def routes(found: Found) -> bool:
    """True if the adapters of this checkpoint are chosen row by row."""
    if found.kind != "stage" or found.recipe is None:
        return False
    return any(overrides(method, "route") for method in build_methods(found.recipe))


def _activation(model: Any, names: Sequence[str]) -> Callable[[], None]:
    if not isinstance(model, PeftModel):
        return lambda: None
    return lambda: adapters.set_active(model, names)


def _routed(found: Found, model: Any, processor: ProcessorMixin, base: str, place: torch.device) -> Checkpoint:
    recipe, folder = found.recipe, found.folder
    assert recipe is not None
    assert folder is not None
    learner = Learner.from_recipe(recipe, model, processor, build_methods(recipe))
    learner.load_stage(folder / "adapter", folder / "method", len(found.tasks))
    learner.model.to(place)
    learner.model.eval()
    # routing looks at rows and at what the methods have stored; the rows of the tasks need not be there any more
    stream = Stream("learnt", tuple(Task(name, train=(), test=()) for name in found.tasks))

    def route(task: str | None) -> Router | None:
        return learner.router(learner.context(stream[len(stream) - 1], stream, Accelerator()), task)

    weights = f"{base}/{folder_sha256(folder)}/{next(learner.model.parameters()).dtype}"
    return Checkpoint(found.label, learner.model, processor, weights, route)


def _last_stage(run: Path, base_model: str | None) -> Found:
    stages = _trained(run)
    if not stages:
        raise RunError(
            f"{run}: has not completed a stage yet.",
            expected="a run with a trained stage",
            fix="run it, or give `base`.",
        )
    return _stage(run / "stages" / f"{max(stages):02d}-{stages[max(stages)]}", base_model)


def _stage(folder: Path, base_model: str | None) -> Found:
    run = folder.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():  # a stage that was copied out of its run
        adapter = folder / "adapter"
        _refuse_gated(adapter)
        return Found("adapter", folder.resolve().name, _section(base_model or _base_of(adapter)), adapter)
    recipe = load_recipe(run / "recipe.yaml")
    model = recipe.model if base_model is None else recipe.model.model_copy(update={"name_or_path": base_model})
    name = folder.resolve().name
    number = int(name.split("-")[0]) if name.split("-")[0].isdigit() else 0
    stages = _trained(run)
    tasks = tuple(stages[index] for index in range(1, number + 1) if index in stages)
    if len(tasks) != number or not number:
        raise RunError(f"{folder}: this stage is not complete.", fix="continue the run with `mllm-cl run`.")
    started = Ledger(RunFolder(run).ledger, writable=False).find("started") or {}
    return Found("stage", name, model, folder, recipe, tasks, started.get("base_fingerprint"))


def _refuse_gated(adapter: Path) -> None:
    """PEFT would load the experts of such an adapter and add them up, and the answers would look like answers."""
    if is_gated(adapter.parent):
        raise ModelError(
            f"{adapter}: holds experts, whose gates are built from the run that it belongs to.",
            expected="the run, or one of its stages with recipe.yaml two folders above",
            fix="give RUN/stages/NN-task.",
        )


def _trained(run: Path) -> dict[int, str]:
    """Returns the completed stages of a run: number -> task."""
    entries = Ledger(RunFolder(run).ledger, writable=False).entries
    return {entry["stage"]: entry["task"] for entry in entries if entry["event"] == "stage_trained"}


def _base_of(folder: Path) -> str:
    try:
        name = parse_json((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}: no readable adapter_config.json ({error}).", expected="a plain PEFT LoRA folder"
        ) from error
    if not name:
        raise ModelError(f"{folder}: does not say which base model it belongs to.", fix="give it with --base_model.")
    return name


def _section(name: str) -> ModelSection:
    return ModelSection(name_or_path=name)  # type: ignore[call-arg]


def _may_be_hub_id(name: str) -> bool:
    """True for `tiny-llava` and `user/model`; not for what lies below a folder that exists here."""
    parts = name.split("/")
    return name == TINY_LLAVA or (
        len(parts) == 2 and all(parts) and parts[0][0].isalnum() and not Path(parts[0]).is_dir()
    )
