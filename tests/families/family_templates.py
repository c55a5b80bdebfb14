"""Chat templates in the shape of the official ones, with generation markers around exactly what the assistant says.

Each is a function of the text that stands for an image. `unmarked` takes the markers away, which is what most official
templates look like.
"""

from __future__ import annotations

from collections.abc import Callable

_BLOCKS = """
{%- macro blocks(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ block['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""


def chatml(image: str) -> str:
    """Qwen-VL, OneVision, InternVL: the end token and a line break after every turn."""
    return (
        _BLOCKS
        + """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- blocks(message) + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- blocks(message) + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def chatml_system(image: str) -> str:
    """As `chatml`, with a system turn of its own when none is given."""
    start = (
        "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}{%- endif -%}"
    )
    return start + chatml(image)


def thinking(image: str) -> str:
    """Qwen 3: an empty thought before the last answer, none before earlier ones; content may be text only."""
    return (
        _BLOCKS
        + """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + blocks(message) + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}{{- blocks(message) + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def llama3(image: str) -> str:
    """Llama 3 and Mllama: contents are trimmed, two line breaks after the header."""
    return (
        _BLOCKS
        + """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- blocks(message) | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- blocks(message) | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def gemma(image: str) -> str:
    """Gemma: the assistant is called model."""
    return (
        _BLOCKS
        + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}
{%- generation -%}{{- blocks(message) | trim + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- '<start_of_turn>user\\n' + blocks(message) | trim + '<end_of_turn>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def mistral(image: str) -> str:
    """Mistral and Pixtral: no generation prompt at all; the end token only after answers."""
    return (
        _BLOCKS
        + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- blocks(message) + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- '[INST]' + blocks(message) + '[/INST]' -}}{%- endif -%}
{%- endfor -%}
"""
    ).replace("IMAGE", image)


def idefics(image: str) -> str:
    """Idefics 3 and SmolVLM: roles are plain words, a space before the text, every turn ends alike."""
    return (
        _BLOCKS
        + """
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + blocks(message) + '<end_of_utterance>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- 'User:' + blocks(message) + '<end_of_utterance>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def vicuna(image: str) -> str:
    """LLaVA-1.5 as published with the converted checkpoints: nothing ends an answer but a space."""
    return (
        _BLOCKS
        + """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + blocks(message) -}}{%- endgeneration -%}{{- ' ' -}}
{%- else -%}{{- 'USER: ' + blocks(message) + ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def cohere(image: str) -> str:
    """Aya Vision: an answer is ended by two tokens, and begun by one that the generation prompt writes."""
    return (
        _BLOCKS
        + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}
{%- generation -%}{{- blocks(message) + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}{%- endgeneration -%}
{%- else -%}{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + blocks(message) + '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def phi(image: str) -> str:
    """Phi 3 and 4: turns end with a token that is not the tokenizer's end token, which follows the whole row."""
    return (
        _BLOCKS
        + """
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- blocks(message) + '<|end|>' + ('\\n' + eos_token if loop.last and not add_generation_prompt else '') -}}
{%- endgeneration -%}
{{- '' if loop.last else '\\n' -}}
{%- else -%}{{- blocks(message) + '<|end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


def llama2(image: str) -> str:
    """Llama 2 and Mistral 7B: every question begins anew, a space stands on both sides of an answer."""
    return (
        _BLOCKS
        + """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + blocks(message) | trim + ' ' + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}{{- bos_token + '[INST] ' + blocks(message) + ' [/INST]' -}}
{%- else -%}{{- '<<SYS>>\\n' + blocks(message) + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{%- endfor -%}
"""
    ).replace("IMAGE", image)


def deepseek(image: str) -> str:
    """DeepSeek: full-width bars in the tokens, no line breaks at all."""
    return (
        _BLOCKS
        + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' -}}{%- generation -%}{{- blocks(message) + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}{{- '<｜User｜>' + blocks(message) -}}
{%- else -%}{{- blocks(message) + '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""
    ).replace("IMAGE", image)


TEMPLATES: dict[str, Callable[[str], str]] = {
    "chatml": chatml,
    "chatml_system": chatml_system,
    "thinking": thinking,
    "llama3": llama3,
    "gemma": gemma,
    "mistral": mistral,
    "idefics": idefics,
    "vicuna": vicuna,
    "cohere": cohere,
    "phi": phi,
    "llama2": llama2,
    "deepseek": deepseek,
}

# begin, end and padding tokens, and the further control tokens of each format
TOKENS: dict[str, tuple[str | None, str, str, list[str]]] = {
    "chatml": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"]),
    "chatml_system": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"]),
    "thinking": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"]),
    "llama3": (
        "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
    ),
    "gemma": ("<bos>", "<end_of_turn>", "<pad>", ["<start_of_turn>", "<eos>"]),
    "mistral": ("<s>", "</s>", "<pad>", ["[INST]", "[/INST]"]),
    "idefics": ("<|im_start|>", "<end_of_utterance>", "<|im_end|>", []),
    "vicuna": ("<s>", "</s>", "<pad>", []),
    "cohere": (
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>",
        ["<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    ),
    "phi": ("<s>", "<|endoftext|>", "<pad>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "llama2": ("<s>", "</s>", "<pad>", []),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>", ["<｜User｜>", "<｜Assistant｜>"]),
}  # fmt: skip


def unmarked(template: str) -> str:
    """Returns a template without its generation markers."""
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
