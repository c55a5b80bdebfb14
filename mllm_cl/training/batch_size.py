"""`auto_find_batch_size`: finds rows per forward pass that fit into memory, before the first step.

transformers starts the task again with smaller batches when memory runs out, here from weights that are half trained.
Instead a step over the task's longest rows is rehearsed and taken back; while it does not fit, the rows of one pass are
halved and the passes of one step doubled. The rows of a step, and with them the gradients, stay what the recipe says.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from mllm_cl.errors import RunError
from mllm_cl.training.memory import longest, optimizer_bytes

if TYPE_CHECKING:
    from mllm_cl.training.trainer import ContinualTrainer

logger = logging.getLogger(__name__)
_LOOKED_AT = 512  # rows of the task whose length is compared


def fit_batch_size(trainer: ContinualTrainer) -> None:
    """Sets `per_device_train_batch_size` and `gradient_accumulation_steps` of the trainer's arguments.

    All processes take the smallest of what fits on one of them. What methods do before and after the steps is not rehearsed.

    Raises:
        RunError: not even one row fits, or the rows of a pass cannot be halved.
    """
    args = trainer.args
    given = args.per_device_train_batch_size
    stride = max(1, trainer.rows // _LOOKED_AT)
    rows: Any = [trainer.train_dataset[index] for index in range(0, trainer.rows, stride)]  # type: ignore[index]
    rows = longest(trainer.learner.processor, rows, given)
    rows += rows[: given - len(rows)]
    while not all(gather_object([_fits(trainer, rows[: args.per_device_train_batch_size])])):
        size = args.per_device_train_batch_size
        if size == 1 or size % 2:
            raise RunError(
                f"auto_find_batch_size: a step with {size} row{'s' * (size > 1)} per pass does not fit into memory"
                + ("." if size == 1 else f", and {size} cannot be halved."),
                fix="save memory (training.activation_checkpointing, model.dtype: bfloat16, model.quantization), "
                "or give a per_device_train_batch_size that is a power of two.",
            )
        args.per_device_train_batch_size, args.gradient_accumulation_steps = (
            size // 2,
            args.gradient_accumulation_steps * 2,
        )
        trainer._train_batch_size = args.train_batch_size
    if args.per_device_train_batch_size != given:
        logger.warning(
            "%s: %d rows per pass do not fit; %d with gradient_accumulation_steps %d.",
            trainer.ctx.task.name,
            given,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
        )


def _fits(trainer: ContinualTrainer, rows: list[Any]) -> bool:
    """Rehearses a pass with room for the states of the optimizer beside it."""
    try:
        trained = sum(p.numel() for p in trainer.learner.model.parameters() if p.requires_grad)
        size = trained * optimizer_bytes(str(trainer.args.optim))
        states = torch.empty(size, dtype=torch.uint8, device=trainer.args.device)
        trainer.rehearse(rows)
        del states
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        error.__traceback__ = None  # it holds the activations
        gc.collect()
        clear_device_cache()
        return False
    return True
