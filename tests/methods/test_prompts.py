"""Soft prompts: where they stand, whose they are, and the formulas of the three methods by hand."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.data.collate import Collator
from mllm_cl.errors import MethodError, ModelError
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.methods._prompts import Query, word_vectors
from mllm_cl.methods.l2p import L2P
from mllm_cl.methods.modal_prompt import ModalPrompt, guide, prototype
from mllm_cl.methods.progressive_prompts import ProgressivePrompts
from mllm_cl.models.adapters import active
from mllm_cl.models.soft_prompts import SoftPrompts


def by_hand(ctx, row, prompt):
    """One row without padding, its embeddings spliced by hand behind the begin token: logits with the prompt's left out."""
    base = ctx.model.get_base_model()
    inputs = ctx.collate([row])
    ids = inputs["input_ids"]
    assert ids[0, 0] == ctx.processor.tokenizer.bos_token_id
    embeddings = base.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        picture = base.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        embeddings[ids == base.config.image_token_id] = torch.cat(list(picture))
    whole = torch.cat([embeddings[0, :1], prompt, embeddings[0, 1:]]).unsqueeze(0)
    hidden = base.get_decoder()(inputs_embeds=whole).last_hidden_state
    logits = base.lm_head(hidden)[0]
    return torch.cat([logits[:1], logits[1 + len(prompt) :]])


@pytest.fixture
def mixed(make_row):
    """Rows of different lengths, one without an image."""
    return [
        make_row("a", "What is this? " * 3, "red", (200, 0, 0)),
        make_row("b", "Why?", "so", None),
        make_row("c", "What colour?", "a blue one", (0, 0, 200)),
    ]


@torch.no_grad()
def test_every_row_is_as_if_its_prompt_were_spliced_in_by_hand(begin, small_stream, mixed):
    """Padding on the right (training) and on the left (generation), with and without images."""
    _, ctx = begin(small_stream(2, rows=4), ProgressivePrompts(length=3))
    ctx.model.eval()
    own = torch.randn(3, 3, ctx.model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    SoftPrompts.of(ctx.model).choose = lambda inputs: own
    expected = [by_hand(ctx, row, prompt) for row, prompt in zip(mixed, own)]
    inputs = ctx.collate(mixed)
    outputs = ctx.model(**inputs, num_items_in_batch=1)
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape
    total = 0.0
    for place, logits in enumerate(expected):
        mask = inputs["attention_mask"][place].bool()
        assert torch.allclose(outputs.logits[place, mask], logits, atol=1e-4)
        labels = inputs["labels"][place, mask]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    assert float(outputs.loss) == pytest.approx(float(total), rel=1e-4)
    left = Collator(ctx.processor, for_generation=True)(mixed)
    assert (left["attention_mask"][:, 0] == 0).any()
    outputs = ctx.model(**left, output_hidden_states=True)
    assert outputs.hidden_states[-1].shape[:2] == left["input_ids"].shape
    for place, logits in enumerate(expected):
        count = int(left["attention_mask"][place].sum())  # the answers are not among them
        assert torch.allclose(outputs.logits[place, -count:], logits[:count], atol=1e-4)


def test_generation_goes_on_from_the_prompt(begin, small_stream, mixed):
    """With a cache, without one, and with beams: every token is the best one after the whole sequence."""
    _, ctx = begin(small_stream(2, rows=4), ProgressivePrompts(length=3))
    own = 3 * torch.randn(3, 3, ctx.model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1))
    by_length: dict[int, torch.Tensor] = {}
    collator = Collator(ctx.processor, for_generation=True)
    for row, prompt in zip(mixed, own):
        by_length[int(collator([row])["attention_mask"].sum())] = prompt
    assert len(by_length) == 3

    def choose(inputs):
        return torch.stack([by_length[int(count)] for count in inputs["attention_mask"].sum(dim=1)])

    soft = SoftPrompts.of(ctx.model)
    soft.choose = choose
    answers = [generate(ctx.model, ctx.processor, mixed, GenerationSettings(4, size)) for size in (1, 3)]
    slow = generate(ctx.model, ctx.processor, mixed, GenerationSettings(4, 3, options=(("use_cache", False),)))
    assert answers[0] == answers[1] == slow
    beams = [
        generate(ctx.model, ctx.processor, mixed, GenerationSettings(4, n, options=(("num_beams", 2),))) for n in (1, 3)
    ]
    assert beams[0] == beams[1]
    soft.choose = lambda inputs: None
    assert generate(ctx.model, ctx.processor, mixed, GenerationSettings(4, 3)) != slow
    tokens, ids = [], collator([mixed[0]])
    soft.choose = lambda inputs: own[:1]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(ctx.model.eval()(**ids).logits[0, -1].argmax())
        ids["input_ids"] = torch.cat([ids["input_ids"], tokens[-1].reshape(1, 1)], dim=1)
        ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    decoded = ctx.processor.tokenizer.decode(torch.stack(tokens), skip_special_tokens=True)
    assert decoded.strip() == slow[0]


def test_what_cannot_be_right_is_refused(begin, small_stream, mixed):
    _, ctx = begin(small_stream(2, rows=4), ProgressivePrompts(length=3))
    inputs = ctx.collate(mixed)
    unknown = torch.zeros(*inputs["input_ids"].shape, 2)
    with pytest.raises(ModelError, match="cross_attention_mask"):
        ctx.model(**inputs, cross_attention_mask=unknown)
    with pytest.raises(ModelError, match=r"engine\.generate"):
        ctx.model.generate(**Collator(ctx.processor, for_generation=True)(mixed[:1]), max_new_tokens=2)
    with pytest.raises(MethodError, match=r"l2p\.top"):
        L2P(pool=2, top=3)
    assert ctx.model(**inputs).loss.isfinite()  # what was refused has left nothing behind


def test_progressive_prompts_stand_before_those_of_earlier_tasks(begin, small_stream):
    stream, method = small_stream(2, rows=4), ProgressivePrompts(length=2)
    learner, ctx = begin(stream, method)
    assert set(method.parameters(ctx)) == {"1"}
    words = ctx.model.get_base_model().get_input_embeddings().weight
    start = method.parameters(ctx)["1"]
    assert all(any(torch.equal(vector, word) for word in words) for vector in start.detach())
    learner.end_task(ctx)
    first = method.learnt["1"].clone()
    learner, ctx = begin(stream, learner=learner)
    trained = method.parameters(ctx)
    assert set(trained) == {"2"}
    inputs = ctx.collate([stream[1].train[0]])
    prompts = SoftPrompts.of(ctx.model).choose(inputs)
    assert torch.equal(prompts[0], torch.cat([trained["2"], first]))
    ctx.model(**inputs).loss.backward()
    assert trained["2"].grad.norm() > 0
    learner.end_task(ctx)
    assert torch.equal(method.learnt["1"], first)
    with active(learner.model, []):
        assert SoftPrompts.of(learner.model).choose(inputs) is None  # the base goes without


def test_queries_come_from_the_inquiry_alone(begin, small_stream, make_row):
    """The same row with another answer, padded, or without one asks the same."""
    _, ctx = begin(small_stream(2, rows=4), method := L2P(pool=3, top=2, length=2))
    rows = [make_row("a", "What is this?", answer, (9, 9, 200)) for answer in ("red", "something else altogether")]
    first = method._query(ctx.model, ctx.collate(rows))
    second = method._query(
        ctx.model, Collator(ctx.processor, for_generation=True)([*rows, make_row("b", "Who? " * 9, "x")])
    )
    for name in ("whole", "image", "text"):
        one, two = getattr(first, name), getattr(second, name)
        assert torch.allclose(one[0], one[1], atol=1e-5)
        assert torch.allclose(one[0], two[0], atol=1e-5)
        assert torch.allclose(one.norm(dim=1), torch.ones(2), atol=1e-5)
    with ctx.reference("base"):
        inputs = ctx.collate(rows[:1])
        hidden = ctx.model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    inquiry = hidden[: int((inputs["labels"][0] != -100).int().argmax())]
    assert torch.allclose(first.whole[0], inquiry.mean(dim=0) / inquiry.mean(dim=0).norm(), atol=1e-5)
    bare = method._query(ctx.model, ctx.collate([make_row("c", "What?", "x", None)]))
    assert float(bare.pictured) == 0
    assert float(bare.image.abs().max()) == 0


@pytest.mark.parametrize("method", [L2P(pool=4, top=2, length=3), ModalPrompt(length=2)], ids=lambda m: m.name)
def test_rows_that_fill_a_batch_up_attract_nothing(method, begin, small_stream, mixed, micro_batch):
    _, ctx = begin(small_stream(2, rows=4), method)
    filled = ctx.collate([*mixed, {**mixed[2], "ignored": True}])
    assert (filled["labels"][3] == -100).all()
    (expected,) = method.loss_terms(ctx, ctx.model, micro_batch(ctx.collate(mixed)), None).values()
    (term,) = method.loss_terms(ctx, ctx.model, micro_batch(filled), None).values()
    assert float(term) == pytest.approx(float(expected), abs=1e-6)


def test_l2p_by_hand(begin, small_stream, mixed, micro_batch):
    _, ctx = begin(small_stream(2, rows=4), method := L2P(pool=4, top=2, length=3, strength=0.25))
    own = method.parameters(ctx)
    assert {name: tuple(p.shape[:-1]) for name, p in own.items()} == {"prompts": (4, 3), "keys": (4,)}
    inputs = ctx.collate(mixed)
    query = method._query(ctx.model, inputs).whole
    keys = own["keys"].detach() / own["keys"].detach().norm(dim=1, keepdim=True)
    cosines = query @ keys.mT
    prompts = SoftPrompts.of(ctx.model).choose(inputs)
    expected = 0.0
    for row, cosine in enumerate(cosines):
        best = sorted(range(4), key=lambda m: -float(cosine[m]))[:2]
        assert torch.equal(prompts[row], torch.cat([own["prompts"][m] for m in best]))
        expected -= 0.25 * sum(float(cosine[m]) for m in best) / 3
    (term,) = method.loss_terms(ctx, ctx.model, micro_batch(inputs), None).values()
    assert float(term) == pytest.approx(expected, abs=1e-5)
    method._asked = None
    ctx.model(
        **inputs, output_hidden_states=None, return_dict=None
    ).loss.backward()  # as PEFT passes them for a task type
    assert own["keys"].grad is None  # the loss reaches the prompts, its term the keys
    term.backward()
    assert own["keys"].grad.norm() > 0
    chosen = {m for cosine in cosines for m in cosine.topk(2).indices.tolist()}
    assert {m for m in range(4) if own["prompts"].grad[m].norm() > 0} == chosen


def test_modal_prompt_by_hand(begin, small_stream, mixed, micro_batch):
    stream, method = small_stream(3, rows=4), ModalPrompt(length=2, past=1, top=2, strength=0.5)
    learner, ctx = begin(stream, method)
    for stage in (1, 2):
        own = method.parameters(ctx)
        assert all(name.startswith(f"{stage}/") for name in own)
        expected = prototype(own, str(stage)).detach()
        e, w1, b1, w2, b2 = (own[f"{stage}/{n}"].detach() for n in ("prompt", "in", "in_bias", "out", "out_bias"))
        assert torch.allclose(expected, (torch.nn.functional.silu(e @ w1.T + b1) @ w2.T + b2).mean(dim=0))
        learner.end_task(ctx)
        assert torch.allclose(method.learnt[f"{stage}/prototype"], expected)
        assert set(method.learnt) == {f"{t}/{n}" for t in range(1, stage + 1) for n in ("prompt", "prototype")}
        learner, ctx = begin(stream, learner=learner)
    own, inputs = method.parameters(ctx), ctx.collate(mixed)
    query = method._query(ctx.model, inputs)
    assert query.pictured.tolist() == [1, 0, 1]
    known = torch.stack([method.learnt["1/prototype"], method.learnt["2/prototype"]])
    cosine = torch.nn.functional.cosine_similarity
    for row in range(3):
        scores = [cosine(query.text[row], p, dim=0) for p in known]
        if row != 1:
            scores = [(s + cosine(query.image[row], p, dim=0)) / 2 for s, p in zip(scores, known)]
        assert torch.allclose(guide(query, known)[row], torch.stack(scores), atol=1e-6)
        best = max((1, 2), key=lambda t: float(scores[t - 1]))
        ctx.model.train()
        prompts = SoftPrompts.of(ctx.model).choose(inputs)[row]
        assert torch.equal(prompts, torch.cat([method.learnt[f"{best}/prompt"], own["3/prompt"]]))
    mine = prototype(own, "3")
    distances = 1 - cosine(query.text, mine.unsqueeze(0))
    distances = distances + query.pictured * (1 - cosine(query.image, mine.unsqueeze(0)))
    (term,) = method.loss_terms(ctx, ctx.model, micro_batch(inputs), None).values()
    assert float(term) == pytest.approx(0.5 * float(distances.mean()), abs=1e-5)
    learner.end_task(ctx)
    learner.model.eval()
    prompts = SoftPrompts.of(learner.model).choose(inputs)
    known = torch.cat([known, method.learnt["3/prototype"].unsqueeze(0)])
    for row, order in enumerate(guide(query, known).argsort(dim=1, descending=True).tolist()):
        second, first = (method.learnt[f"{task + 1}/prompt"] for task in (order[1], order[0]))
        assert torch.equal(prompts[row], torch.cat([second, first]))  # the best one next to the text


def test_a_row_without_an_image_is_guided_by_its_text():
    query = Query(torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.eye(2), torch.tensor([1.0, 0.0]))
    assert torch.allclose(guide(query, torch.eye(2)), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_past_prompts_are_those_of_the_last_stage(begin, small_stream, disturb):
    """`previous`, for methods that distil: the prompts as they were, whatever has been learnt since."""
    from mllm_cl.methods.lwf import LwF

    stream, method = small_stream(2, rows=4), L2P(pool=2, top=2, length=2)
    learner, ctx = begin(stream, method, LwF())
    learner.end_task(ctx)
    inputs = ctx.collate([stream[0].train[0]])
    with torch.no_grad():
        before = learner.model.eval()(**inputs).logits
    learner, ctx = begin(stream, learner=learner)
    with torch.no_grad():
        method.parameters(ctx)["prompts"].add_(1.0)
        assert not torch.equal(ctx.model.eval()(**inputs).logits, before)
        with ctx.reference("previous"):
            assert torch.equal(ctx.model(**inputs).logits, before)


def test_words_are_drawn_from_the_context(begin, small_stream):
    _, ctx = begin(small_stream(1, rows=4), ProgressivePrompts())
    state = ctx.rng.get_state()
    one = word_vectors(ctx, 4)
    ctx.rng.set_state(state)
    assert torch.equal(one, word_vectors(ctx, 4))
    assert one.requires_grad is False
