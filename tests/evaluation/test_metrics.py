"""Every metric against hand-computed values, and the identities that tie them together."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.evaluation import metrics
from mllm_cl.evaluation.metrics import DEFINITIONS, ONE_TASK, average_accuracies, derive, general_ability_deltas

GOLDEN = [(80, 30, 20, 10), (70, 75, 25, 15), (60, 72, 90, 20), (62, 65, 85, 88)]
ZERO_SHOT, SINGLE, JOINT = (25, 20, 15, 10), (80, 78, 91, 90), (79, 77, 88, 86)
EXPECTED = {
    "mean_final_accuracy": 75.0,
    "mean_finetune_accuracy": 83.25,
    "mean_average_accuracy": 75.375,
    "backward_transfer": -11.0,
    "backward_transfer_over_all_tasks": -8.25,
    "forgetting": 11.0,
    "forgetting_from_any_stage": 11.0,
    "relative_forgetting": 13.7963,
    "retention": 86.2037,
    "forward_transfer": 10.0,
    "forward_transfer_to_learning": -1.5,
    "zero_shot_transfer": 20.0,
    "mtil_transfer": 22.5,
    "mtil_average": 54.1875,
    "mtil_last": 75.0,
    "intransigence": -0.75,
    "intransigence_last": -2.0,
}
_ = None
UCIT = [  # a user's LoRA-FT run, Ghy0501/MCITlib#6
    [90.97, _, _, _, _, _],
    [90.38, 92.60, _, _, _, _],
    [73.90, 86.33, 59.54, _, _, _],
    [75.67, 68.77, 47.34, 53.30, _, _],
    [75.10, 74.53, 46.73, 52.30, 69.73, _],
    [65.77, 71.27, 45.05, 51.20, 49.60, 57.47],
]


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_vector(name):
    found = derive(GOLDEN, zero_shot=ZERO_SHOT, single=SINGLE, joint=JOINT)[name]
    assert found.value == pytest.approx(EXPECTED[name], abs=5e-5)
    assert found.reason is None


def test_golden_average_accuracies():
    assert [metric.value for metric in average_accuracies(GOLDEN)] == [80, 72.5, 74, 75]


def test_user_matrix_of_ucit():
    found = derive(UCIT)
    assert found["mean_finetune_accuracy"].value == pytest.approx(70.60, abs=0.005)
    assert found["mean_final_accuracy"].value == pytest.approx(56.73, abs=0.005)
    assert found["mean_average_accuracy"].value == pytest.approx(72.90, abs=0.005)
    assert found["backward_transfer"].value == pytest.approx(-16.65, abs=0.005)
    assert found["backward_transfer"].divisor == 5
    assert found["backward_transfer_over_all_tasks"].value == pytest.approx(-13.88, abs=0.006)
    assert found["backward_transfer_over_all_tasks"].divisor == 6
    assert found["forgetting"].value == pytest.approx(16.65, abs=0.005)


def test_best_score_since_learning_and_of_any_stage_differ():
    matrix = [(50, 95), (40, 60)]  # nothing to forget but task 1
    assert derive(matrix)["forgetting"].value == 10
    three = [(50, 95, 0), (60, 70, 0), (40, 65, 80)]  # task 1: best 60; task 2: 70 since learnt, 95 before
    assert derive(three)["forgetting"].value == pytest.approx((20 + 5) / 2)
    assert derive(three)["forgetting_from_any_stage"].value == pytest.approx((20 + 30) / 2)


def test_unmeasured_cells_give_a_reason_and_never_zero():
    found = derive(UCIT)
    for name in ("zero_shot_transfer", "mtil_transfer", "mtil_average", "forgetting_from_any_stage"):
        assert found[name].value is None
        assert "a[1,2]" in found[name].reason
    assert "untouched model" in found["forward_transfer"].reason
    assert "single-task" in found["forward_transfer_to_learning"].reason
    assert "joint" in found["intransigence"].reason
    assert "no general benchmark" in found["general_ability_delta"].reason


def test_unfinished_run():
    found = derive([[80, _, _], [70, 75, _], [_, _, _]])
    assert found["mean_final_accuracy"].value is None
    assert found["mean_final_accuracy"].reason == "not measured: a[3,1], a[3,2], a[3,3]"
    assert [metric.value for metric in average_accuracies([[80, _, _], [70, 75, _], [_, _, _]])] == [80, 72.5, None]


def test_only_the_cells_of_the_formula_are_needed():
    hollow = [[80, _, _], [_, 75, _], [60, 70, _]]
    assert derive(hollow)["backward_transfer"].value == pytest.approx((-20 - 5) / 2)
    assert derive(hollow)["forgetting"].value is None
    assert derive(hollow)["mean_final_accuracy"].value is None
    base = derive([[80, 30], [70, 75]], zero_shot=[_, 20])
    assert base["forward_transfer"].value == 10


def test_stream_of_one_task():
    found = derive([[80]], zero_shot=[10])
    assert found["mean_final_accuracy"].value == found["mean_average_accuracy"].value == 80
    for name in ("backward_transfer", "forgetting", "retention", "forward_transfer", "zero_shot_transfer"):
        assert found[name].value is None
        assert found[name].reason == ONE_TASK
        assert found[name].divisor is None


def test_share_of_zero_is_undefined():
    found = derive([[0, 0], [0, 50]])
    assert found["retention"].value is None
    assert "task 1" in found["retention"].reason
    assert found["relative_forgetting"].value is None
    assert found["backward_transfer"].value == 0


def test_general_ability():
    general = [[60, 40], [58, 41], [50, _]]
    deltas = general_ability_deltas(general, 2)
    assert [metric.value for metric in deltas] == [-0.5, None]
    assert deltas[1].reason == "not measured: g[2,2]"
    assert derive([[1, _], [1, 1]], general=general)["general_ability_delta"].value is None
    assert general_ability_deltas(None, 2)[0].reason == "no general benchmark was evaluated"


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ([[1, 2]], {}),
        ([], {}),
        ([1.0], {}),
        ([[np.inf]], {}),
        ([[1]], {"zero_shot": [1, 2]}),
        ([[1]], {"general": [[1]]}),
    ],
)
def test_wrong_shapes_are_refused(values, given):
    with pytest.raises(ValueError):
        derive(values, **given)


def test_definitions_cover_the_metrics():
    assert list(derive(GOLDEN)) == list(DEFINITIONS)


def test_imports_numpy_only():
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert modules <= {"__future__", "collections", "dataclasses", "numpy"}


@st.composite
def matrices(draw, least=2, lowest=1):
    tasks = draw(st.integers(least, 6))
    cells = st.integers(lowest, 100)
    return np.array(
        draw(st.lists(st.lists(cells, min_size=tasks, max_size=tasks), min_size=tasks, max_size=tasks)), float
    )


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_identities(matrix):
    found, tasks = (
        derive(matrix, zero_shot=matrix[0], single=np.diagonal(matrix), joint=np.diagonal(matrix)),
        len(matrix),
    )
    value = {name: metric.value for name, metric in found.items()}
    # the last task cannot be forgotten, so the sums over all tasks and over the earlier ones agree
    gap = tasks * (value["mean_final_accuracy"] - value["mean_finetune_accuracy"])
    assert gap == pytest.approx((tasks - 1) * value["backward_transfer"])
    assert value["backward_transfer_over_all_tasks"] * tasks == pytest.approx(value["backward_transfer"] * (tasks - 1))
    # the best score is at least the one right after learning
    assert value["forgetting"] >= -value["backward_transfer"] - 1e-9
    assert value["forgetting_from_any_stage"] >= value["forgetting"] - 1e-9
    assert value["forward_transfer_to_learning"] == value["intransigence"] == 0
    assert value["mtil_average"] == pytest.approx(matrix.mean())


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(0, 20))
def test_shift_moves_levels_and_leaves_differences(matrix, shift):
    before, after = derive(matrix, zero_shot=matrix[0]), derive(matrix + shift, zero_shot=matrix[0] + shift)
    for name in ("backward_transfer", "forgetting", "forward_transfer", "forgetting_from_any_stage"):
        assert after[name].value == pytest.approx(before[name].value, abs=1e-9)
    for name in ("mean_final_accuracy", "mean_finetune_accuracy", "mean_average_accuracy", "zero_shot_transfer"):
        assert after[name].value == pytest.approx(before[name].value + shift)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_a_missing_cell_is_never_read_as_zero(matrix, data):
    place = tuple(data.draw(st.integers(0, len(matrix) - 1)) for _ in range(2))
    holed = matrix.copy()
    holed[place] = np.nan
    for name, metric in derive(holed, zero_shot=matrix[0]).items():
        if metric.value is not None:  # then the cell plays no part in it, whatever its value
            for filler in (0.0, 100.0):
                filled = holed.copy()
                filled[place] = filler
                assert derive(filled, zero_shot=matrix[0])[name].value == pytest.approx(metric.value), name
        else:
            assert metric.reason
