"""Drift probes: nothing at the untouched model, the defined quantities away from it, per-sample routes respected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_cl.data.collate import Collator
from mllm_cl.evaluation import drift
from mllm_cl.evaluation.drift import OPEN_PROMPTS, measure_drift, open_inquiries
from mllm_cl.models import adapters


@pytest.fixture
def moved(make_learner):
    """A learner whose adapter is away from zero."""
    learner = make_learner()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(learner.model, "default").values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return learner


def states(model, inputs) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[-1][0].double().numpy()


def test_inquiries_ask_about_pictures_of_every_task_and_carry_no_answer(small_stream):
    stream = small_stream(2, rows=4)
    inquiries = open_inquiries(stream, 6)
    pictures = [[image for row in task.test for image in row["images"]] for task in stream]
    for index, inquiry in enumerate(inquiries):
        assert any(inquiry["images"][0] is image for image in pictures[index % 2])
        assert [message["role"] for message in inquiry["messages"]] == ["user"]
        assert inquiry["messages"][0]["content"][-1]["text"] in OPEN_PROMPTS
    assert open_inquiries(stream, 6) == inquiries


def test_the_untouched_model_has_not_drifted(make_learner, small_stream):
    learner = make_learner()
    found = measure_drift(learner.model, learner.processor, open_inquiries(small_stream(1, rows=4), 4))
    assert found.feature_shift == pytest.approx(0, abs=1e-6)
    assert found.n == 4


def test_the_shift_is_one_minus_the_cosine_over_all_tokens(moved, small_stream):
    inquiries = open_inquiries(small_stream(2, rows=4), 5)
    cosines = []
    for inquiry in inquiries:
        inputs = Collator(moved.processor, for_generation=True)([inquiry])
        now = states(moved.model, inputs)
        with adapters.active(moved.model, []):
            before = states(moved.model, inputs)
        cosines += list((now * before).sum(-1) / np.linalg.norm(now, axis=-1) / np.linalg.norm(before, axis=-1))
    found = measure_drift(moved.model, moved.processor, inquiries)
    assert found.feature_shift == pytest.approx(1 - np.mean(cosines), rel=1e-4)
    assert found.feature_shift > 0.01


def test_collapse_is_counted_in_words(moved, small_stream, monkeypatch):
    answers = ["yes", "", "a cat on a mat", "two words"]
    monkeypatch.setattr(drift, "generate", lambda *a: answers)
    found = measure_drift(moved.model, moved.processor, open_inquiries(small_stream(1, rows=4), 4))
    assert found.one_word_share == 50
    assert found.mean_words == 2


def test_routes_are_followed_per_sample(moved, small_stream):
    inquiries = open_inquiries(small_stream(1, rows=4), 4)

    def route(rows):
        return [{"default": 1.0} if row["id"].endswith(("0", "2")) else {} for row in rows]

    half = measure_drift(moved.model, moved.processor, inquiries, route).feature_shift
    only = measure_drift(moved.model, moved.processor, inquiries[::2]).feature_shift
    lengths = [
        Collator(moved.processor, for_generation=True)([row])["attention_mask"].sum().item() for row in inquiries
    ]
    share = sum(lengths[::2]) / sum(lengths)
    assert half == pytest.approx(only * share, rel=1e-4)
