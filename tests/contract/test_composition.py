"""Every pair of methods: allowed ones learn two short tasks together, forbidden ones are refused with a message.

All pairs are checked for being allowed. All allowed ones are trained once a week; on every commit every 37th of them, and
one for every method that is in none of these.
"""

from __future__ import annotations

import itertools
import math

import pytest
from method_options import TINY

from mllm_cl.errors import MllmClError
from mllm_cl.methods import METHODS, build_method
from mllm_cl.recipe import MethodSpec, load_recipe
from mllm_cl.training.capabilities import ANCHORS, build_methods

PAIRS = list(itertools.combinations(METHODS, 2))


def entry(name: str) -> dict:
    return {name: TINY.get(name, {})}


def refusal(pair: tuple[str, str]) -> str | None:
    recipe = load_recipe(
        {"name": "r", "output_dir": "r", "stream": {"name": "quickstart"}, "methods": list(map(entry, pair))}
    )
    try:
        build_methods(recipe)
    except MllmClError as error:
        return str(error)
    return None


REFUSED = {pair: message for pair in PAIRS if (message := refusal(pair)) is not None}
ALLOWED = [pair for pair in PAIRS if pair not in REFUSED]
TRAINED = sorted(
    {*ALLOWED[::37], *(next(pair for pair in ALLOWED[::-1] if name in pair) for name in METHODS if name not in ANCHORS)}
)


def expected_refusal(one: str, two: str) -> bool:
    """The rules, said again: baselines stand alone, policies agree, a role is played once, ..."""
    if one in ANCHORS or two in ANCHORS:
        return True
    first, second = (build_method(MethodSpec(name=name, options=TINY.get(name, {}))) for name in (one, two))
    policies = {method.adapters for method in (first, second)} - {None}
    if len(policies) > 1 or first.roles & second.roles:
        return True
    needs, roles = first.needs | second.needs, first.roles | second.roles
    if "previous" in needs and "per_task" in policies:
        return True
    if "adapter" in needs and "training" in roles:
        return True
    return "continued" in needs and "consolidation" in roles


def test_exactly_the_impossible_pairs_are_refused():
    assert {pair for pair in PAIRS if expected_refusal(*pair)} == set(REFUSED)
    assert len(ALLOWED) > 200
    assert {name for pair in TRAINED for name in pair} >= set(METHODS) - set(ANCHORS)


@pytest.mark.parametrize(
    "words",
    [
        "baseline of its own",
        "cannot be combined",
        "each do the",
        "go on from where",
        "previous stage",
        "acts on the adapter",
    ],
)
def test_refusals_name_both_methods_and_what_to_do(words):
    """Every kind of refusal occurs, and every message names the two and says what to do."""
    assert any(words in message for message in REFUSED.values())
    for (one, two), message in REFUSED.items():
        assert one in message or two in message
        assert any(word in message for word in ("remove", "keep one", "run it by itself"))


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if pair in TRAINED else pytest.mark.weekly, id="+".join(pair)) for pair in ALLOWED],
)
def test_allowed_pairs_learn_two_tasks(pair, make_learner, small_stream, train_task):
    methods = [build_method(MethodSpec(name=name, options=TINY.get(name, {}))) for name in pair]
    learner, stream = make_learner(*methods, rank=2), small_stream(2, rows=4)
    for _ in stream:
        trainer = train_task(learner, stream, per_device_train_batch_size=4)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses
        assert all(math.isfinite(loss) for loss in losses)
    assert learner.stage == 2
