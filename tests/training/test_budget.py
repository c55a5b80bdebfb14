"""The budget: the rank that fits is required, and what is stored is limited."""

from __future__ import annotations

import json

import pytest

from mllm_cl.errors import RecipeError, RunError
from mllm_cl.recipe import BudgetSection, load_recipe
from mllm_cl.training.budget import check_stored, check_trainable
from mllm_cl.training.loop import run_stream


def test_the_largest_rank_that_fits_is_required():
    budget = BudgetSection(kind="trainable_parameters", value=1000)
    check_trainable(budget, 960, 8)  # 120 per rank: 8 fits, 9 does not
    check_trainable(None, 10**9, 8)
    for rank, parameters in ((4, 480), (16, 1920)):
        with pytest.raises(RecipeError, match=r"model\.lora\.r=8.*960 parameters"):
            check_trainable(budget, parameters, rank)
    with pytest.raises(RecipeError, match=r"with rank 1 this recipe already trains 2000"):
        check_trainable(budget, 4000, 2)


def test_more_stored_bytes_than_the_budget_are_refused():
    budget = BudgetSection(kind="stored_bytes", value=1000)
    check_stored(budget, 1000, "01-a")
    check_stored(BudgetSection(kind="trainable_parameters", value=1), 10**9, "01-a")
    with pytest.raises(RunError, match="after 01-a adapters and method states take 1001"):
        check_stored(budget, 1001, "01-a")


def test_unknown_budgets_are_refused():
    with pytest.raises(RecipeError, match=r"budget: should be .trainable_parameters"):
        load_recipe(
            {"name": "a", "output_dir": "b", "stream": {"name": "quickstart"}, "budget": {"kind": "time", "value": 1}}
        )


def test_a_run_is_held_to_its_budget(recipe_for):
    small = (
        "stream.limit.train=4",
        "stream.limit.test=1",
        "evaluation.stage_zero=false",
        "evaluation.max_new_tokens=1",
    )
    kind = "budget.kind=trainable_parameters"
    with pytest.raises(RecipeError, match=r"with rank 4 this recipe trains (\d+)") as caught:
        run_stream(recipe_for("finetune", *small, kind, "budget.value=1000000"))
    trained = int(str(caught.value).split("recipe trains ")[1].split(".")[0])
    folder = run_stream(recipe_for("finetune", *small, kind, f"budget.value={trained}", run="fits"))
    lines = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    assert next(line for line in lines if line["event"] == "stage_trained")["trainable_parameters"] == trained
    with pytest.raises(RunError, match="stored bytes; after 01-task-1"):
        run_stream(recipe_for("finetune", *small, "budget.kind=stored_bytes", "budget.value=1000", run="too-much"))
