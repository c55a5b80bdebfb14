"""Prompt profiles: published prompt formats, for numbers that can be compared with published ones."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from mllm_cl.errors import ModelError

# The conversation format of LLaVA-1.5 (`vicuna_v1`): images and a line break before the first question, turns separated by
# a space, answers ended by the end token. Source: Liu et al. 2023 (arXiv 2310.03744) and the code released with it.
_LLAVA_V1 = """
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for block in message['content'] if block['type'] == 'text' -%}{{ block['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- BOS -}}
{%- if messages[0]['role'] == 'system' -%}{{- text_of(messages[0]) -}}
{%- else -%}{{- SYSTEM -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- ' USER: ' if loop.first or messages[loop.index0 - 1]['role'] == 'system' else 'USER: ' -}}
{%- if message['content'] is not string -%}
{%- for block in message['content'] if block['type'] == 'image' -%}{{- IMAGE + '\\n' -}}{%- endfor -%}
{%- endif -%}
{{- text_of(message) -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ASSISTANT:' -}}
{%- generation -%}{{- ' ' + text_of(message) + END -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
_LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
PROFILES = {"llava_v1": (_LLAVA_V1, _LLAVA_V1_SYSTEM)}


def apply_profile(processor: ProcessorMixin, name: str) -> None:
    """Replaces the chat template of a processor by that of a profile.

    Raises:
        ModelError: the processor has no placeholder token for images, or its tokenizer no end token.
    """
    image: Any = getattr(processor, "image_token", None)
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    if image is None or tokenizer.eos_token is None:
        missing = "token that stands for an image" if image is None else "end token"
        raise ModelError(
            f"model.prompt_profile: {name} cannot be used, the processor has no {missing}.",
            fix="remove model.prompt_profile and give the model a chat template.",
        )
    template, system = PROFILES[name]
    written = {"BOS": tokenizer.bos_token or "", "IMAGE": str(image), "END": tokenizer.eos_token, "SYSTEM": system}
    settings = "".join("{%- set " + key + " = " + repr(value) + " -%}" for key, value in written.items())
    processor.chat_template = settings + template
