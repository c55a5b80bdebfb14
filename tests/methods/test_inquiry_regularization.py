"""UIR: at rest at its reference, blind to labels and padding, and each inquiry held to the right model."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mllm_cl.data.collate import COMPANIONS, Collator
from mllm_cl.data.inquiry import question_of
from mllm_cl.data.rows import Rows, user_message
from mllm_cl.errors import MethodError
from mllm_cl.methods._inquiries import PRESETS
from mllm_cl.methods._probe import DISTANCES, Probe
from mllm_cl.methods.inquiry_regularization import _REQUESTS, InquiryRegularization
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
@pytest.mark.parametrize("ratios", [{}, {"ratio": 1.0, "memory_ratio": 0.0}], ids=["each", "shared"])
def test_general_inquiries_are_held_to_the_base_and_remembered_ones_to_the_previous_stage(
    ratios, policy, method, begin, small_stream, disturb
):
    uir, stream = method("uir_memory", top_k=300, **ratios), small_stream(2, rows=8)
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


def test_with_a_memory_ratio_no_kind_of_inquiry_has_less_for_further_tasks(
    method, begin, small_stream, micro_batch, disturb
):
    uir, stream = method("uir_memory", ratio=0.5, memory_ratio=0.25, weight=3.0), small_stream(3, rows=8)
    learner, ctx = begin(stream, uir)
    for stage, remembered in enumerate((0, 2, 4)):
        if stage:
            learner.end_task(ctx)
            learner, ctx = begin(stream, learner=learner)
        rows = learner.train_rows(ctx, ctx.task.train)
        inquiries = inquiries_of(rows)
        count = Counter(q["id"].split("/")[0] for q in inquiries)
        assert count == ({"inquiry": 4, "remembered": remembered} if stage else {"inquiry": 4})
        assert ctx.cost["inquiry_rows"] == 4 + remembered
        disturb(ctx.model, learner.trained_name(ctx.task), stage)

        def value(some, ctx=ctx, learner=learner):
            batch = micro_batch({"companions": {"inquiry": Collator(learner.processor)._companion(some)}})
            return uir.loss_terms(ctx, ctx.model, batch, None)["uir"].item()

        kinds = [[q for q in inquiries if q["id"].startswith(kind)] for kind in count]
        means = [value(own) / (3.0 * (1 + 0.5 * stage)) for own in kinds]
        shares = {"inquiry": 1.0, "remembered": 0.5 * stage}
        assert value(inquiries) == pytest.approx(3.0 * sum(m * shares[k] for m, k in zip(means, count)), rel=1e-4)


COMBINATIONS = [
    {"target": target, "distance": distance, "positions": positions, "rollout": rollout}
    for target, distances in DISTANCES.items()
    for distance in distances
    for positions, rollout in (("all", 0), ("last", 0), ("all", 4), ("answer", 4))
]


def reference_distance(kind: str, now: np.ndarray, before: np.ndarray) -> float:
    """The formulas of the docstring, position by position: (N, V) logits or (N, layers, D) states."""
    if kind in ("kl", "reverse_kl"):
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (before, now))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        p, q = (p, q) if kind == "kl" else (q, p)
        return float((p * np.log(p / q)).sum(-1).mean())
    if kind == "cosine":
        dots = (now * before).sum(-1) / np.linalg.norm(now, axis=-1) / np.linalg.norm(before, axis=-1)
        return float((1 - dots).mean())
    normal = [x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (now, before)]
    return float(((normal[0] - normal[1]) ** 2).mean())


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_combination_is_the_distance_it_names(settings, method, begin, small_stream, micro_batch, disturb):
    uir = method("uir_feat", top_k=10_000, **settings)
    learner, ctx = begin(small_stream(1, rows=4), uir)
    rows = learner.train_rows(ctx, ctx.task.train)
    inquiries = inquiries_of(rows)
    disturb(ctx.model, "default", 1)

    def states(inquiry) -> np.ndarray:
        inputs = ctx.collate([inquiry])
        labels = inputs.pop("labels")[0]
        target = (labels != -100).nonzero().flatten().tolist()
        onset = target[0] - 1  # where the first token of the answer is predicted
        chosen = {
            "answer": [t - 1 for t in target],
            "last": [onset],
            "all": list(range(onset + 1)),
        }[settings["positions"]]
        outputs = ctx.model(**inputs, output_hidden_states=True)
        layers = outputs.hidden_states
        if settings["target"] == "logits":
            found = outputs.logits[0]
        elif settings["target"] == "hidden_last":
            found = layers[-1][0][:, None]
        else:
            found = torch.stack([layers[round(d * (len(layers) - 1))][0] for d in (0.25, 0.5, 0.75, 1)], dim=1)
        return found[chosen].detach().double().numpy()

    with ctx.reference("base"):
        before = [states(inquiry) for inquiry in inquiries]
    after = [states(inquiry) for inquiry in inquiries]
    distances = [reference_distance(settings["distance"], now, then) for now, then in zip(after, before)]
    term = uir.loss_terms(ctx, ctx.model, micro_batch(collated(learner, rows)), None)["uir"]
    assert term.item() == pytest.approx(2.0 * np.mean(distances), rel=1e-4)
    assert term.item() > 1e-3


def pictures_and_task(learner, ctx) -> tuple[list[int], list[bool]]:
    """How many pictures the inquiries have, and whether they are the task's."""
    inquiries = inquiries_of(learner.train_rows(ctx, ctx.task.train))
    own = {id(image) for row in ctx.task.train for image in row["images"]}
    return [len(q["images"]) for q in inquiries], [id(image) in own for q in inquiries for image in q["images"]]


@pytest.mark.parametrize(
    ("settings", "with_pictures", "of_task"),
    [
        ({"modality": "text"}, 0.0, 0.0),
        ({"modality": "image", "images": "task"}, 1.0, 1.0),
        ({"modality": "image", "images": "both"}, 1.0, 1.0),  # the text pool has none of its own
        ({"modality": "both", "images": "task"}, 0.5, 1.0),
        ({"modality": "image", "images": "pool", "pool": "general"}, 0.93, 0.0),  # one in sixteen is a plain question
        ({"modality": "image", "images": "both", "pool": "general"}, 1.0, 0.53),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_pictures_come_from_where_they_should(settings, with_pictures, of_task, method, begin, small_stream):
    uir = method("uir_kl", ratio=2.0, positions="last", **settings)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    counts, own = pictures_and_task(learner, ctx)
    assert np.mean([count > 0 for count in counts]) == pytest.approx(with_pictures, abs=0.07)
    assert np.mean(own or [False]) == pytest.approx(of_task, abs=0.07)


def test_task_inquiries_lose_their_format_instruction(method, begin, small_stream, make_row):
    rows = [make_row(str(i), f"What is number {i}? Answer with one word.", "x") for i in range(8)]
    stream = Stream("suffixes", (Task("suffixes", Rows(rows), Rows(rows)),))
    for source, expected in (("task", 8), ("mixed", 4), ("pool", 0)):
        uir = method("uir_feat", source=source, ratio=1.0)
        learner, ctx = begin(stream, uir)
        texts = [question_of(q) for q in inquiries_of(learner.train_rows(ctx, ctx.task.train))]
        assert sum(text.startswith("What is number") for text in texts) == expected
        assert not any("one word" in text for text in texts)


def test_the_model_may_write_its_own_inquiries(method, begin, small_stream):
    uir = method("uir_self", source="generated", images="task", ratio=1.0)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    inquiries = inquiries_of(learner.train_rows(ctx, ctx.task.train))
    assert len(inquiries) == 8
    requests = [{**q, "messages": [user_message(text, 1)]} for q in inquiries for text in _REQUESTS]
    with ctx.reference("base"):
        written = {text.strip() for text in ctx.generate(requests, 32)}
    assert {question_of(q) for q in inquiries} <= written


def test_targets_are_computed_once_and_survive_a_restart(method, begin, small_stream, monkeypatch, tmp_path):
    stream = small_stream(2, rows=8)

    def rows(disturbed: bool):
        learner, _ = begin(stream, method("uir_memory", ratio=1.0))
        if disturbed:
            for parameter in adapters.adapter_parameters(learner.model, "default").values():
                parameter.data.add_(0.1)
        learner.end_task(learner._context(stream[0], stream, 1, Accelerator(cpu=True)))
        ctx = learner.begin_task(stream[1], stream, Accelerator(cpu=True), tmp_path)
        return inquiries_of(learner.train_rows(ctx, ctx.task.train)), ctx.cost

    first, cost = rows(False)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2  # one held to the base, one to the previous stage
    assert {file.suffix for file in files} == {".safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "states", None)  # no forward pass
        again, cost_again = rows(False)
    assert cost == cost_again
    assert [q["id"] for q in again] == [q["id"] for q in first]
    assert all(torch.equal(a["targets"]["values"], b["targets"]["values"]) for a, b in zip(again, first))
    rows(True)  # another previous stage: what is held to the base is found again, the rest is new
    assert len(list(tmp_path.iterdir())) == 3


def test_models_without_eyes_need_text_inquiries(method, begin, small_stream, monkeypatch):
    uir = method("uir_self")
    learner, ctx = begin(small_stream(1, rows=4), uir)
    monkeypatch.delattr(type(ctx.processor), "image_processor", raising=False)
    monkeypatch.delattr(ctx.processor, "image_processor", raising=False)
    with pytest.raises(MethodError, match=r"this model takes none\.\n.*`modality: text`"):
        learner.train_rows(ctx, ctx.task.train)


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
    uir = method(inquiry_memory=2)
    learner, ctx = begin(small_stream(1, rows=8), uir)
    learner.end_task(ctx)
    assert len(uir.memory["colours"]) == 2
    again = method()
    again.load_state_dict(uir.state_dict())
    assert again.memory == uir.memory
    assert not uir.state_dict().tensors


def test_presets_may_be_changed_one_by_one(method):
    uir = method("uir_memory", target="hidden_last", distance="l2", rollout=0)
    assert (uir.probe.target, uir.rollout, uir.memory_size) == ("hidden_last", 0, 64)
    with pytest.raises(MethodError, match=r"'uir_memry' does not exist\.\n.*did you mean 'uir_memory'"):
        method("uir_memry")
    with pytest.raises(MethodError, match=r"distance 'kl' does not fit target 'hidden_last'"):
        method("uir_feat", distance="kl")
    with pytest.raises(MethodError, match=r"'answer' needs an answer"):
        method("uir_feat", positions="answer")


def test_the_previous_stage_is_needed_only_where_something_is_held_to_it(method):
    """So that general inquiries may stand beside one adapter per task, and no second adapter is kept for them."""
    assert "previous" in method().needs
    assert "previous" in method(reference="previous", inquiry_memory=0).needs
    assert "previous" not in method(inquiry_memory=0).needs
    assert "previous" not in method(preset="uir_self").needs
