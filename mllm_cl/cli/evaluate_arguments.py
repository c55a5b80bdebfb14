"""Reads the values of `mllm-cl evaluate`'s flags; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import typer

from mllm_cl.errors import suggest

OPTIONS = {
    "max_new_tokens": int,
    "do_sample": bool,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "num_beams": int,
    "repetition_penalty": float,
    "length_penalty": float,
    "no_repeat_ngram_size": int,
    "min_new_tokens": int,
    "until": str,
}
"""What `--gen_kwargs` understands; `until` is a stop string, several with `|` between them."""

LEAST = {
    "max_new_tokens": 1,
    "temperature": 0,
    "top_p": 0,
    "top_k": 0,
    "num_beams": 1,
    "repetition_penalty": 0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""What a number of `--gen_kwargs` must not be below; `top_p` must not be above 1 either."""

REFUSED = {
    "--use_cache": "answers are kept in --output_path and used again while nothing they depend on has changed",
    "-c": "answers are kept in --output_path and used again while nothing they depend on has changed",
    "--cache_requests": "rows are read once for all checkpoints, and not kept between commands",
    "--fewshot_as_multiturn": "tasks are asked without examples",
    "--baseline": "compare with `mllm-cl compare`, which tests the same rows in pairs",
    "--wandb_args": "put `report_to` into the recipe's `training`; results of evaluations are files",
    "--hf_hub_log_args": "publish a run with `mllm-cl push`",
    "--trust_remote_code": "put `trust_remote_code: true` into a recipe's `model`, and evaluate its run",
    "--check_integrity": "`mllm-cl data validate STREAM` checks the data",
    "--write_out": "`mllm-cl data show` shows rows, and --log_samples writes all of them",
}
"""Flags of lm-evaluation-harness that are not here, and what to do instead."""

VERBOSITY = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

VLLM = "vllm"

MODEL_ARGS = ("pretrained", "peft", "revision", "dtype", "trust_remote_code")


def refuse(arguments: list[str]) -> None:
    """Ends with what to do instead when a flag is given that other harnesses have and this one has not."""
    for argument in arguments:
        if argument.partition("=")[0] in REFUSED:
            name = argument.partition("=")[0]
            raise typer.BadParameter(f"is not here: {REFUSED[name]}", param_hint=name)


def with_system_instruction(rows: Sequence[Any], text: str) -> list[Any]:
    """Returns the rows with a system turn in front, instead of one of their own."""
    turn = {"role": "system", "content": text}
    return [
        {**row, "messages": [turn, *(message for message in row["messages"] if message["role"] != "system")]}
        for row in rows
    ]


def batch_size_of(text: str, largest: int | None = None) -> int | Literal["auto"]:
    """Returns rows per batch; `auto` with a largest size begins there."""
    if text == "auto":
        return "auto" if largest is None else largest
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither `auto` nor a number of rows", param_hint="--batch_size")
    return int(text)


def limit_of(text: str | None) -> int | float | None:
    """Returns a number of rows, or a share of them below 1."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf or (value >= 1 and not value.is_integer()):
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor a share below 1", param_hint="--limit")
    return value if value < 1 else int(value)


def pairs(text: str, flag: str) -> dict[str, str]:
    """Returns `a=1,b=2` as a dict; a part without `=` belongs to the value before it."""
    found: dict[str, str] = {}
    last = None
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if equals:
            last = key.strip()
            found[last] = value
        elif last is not None:
            found[last] += f",{part}"
        else:
            raise typer.BadParameter(f"{part!r} is no key=value", param_hint=flag)
    return found


def generation_options(text: str | None) -> dict[str, Any]:
    """Returns the fields of `GenerationConfig` that `--gen_kwargs` sets."""
    options: dict[str, Any] = {}
    for key, value in pairs(text, "--gen_kwargs").items() if text else ():
        if key not in OPTIONS:
            raise typer.BadParameter(f"unknown {key!r}; {suggest(key, OPTIONS)}", param_hint="--gen_kwargs")
        try:
            options[key] = _value(value, OPTIONS[key])
        except ValueError:
            kind = OPTIONS[key].__name__
            raise typer.BadParameter(f"{key}={value!r} is no {kind}", param_hint="--gen_kwargs") from None
        if OPTIONS[key] is float and not math.isfinite(options[key]):
            raise typer.BadParameter(f"{key}={value} is no finite number", param_hint="--gen_kwargs")
        if key in LEAST and not LEAST[key] <= options[key] <= (1 if key == "top_p" else math.inf):
            bound = "between 0 and 1" if key == "top_p" else f"at least {LEAST[key]}"
            raise typer.BadParameter(f"{key}={value} has to be {bound}", param_hint="--gen_kwargs")
        if key == "repetition_penalty" and options[key] == 0:  # every score is divided by it
            raise typer.BadParameter(f"{key}={value} has to be above 0", param_hint="--gen_kwargs")
    if "until" in options:
        options["stop_strings"] = tuple(options.pop("until").split("|"))
        if "" in options["stop_strings"]:  # it stands in front of every answer
            raise typer.BadParameter("until has an empty stop string", param_hint="--gen_kwargs")
    if options.get("temperature") == 0:  # what other harnesses call greedy
        options |= {"do_sample": False, "temperature": 1.0}
    return options


def check_model(name: str) -> None:
    """Refuses what answers neither through transformers nor through vLLM."""
    if name not in ("hf", "hf-multimodal", "mllm_cl", VLLM):
        raise typer.BadParameter(f"{name!r} is not known; `hf` and `vllm` are", param_hint="--model")


def refuse_with_vllm(metric: str | None, device: str | None, lmms_tasks: Sequence[str]) -> None:
    """Refuses flags that vLLM could only leave out."""
    if metric == "choice_likelihood":
        raise typer.BadParameter(
            "choice_likelihood needs --model hf: nothing is generated under it", param_hint="--metric"
        )
    if device is not None:
        raise typer.BadParameter("vLLM chooses its devices itself (CUDA_VISIBLE_DEVICES)", param_hint="--device")
    if lmms_tasks:
        raise typer.BadParameter(
            "`lmms:` tasks are answered through transformers; use --model hf", param_hint="--model"
        )


def checkpoint_of_model_args(text: str, checkpoints: list[str], base_model: str | None) -> tuple[str, str | None]:
    """Returns (checkpoint, base model) of `--model_args pretrained=...,peft=...`."""
    given = pairs(text, "--model_args")
    for key in given:
        if key not in MODEL_ARGS[:2]:
            known = (
                "pretrained, peft; put other settings into a recipe"
                if key in MODEL_ARGS
                else suggest(key, MODEL_ARGS[:2])
            )
            raise typer.BadParameter(f"{key!r} cannot be set here; {known}", param_hint="--model_args")
    if checkpoints or base_model or "pretrained" not in given:
        raise typer.BadParameter(
            "give pretrained=MODEL, and neither CHECKPOINT nor --base_model beside it", param_hint="--model_args"
        )
    return (given["peft"], given["pretrained"]) if "peft" in given else (given["pretrained"], None)


def use_device(name: str | None) -> None:
    """Chooses the device for this process, before anything is loaded."""
    if name is None:
        return
    import torch
    from accelerate import PartialState

    if name == "cpu":
        PartialState(cpu=True)
    elif name != "cuda":
        raise typer.BadParameter(
            f"{name!r}: only `cpu` and `cuda`; choose a card with CUDA_VISIBLE_DEVICES", param_hint="--device"
        )
    elif not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    return kind(text)
