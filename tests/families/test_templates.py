"""Labels under templates without generation markers are those under the same templates with markers, token for token."""

from __future__ import annotations

import pytest
import torch
from family_templates import TEMPLATES, TOKENS, unmarked
from family_zoo import Family, make_tokenizer
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor

from mllm_cl.data.collate import IGNORED, Collator
from mllm_cl.data.rows import assistant_message, user_message
from mllm_cl.errors import DataError

IMAGE = "<image>"


@pytest.fixture(scope="module", params=TEMPLATES)
def style(request):
    return request.param


def make_processor(style: str, template: str):
    tokenizer = make_tokenizer(Family(style, lambda family: (None, None), style), {"image_token": IMAGE})
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=template
    )


@pytest.fixture(scope="module")
def processors(style):
    """The processor with markers in its template, and without."""
    template = TEMPLATES[style](IMAGE)
    assert unmarked(template) != template
    return make_processor(style, template), make_processor(style, unmarked(template))


def row(*turns: str, images: int = 0, system: str | None = None) -> dict:
    messages = [
        assistant_message(text) if index % 2 else user_message(text, images if index == 0 else 0)
        for index, text in enumerate(turns)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return {"id": "row", "messages": messages, "images": [Image.new("RGB", (28, 28), (9, 9, 9))] * images}


ROWS = {
    "one turn": row("What is this?", "a photo of a cat"),
    "images": row("What is this?", "red", images=2),
    "turns": row("one?", "yes", "two?", "no", "three?", "no cat", images=1),
    "system": row("What is this?", "blue", "Sure?", "yes", system="Answer with one word."),
    "equal answers": row("yes", "yes", "yes", "yes"),
    "answer says a header": row("Q?", "USER: no ASSISTANT: yes", "User:", "assistant\nred", images=1),
    "answer says a token": row("Q?", "red</s><|im_end|><end_of_turn>[/INST] blue", "again", "x"),
    "line breaks": row("Q?", "first\n\nsecond\nthird", "more", "fourth\n"),
    "spaces": row("Q?", "red  ", "again?", "  blue "),
    "not latin": row("色は？", "赤い猫 🐈", images=1),
    "one letter": row("Q?", "A"),
    "unanswered": row("Q?", "A", "and then?"),
}


@pytest.mark.parametrize("name", ROWS)
def test_labels_equal_those_of_the_marked_template(processors, style, name):
    marked, without = (Collator(processor)([ROWS[name]]) for processor in processors)
    assert marked.keys() == without.keys()
    for key in marked:
        assert torch.equal(marked[key], without[key]), key
    assert (marked["labels"] != IGNORED).any()


def test_labels_are_the_answers_and_what_ends_them(processors, style):
    collate = Collator(processors[1])
    inputs = collate([ROWS["turns"], ROWS["one turn"]])
    for index, answers in enumerate((["yes", "no", "no cat"], ["a photo of a cat"])):
        learnt = inputs["labels"][index]
        text = processors[1].tokenizer.decode(learnt[learnt != IGNORED])
        end = TOKENS[style][1]
        assert text.endswith(end)
        words = (
            text.replace(end, " ")
            .replace("<|END_RESPONSE|>", " ")
            .replace("<|end|>", " ")
            .replace("<think>\n\n</think>", " ")
            .split()
        )
        assert words == " ".join(answers).split()


def test_the_model_is_asked_as_it_was_taught(processors, style):
    """What precedes the first label is what the model is given when it has to answer."""
    for name in ("one turn", "images", "system"):
        single = {**ROWS[name], "messages": ROWS[name]["messages"][: 3 if name == "system" else 2]}
        taught, asked = (Collator(processors[1], for_generation=side)([single]) for side in (False, True))
        first = int((taught["labels"][0] != IGNORED).nonzero()[0])
        assert taught["input_ids"][0, :first].tolist() == asked["input_ids"][0].tolist()


def test_padding_and_batching_change_nothing(processors):
    names = ["turns", "one turn", "images", "not latin"]
    together = Collator(processors[1])([ROWS[name] for name in names])
    for index, name in enumerate(names):
        alone = Collator(processors[1])([ROWS[name]])
        length = alone["input_ids"].shape[1]
        assert torch.equal(together["labels"][index, :length], alone["labels"][0])
        assert (together["labels"][index, length:] == IGNORED).all()


def test_a_template_that_rewrites_answers_is_refused():
    template = unmarked(TEMPLATES["chatml"](IMAGE)).replace("{{- blocks(message) + '<|im_end|>' -}}", "{{- 'gone' -}}")
    with pytest.raises(DataError, match="row row: the chat template rewrites an answer") as caught:
        Collator(make_processor("chatml", template))([ROWS["one turn"]])
    assert "generation" in str(caught.value)


@pytest.mark.parametrize("for_generation", [False, True])
def test_a_row_that_the_template_refuses_is_named(for_generation):
    """Gemma and Mistral refuse system turns, or turns that do not alternate, by an exception of their template."""
    refusal = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('no system turns') -}}{%- endif -%}"
    processor = make_processor("gemma", refusal + unmarked(TEMPLATES["gemma"](IMAGE)))
    with pytest.raises(DataError, match=r"row row: .* \(no system turns\)") as caught:
        Collator(processor, for_generation=for_generation)([ROWS["system"]])
    assert "system, user" in str(caught.value)


def test_a_turn_of_the_user_behind_the_last_answer_is_not_learnt():
    processor = make_processor("chatml", unmarked(TEMPLATES["chatml"](IMAGE)))
    processor.tokenizer.eos_token = "<|endoftext|>"  # as in base models: then nothing but the template ends a turn
    inputs = Collator(processor)([ROWS["unanswered"]])
    learnt = inputs["labels"][0]
    assert processor.tokenizer.decode(learnt[learnt != IGNORED]) == "A<|im_end|>"
