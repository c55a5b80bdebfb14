"""The tiny LLaVA: a genuine `LlavaForConditionalGeneration` of 1.5 million parameters that ships with the package.

CLIP vision tower, MLP projector, Llama decoder and a byte-level BPE tokenizer: the classes, the folder layout and the
chat template habits of the large ones, small enough for a laptop. `data_scripts/build_tiny_llava.py` trains it; its
README has the numbers.

The chat template puts the images of a turn first and marks the answer *and* its end with `{% generation %}`:

```
<s><|system|>...</s><|user|><image>What is this?<|assistant|>a cat</s><|user|>...
```
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TINY_LLAVA = "tiny-llava"

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
IMAGE, SYSTEM, USER, ASSISTANT = "<image>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, EOS, IMAGE, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for block in content if block['type'] == 'text' -%}{{ block['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- '<|system|>' + text_of(message['content']) + '</s>' -}}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>' -}}
{%- if message['content'] is not string -%}
{%- for block in message['content'] if block['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- endif -%}
{{- text_of(message['content']) -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- text_of(message['content']) + '</s>' -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('unknown role: ' + message['role'] + ' (expected system, user or assistant)') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def tiny_llava_folder() -> Path:
    """Returns the folder of the shipped weights and processor; `from_pretrained` takes it."""
    return Path(__file__).parent / "tiny_llava"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: any text is encoded without loss, there is no unknown word.

    Args:
        texts (`Iterable[str]`): what to learn merges from.
        vocab_size (`int`, defaults to 640): at most; 264 are the bytes and the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={
            "image_token": IMAGE,
            "system_token": SYSTEM,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, image_size: int = 32, patch_size: int = 8) -> LlavaProcessor:
    """Builds the processor around a tokenizer; images of any size and mode become RGB squares of `image_size` pixels.

    An image takes `(image_size / patch_size) ** 2` tokens.
    """
    square = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size=square,
        do_center_crop=False,
        crop_size=square,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy "default" drops again
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor,
    *,
    vision_hidden: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    text_hidden: int = 128,
    text_intermediate: int | None = None,
    text_layers: int = 4,
    text_heads: int = 4,
    max_positions: int = 1024,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Builds a LLaVA with random weights that fits the processor; the defaults are those of the shipped model.

    The decoder and the projector start with a standard deviation of 0.06 instead of 0.02: at this width it is worth
    more than doubling the steps. The global random state is left as it was.
    """
    tokenizer = processor.tokenizer
    image_size = processor.image_processor.size["height"]
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=4 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=processor.patch_size,
        projection_dim=vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_hidden,
        # 8/3 of the width as in Llama, rounded to a multiple of 8
        intermediate_size=text_intermediate or -(-text_hidden * 8 // 3 // 8) * 8,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_heads,
        max_position_embeddings=max_positions,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    shared: dict[str, Any] = {
        "initializer_range": 0.06,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image_size // processor.patch_size) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,  # of three layers the usual -2 would waste one
        tie_word_embeddings=True,
        **shared,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        embeddings = model.model.vision_tower.embeddings
        torch.nn.init.normal_(embeddings.patch_embedding.weight, std=0.05)
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
        for module in model.model.multi_modal_projector.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.06)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


FIXTURE_TEXTS = (
    "What is this?",
    "Is this red?",
    "Which digit is this?",
    "yes",
    "no",
    "red",
    "blue",
    "a photo of a cat",
)


def build_fixture(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Writes a model with random weights (about 50 thousand parameters) and its processor, for tests.

    The classes and the folder layout are those of the shipped model.
    """
    folder = Path(folder)
    processor = build_processor(train_tokenizer(FIXTURE_TEXTS, vocab_size=300))
    model = build_model(
        processor,
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
        text_hidden=32,
        text_layers=2,
        text_heads=2,
        max_positions=512,
        seed=seed,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
