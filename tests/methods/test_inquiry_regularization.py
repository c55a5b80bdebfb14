"""UIR: at rest at its reference, blind to labels and padding, and each inquiry held to the right model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mllm_cl.data.collate import COMPANIONS, Collator
from mllm_cl.data.rows import Rows
from mllm_cl.errors import MethodError
from mllm_cl.methods.inquiry_regularization import PRESETS, InquiryRegularization
from mllm_cl.models import adapters
from mllm_cl.streams import Stream, Task


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pool") / "pool.txt"
    path.write_text("\n".join(f"What about {'this ' * (i % 3)}{i}?" for i in range(9)))
    return str(path)


@pytest.fixture
def method(pool):
    return lambda preset="uir_memory", **options: InquiryRegularization(
        **{"preset": preset, "weight": 2.0, "ratio": 0.5, "pool": pool, **options}
    )


def inquiries_of(rows) -> list[dict]:
    return [other for row in rows for other in row.get(COMPANIONS, {}).get("inquiry", [])]


def collated(learner, rows):
    return Collator(learner.processor)(list(rows))


@pytest.mark.parametrize("preset", PRESETS)
def test_value_and_gradient_are_zero_at_the_reference(preset, method, begin, small_stream, micro_batch, disturb):
    uir = method(preset)
    learner, ctx = begin(small_stream(2, rows=8), uir)
    rows = learner.train_rows(ctx, ctx.task.train)
    batch = micro_batch(collated(learner, rows))
    parameters = adapters.set_trainable(ctx.model, ["default"])
    disturb(ctx.model, "default", size=0.0)
    term = uir.loss_terms(ctx, ctx.model, batch, None)["uir"]
    gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    assert abs(term.item()) < 1e-5
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-4
    disturb(ctx.model, "default", size=0.2)
    moved = uir.loss_terms(ctx, ctx.model, batch, None)["uir"]
    assert moved.item() > 1e-3
    moved.backward()
    with_gradient = [name for name, p in ctx.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert with_gradient
    assert all(".default." in name for name in with_gradient)  # nothing flows into a reference
    assert not any(tensor.requires_grad for q in inquiries_of(rows) for tensor in q["targets"].values())


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_are_never_read(preset, method, begin, small_stream, micro_batch, disturb):
    stream = small_stream(2, rows=8)

    def rewritten(task: Task) -> Task:
        rows = copy.deepcopy(list(task.train))
        for row in rows:
            row["messages"][-1]["content"][0]["text"] = "something else"
            row["answers"] = ["something else"]
        return Task(task.name, Rows(rows), task.test)

    values = []
    for some in (stream, Stream("other", tuple(map(rewritten, stream)))):
        uir = method(preset)
        learner, ctx = begin(some, uir)
        disturb(ctx.model, "default", 1)
        learner.end_task(ctx)
        learner, ctx = begin(some, learner=learner)
        rows = learner.train_rows(ctx, ctx.task.train)
        disturb(ctx.model, "default", 2)
        values.append((uir.loss_terms(ctx, ctx.model, micro_batch(collated(learner, rows)), None)["uir"], uir.memory))
    assert torch.equal(values[0][0], values[1][0])
    assert values[0][1] == values[1][1]


@pytest.mark.parametrize("preset", ["uir_self", "uir_kl", "uir_feat"])
def test_padding_does_not_matter(preset, method, begin, small_stream, micro_batch, disturb):
    uir = method(preset)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    inquiries = inquiries_of(learner.train_rows(ctx, ctx.task.train))
    disturb(ctx.model, "default", 1)
    companion = Collator(learner.processor)._companion(inquiries)

    def value(inputs) -> float:
        batch = micro_batch({"companions": {"inquiry": inputs}})
        return uir.loss_terms(ctx, ctx.model, batch, None)["uir"].item()

    def padded(side: str, count: int):
        fills = {"input_ids": learner.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        extra = {
            name: torch.full((len(inquiries), count), fill, dtype=companion[name].dtype) for name, fill in fills.items()
        }
        order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
        return companion | {name: torch.cat(order(extra[name], companion[name]), dim=1) for name in fills}

    expected = value(companion)
    assert expected > 1e-3
    for side in ("left", "right"):
        assert value(padded(side, 9)) == pytest.approx(expected, rel=1e-4)
    alone = [value(Collator(learner.processor)._companion([one])) for one in inquiries]
    assert np.mean(alone) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("policy", ["one", "stacked"])
def test_general_inquiries_are_held_to_the_base_and_remembered_ones_to_the_previous_stage(
    policy, method, begin, small_stream, disturb
):
    uir, stream = method("uir_memory", ratio=1.0, top_k=300), small_stream(2, rows=8)
    learner, ctx = begin(stream, uir, policy=policy)
    assert all(q["id"].startswith("inquiry/") for q in inquiries_of(learner.train_rows(ctx, ctx.task.train)))
    disturb(ctx.model, learner.trained_name(ctx.task), 1)
    learner.end_task(ctx)
    assert set(uir.memory["colours"]) <= {row["messages"][0]["content"][-1]["text"] for row in stream[0].train}
    learner, ctx = begin(stream, learner=learner)
    disturb(ctx.model, learner.trained_name(ctx.task), 2)  # where the model is now must not matter
    inquiries = inquiries_of(learner.train_rows(ctx, ctx.task.train))
    kinds = {"inquiry": "base", "remembered": "previous"}
    assert [sum(q["id"].startswith(kind) for q in inquiries) for kind in kinds] == [4, 4]
    for kind, reference in kinds.items():
        for inquiry in [q for q in inquiries if q["id"].startswith(kind)]:
            inputs = ctx.collate([inquiry])
            labels = inputs.pop("labels")[0]
            with ctx.reference(reference):
                logits = ctx.model(**inputs).logits[0]
                answer = ctx.generate([{**inquiry, "messages": inquiry["messages"][:-1]}], 8)
            assert answer == [inquiry["messages"][-1]["content"][0]["text"]]
            expected = logits[:-1][labels[1:] != -100].log_softmax(dim=-1)
            values, order = inquiry["targets"]["values"], inquiry["targets"]["ids"]
            assert torch.allclose(expected.gather(-1, order), values, atol=1e-4)


def test_the_hidden_target_is_the_distance_of_normalised_states(method, begin, small_stream, micro_batch, disturb):
    uir = method("uir_feat")
    learner, ctx = begin(small_stream(1, rows=4), uir)
    rows = learner.train_rows(ctx, ctx.task.train)
    inquiries = inquiries_of(rows)
    disturb(ctx.model, "default", 1)

    def states(inquiry) -> np.ndarray:
        inputs = {k: v for k, v in ctx.collate([inquiry]).items() if k != "labels"}
        hidden = ctx.model(**inputs, output_hidden_states=True).hidden_states[-1][0].detach().double().numpy()
        return hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True))

    with ctx.reference("base"):
        before = [states(inquiry) for inquiry in inquiries]
    after = [states(inquiry) for inquiry in inquiries]
    expected = 2.0 * np.mean([((a - b) ** 2).mean() for a, b in zip(after, before)])
    term = uir.loss_terms(ctx, ctx.model, micro_batch(collated(learner, rows)), None)["uir"]
    assert term.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("images", "pool_has", "expected"),
    [("none", True, {0}), ("pool", True, {1}), ("pool", False, {0}), ("task", True, {1}), ("both", False, {1})],
)
def test_pictures_come_from_where_they_should(images, pool_has, expected, method, begin, small_stream, pool):
    uir = method("uir_kl", images=images, pool="general" if pool_has else pool, ratio=1.0)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    inquiries = inquiries_of(learner.train_rows(ctx, ctx.task.train))
    own = {id(image) for row in ctx.task.train for image in row["images"]}
    counts = {len(q["images"]) for q in inquiries if images != "pool" or not pool_has or q["images"]}
    assert counts <= expected | ({0} if images == "pool" else set())
    from_task = [id(image) in own for q in inquiries for image in q["images"]]
    assert all(from_task) if images in ("task", "both") else not any(from_task)


def test_the_number_of_inquiries_follows_the_ratio(method, begin, small_stream):
    for ratio, expected in ((0.5, 8), (1.0, 16), (1.5, 24), (0.001, 1)):
        uir = method("uir_kl", ratio=ratio)
        learner, ctx = begin(small_stream(1, rows=16), uir)
        assert len(inquiries_of(learner.train_rows(ctx, ctx.task.train))) == expected
        assert ctx.cost["inquiry_rows"] == expected
    learner, ctx = begin(small_stream(1, rows=16), method(weight=0.0))
    rows = learner.train_rows(ctx, ctx.task.train)
    assert not inquiries_of(rows)


def test_question_memories_survive_saving(method, begin, small_stream):
    uir = method(memory=2)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    learner.end_task(ctx)
    assert len(uir.memory["colours"]) == 2
    again = method()
    again.load_state_dict(uir.state_dict())
    assert again.memory == uir.memory
    assert not uir.state_dict().tensors


def test_presets_may_be_changed_one_by_one(method):
    uir = method("uir_memory", target="hidden", rollout=0)
    assert (uir.target, uir.rollout, uir.memory_size) == ("hidden", 0, 64)
    with pytest.raises(MethodError, match=r"'uir_memry' does not exist\.\n.*did you mean 'uir_memory'"):
        method("uir_memry")
