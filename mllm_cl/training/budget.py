"""The budget of a recipe: what a method may cost, so that a comparison of methods is one at equal cost.

Under `trainable_parameters` every method gets the largest LoRA rank whose trained parameters fit: a recipe with another
rank is refused and told which one it is, as methods that train one factor or some of the layers need another rank than
the others. Under `stored_bytes` a run stops at the stage that keeps more on disk (adapters and method states).
"""

from __future__ import annotations

from mllm_cl.errors import RecipeError, RunError
from mllm_cl.recipe import BudgetSection


def check_trainable(budget: BudgetSection | None, parameters: int, rank: int) -> None:
    """Refuses a rank that is not the largest one within the budget.

    Args:
        parameters: trained in the first task, at `rank`; they grow in proportion to it.

    Raises:
        RecipeError: another rank would fit, or none.
    """
    if budget is None or budget.kind != "trainable_parameters" or parameters == 0:
        return
    fitting = budget.value * rank // parameters
    if fitting == 0:
        raise RecipeError(
            f"budget: {budget.value} trainable parameters; with rank 1 this recipe already trains {parameters // rank}.",
            fix="raise budget.value, or train fewer matrices (model.lora.target_modules).",
        )
    if fitting != rank:
        raise RecipeError(
            f"budget: {budget.value} trainable parameters; with rank {rank} this recipe trains {parameters}.",
            expected=f"model.lora.r={fitting}, the largest rank that fits ({parameters * fitting // rank} parameters)",
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
