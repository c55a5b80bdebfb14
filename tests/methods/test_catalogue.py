"""The catalogue: names, options, and which methods can be combined."""

from __future__ import annotations

import inspect

import pytest

from mllm_cl.errors import MethodError
from mllm_cl.methods import METHODS, Method, adapter_policy, build_method, method_class
from mllm_cl.methods.base import overrides
from mllm_cl.methods.replay import Replay
from mllm_cl.recipe import MethodSpec


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_and_built_with_its_defaults(name):
    method = build_method(MethodSpec(name=name))
    assert method.name == name
    assert method.summary
    assert "\n" not in method.summary
    state = method.state_dict()
    method.load_state_dict(state)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_stores_and_costs(name):
    text = inspect.getmodule(method_class(name)).__doc__ or ""
    assert text.startswith(f"{name}: ")
    for part in ("Idea:", "Formula", "Stored", "Cost", "per task", "Reference:", "Fidelity:"):
        assert part in text, part


def test_options_are_checked():
    assert build_method(MethodSpec(name="replay", options={"size": 3})).size == 3  # type: ignore[attr-defined]
    for options, message in (
        ({"sise": 3}, r"replay\.sise: unknown option\.\n.*did you mean 'size'"),
        ({"size": 0}, r"replay\.size: 0 is not usable"),
        ({"policy": "any"}, r"replay\.policy: 'any' is not usable"),
    ):
        with pytest.raises(MethodError, match=message):
            build_method(MethodSpec(name="replay", options=options))
    with pytest.raises(MethodError, match="no options"):
        build_method(MethodSpec(name="finetune", options={"x": 1}))


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(MethodError, match="did you mean 'replay'"):
        method_class("reply")
    with pytest.raises(MethodError, match="cannot be imported"):
        method_class("nowhere.at.all:Class")
    with pytest.raises(MethodError, match="is not a method"):
        method_class("collections:Counter")
    assert method_class("mllm_cl.methods.replay:Replay") is Replay


def test_adapter_policies_must_agree():
    build = lambda *names: [build_method(MethodSpec(name=name)) for name in names]  # noqa: E731
    assert adapter_policy([]) == "one"
    assert adapter_policy(build("lwf")) == "one"
    assert adapter_policy(build("lwf", "replay"), "stacked") == "stacked"
    assert adapter_policy(build("inquiry_regularization", "spectral_consolidation")) == "stacked"
    with pytest.raises(MethodError, match="cannot be combined"):
        adapter_policy(build("ewc", "spectral_consolidation"))
    with pytest.raises(MethodError, match=r"model\.adapters"):
        adapter_policy(build("ewc"), "stacked")


def test_hooks_that_a_method_implements_are_known():
    assert overrides(build_method(MethodSpec(name="lwf")), "loss_terms")
    assert not overrides(build_method(MethodSpec(name="replay")), "loss_terms")
    assert not overrides(Method(), "route")
