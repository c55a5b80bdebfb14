"""What `mllm-cl doctor RECIPE` says of a recipe: whether it can run here, and what memory it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_cl.cli.environment import Check

if TYPE_CHECKING:
    from mllm_cl.recipe import Recipe
    from mllm_cl.streams import Stream

_OF_A_TASK = 256  # rows of each task whose length is looked at
_MEANING = {
    "libraries": "python and the libraries, where the device holds them",
    "weights": "the base model",
    "adapters": "all adapters that exist while a task is learnt",
    "methods": "copies that methods keep for reference",
    "gradients": "of what is trained",
    "optimizer": "states of the optimizer",
    "activations": "peak of one training step, companions of the methods included",
    "allocator": "kept by the C library of what a step gives back",
    "evaluation": "peak of one generation batch; not at the same time as training",
}


def check_recipe(path: Path, overrides: Sequence[str]) -> tuple[list[list[str]], Check]:
    """Returns the parts of the memory estimate as lines of a table, and whether they fit.

    Raises:
        MllmClError: the recipe is refused; the message says why, and what works instead.
    """
    from mllm_cl.recipe import load_recipe
    from mllm_cl.streams import stream_of_section
    from mllm_cl.training.arguments import runs_on_cpu
    from mllm_cl.training.capabilities import build_methods, check_stream
    from mllm_cl.training.memory import estimate_memory, readable

    recipe = load_recipe(path, overrides)
    methods = build_methods(recipe)
    stream = stream_of_section(recipe.stream)
    check_stream(recipe, stream)
    on_cpu = runs_on_cpu(recipe.training)
    train = [row for task in stream for row in task.train[:_OF_A_TASK]]
    test = [row for task in stream for row in task.test[:_OF_A_TASK]]
    held = resident_bytes() if on_cpu else 0
    ranked = with_rank(recipe, stream, on_cpu)
    estimate = estimate_memory(ranked, methods, train, test, earlier=len(stream) - 1, on_cpu=on_cpu, libraries=held)
    parts = [[name, readable(getattr(estimate, name)), meaning] for name, meaning in _MEANING.items()]
    parts.append(["peak", readable(estimate.total), f"{estimate.rows} rows of up to {estimate.length} tokens"])
    if estimate.towers_left_out:
        parts.append(
            ["towers", "unknown", "image tower and bridge, which are trained, are not in it; measure one step"]
        )
    if ranked is not recipe:
        parts.append(["rank", str(ranked.model.lora["r"]), "the largest within the budget (`model.lora.r: auto`)"])
    free, where = (free_bytes(), "of memory are free") if on_cpu else (device_bytes(), "on the device")
    found_text = f"needs about {readable(estimate.total)}, {readable(free)} {where}"
    if estimate.total <= free:
        return parts, Check(str(path), "ok", found_text)
    fix = (
        "smaller training.per_device_train_batch_size with training.gradient_accumulation_steps, "
        "training.activation_checkpointing: true, model.dtype: bfloat16, or model.quantization: 4bit"
    )
    return parts, Check(str(path), "broken", f"{found_text}, so it does not fit", fix)


def with_rank(recipe: Recipe, stream: Stream, on_cpu: bool) -> Recipe:
    """Returns the recipe with the rank that `model.lora.r: auto` stands for; any other recipe as it is.

    Which rank fits depends on what the methods train, so the weights are read and the first task is begun, as in a run.

    Raises:
        MllmClError: no rank fits, or the model cannot be loaded.
    """
    from mllm_cl.model_section import AUTO

    if recipe.model.lora.get("r") != AUTO:
        return recipe
    from accelerate import PartialState

    from mllm_cl.models.load import load_from_section
    from mllm_cl.training.budget import fitting_rank

    PartialState(cpu=on_cpu)
    model, processor = load_from_section(recipe.model)
    rank = fitting_rank(recipe, stream, model, processor)
    return recipe.model_copy(update={"model": recipe.model.with_rank(rank)})


def resident_bytes() -> int:
    """Returns what this process holds in memory now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def free_bytes() -> int:
    """Returns the memory of the machine that is free for a new process."""
    memory = Path("/proc/meminfo")
    if memory.exists():
        for line in memory.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
    """Returns the free memory of the first accelerator."""
    import torch

    return torch.accelerator.get_memory_info(0)[0]
