"""Soft prompts: learnt vectors in the sequence of an image-text model, another choice of them for every row if need be.

A prompt is put into the token ids as so many ordinary tokens, and where the model embeds these the learnt vectors take their
place. Whatever a model derives from its ids (positions in one or three dimensions, masks, where images are) it derives from
the longer sequence, so no family has to be known by name. The prompt stands behind the begin token of a row where it has
one, else before its first token, and always behind padding; it is taken out of `logits` and `hidden_states` again, so that
these fit the ids and labels that the caller gave.

Notation: N rows, L tokens, P tokens of the prompt, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from mllm_cl.errors import ModelError
from mllm_cl.models.adapters import lora_layers

Choose = Callable[[dict[str, Any]], Tensor | None]
"""Inputs of the model -> prompts (N, P, H), or `None` where the model is to answer without."""

_NAME = "_mllm_cl_soft_prompts"
_FILL = {"attention_mask": 1, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class SoftPrompts:
    """Puts prompts into every forward pass of a model, from now on.

    Args:
        model: the model.
        processor: its processor.
        choose: which prompts.
    """

    def __init__(self, model: PeftModel, processor: ProcessorMixin, choose: Choose) -> None:
        self.choose = choose
        base = cast(PreTrainedModel, model.get_base_model())
        tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
        self.begin: int | None = tokenizer.bos_token_id
        self.filler: int = tokenizer("a", add_special_tokens=False)["input_ids"][0]  # any token that is text
        self._prompts: Tensor | None = None
        self._places = torch.zeros(0, 0, dtype=torch.bool)
        self._paused, self._embedded = False, False
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, always_call=True)
        base.get_input_embeddings().register_forward_hook(self._embed)
        vars(base)[_NAME] = self

    @staticmethod
    def of(model: nn.Module) -> SoftPrompts | None:
        """Returns those of a model, if any."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return vars(base).get(_NAME)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context forward passes go without prompts, also inside of one that has them."""
        before, self._paused = self._paused, True
        prompts, self._prompts = self._prompts, None
        try:
            yield
        finally:
            self._paused, self._prompts = before, prompts

    @contextlib.contextmanager
    def written_into(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inputs for `generate`: the prompt is written into them once and is in the cache afterwards."""
        prompts = self.choose(inputs)
        with self.paused():
            yield inputs if prompts is None else self._lengthen(inputs, prompts)
            self._check_embedded(prompts)

    def _before(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if self._paused or given.get("input_ids") is None:
            return None
        prompts = self.choose(given)
        if prompts is None:
            return None
        if given.get("past_key_values") is not None:
            raise ModelError(
                "soft prompts: a forward pass with a cache got no prompt written into its inputs.",
                expected="generation through `mllm_cl.evaluation.engine.generate`",
            )
        return args, self._lengthen(given, prompts)

    def _lengthen(self, given: dict[str, Any], prompts: Tensor) -> dict[str, Any]:
        """Makes room for the prompt in everything that has one entry per token."""
        ids = given["input_ids"]  # (N, L)
        count, length = ids.shape
        extra = prompts.shape[1]
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        begin = mask.argmax(dim=1)  # the first token that is not padding
        if self.begin is not None:
            begin = begin + (ids.gather(1, begin.unsqueeze(1)).squeeze(1) == self.begin)
        column = torch.arange(length + extra, device=ids.device).expand(count, -1)
        begin = begin.unsqueeze(1)
        places = (column >= begin) & (column < begin + extra)
        source = (column - extra * (column >= begin + extra)).clamp_max(length - 1)
        longer = dict(given) | {"attention_mask": mask}
        for name, value in longer.items():
            if not torch.is_tensor(value) or value.shape[:2] != ids.shape:
                continue
            fill = self.filler if name == "input_ids" else _FILL.get(name)
            if fill is None or value.dim() != 2:
                raise ModelError(
                    f"soft prompts: this model is given {name} {tuple(value.shape)} per token, and what it would be for "
                    "the tokens of a prompt is not known.",
                    expected=f"no inputs per token but input_ids, {', '.join(_FILL)}",
                    fix="choose a method that trains adapters.",
                )
            longer[name] = value.gather(1, source).masked_fill(places, fill)
        self._prompts, self._places, self._embedded = prompts, places, False
        return longer

    def _check_embedded(self, prompts: Tensor | None) -> None:
        if prompts is not None and not self._embedded:
            raise ModelError(
                "soft prompts: this model does not embed its tokens with `get_input_embeddings()`.",
                expected="a model that calls that module with the token ids",
                fix="choose a method that trains adapters.",
            )

    def _embed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Puts the prompts where their places are; a pass that continues from a cache has none of them."""
        if self._prompts is None or not args or args[0].dim() != 2 or args[0].shape[1] < self._places.shape[1]:
            return None
        rows, length = args[0].shape
        copies = rows // len(self._places)  # beam search repeats every row
        places = torch.zeros(rows, length, dtype=torch.bool, device=output.device)
        places[:, : self._places.shape[1]] = self._places.repeat_interleave(copies, dim=0)
        prompts = self._prompts.repeat_interleave(copies, dim=0).to(output)
        self._embedded = True
        return output.masked_scatter(places.unsqueeze(-1), prompts)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Takes the prompt's tokens out of what has one entry per token."""
        if self._paused or self._prompts is None:
            return None
        prompts, kept = self._prompts, ~self._places
        self._prompts = None
        if output is None:  # the pass failed
            return None
        self._check_embedded(prompts)

        def cut(states: Tensor) -> Tensor:
            if states.shape[:2] != kept.shape:
                return states  # logits of the last tokens only
            return states[kept].unflatten(0, (len(kept), -1))

        if output.get("logits") is not None:
            output.logits = cut(output.logits)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(cut(states) for states in output.hidden_states)
        return output


@contextlib.contextmanager
def with_prompts(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs for `generate` with the model's prompts written into them; the same inputs where it has none."""
    prompts = SoftPrompts.of(model)
    if prompts is None:
        yield inputs
    else:
        with prompts.written_into(inputs) as longer:
            yield longer


def adapters_on(model: PeftModel) -> list[str]:
    """Returns the adapters that take part in the forward pass."""
    layer = next((layer for _, layer in lora_layers(model)), None)
    return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)
