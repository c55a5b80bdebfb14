"""Tiny instances of every family: random weights, built from configurations, each with a real processor of its family.

Nothing is downloaded: the tokenizer is trained here on a few words. An instance has fewer than 100 thousand parameters.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t
from family_templates import TEMPLATES, TOKENS, unmarked
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mllm_cl.models.load import load_model
from mllm_cl.models.processors import TextProcessor, without_video

WORDS = ("What is this?", "Is this red?", "yes", "no", "red", "blue", "a photo of a cat", "Answer with one word.")
SIZE = 28  # pixels of the square that most of them see


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: as people write it.
        build: template -> (model, processor).
        template: the chat format (`family_templates`).
        images: `True` if it reads images.
        text_only_rows: `True` if rows without an image are possible.
        several: `True` if a row may have several images.
        torchvision: `True` if its processor cannot be loaded without torchvision.
        note: what a user has to know, for docs/models.md.
        image: token that stands for images in a sequence.
    """

    name: str
    build: Callable[[Family], tuple[Any, Any]]
    template: str
    image: str | None = None
    text_only_rows: bool = True
    several: bool = True
    torchvision: bool = False
    note: str = ""

    @property
    def images(self) -> bool:
        return self.image is not None


def make_tokenizer(family: Family, extra: dict[str, str]) -> Any:
    """A byte-level BPE with the control tokens of the family's chat format, and what its processor needs."""
    begin, end, pad, control = TOKENS[family.template]
    special = [token for token in dict.fromkeys([pad, begin, end, *control, *extra.values()]) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280 + len(special),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    named = {key: value for key, value in extra.items() if key.endswith("_token")}
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=named,
        model_max_length=1024,
    )


def text_settings(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    """Sizes of a tiny decoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    } | settings


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 14,
}
SQUARE = {"height": SIZE, "width": SIZE}


def chat(family: Family, image: str) -> str:
    return unmarked(TEMPLATES[family.template](image))


def llava(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {"image_token": "<image>"})
    images = t.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    processor = t.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat(family, "<image>\\n"),
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.image_token_id,
    )
    return t.LlavaForConditionalGeneration(config), processor


def llava_next(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {"image_token": "<image>"})
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    images = t.LlavaNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=grid)
    processor = t.LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat(family, "<image>\\n"),
    )  # fmt: skip
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.MistralConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=grid,
    )
    return t.LlavaNextForConditionalGeneration(config), processor


def llava_onevision(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {"image_token": "<image>", "video_token": "<video>"})
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    images = t.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
    processor = without_video(t.LlavaOnevisionProcessor)(
        images, tokenizer, None, num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=chat(family, "<image>\\n"),
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION),
        text_config=t.Qwen2Config(**text_settings(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grid,
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(family: Family, processor_class: Any) -> tuple[Any, Any]:
    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    tokenizer = make_tokenizer(family, tokens)
    pixels = 28 * 28
    images = t.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": pixels, "longest_edge": 4 * pixels}
    )
    template = chat(family, "<|vision_start|><|image_pad|><|vision_end|>")
    return tokenizer, without_video(processor_class)(images, tokenizer, None, chat_template=template)


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }


def qwen2_vl(family: Family) -> tuple[Any, Any]:
    tokenizer, processor = _qwen(family, t.Qwen2VLProcessor)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = t.Qwen2VLConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2, "num_heads": 2},
        **_qwen_ids(tokenizer),
    )
    return t.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(family: Family) -> tuple[Any, Any]:
    tokenizer, processor = _qwen(family, t.Qwen2_5_VLProcessor)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = t.Qwen2_5_VLConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "window_size": 28, "fullatt_block_indexes": [1],
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(family: Family) -> tuple[Any, Any]:
    tokenizer, processor = _qwen(family, t.Qwen3VLProcessor)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    config = t.Qwen3VLConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope, head_dim=8),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return t.Qwen3VLForConditionalGeneration(config), processor


def internvl(family: Family) -> tuple[Any, Any]:
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(family, tokens)
    images = t.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = without_video(t.InternVLProcessor)(
        images, tokenizer, None, image_seq_length=1, chat_template=chat(family, "<IMG_CONTEXT>\\n")
    )
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**VISION | {"image_size": (SIZE, SIZE), "patch_size": (14, 14)}),
        text_config=t.Qwen2Config(**text_settings(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=1,
    )
    return t.InternVLForConditionalGeneration(config), processor


def _idefics(family: Family, config_class: Any, model_class: Any) -> tuple[Any, Any]:
    tokens = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **{f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)},
    }
    tokenizer = make_tokenizer(family, tokens)
    images = t.Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    processor = t.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=chat(family, "<image>"))
    config = config_class(
        vision_config=VISION,
        text_config=t.LlamaConfig(**text_settings(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config), processor


def idefics3(family: Family) -> tuple[Any, Any]:
    return _idefics(family, t.Idefics3Config, t.Idefics3ForConditionalGeneration)


def smolvlm(family: Family) -> tuple[Any, Any]:
    return _idefics(family, t.SmolVLMConfig, t.SmolVLMForConditionalGeneration)


def gemma3(family: Family) -> tuple[Any, Any]:
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(family, tokens)
    images = t.Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=1)
    processor = t.Gemma3Processor(images, tokenizer, image_seq_length=1, chat_template=chat(family, "<start_of_image>"))
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(
            **text_settings(tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
        ),
        vision_config=t.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=1,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return t.Gemma3ForConditionalGeneration(config), processor


def mistral3(family: Family) -> tuple[Any, Any]:
    tokenizer, processor = _pixtral(family, merge=2)
    config = t.Mistral3Config(
        vision_config=t.PixtralVisionConfig(**VISION | {"patch_size": 7, "image_size": 2 * SIZE}),
        text_config=t.MistralConfig(**text_settings(tokenizer, head_dim=8)),
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
    )
    return t.Mistral3ForConditionalGeneration(config), processor


def pixtral(family: Family) -> tuple[Any, Any]:
    tokenizer, processor = _pixtral(family, merge=1)
    config = t.LlavaConfig(
        vision_config=t.PixtralVisionConfig(**VISION | {"patch_size": 7, "image_size": 2 * SIZE}),
        text_config=t.MistralConfig(**text_settings(tokenizer, head_dim=8)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return t.LlavaForConditionalGeneration(config), processor


def pixtral_processor() -> Any:
    """The processor class, whose module imports torchvision for one function that the Pillow half of it has too."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    if not t.utils.is_torchvision_available():
        sys.modules[name] = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    try:
        return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
    finally:
        if not t.utils.is_torchvision_available():
            del sys.modules[name]


def _pixtral(family: Family, merge: int) -> tuple[Any, Any]:
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer = make_tokenizer(family, tokens)
    images = t.PixtralImageProcessorPil(
        size={"longest_edge": 2 * SIZE}, patch_size={"height": 7 * merge, "width": 7 * merge}
    )
    return tokenizer, pixtral_processor()(
        images, tokenizer, patch_size=7, spatial_merge_size=merge, chat_template=chat(family, "[IMG]")
    )


def aya_vision(family: Family) -> tuple[Any, Any]:
    tokens = {
        "image_token": "<image>",
        "start_of_img_token": "<|START_OF_IMG|>",
        "end_of_img_token": "<|END_OF_IMG|>",
        "img_patch_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
        **{name: name for name in ("TILE_GLOBAL", "TILE_1", "TILE_2")},
    }
    tokenizer = make_tokenizer(family, tokens)
    images = t.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = t.AyaVisionProcessor(
        images, tokenizer, patch_size=14, img_size=SIZE, downsample_factor=2, chat_template=chat(family, "<image>")
    )
    settings = text_settings(tokenizer)
    config = t.AyaVisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=t.Cohere2Config(**settings, logit_scale=1.0, sliding_window=64),
        image_token_index=tokenizer.img_patch_token_id,
    )
    return t.AyaVisionForConditionalGeneration(config), processor


def mllama(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {"image_token": "<|image|>"})
    images = t.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2)
    processor = t.MllamaProcessor(images, tokenizer, chat_template=chat(family, "<|image|>"))
    config = t.MllamaConfig(
        vision_config=t.MllamaVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
            image_size=SIZE, patch_size=14, max_num_tiles=2, intermediate_layers_indices=[0], vision_output_dim=32,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        text_config=t.MllamaTextConfig(
            **text_settings(tokenizer, num_hidden_layers=3), cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return t.MllamaForConditionalGeneration(config), processor


def paligemma(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {"image_token": "<image>"})
    images = t.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    processor = t.PaliGemmaProcessor(images, tokenizer)  # has no chat template: prefix and suffix
    config = t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**text_settings(processor.tokenizer, head_dim=8)),
        vision_config=t.SiglipVisionConfig(**VISION, projection_dim=16),
        image_token_index=tokenizer.image_token_id,
        projection_dim=16,
        hidden_size=16,
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def llama(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {})
    return t.LlamaForCausalLM(t.LlamaConfig(**text_settings(tokenizer))), _text(family, tokenizer)


def qwen3(family: Family) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family, {})
    return t.Qwen3ForCausalLM(t.Qwen3Config(**text_settings(tokenizer, head_dim=8))), _text(family, tokenizer)


def _text(family: Family, tokenizer: Any) -> Any:
    tokenizer.chat_template = chat(family, "")
    return TextProcessor(tokenizer, chat_template=tokenizer.chat_template)


VIDEOS = "videos are not read; torchvision is not needed"
TORCHVISION = "its processor needs torchvision; tested with the Pillow half of it"
FAMILIES = {
    family.name: family
    for family in (
        Family("LLaVA", llava, "vicuna", "<image>"),
        Family("LLaVA-NeXT", llava_next, "mistral", "<image>"),
        Family("LLaVA-OneVision", llava_onevision, "chatml", "<image>", note=VIDEOS),
        Family("Qwen2-VL", qwen2_vl, "chatml_system", "<|image_pad|>", note=VIDEOS),
        Family("Qwen2.5-VL", qwen2_5_vl, "chatml_system", "<|image_pad|>", note=VIDEOS),
        Family("Qwen3-VL", qwen3_vl, "chatml", "<|image_pad|>", note=VIDEOS),
        Family("InternVL", internvl, "chatml", "<IMG_CONTEXT>", note=VIDEOS),
        Family("Idefics3", idefics3, "idefics", "<image>"),
        Family(
            "SmolVLM",
            smolvlm,
            "idefics",
            "<image>",
            note="tested with the processor of Idefics3; its own needs `pip install num2words` and torchvision",
        ),
        Family(
            "Gemma 3",
            gemma3,
            "gemma",
            "<image_soft_token>",
            note="its bridge has no linear layer, so `train_bridge` is refused",
        ),
        Family("Mistral 3", mistral3, "mistral", "[IMG]", torchvision=True, note=TORCHVISION),
        Family("Pixtral", pixtral, "mistral", "[IMG]", torchvision=True, note=TORCHVISION),
        Family("Aya Vision", aya_vision, "cohere", "<|IMG_PATCH|>"),
        Family(
            "Mllama",
            mllama,
            "llama3",
            "<|image|>",
            note="images enter by cross-attention; those layers get LoRA too",
        ),
        Family(
            "PaliGemma",
            paligemma,
            "gemma",
            "<image>",
            text_only_rows=False,
            note="prefix and suffix instead of a chat: one question and one answer per row",
        ),
        Family("Llama (text only)", llama, "llama3"),
        Family("Qwen 3 (text only)", qwen3, "thinking"),
    )
}


def build_family(name: str, folder: Path) -> tuple[Any, Any]:
    """Writes a tiny instance of a family and its processor, and loads it as a user would.

    A processor that needs torchvision cannot be loaded without it; then the one that was built is returned.
    """
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = family.build(family)
    tokenizer = processor.tokenizer
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(tokenizer, key))
    model.save_pretrained(folder)
    (tokenizer if isinstance(processor, TextProcessor) else processor).save_pretrained(folder)
    if family.torchvision and not t.utils.is_torchvision_available():
        loaded = t.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        loaded.name_or_path = str(folder)
        return loaded, processor
    return load_model(str(folder), dtype="float32")
