"""`choice_likelihood`: the likeliest choice by forward passes, against log likelihoods computed one by one."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import assistant_message
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.cell import cell_key, evaluate_cell
from mllm_cl.evaluation.engine import GenerationSettings, generate_batches, image_groups, plan_batches
from mllm_cl.evaluation.likelihood import Ranker, candidates
from mllm_cl.evaluation.rescoring import read_predictions, rescore

WORDS = ["red", "a photo of a cat", "blue"]


@pytest.fixture
def rows(make_row):
    made = [make_row(f"r{i}", "What is this?" + "?" * i, "B", (i * 40, 9, 250 - i * 40)) for i in range(5)]
    return [{**row, "answers": ["B"], "choices": WORDS} for row in made]


@pytest.fixture(scope="module")
def sharp(fresh):
    model, processor = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model, processor


def one_by_one(model, processor, row, allowed) -> str:
    """Log likelihood of the labels of a training batch, the end of the turn left out."""
    scores, lengths = [], []
    for text in allowed:
        batch = Collator(processor)([{**row, "messages": [*row["messages"][:1], assistant_message(text)]}])
        labels = batch.pop("labels")
        with torch.no_grad():
            steps = model(**batch).logits[0, :-1].log_softmax(-1)
        learnt = (labels[0, 1:] != -100).nonzero()[:-1, 0]  # the last one is the end token
        scores.append(steps[learnt, labels[0, 1:][learnt]].sum().item())
        lengths.append(len(learnt))
    return allowed[max(range(len(allowed)), key=scores.__getitem__)]


@pytest.mark.parametrize("answer", ["B", "blue"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_likeliest_choice(sharp, rows, answer, batch_size):
    rows = [{**row, "answers": [answer]} for row in rows]
    allowed = ["A", "B", "C"] if answer == "B" else WORDS
    assert set(map(tuple, candidates(rows).values())) == {tuple(allowed)}
    expected = [one_by_one(*sharp, row, allowed) for row in rows]
    found = {}
    settings = GenerationSettings(4, batch_size)
    batches = plan_batches([1] * len(rows), batch_size)
    for batch, texts in generate_batches(*sharp, rows, batches, settings, engine_type=Ranker.over(rows)):
        found |= dict(zip(batch, texts))
    assert [found[index] for index in range(len(rows))] == expected


def test_what_may_be_chosen(make_row):
    plain = make_row("r", "Is it?", "yes")
    assert candidates([{**plain, "answers": ["yes"]}]) == {"r": ["Yes", "No"]}
    with pytest.raises(EvaluationError, match="row r: choice_likelihood has nothing to choose from"):
        candidates([{**plain, "answers": ["red"]}])
    with pytest.raises(EvaluationError, match="row q: "):
        candidates([{**plain, "answers": ["A"], "choices": WORDS}, {**plain, "id": "q", "answers": ["A"]}])


def test_it_never_stands_for_generated_answers(sharp, rows, tmp_path):
    model, processor = sharp
    settings = GenerationSettings(4, 2)
    results = {}
    for metric in ("choice_likelihood", "multiple_choice"):
        key = cell_key(processor, "rows", "weights", metric, settings)
        results[metric] = evaluate_cell(
            model,
            processor,
            rows,
            folder=tmp_path / metric,
            stage="s",
            task="t",
            metric=metric,
            settings=settings,
            key=key,
        )
    assert results["choice_likelihood"].key != results["multiple_choice"].key
    content = json.loads((tmp_path / "choice_likelihood" / "result.json").read_text())
    assert (content["metric"], content["scorer"]) == ("choice_likelihood", "choice_likelihood/strict/1")
    for made, other in (("choice_likelihood", "multiple_choice"), ("multiple_choice", "choice_likelihood")):
        predictions = read_predictions(tmp_path / made / "predictions.jsonl")
        with pytest.raises(EvaluationError, match=f"evaluate with --metric {other}"):
            rescore(predictions, other)
        assert rescore(predictions)[1].value == results[made].score


def test_questions_on_one_image_follow_each_other():
    images = ["x.png", "y.png", "x.png", "z.png", "y.png", "x.png"]
    rows = [{"id": str(i), "messages": [], "images": [image]} for i, image in enumerate(images)]
    groups = image_groups(rows)
    assert groups == [0, 1, 0, 3, 1, 0]
    assert plan_batches([600, 601, 602, 603, 604, 605], 3, groups) == [[5, 2, 0], [4, 1, 3]]
    assert plan_batches([600, 601, 602, 603, 604, 1200], 3, groups) == [[5, 2, 0], [4, 1, 3]]  # lengths come first
    memory = [{**row, "images": [object()]} for row in rows]
    assert image_groups(memory) == list(range(6))
