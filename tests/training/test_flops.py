"""The count of work against torch's own counter, which sees every kernel."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_cl.data.collate import Collator
from mllm_cl.models import adapters
from mllm_cl.training.flops import Work


@pytest.fixture
def batch(small_stream, loaded):
    return Collator(loaded[1])(list(small_stream(1, 4)[0].train))


def counted(model, run):
    """FLOPs by our count, and by torch's without those of attention."""
    with Work(model) as work, FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts()["Global"]
    weights = sum(count for operation, count in found.items() if "attention" not in str(operation))
    return work.cost["flops"], weights


def trained(learner):
    """The learner's model as it is while a task is learnt with a fresh adapter beside the consolidated one."""
    adapters.add_adapter(learner.model, adapters.TASK, learner.lora, 0)
    adapters.set_active(learner.model, [adapters.DEFAULT, adapters.TASK])
    adapters.set_trainable(learner.model, [adapters.TASK])
    return learner.model


def test_forward(fresh, batch):
    model, _ = fresh()
    with torch.no_grad():
        own, weights = counted(model, lambda: model(**batch))
    decoder = 2 * sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    assert own == weights > decoder * batch["input_ids"].numel()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_with_a_frozen_base(make_learner, batch, checkpointing):
    model = trained(make_learner(policy="stacked"))
    base = model.get_base_model()
    model.train()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    own, weights = counted(base, lambda: model(**batch).loss.backward())
    assert own == pytest.approx(weights, rel=0.01 if checkpointing else 0)  # the last layer is left in the middle
    with torch.no_grad():
        forward, _ = counted(base, lambda: model(**batch))
    assert 1.5 * forward < own < (3.2 if checkpointing else 2.5) * forward


def test_full_training_is_three_times_the_forward_pass(fresh, batch):
    model, _ = fresh()
    own, weights = counted(model, lambda: model(**batch).loss.backward())
    assert own == weights
    with torch.no_grad():
        forward, _ = counted(model, lambda: model(**batch))
    assert own == pytest.approx(3 * forward, rel=0.1)  # the first layers have no gradient of their input


def test_generated_tokens_count_but_are_no_passes(make_learner, small_stream):
    learner = make_learner()
    rows = list(small_stream(1, 4)[0].test)
    base = learner.model.get_base_model()
    with Work(base) as short:
        learner._generate(rows, 1)
    with Work(base) as long:
        learner._generate(rows, 6)
    assert 0 < short.cost["flops"] < long.cost["flops"]
    assert short.cost["passes"] == long.cost["passes"] == 1


def test_it_counts_where_it_is_told_to(fresh, batch):
    model, _ = fresh()
    place: Counter[str] = Counter(inquiry_rows=3)
    with Work(model) as work, torch.no_grad():
        model(**batch)
        work.move_to(place)
        model(**batch)
    with torch.no_grad():
        model(**batch)  # not counted any more
    assert place["passes"] == 2
    assert place["inquiry_rows"] == 3
    assert place["flops"] % 2 == 0
