"""The anchors of every comparison: finetune, joint and single."""

from __future__ import annotations

import torch

from mllm_cl.methods.finetune import Finetune
from mllm_cl.methods.joint import Joint
from mllm_cl.methods.single import Single
from mllm_cl.models.adapters import adapter_state


def test_finetune_has_no_hook_of_its_own():
    assert not set(vars(Finetune)) & {"begin_task", "train_rows", "loss_terms", "after_step", "end_task", "route"}


def test_joint_trains_at_the_last_stage_only(begin, small_stream):
    stream = small_stream(3, rows=4)
    learner, ctx = begin(stream, Joint())
    for _ in range(2):
        assert len(learner.train_rows(ctx, stream[learner.stage].train)) == 0
        learner.end_task(ctx)
        _, ctx = begin(stream, learner=learner)
    rows = learner.train_rows(ctx, stream[2].train)
    assert [row["id"] for row in rows] == [row["id"] for task in stream for row in task.train]


def test_single_starts_every_task_from_the_base(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, Single())
    disturb(learner.model, "default")
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    state = adapter_state(learner.model, "default")
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in state.items() if "lora_A" in name)
    assert Single.measures == "current"
    inputs = {k: v for k, v in ctx.collate(list(stream[0].train)).items() if k != "labels"}
    with torch.no_grad():
        adapted = ctx.model.eval()(**inputs).logits
        with ctx.reference("base"):
            assert torch.equal(ctx.model(**inputs).logits, adapted)
