"""DER++ and the generic mix: the stored logits, the two terms by hand, and what is mixed in."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import reference_answers
from mllm_cl.errors import MethodError
from mllm_cl.methods._terms import target_logits
from mllm_cl.methods.derpp import DerPlusPlus, logit_distance
from mllm_cl.methods.generic_mix import GenericMix
from mllm_cl.models.adapters import DEFAULT


def test_the_distance_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]])
    stored, ids = torch.tensor([[4.0, 2.0], [5.0, 0.0]]), torch.tensor([[2, 1], [2, 1]])
    assert logit_distance(logits, stored, ids).item() == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert logit_distance(logits, stored[:0], ids[:0]).item() == 0


def test_terms_are_the_stored_logits_and_answers(begin, disturb, small_stream, micro_batch):
    stream = small_stream(2, rows=8)
    learner, ctx = begin(stream, method := DerPlusPlus(alpha=2.0, beta=3.0, size=4, ratio=1.0, top_k=5))
    assert learner.train_rows(ctx, stream[0].train) is stream[0].train
    disturb(ctx.model, DEFAULT)
    learner.end_task(ctx)
    assert len(method.memory) == len(method.targets) == 4
    for (_, row_id), stored in zip(method.memory, method.targets):
        inputs = ctx.collate([stream[0].train[int(row_id.split("/")[1])]])
        labels = inputs.pop("labels")
        expected = target_logits(ctx.model.eval()(**inputs).logits, labels).topk(5, dim=-1)
        assert torch.allclose(stored["logits"].float(), expected.values, atol=2e-3)  # float16
        assert torch.equal(stored["ids"].long(), expected.indices)
    again = DerPlusPlus(alpha=2.0, beta=3.0, size=4, ratio=1.0, top_k=5)
    again.load_state_dict(method.state_dict())
    learner.methods[0] = again
    learner, ctx = begin(stream, learner=learner)
    rows = learner.train_rows(ctx, stream[1].train)
    assert ctx.cost["memory_rows"] == len(rows) == 8
    batch = micro_batch(Collator(learner.processor)([rows[index] for index in range(3)]))
    batch.shares["memory"] = 1.0
    terms = again.loss_terms(ctx, ctx.model.eval(), batch, None)
    assert abs(terms["derpp_logits"].item()) < 1e-5  # nothing has moved
    losses = [ctx.model(**ctx.collate([row])).loss for index in range(3) for row in rows[index]["companions"]["memory"]]
    assert terms["derpp_answers"].item() == pytest.approx(3 * torch.stack(losses).mean().item(), rel=1e-4)
    disturb(ctx.model, DEFAULT, seed=5)
    assert again.loss_terms(ctx, ctx.model, batch, None)["derpp_logits"].item() > 0.1


def test_no_weight_attaches_nothing(begin, small_stream):
    stream = small_stream(2, rows=8)
    learner, ctx = begin(stream, DerPlusPlus(alpha=0.0, beta=0.0))
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    assert learner.train_rows(ctx, stream[1].train) is stream[1].train


def test_the_generic_mix_is_general_rows(begin, small_stream, tmp_path):
    stream = small_stream(2, rows=9)
    learner, ctx = begin(stream, GenericMix(share=0.25))
    mixed = learner.train_rows(ctx, stream[0].train)
    assert len(mixed) == 12
    assert [row["id"] for row in mixed][:9] == [row["id"] for row in stream[0].train]
    assert all(row["answers"] for row in mixed)
    assert len({row["id"] for row in mixed}) == 12
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    assert repr(list(learner.train_rows(ctx, stream[1].train))[9:]) != repr(list(mixed)[9:])  # others at every task
    path = tmp_path / "own.json"
    conversations = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    path.write_text(json.dumps([{"id": "only", "conversations": conversations}]))
    own = GenericMix(share=0.25, source=str(path)).train_rows(ctx, stream[1].train)
    assert [reference_answers(row) for row in own][9:] == [["So."]] * 3
    with pytest.raises(MethodError, match="there is no"):
        GenericMix(source="nowhere.json")
