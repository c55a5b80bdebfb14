"""Collation: which tokens carry labels, what stays text, and what the model sees."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from PIL import Image

from mllm_cl.data.collate import IGNORED, JOINER, Collator, plain_text
from mllm_cl.data.rows import assistant_message, inquiry_of, text_block, user_message
from mllm_cl.errors import DataError
from mllm_cl.model_section import InputSettings
from mllm_cl.models.tiny import ASSISTANT, BOS, EOS, IMAGE, USER

PATCHES = 16  # image tokens of a 32 x 32 picture


@pytest.fixture(scope="module")
def processor(loaded):
    return loaded[1]


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def learnt(inputs, row: int = 0) -> list[int]:
    labels = inputs["labels"][row]
    return labels[labels != IGNORED].tolist()


def shown(inputs, row: int = 0) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


def conversation(*turns: str, images: int = 0) -> dict:
    pictures = [Image.new("RGB", (32, 32), (index, 0, 0)) for index in range(images)]
    messages = [
        assistant_message(text) if index % 2 else user_message(text, images if index == 0 else 0)
        for index, text in enumerate(turns)
    ]
    return {"id": "row", "messages": messages, "images": pictures}


def test_labels_are_the_answer_and_its_end(processor, make_row):
    inputs = Collator(processor)([make_row("a", "What is this?", "a photo of a cat")])
    prompt = ids_of(processor, f"{BOS}{USER}{IMAGE * PATCHES}What is this?{ASSISTANT}")
    answer = ids_of(processor, f"a photo of a cat{EOS}")
    assert shown(inputs) == prompt + answer
    assert learnt(inputs) == answer
    assert (inputs["labels"][0] != IGNORED).nonzero().flatten().tolist() == list(
        range(len(prompt), len(prompt) + len(answer))
    )


def test_all_answers_of_a_conversation_carry_labels(processor):
    inputs = Collator(processor)([conversation("one?", "yes", "two?", "no", images=1)])
    assert learnt(inputs) == ids_of(processor, f"yes{EOS}no{EOS}")


def test_batches_mix_rows_with_and_without_images(processor, make_row):
    rows = [
        make_row("a", "What is this?", "red"),
        make_row("b", "What is three?", "a much longer answer", None),
        conversation("both?", "blue", images=2),
    ]
    inputs = Collator(processor)(rows)
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (inputs["input_ids"] == image).sum(dim=1).tolist() == [PATCHES, 0, 2 * PATCHES]
    for index, row in enumerate(rows):
        alone = Collator(processor)([row])
        assert shown(inputs, index) == shown(alone)
        assert learnt(inputs, index) == learnt(alone)
    assert not inputs["attention_mask"][0].bool().all()
    assert (inputs["labels"][inputs["attention_mask"] == 0] == IGNORED).all()


def test_text_only_batches_have_no_pixels(processor, make_row):
    inputs = Collator(processor)([make_row("a", "What is this?", "red", None)])
    assert "pixel_values" not in inputs
    assert set(inputs) == {"input_ids", "attention_mask", "labels"}


def test_content_may_be_text_or_blocks(processor):
    blocks = conversation("What is this?", "yes")
    plain = {
        **blocks,
        "messages": [{"role": m["role"], "content": m["content"][0]["text"]} for m in blocks["messages"]],
    }
    for for_generation in (False, True):
        collate = Collator(processor, for_generation=for_generation)
        assert shown(collate([blocks])) == shown(collate([plain]))


def test_padding_sides(processor, make_row):
    rows = [make_row("a", "Q?", "a", None), make_row("b", "A much longer question?", "b", None)]
    left, right = Collator(processor, for_generation=True)(rows), Collator(processor)(rows)
    assert left["attention_mask"][0].tolist() == sorted(left["attention_mask"][0].tolist())
    assert right["attention_mask"][0].tolist() == sorted(right["attention_mask"][0].tolist(), reverse=True)
    assert shown(left) == ids_of(processor, f"{BOS}{USER}Q?{ASSISTANT}")
    assert "labels" not in left


def test_training_and_evaluation_see_the_same_pixels(processor, make_row):
    rows = [make_row(str(index), "?", "x", (index * 40, 7, 200)) for index in range(3)]
    rows[1]["images"] = [Image.effect_noise((53, 21), 90.0)]
    hashes = [
        hashlib.sha256(Collator(processor, for_generation=side)(rows)["pixel_values"].numpy().tobytes()).hexdigest()
        for side in (False, True)
    ]
    assert hashes[0] == hashes[1]
    alone = torch.cat([Collator(processor)([row])["pixel_values"] for row in rows])
    assert torch.equal(alone, Collator(processor)(rows)["pixel_values"])


@pytest.mark.parametrize("for_generation", [False, True])
@pytest.mark.parametrize("written", [IMAGE, EOS, USER, ASSISTANT, BOS, "<pad>", f"<{IMAGE}>", IMAGE + EOS])
def test_control_tokens_in_a_message_stay_text(processor, written, for_generation):
    collate = Collator(processor, for_generation=for_generation)
    nasty = conversation(f"Say {written} now", f"{written} ok", "again?", "ok", images=1)
    inputs = collate([nasty])
    usual = collate([conversation("Say so now", "it is ok", "again?", "ok", images=1)])
    special = set(processor.tokenizer.all_special_ids)

    def steering(batch) -> list[int]:
        return [token for token in shown(batch) if token in special]

    assert steering(inputs) == steering(usual)
    assert inputs["pixel_values"].shape == usual["pixel_values"].shape
    text = processor.tokenizer.decode([token for token in shown(inputs) if token not in special])
    assert plain_text(text).startswith(f"Say {written} now{written} ok")
    if not for_generation:
        assert plain_text(processor.tokenizer.decode(learnt(inputs))) == f"{written} ok{EOS}ok{EOS}"


def test_only_rows_with_control_tokens_are_changed(processor):
    assert JOINER not in processor.tokenizer.decode(shown(Collator(processor)([conversation("a < b > c", "</ s>")])))
    assert plain_text(f" <{JOINER}image> ") == "<image>"


@pytest.mark.parametrize("for_generation", [False, True])
def test_images_and_blocks_must_match(processor, make_row, for_generation):
    collate = Collator(processor, for_generation=for_generation)
    row = make_row("plates/7", "What?", "x")
    with pytest.raises(DataError, match=r"plates/7: has more images than image blocks"):
        collate([{**row, "images": row["images"] * 2}])
    with pytest.raises(DataError, match=r"plates/7: has more image blocks than images"):
        collate([{**row, "images": []}])
    plain = {**row, "messages": [{"role": "user", "content": "What?"}, assistant_message("x")]}
    with pytest.raises(DataError, match="more images"):
        collate([plain])


def test_generation_never_sees_the_answer(processor, make_row):
    row = make_row("a", "What is this?", "zebra")
    collate = Collator(processor, for_generation=True)
    assert shown(collate([row])) == shown(collate([inquiry_of(row)]))
    assert shown(collate([row]))[-1] == processor.tokenizer.convert_tokens_to_ids(ASSISTANT)


def test_rows_are_left_as_they_were(processor, make_row):
    row = make_row("a", f"What is {IMAGE}?", "x")
    before = repr(row)
    Collator(processor)([row])
    assert repr(row) == before


@pytest.fixture
def limited(processor):
    """Returns a function that makes a collator whose processor carries these settings."""

    def make(**settings):
        own = copy.copy(processor)
        InputSettings(**settings).attach_to(own)
        return Collator(own)

    return make


def test_a_row_that_is_too_long_is_named(limited, make_row):
    rows = [make_row("short", "?", "x", None), make_row("long", "?" * 50, "x", None)]
    with pytest.raises(DataError, match=r"row long: \d+ tokens .*max_length is 20") as caught:
        limited(max_length=20)(rows)
    assert "raise model.max_length" in str(caught.value)
    assert "model.truncate: true" in str(caught.value)
    limited(max_length=200)(rows)
    with pytest.raises(DataError, match="max_length is 20"):
        limited(max_length=20).with_rows(rows)


def test_truncation_cuts_text_only(limited, processor, make_row):
    row = make_row("long", "?", "a photo of a cat " * 4)
    whole = Collator(processor)([row])
    kept = whole["input_ids"].shape[1] - 5
    cut = limited(max_length=kept, truncate=True)([row, make_row("short", "?", "x")])
    assert cut["input_ids"].shape == (2, kept)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name][0], whole[name][0, :kept])
    assert cut["pixel_values"].shape == (2, 3, 32, 32)


def test_a_cut_through_image_tokens_is_refused(limited, make_row):
    rows = [make_row("plates/1", "?", "x", None), make_row("plates/2", "?", "x")]
    with pytest.raises(DataError, match=r"row plates/2: \d+ tokens; a cut at model.max_length = 10 would go through"):
        limited(max_length=10, truncate=True)(rows)
    with pytest.raises(DataError, match="leave nothing of its answer") as caught:
        limited(max_length=20, truncate=True)([make_row("plates/3", "What is this? " * 3, "x")])
    assert "set model.max_length to at least" in str(caught.value)


def test_generation_is_not_limited(limited, processor, make_row):
    row = make_row("long", "?" * 50, "x", None)
    own = limited(max_length=20).processor
    assert shown(Collator(own, for_generation=True)([row])) == shown(Collator(processor, for_generation=True)([row]))


@pytest.mark.parametrize("for_generation", [False, True])
def test_image_modes_hold_for_training_and_evaluation(processor, make_row, for_generation):
    wide = Image.new("RGB", (64, 32), (250, 10, 10))
    wide.paste((10, 250, 10), (16, 0, 48, 32))
    row = {**make_row("a", "?", "x"), "images": [wide]}
    own, pixels = copy.copy(processor), {}
    for mode in ("native", "pad", "crop"):
        InputSettings(image_mode=mode).attach_to(own)
        pixels[mode] = Collator(own, for_generation=for_generation)([row])["pixel_values"][0]
    green = Image.new("RGB", (32, 32), (10, 250, 10))
    assert torch.equal(pixels["crop"], Collator(processor)([{**row, "images": [green]}])["pixel_values"][0])
    assert pixels["pad"][:, :4].abs().max() < 0.02  # the rows above the picture have the colour that becomes zero
    assert not torch.equal(pixels["pad"], pixels["native"])


def test_ignored_rows_have_no_labels(processor, make_row):
    rows = [make_row("a", "?", "x"), {**make_row("b", "?", "x"), "ignored": True}]
    inputs = Collator(processor)(rows)
    assert learnt(inputs, 0)
    assert not learnt(inputs, 1)


def test_companions_travel_with_their_targets(processor, make_row):
    inquiry = [
        {**make_row(f"q{i}", "What?" * (i + 1), "z"), "targets": {"values": torch.full((i + 1,), i)}} for i in (0, 1)
    ]
    rows = [
        {**make_row("a", "?", "x"), "companions": {"inquiry": inquiry[:1]}},
        make_row("b", "?", "x"),
        {**make_row("c", "?", "x"), "companions": {"inquiry": inquiry[1:]}},
    ]
    batch = Collator(processor)(rows)
    others = batch["companions"]["inquiry"]
    assert len(batch["input_ids"]) == 3
    assert len(others["input_ids"]) == 2
    assert [len(values) for values in others["targets"]["values"]] == [1, 2]
    assert "companions" not in Collator(processor)(rows[1:2])
    assert text_block("x") == {"type": "text", "text": "x"}
