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


SMALL = ("stream.limit.train=8", "stream.limit.test=1", "evaluation.stage_zero=false", "evaluation.max_new_tokens=1")


def trained_stages(folder):
    lines = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    return [line for line in lines if line["event"] == "stage_trained"]


def test_equal_flops_leave_expensive_methods_fewer_steps(recipe_for):
    """Each takes what fits: the teacher of LwF runs from the second task on, UIR pays for inquiries in each."""
    budget = ("budget.kind=flops", "budget.value=1e9", "evaluation.drift=0")
    found = {
        name: trained_stages(run_stream(recipe_for(name, *SMALL, *budget, run=name)))
        for name in ("finetune", "lwf", "inquiry_regularization")
    }
    for stages in found.values():
        assert sum(stage["flops"] for stage in stages) == pytest.approx(2e9, rel=0.1)
    steps = {name: [stage["steps"] for stage in stages] for name, stages in found.items()}
    assert steps["lwf"][0] == steps["finetune"][0] > steps["inquiry_regularization"][0] > 1
    assert steps["finetune"][1] > max(steps["lwf"][1], steps["inquiry_regularization"][1]) > 1
    passes = {name: [stage["extra_forward_passes"] for stage in stages] for name, stages in found.items()}
    assert passes["finetune"] == [0, 0]
    assert passes["lwf"] == [0, steps["lwf"][1]]  # one teacher for each step


def test_joint_training_may_use_the_flops_of_all_tasks(recipe_for):
    joint = trained_stages(run_stream(recipe_for("joint", *SMALL, "budget.kind=flops", "budget.value=1e9")))
    assert [stage["flops"] for stage in joint[:-1]] == [0]
    assert joint[-1]["flops"] == pytest.approx(2e9, rel=0.1)


def test_a_budget_too_small_for_one_step_is_refused(recipe_for):
    with pytest.raises(RecipeError, match=r"(?s)steps of task-1, and one step takes .*at least") as caught:
        run_stream(recipe_for("finetune", *SMALL, "budget.kind=flops", "budget.value=1000"))
    needed = str(caught.value).split("at least ")[1].split(",")[0]
    folder = run_stream(recipe_for("finetune", *SMALL, "budget.kind=flops", f"budget.value={needed}", run="enough"))
    assert [stage["steps"] for stage in trained_stages(folder)] == [1, 1]


def test_a_resumed_stage_keeps_its_steps(recipe_for):
    recipe = recipe_for(
        "inquiry_regularization",
        *SMALL,
        "budget.kind=flops",
        "budget.value=1e9",
        "training.save_strategy=steps",
        "training.save_steps=2",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_cl.training.learner.Learner.end_task", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stream(recipe)
    resumed = trained_stages(run_stream(recipe))
    whole = trained_stages(run_stream(recipe.model_copy(update={"output_dir": recipe.output_dir + "-whole"})))
    assert resumed[0]["resumed_at_step"] > 0
    kept = ("steps", "flops", "extra_forward_passes", "adapter_sha256")
    assert [[stage[key] for key in kept] for stage in resumed] == [[stage[key] for key in kept] for stage in whole]


def test_rehearsing_a_step_changes_nothing(recipe_for):
    """The same steps with and without: a method that draws numbers at every step, and one with a teacher."""
    for method in ("agem", "lwf"):
        free = trained_stages(
            run_stream(recipe_for(method, *SMALL, "training.num_train_epochs=2", run=f"{method}-free"))
        )
        most = max(stage["flops"] for stage in free)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "mllm_cl.training.loop.fitting_steps", lambda budget, trainer, _: trainer.rehearse() or (2, 0)
            )
            held = trained_stages(
                run_stream(
                    recipe_for(
                        method,
                        *SMALL,
                        "training.num_train_epochs=2",
                        "budget.kind=flops",
                        f"budget.value={most}",
                        run=f"{method}-held",
                    )
                )
            )
        assert [stage["adapter_sha256"] for stage in held] == [stage["adapter_sha256"] for stage in free]


def test_automatic_rank(recipe_for):
    kind = ("budget.kind=trainable_parameters", "model.lora={r: auto}")
    folder = run_stream(recipe_for("finetune", *SMALL, *kind, "budget.value=9000", run="auto"))
    lines = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    rank, trained = lines[0]["rank"], trained_stages(folder)[0]["trainable_parameters"]
    per_rank = trained // rank
    assert rank > 1
    assert trained <= 9000 < trained + per_rank
    config = json.loads((folder.stage("01-task-1") / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
    given = run_stream(
        recipe_for(
            "finetune",
            *SMALL,
            kind[0],
            "budget.value=9000",
            f"model.lora={{r: {rank}, lora_alpha: {2 * rank}}}",
            run="given",
        )
    )
    assert [s["adapter_sha256"] for s in trained_stages(given)] == [s["adapter_sha256"] for s in trained_stages(folder)]
    with pytest.raises(RecipeError, match="with rank 1 this recipe already trains"):
        run_stream(recipe_for("finetune", *SMALL, *kind, "budget.value=10", run="none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.lora.r=auto"], "auto` is the largest rank within"),
        (["budget={kind: flops, value: 1}", "training.max_steps=3"], "remove `training.max_steps`"),
    ],
)
def test_contradictions_are_refused(recipe_for, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe_for("finetune", *changes)
