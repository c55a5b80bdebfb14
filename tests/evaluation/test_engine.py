"""The generation engine: the same answers whatever the batches, and what happens when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from mllm_cl.data.collate import Collator
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import GenerationSettings, generate, generate_batches, plan_batches, token_counts
from mllm_cl.models import adapters
from mllm_cl.models.parts import lora_targets

QUESTIONS = ["What?", "Which digit is this?", "Is this red?", "a photo of a cat, blue, red or no? " * 2, "Why?"]


@pytest.fixture(scope="module")
def rows(make_row):
    made = [
        make_row(f"r{i}", QUESTIONS[i % 5] + "?" * i, "x", None if i % 4 == 3 else (i * 20, 9, 250 - i * 20))
        for i in range(11)
    ]
    made[4]["messages"] = [*make_row("z", "one?", "two")["messages"], made[4]["messages"][0]]
    made[4]["images"] = [*make_row("z", "one?", "two")["images"], *made[4]["images"]]
    return made


@pytest.fixture(scope="module")
def talkative(fresh):
    """Random weights, sharpened so that answers differ between rows."""
    model, processor = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model, processor


def reference(model, processor, rows, max_new_tokens=6) -> list[str]:
    """A batch-1 loop."""
    collate, answers = Collator(processor, for_generation=True), []
    for row in rows:
        inputs = collate([row])
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 4, "auto"])
def test_answers_do_not_depend_on_the_batch(talkative, rows, batch_size):
    model, processor = talkative
    expected = reference(model, processor, rows)
    assert len(set(expected)) > 5
    assert generate(model, processor, rows, GenerationSettings(6, batch_size)) == expected


def test_answers_follow_the_rows_whatever_their_order(talkative, rows):
    model, processor = talkative
    settings = GenerationSettings(4, 4)
    forward, backward = (generate(model, processor, list(some), settings) for some in (rows, reversed(rows)))
    assert forward == backward[::-1]
    assert generate(model, processor, [], settings) == []


def test_workers_change_nothing(talkative, rows, capfd):
    model, processor = talkative
    alone = generate(model, processor, rows, GenerationSettings(4, 4, num_workers=0))
    assert generate(model, processor, rows, GenerationSettings(4, 4, num_workers=2)) == alone
    assert "forked" not in capfd.readouterr().err


def test_token_counts_are_those_of_the_collator(loaded, rows):
    processor = loaded[1]
    counts = token_counts(processor, rows)
    real = Collator(processor, for_generation=True)(rows)["attention_mask"].sum(dim=1).tolist()
    markers = [1 + len(row["messages"]) - (row["messages"][-1]["role"] == "assistant") + 1 for row in rows]
    assert [count + extra for count, extra in zip(counts, markers)][:4] == real[:4]


def test_the_plan_starts_with_the_longest_rows():
    assert plan_batches([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert plan_batches([], 4) == []
    assert sorted(index for batch in plan_batches([1] * 7, 3) for index in batch) == list(range(7))


def limited(monkeypatch, model, limit: int, error: Exception) -> list[int]:
    """Lets `generate` run out of memory above `limit` rows; returns the list of batch sizes that were tried."""
    tried, original = [], model.generate

    def generate_or_fail(*args, **kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > limit:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "generate", generate_or_fail)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_batches_are_halved_until_they_fit(monkeypatch, talkative, rows, caplog, error):
    model, processor = talkative
    expected = reference(model, processor, rows, 4)
    tried = limited(monkeypatch, model, 3, error)
    with caplog.at_level(logging.WARNING):
        assert generate(model, processor, rows, GenerationSettings(4, 8)) == expected
    assert tried[0] == 8
    assert sum(size > 3 for size in tried) == 2  # 8 and 4 were tried once each, and never again
    assert "out of memory with 8 rows per batch; going on with 4" in caplog.text


def test_one_row_that_does_not_fit_is_named(monkeypatch, talkative, rows):
    model, processor = talkative
    limited(monkeypatch, model, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(EvaluationError, match=r"row r\d+: one row alone does not fit into memory \(\d+ tokens\)"):
        generate(model, processor, rows, GenerationSettings(4, 4))


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, talkative, rows):
    model, processor = talkative
    tried = limited(monkeypatch, model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, processor, rows, GenerationSettings(4, 4))
    assert tried == [4]


def test_what_a_checkpoint_says_about_sampling_is_neither_used_nor_warned_about(fresh, rows, capfd):
    model, processor = fresh()
    settings = GenerationSettings(4, 4)
    expected = generate(model, processor, rows, settings)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.8, top_k=5, eos_token_id=3)
    assert generate(model, processor, rows, settings) == expected
    model.generation_config = GenerationConfig()  # not even an end token
    assert generate(model, processor, rows, settings) == expected
    assert "generation flags" not in capfd.readouterr().err


def test_the_training_mode_is_restored(talkative, rows):
    model, processor = talkative
    model.train()
    generate(model, processor, rows[:2], GenerationSettings(2))
    assert model.training
    batches = generate_batches(model, processor, rows, [[0], [1]], GenerationSettings(2))
    next(batches)
    assert not model.training
    batches.close()  # type: ignore[attr-defined]
    assert model.training
    model.eval()


@pytest.fixture
def routed(fresh):
    model, processor = fresh()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=lora_targets(model))
    for seed, name in enumerate(("default", "one", "two"), start=1):
        model = adapters.add_adapter(model, name, config, seed)
        with torch.no_grad():
            for parameter in adapters.adapter_parameters(model, name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model, processor


def test_mixed_batches_are_routed_row_by_row(routed, rows):
    model, processor = routed
    choices = [{"one": 1.0}, {"two": 1.0}, {}, {"one": 0.5, "two": 0.5}]
    chosen = {row["id"]: choices[index % 4] for index, row in enumerate(rows)}
    together = generate(model, processor, rows, GenerationSettings(5, 8), lambda some: [chosen[r["id"]] for r in some])
    for index, row in enumerate(rows):
        with adapters.weighted(model, chosen[row["id"]]):
            assert reference(model, processor, [row], 5) == [together[index]]
    assert len({tuple(generate(model, processor, rows, GenerationSettings(5), lambda some, c=c: [c] * len(some)))
                for c in choices}) == 4  # fmt: skip


def test_a_route_of_none_leaves_the_model_as_it_is(routed, rows):
    model, processor = routed
    adapters.set_active(model, ["two"])
    settings = GenerationSettings(4, 4)
    assert generate(model, processor, rows, settings, lambda some: None) == generate(model, processor, rows, settings)


def test_padding_on_the_right_is_refused(talkative, rows, monkeypatch):
    monkeypatch.setattr(
        Collator, "with_rows", lambda self, batch: (batch, Collator(self.processor, for_generation=False)(batch))
    )
    with pytest.raises(EvaluationError, match="padded on the right"):
        generate(*talkative, rows, GenerationSettings(max_new_tokens=2, batch_size=8))


def test_generation_options(talkative, rows):
    def answers(**changes):
        return generate(*talkative, rows[:4], GenerationSettings(max_new_tokens=6, batch_size=2, **changes))

    sampled = (("do_sample", True), ("temperature", 5.0))
    assert answers(options=sampled, seed=1) == answers(options=sampled, seed=1) != answers(options=sampled, seed=2)
    assert answers(options=(("num_beams", 2),)) == answers(options=(("num_beams", 2),))
    greedy = answers()
    stop = next(text for text in greedy if len(text) > 2)[1:3]
    stopped = answers(options=(("stop_strings", (stop,)),))
    assert all(text == whole.partition(stop)[0].strip() for text, whole in zip(stopped, greedy))
