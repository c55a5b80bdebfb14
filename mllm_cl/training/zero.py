"""DeepSpeed ZeRO: optimizer states (1), gradients (2) and weights (3) in shards while a task is trained.

Between tasks the weights are whole on every process, so all that happens there is what it is under DDP. accelerate would keep
one DeepSpeed configuration for the life of the process; here every task gets an engine of its own and nothing of it stays.

The engine steps inside of the backward pass and then frees the gradients. It adds them up in the order in which they become
ready, whatever their names: all processes have to run the same layers. Hence what is refused below.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers.integrations.deepspeed import propagate_args_to_deepspeed, unset_hf_deepspeed_config

from mllm_cl.errors import RecipeError
from mllm_cl.recipe import Recipe
from mllm_cl.training.launchers import deepspeed_config
from mllm_cl.training.zero_weights import OnlyLayers, weights_in_shards, weights_on_all

if TYPE_CHECKING:
    from mllm_cl.training.trainer import ContinualTrainer

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_SIZES = {
    **dict.fromkeys((1, 2), ("reduce_bucket_size", "allgather_bucket_size")),
    3: ("reduce_bucket_size", "stage3_param_persistence_threshold"),
}
# fetching ahead would need the same course of layers on all processes; the other replaces torch's `linear` for good
_STAGE_3 = {"stage3_prefetch_bucket_size": 0, "memory_efficient_linear": False}
_COMPILED_ON_CPU = "deepspeed_shm_comm"


def check_zero(recipe: Recipe, started: str) -> None:
    """Refuses what a recipe asks for and DeepSpeed, or our use of it, does not do; without importing it.

    Raises:
        RecipeError: there is such a setting, or DeepSpeed is not installed.
    """
    if started not in STAGES:
        return
    training, name = recipe.training, started
    zero_section(training, started)
    if training.get("save_strategy", "no") != "no" or "save_steps" in training:
        raise RecipeError(
            f"training.save_strategy, save_steps: {name} writes no checkpoints within a task "
            "(DeepSpeed's are pickles); an interrupted task starts again from its beginning.",
            expected="save_strategy: no, or neither of the two",
            fix="remove them, or start with ddp.",
        )
    if training.get("fp16"):
        raise RecipeError(
            f"training.fp16: does not work under {name} (DeepSpeed would cast the base weights themselves).",
            expected="training.bf16: true, or float32",
            fix="remove training.fp16, or start with ddp.",
        )
    for key in ("train_vision", "train_bridge"):
        if getattr(recipe.model, key):
            raise RecipeError(
                f"model.{key}: does not work under {name} (a process whose rows have no image has its gradients ready in "
                "another order, and DeepSpeed adds them up by order).",
                expected="adapters in the language part only",
                fix=f"remove model.{key}, or start with ddp.",
            )
    if find_spec("deepspeed") is None:
        raise RecipeError(
            f"launcher: {name} was asked for, and DeepSpeed is not installed.",
            expected="the package `deepspeed`",
            fix="`pip install 'mllm_cl[deepspeed]'` (on a CPU with DS_BUILD_OPS=0 set), or start with ddp.",
        )


def zero_section(training: Mapping[str, Any], started: str) -> dict[str, Any]:
    """Returns the `zero_optimization` section of the engine: the stage and, if given, sizes of buckets.

    Raises:
        RecipeError: the configuration says what the recipe says already, or what no test has shown.
    """
    config, stage = deepspeed_config(training) or {}, STAGES[started]
    given = {key: value for key, value in config.get("zero_optimization", {}).items() if value != "auto"}
    others = [key for key, value in config.items() if key != "zero_optimization" and value != "auto"]
    others += [f"zero_optimization.{key}" for key in given if key not in ("stage", *_SIZES[stage])]
    for part in ("OPTIMIZER", "PARAM"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"
        if os.environ.get(variable, "none") != "none":
            others.append(f"{variable}={os.environ[variable]}")
    if others:
        raise RecipeError(
            f"DeepSpeed's configuration: {', '.join(others)}: not supported.",
            expected=f"zero_optimization with stage, {' and '.join(_SIZES[stage])}; the rest is said by the recipe or `auto`",
            fix="remove these settings.",
        )
    sizes = {key: given[key] for key in _SIZES[stage] if key in given}
    return {"stage": stage, **sizes, **(_STAGE_3 if stage == 3 else {})}


@contextlib.contextmanager
def engine_of_task(trainer: ContinualTrainer) -> Iterator[None]:
    """Within the context, the training of a task, accelerate and transformers work with a DeepSpeed engine, if the learner
    is to have one; afterwards the model is as if there had been none."""
    section = trainer.learner.zero
    if section is None:
        yield
        return
    _start_deepspeed(trainer.args.device.type)
    accelerator, model = trainer.accelerator, trainer.learner.model
    # autocast around `forward`, as under DDP; DeepSpeed's own bfloat16 would cast the base weights, and so is not told
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    del model._is_accelerate_prepared
    state, args = accelerator.state, trainer.args
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "train_batch_size": args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * accelerator.num_processes,
            "gradient_clipping": args.max_grad_norm,
            "zero_optimization": dict(section),
        }
    )
    plugin.select(_from_accelerator_state=True)
    before = state.distributed_type, state.deepspeed_plugins, accelerator.gradient_accumulation_steps
    _set(state, DistributedType.DEEPSPEED, plugin)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    accelerator.deepspeed_engine_wrapped, trainer.is_deepspeed_enabled = None, True
    only_layers = OnlyLayers(model)
    with (weights_in_shards if section["stage"] == 3 else weights_on_all)(model):
        try:
            trainer.add_callback(only_layers)
            propagate_args_to_deepspeed(accelerator, args)
            yield
        finally:
            trainer.remove_callback(only_layers)
            accelerator.free_memory()  # the engine's hooks too
            trainer.deepspeed, trainer.is_deepspeed_enabled = None, False
            _set(state, *before[:2])
            accelerator.gradient_accumulation_steps = before[2]
            unset_hf_deepspeed_config()


def _set(state: AcceleratorState, distributed_type: DistributedType, plugin: Any) -> None:
    """Tells accelerate; every new `AcceleratorState` copies what the `PartialState` says."""
    state.distributed_type = PartialState().distributed_type = distributed_type
    state.deepspeed_plugins = plugin


def _start_deepspeed(device: str) -> None:
    """Lets DeepSpeed take over the process group that is there; the first time only."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # type: ignore[import-not-found]  # optional

    if deepspeed.comm.is_initialized():
        return
    if (
        device == "cpu"
    ):  # it would compile an extension first, which takes minutes, and waits for locks of killed starts
        deepspeed.ops.__compatible_ops__[_COMPILED_ON_CPU] = False
    backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else backend, auto_mpi_discovery=False)
