"""The budget of a recipe: what a method may cost, so that a comparison of methods is one at equal cost.

Under `trainable_parameters` every method gets the largest LoRA rank whose trained parameters fit: a recipe with another
rank is refused and told which one it is, as methods that train one factor or some of the layers need another rank than
the others; `model.lora.r: auto` finds it. Under `stored_bytes` a run stops at the stage that keeps more on disk (adapters
and method states). Under `flops` every stage takes as many optimizer steps as its work leaves room for (`flops.py` says
what is counted): what a method spends on teachers, rollouts, memories and statistics it cannot spend on steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, ProcessorMixin

from mllm_cl.errors import RecipeError, RunError
from mllm_cl.models.extra_parameters import attached, detach
from mllm_cl.recipe import BudgetSection, Recipe
from mllm_cl.streams import Stream
from mllm_cl.training.capabilities import PROBE_RANK, build_methods
from mllm_cl.training.learner import Learner
from mllm_cl.training.trainer import ContinualTrainer


def check_trainable(budget: BudgetSection | None, parameters: int, rank: int, extra: int = 0) -> None:
    """Refuses a rank that is not the largest one within the budget.

    Args:
        parameters: trained in the first task, at `rank`; but for `extra` they grow in proportion to it.
        extra: those of them that methods train beside the adapters, whatever the rank.

    Raises:
        RecipeError: another rank would fit, or none.
    """
    if budget is None or budget.kind != "trainable_parameters" or parameters == extra:
        return
    per_rank = (parameters - extra) // rank
    fitting = largest_rank(budget, per_rank, extra)
    if fitting != rank:
        raise RecipeError(
            f"budget: {budget.value} trainable parameters; with rank {rank} this recipe trains {parameters}.",
            expected=f"model.lora.r={fitting}, the largest rank that fits ({per_rank * fitting + extra} parameters)",
            fix=f"set model.lora.r={fitting} and scale model.lora.lora_alpha with it.",
        )


def check_stored(budget: BudgetSection | None, stored: int, stage: str) -> None:
    """Stops a run that keeps more than its budget.

    Raises:
        RunError: it does.
    """
    if budget is not None and budget.kind == "stored_bytes" and stored > budget.value:
        raise RunError(
            f"budget: {budget.value} stored bytes; after {stage} adapters and method states take {stored}.",
            fix="lower model.lora.r, model.max_rank or the memory of the method, or raise budget.value.",
        )


def largest_rank(budget: BudgetSection, per_rank: int, extra: int) -> int:
    """Returns the largest rank whose trained parameters fit.

    Raises:
        RecipeError: not even rank 1 fits.
    """
    fitting = max(0, budget.value - extra) // per_rank
    if fitting == 0:
        raise RecipeError(
            f"budget: {budget.value} trainable parameters; with rank 1 this recipe already trains {per_rank + extra}.",
            fix="raise budget.value, or train fewer matrices (model.lora.target_modules).",
        )
    return fitting


def fitting_rank(recipe: Recipe, stream: Stream, model: PreTrainedModel, processor: ProcessorMixin) -> int:
    """Returns the rank that `model.lora.r: auto` means: the first task is begun with another one, counted and undone.

    Raises:
        RecipeError: not even rank 1 fits, or the methods train nothing but parameters of their own.
    """
    budget = recipe.budget
    assert budget is not None  # `Recipe` refuses `auto` without one
    probed = recipe.model_copy(update={"model": recipe.model.with_rank(PROBE_RANK)})
    learner = Learner.from_recipe(probed, model, processor, build_methods(recipe))
    learner.begin_task(stream[0], stream, Accelerator())
    extra = sum(own.numel() for own in attached(learner.model).values())
    parameters = learner.parameters() - extra
    detach(learner.model)
    learner.model.unload()
    if parameters == 0:
        raise RecipeError(
            "model.lora.r: auto: this recipe trains no adapter in its first task.",
            expected="methods that train LoRA matrices",
            fix="give a rank.",
        )
    return largest_rank(budget, parameters // PROBE_RANK, extra)


def fitting_steps(
    budget: BudgetSection, trainer: ContinualTrainer, trained: Sequence[dict[str, Any]]
) -> tuple[int, int]:
    """Returns how many optimizer steps of a task fit into `budget.kind: flops`, and the FLOPs of its preparations.

    Both are those of all processes together, and the same on each.

    Each stage may use `value` FLOPs and what earlier ones have left of theirs (or have used too much: they are counted
    when they are done). From that go the preparations of this task, which are done, and what the stage before spent
    after its last step; the rest is divided by the work of one step, which is measured by rehearsing it.

    Args:
        trainer: of the task, its rows prepared; `trainer.ctx.cost["flops"]` counts.
        trained: ledger entries of the stages before.

    Raises:
        RecipeError: not even one step fits.
    """
    own = Counter(trainer.ctx.cost)
    trainer.rehearse()
    steps = trainer.args.gradient_accumulation_steps
    together = gather_object([(own["flops"], (trainer.ctx.cost["flops"] - own["flops"]) * steps)])
    trainer.ctx.cost.clear()
    trainer.ctx.cost.update(own)
    prepared, step = (sum(values) for values in zip(*together))
    spent = sum(entry["flops"] for entry in trained)
    ending = trained[-1]["flops_after_steps"] if trained else 0
    room = (len(trained) + 1) * budget.value - spent - prepared - ending
    if room < step:
        raise RecipeError(
            f"budget: {budget.value:.3g} FLOPs per task; {max(room, 0):.3g} of them are left for the steps of "
            f"{trainer.ctx.task.name}, and one step takes {step:.3g}.",
            expected=f"a budget.value of at least {budget.value + step - room}, for one step of this task",
            fix="raise budget.value for all methods that are compared.",
        )
    return room // step, prepared
