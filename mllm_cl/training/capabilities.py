"""Refuses an impossible recipe before any weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig

from mllm_cl.data.builders import BENCHMARKS
from mllm_cl.errors import EvaluationError, MethodError, RecipeError, StreamError, suggest
from mllm_cl.evaluation.scorers import find_metric
from mllm_cl.evaluation.scorers.meteor import meteor_available
from mllm_cl.methods import Method, adapter_policy, build_method
from mllm_cl.methods.base import overrides
from mllm_cl.models.quantize import check_bitsandbytes
from mllm_cl.recipe import MethodSpec, Recipe
from mllm_cl.streams import Stream
from mllm_cl.training.arguments import check_training
from mllm_cl.training.launchers import check_launcher, launcher
from mllm_cl.training.zero import check_zero

PROBE_RANK = 8
"""Stands for `model.lora.r: auto` until the model is there."""
ANCHORS = ("finetune", "joint", "single")


def build_methods(recipe: Recipe) -> list[Method]:
    """Returns the methods of a recipe, checked against each other, the launcher and the model section.

    Raises:
        MethodError: unknown, wrong options, listed twice, or not combinable.
        RecipeError: LoRA or training arguments are not usable.
    """
    specs = recipe.methods or [MethodSpec(name="finetune")]
    methods = [build_method(spec) for spec in specs]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise MethodError(f"methods: {name} is listed twice.", fix="keep one of the two entries.")
        if name in ANCHORS and len(names) > 1:
            others = ", ".join(other for other in names if other != name)
            raise MethodError(
                f"methods: {name} is a baseline of its own and cannot be combined with {others}.",
                fix=f"remove {name}, or run it by itself.",
            )
    policy = adapter_policy(methods, recipe.model.adapters)
    _check_needs(methods, policy)
    started = launcher(recipe.training)
    check_launcher(started, recipe.model.quantization)
    if recipe.budget is not None and recipe.budget.kind == "flops" and started not in ("single", "ddp"):
        raise RecipeError(
            f"budget.kind: flops does not work with {started} (its layers hold parts of the weights while work is counted).",
            expected="one process or ddp, or another budget",
            fix="start with ddp, or use trainable_parameters or stored_bytes.",
        )
    if recipe.training.get("auto_find_batch_size"):
        _check_rehearsal(methods, started)
    if recipe.model.quantization is not None:
        check_bitsandbytes(recipe.model.quantization)
    _check_launcher(methods, started)
    check_zero(recipe, started)
    check_lora(recipe.model.with_rank(PROBE_RANK).lora)
    check_training(recipe.training)
    return methods


def _check_rehearsal(methods: Sequence[Method], started: str) -> None:
    """Refuses `auto_find_batch_size` where a process that runs out of memory would leave the others waiting."""
    talking = [method.name for method in methods if overrides(method, "before_step")]
    if started in ("single", "ddp") and not (started == "ddp" and talking):
        return
    beside = f" and {talking[0]}" if started == "ddp" else ""
    raise RecipeError(
        f"training.auto_find_batch_size does not work with {started}{beside} "
        "(a process that runs out of memory leaves the others waiting).",
        expected="one process, or ddp without methods that exchange gradients",
        fix="give a per_device_train_batch_size that fits; `mllm-cl doctor RECIPE` estimates it.",
    )


def check_stream(recipe: Recipe, stream: Stream) -> None:
    """Refuses what the evaluation section asks of a stream that does not have it.

    Raises:
        StreamError: an unknown metric, or no rows in the split to be measured.
        RecipeError: an unknown general benchmark.
    """
    for name in recipe.evaluation.general:
        if name not in BENCHMARKS:
            raise RecipeError(f"evaluation.general: {name!r} does not exist.", expected=suggest(name, BENCHMARKS))
        if BENCHMARKS[name].metric is None:
            raise RecipeError(
                f"evaluation.general: {name} is scored by a judge, so a run cannot score it.",
                fix=f"write predictions with `mllm-cl evaluate CHECKPOINT --tasks {name} --predict_only`.",
            )
        if name in [task.name for task in stream]:
            raise RecipeError(
                f"evaluation.general: {name!r} is also the name of a task of {stream.name}.", fix="rename the task."
            )
    for task in stream:
        try:
            needs_java = find_metric(task.metric)[1].needs_java
        except EvaluationError as error:
            raise StreamError(
                f"{stream.name}, task {task.name}, metric: {error.given}",
                expected=error.expected,
                fix="correct `metric`.",
            ) from error
        if needs_java and not meteor_available():
            raise StreamError(
                f"{stream.name}, task {task.name}, metric: {task.metric} contains METEOR, which cannot run here.",
                expected="Java on the path and `pip install mllm_cl[caption]`",
                fix="install them, or set `metric: captions` (a public stream: stream.options.scoring=corrected).",
            )
        if recipe.evaluation.split == "validation" and not len(task.validation):
            raise StreamError(
                f"{stream.name}, task {task.name}: has no validation rows, which evaluation.split asks for.",
                expected="`validation:` rows in the stream file, or stream.validation_share in the recipe",
                fix="set stream.validation_share=0.1, or measure the test split.",
            )


def _check_needs(methods: Sequence[Method], policy: str) -> None:
    for method in methods:
        if "previous" in method.needs and policy == "per_task":
            raise MethodError(
                f"methods: {method.name} needs the previous stage as reference; with one adapter per task there is none.",
                expected="a method with one or stacked adapters beside it",
                fix=f"remove {method.name} or the method that keeps one adapter per task, or choose options of "
                f"{method.name} that need no previous stage, where it has some (`mllm-cl methods {method.name}`).",
            )
    for role in sorted({role for method in methods for role in method.roles}):
        both = [method.name for method in methods if role in method.roles]
        if len(both) > 1:
            raise MethodError(f"methods: {' and '.join(both)} each do the {role} of a recipe.", fix="keep one of them.")
    rewriting = [method.name for method in methods if policy == "one" and method.roles & {"consolidation"}]
    continued = [method.name for method in methods if "continued" in method.needs]
    if rewriting and continued:
        raise MethodError(
            f"methods: {continued[0]} needs the adapter to go on from where the last task left it, and "
            f"{rewriting[0]} changes it between tasks.",
            fix=f"remove {continued[0]} or {rewriting[0]}.",
        )
    instead = [method.name for method in methods if "training" in method.roles]
    on_adapter = [method.name for method in methods if "adapter" in method.needs]
    if instead and on_adapter:
        raise MethodError(
            f"methods: {on_adapter[0]} acts on the adapter that is trained, and {instead[0]} trains parameters of its own "
            "instead.",
            fix=f"remove {on_adapter[0]} or {instead[0]}.",
        )
    routing = [method.name for method in methods if overrides(method, "route")]
    if len(routing) > 1:
        raise MethodError(f"methods: {' and '.join(routing)} both route samples.", fix="keep one of them.")


def _check_launcher(methods: Sequence[Method], current: str) -> None:
    for method in methods:
        if current not in method.supports:
            raise MethodError(
                f"methods: {method.name} does not work under {current}, or no test has shown it yet.",
                expected="one of: " + ", ".join(sorted(method.supports)),
                fix="start it with one of these launchers.",
            )


def check_lora(settings: dict) -> LoraConfig:
    """Returns the LoRA configuration of the recipe.

    Raises:
        RecipeError: an unknown key, or a value that PEFT or we refuse.
    """
    known = [name for name in inspect.signature(LoraConfig).parameters if name not in ("task_type", "peft_type")]
    for key in settings:
        if key not in known:
            raise RecipeError(f"model.lora.{key}: unknown key.", expected=suggest(key, known))
    rank = settings.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        expected = "a whole number of at least 1 (`auto` is known once the model is loaded: `rank` in a run's ledger)"
        raise RecipeError(f"model.lora.r: {rank!r} is not a rank.", expected=expected)
    check_plain(settings, "model.lora")
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.lora: PEFT refuses these settings ({error}).") from error


def check_plain(settings: Mapping[str, Any], place: str) -> None:
    """Refuses LoRA settings that change the base weights, or whose update is not exactly B A.

    Raises:
        RecipeError: there is such a setting.
    """
    for key in ("use_dora", "modules_to_save", "target_parameters", "layer_replication", "lora_bias"):
        if settings.get(key):
            raise RecipeError(f"{place}.{key}: not supported; the update must be exactly B A.", fix="remove it.")
    for key in ("bias", "trainable_token_indices"):
        if settings.get(key) not in (None, "none"):
            raise RecipeError(f"{place}.{key}: base weights are never trained.", expected="none", fix="remove it.")
    start = settings.get("init_lora_weights", True)
    if start not in (True, "gaussian", "orthogonal"):
        raise RecipeError(
            f"{place}.init_lora_weights: {start!r} changes the base weights, or starts with an update that is not zero.",
            expected="true, gaussian or orthogonal",
            fix="remove it.",
        )
