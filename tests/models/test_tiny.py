"""The tiny LLaVA: tokenizer, template, processor, and what the shipped weights can do."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mllm_cl.data.builders.general import general_rows
from mllm_cl.data.images import load_image
from mllm_cl.models.tiny import SPECIAL_TOKENS, build_fixture, tiny_llava_folder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(tiny_llava_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(tiny_llava_folder()).eval()


@pytest.fixture(scope="module")
def fixture_folder(tmp_path_factory):
    return build_fixture(tmp_path_factory.mktemp("fixture") / "model")


def encode(processor, messages, **options):
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "add_special_tokens": False},
        **options,
    )


def image_turn(text, *images):
    blocks = [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in images)]
    return {"role": "user", "content": blocks}


RED = Image.new("RGB", (32, 32), (215, 35, 40))


@lru_cache(maxsize=1)  # hypothesis does not mix with fixtures of function scope
def shipped_tokenizer():
    return AutoProcessor.from_pretrained(tiny_llava_folder()).tokenizer


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_tokenizer_is_lossless(text):
    tokenizer = shipped_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\x00\x01\x7f\r\n\t",
        "naïve café",
        "你好，世界",
        "👩‍👩‍👧 🏳️‍🌈",
        "a , b . c 's",
        *SPECIAL_TOKENS,
        "x</s>y <image> z",
    ],
)
def test_tokenizer_is_lossless_on_awkward_texts(processor, text):
    tokenizer = processor.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids or "<unk>" in text
    literal = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(literal) == text
    assert not set(literal) & set(tokenizer.all_special_ids)


def test_special_tokens_are_single_and_distinct(processor):
    tokenizer = processor.tokenizer
    ids = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(SPECIAL_TOKENS)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_template_puts_images_first_and_masks_answer_and_end(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        image_turn("Which colour?", RED, RED),
        {"role": "assistant", "content": [{"type": "text", "text": "red 😀"}]},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    batch = encode(processor, [messages], return_assistant_tokens_mask=True)
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0].bool()
    assert processor.tokenizer.decode(ids) == (
        "<s><|system|>Be brief.</s><|user|>" + "<image>" * 32 + "Which colour?<|assistant|>red 😀</s>"
        "<|user|>Sure?<|assistant|>yes</s>"
    )
    assert processor.tokenizer.decode(ids[mask]) == "red 😀</s>yes</s>"
    assert batch["pixel_values"].shape == (2, 3, 32, 32)


def test_generation_prompt_is_the_prefix_of_the_full_conversation(processor):
    turn = image_turn("Which colour?", RED)
    prompt = encode(processor, [[turn]], add_generation_prompt=True)["input_ids"][0].tolist()
    full = encode(processor, [[turn, {"role": "assistant", "content": "red"}]])["input_ids"][0].tolist()
    assert full[: len(prompt)] == prompt


def test_unknown_role_is_an_error(processor):
    with pytest.raises(Exception, match="unknown role"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("mode", "size"),
    [("L", (48, 48)), ("RGBA", (200, 20)), ("P", (7, 31)), ("1", (32, 32)), ("RGB", (640, 480)), ("CMYK", (9, 9))],
)
def test_images_of_any_size_and_mode(processor, mode, size):
    batch = encode(processor, [[image_turn("What?", Image.new(mode, size))]])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_fixture_is_small_fast_and_of_the_same_classes(tmp_path, fixture_folder):
    started = time.process_time()
    folder = build_fixture(tmp_path / "again")
    assert time.process_time() - started < 2
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert 30_000 <= sum(p.numel() for p in model.parameters()) <= 60_000
    same = AutoModelForImageTextToText.from_pretrained(fixture_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
    other = AutoModelForImageTextToText.from_pretrained(build_fixture(tmp_path / "seed", seed=1))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    batch = encode(processor, [[image_turn("What is this?", RED), {"role": "assistant", "content": "red"}]])
    assert torch.isfinite(model(**batch, labels=batch["input_ids"]).loss)


def test_building_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_fixture(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_shipped_model_is_a_real_llava_of_the_stated_size(model, processor):
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in tiny_llava_folder().iterdir()) <= 4_000_000
    assert not [file for file in tiny_llava_folder().iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    half = AutoModelForImageTextToText.from_pretrained(tiny_llava_folder(), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_saved_again_and_reloaded_gives_the_same_logits(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    messages = [[image_turn("What colour is the object?", RED)]]
    one, two = (
        encode(processor, messages, add_generation_prompt=True),
        encode(other, messages, add_generation_prompt=True),
    )
    assert torch.equal(one["input_ids"], two["input_ids"])
    with torch.inference_mode():
        assert torch.equal(model(**one).logits, again.eval()(**two).logits)


def generate(model, processor, rows, batch_size=100):
    """Greedy answers, batched, images and plain text mixed as they come."""
    answers = []
    for start in range(0, len(rows), batch_size):
        chunk = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        prompts = [
            processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in chunk
        ]
        images = [load_image(reference) for row in chunk for reference in row["images"]]
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@pytest.mark.slow
def test_shipped_weights_reach_the_stated_accuracy(model, processor):
    rows = general_rows("test")
    hits = {}
    for row, answer in zip(rows, generate(model, processor, rows)):
        hits.setdefault(row["kind"], []).append(answer in row["answers"])
    overall = sum(map(sum, hits.values())) / len(rows)
    assert overall >= 0.80
    assert (
        sum(sum(hit) / len(hit) >= 0.7 for hit in hits.values()) >= 12
    )  # kinds it can really do; the README lists all
    assert f"**{100 * overall:.1f} %**" in (tiny_llava_folder() / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_batched_answers_do_not_depend_on_the_batch(model, processor):
    rows = general_rows("test", size=24)
    assert generate(model, processor, rows) == generate(model, processor, rows, batch_size=1 + 7)
