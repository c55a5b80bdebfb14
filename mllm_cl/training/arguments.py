"""The `training` section of a recipe -> `TrainingArguments` of one stage."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mllm_cl.errors import RecipeError, suggest

logger = logging.getLogger(__name__)

# Used where the recipe is silent. LoRA learning rate, schedule, warm-up and weight decay: LLaVA-1.5's LoRA recipe.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 1,
    "report_to": "none",
    "include_num_input_tokens_seen": "non_padding",
}

# Arguments of transformers 4 that 5 refuses, and what to write instead.
RENAMED: dict[str, str] = {
    "warmup_ratio": "warmup_steps: 0.03   # a float below 1 is a share of all steps",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "no_cuda": "use_cpu: true",
    "evaluation_strategy": "evaluation.tasks in the recipe",
    "tokenizer": "model.name_or_path in the recipe",
    "gradient_checkpointing": "activation_checkpointing: true",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs: {...}",
    "per_gpu_train_batch_size": "per_device_train_batch_size: 16",
    "per_gpu_eval_batch_size": "evaluation.batch_size in the recipe",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "a new output_dir in the recipe",
    "save_safetensors": "nothing: safetensors are always used",
    "half_precision_backend": "bf16: true",
    "torchdynamo": "torch_compile: true",
    "use_mps_device": "nothing: the device is found",
    "push_to_hub_token": "nothing: `hf auth login`",
    "push_to_hub_model_id": "nothing: `mllm-cl push`",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: {transformer_layer_cls_to_wrap: ...}",
    "fsdp_min_num_params": "fsdp_config: {min_num_params: ...}",
    "include_tokens_per_second": "include_num_input_tokens_seen: true",
    "jit_mode_eval": "nothing: it is gone",
    "past_index": "nothing: it is gone",
    "ray_scope": "nothing: it is gone",
    "tpu_num_cores": "nothing: it is gone",
}

# What the stream loop decides; saying it in the recipe would contradict it.
OWNED: dict[str, str] = {
    "output_dir": "output_dir at the top of the recipe",
    "seed": "seed at the top of the recipe",
    "data_seed": "seed at the top of the recipe",
    "remove_unused_columns": "nothing: rows are always kept whole",
    "label_names": "nothing",
    "do_train": "nothing",
    "do_eval": "nothing",
    "do_predict": "nothing",
    "eval_strategy": "evaluation.tasks in the recipe",
    "eval_on_start": "evaluation.stage_zero in the recipe",
    "load_best_model_at_end": "nothing: a stage ends with its last step",
    "resume_from_checkpoint": "nothing: the same command continues a run",
    "push_to_hub": "`mllm-cl push`",
    "hub_token": "nothing: `hf auth login`, or HF_TOKEN in the environment",
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "the section `hub` of the recipe, or `mllm-cl push`",
    ),
    "disable_tqdm": "nothing: the command line shows progress",
    "use_cache": "nothing",
    "fsdp_config": "nothing: what is sharded is decided by the run (`fsdp: true`)",
    "dataloader_persistent_workers": "nothing: every epoch has inquiries of its own, and starts workers that know them",
}


def check_training(section: dict[str, Any]) -> None:
    """Refuses what `TrainingArguments` would not understand, naming the line to write instead.

    Raises:
        RecipeError: an unknown, renamed or reserved key, or a value that is refused.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in section:
        if key in RENAMED:
            raise RecipeError(
                f"training.{key}: an argument of transformers 4 that version 5 does not have.",
                expected=RENAMED[key],
                fix="replace the line.",
            )
        if key in OWNED:
            raise RecipeError(
                f"training.{key}: decided by the run itself.", expected=OWNED[key], fix="remove the line."
            )
        if key not in known:
            raise RecipeError(f"training.{key}: unknown key.", expected=suggest(key, known - OWNED.keys()))
    training_arguments(section, Path("unused"), 0)


def runs_on_cpu(section: dict[str, Any]) -> bool:
    """True if the section says so, or if there is nothing else."""
    return bool(section.get("use_cpu")) or not torch.accelerator.is_available()


def training_arguments(section: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """Returns the arguments of one stage, defaults filled in.

    Raises:
        RecipeError: `TrainingArguments` refuses a value.
    """
    settings: dict[str, Any] = DEFAULTS | section | {"use_cpu": runs_on_cpu(section)}
    for name in ("fsdp", "deepspeed"):
        settings.pop(name, None)  # the run shards the weights, or makes the engine, itself
    for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise RecipeError(f"training.{name}: {value!r} is not usable.", expected="a number above 0")
    if settings["save_strategy"] not in ("steps", "epoch", "no"):
        raise RecipeError(f"training.save_strategy: {settings['save_strategy']!r}.", expected="steps, epoch or no")
    try:
        return TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            **settings,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(
            f"training: transformers refuses these arguments ({str(error).splitlines()[0]}).",
            fix="correct the section.",
        ) from error


def adapt_arguments(args: TrainingArguments) -> None:
    """Sets what `ContinualTrainer` depends on, in place."""
    if args.load_best_model_at_end:
        raise RecipeError("load_best_model_at_end: a task ends with its last step.", fix="set it to False.")
    args.remove_unused_columns = False  # the collator needs the rows as they are
    args.label_names = ["labels"]
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # the loss reaches every trained parameter
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # no buffer is ever written
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible and one is used; start with torchrun or accelerate to use all.", args.n_gpu)
        args._n_gpu = 1  # nn.DataParallel would see neither adapters nor companions
