"""The prompt profile of LLaVA-1.5, against the published format written out by hand."""

from __future__ import annotations

import copy

import pytest
from PIL import Image

from mllm_cl.data.collate import IGNORED, Collator
from mllm_cl.data.rows import assistant_message, user_message
from mllm_cl.errors import ModelError
from mllm_cl.models.prompts import apply_profile

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@pytest.fixture
def processor(loaded):
    own = copy.copy(loaded[1])
    apply_profile(own, "llava_v1")
    return own


def text_of(processor, inputs) -> str:
    return processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>" * 16, "<image>")


def test_conversations_are_written_as_published(processor):
    messages = [
        user_message("What is this?", 1),
        assistant_message("red"),
        user_message("Sure?"),
        assistant_message("yes"),
    ]
    row = {"id": "a", "messages": messages, "images": [Image.new("RGB", (32, 32))]}
    inputs = Collator(processor)([row])
    expected = f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: red</s>USER: Sure? ASSISTANT: yes</s>"
    assert text_of(processor, inputs) == expected
    labels = inputs["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == " red</s> yes</s>"
    asked = Collator(processor, for_generation=True)([row])
    assert text_of(processor, asked) == expected.removesuffix(" yes</s>")


def test_a_system_turn_replaces_the_usual_one(processor):
    row = {"id": "a", "messages": [{"role": "system", "content": "Be brief."}, user_message("Hi")], "images": []}
    asked = Collator(processor, for_generation=True)([row])
    assert text_of(processor, asked) == "<s>Be brief. USER: Hi ASSISTANT:"


def test_a_processor_without_placeholder_is_refused(loaded):
    class Plain:
        tokenizer = loaded[1].tokenizer

    with pytest.raises(ModelError, match="no token that stands for an image"):
        apply_profile(Plain(), "llava_v1")  # type: ignore[arg-type]
