"""smolora: two separate mixtures of LoRA blocks, one for what is seen and one for what is asked (SMoLoRA).

Idea: tasks differ in what must be seen and in how it must be answered; a router for each lets a new task change one without
the other, and a third gate weighs the two for every token.
Formula: y = W x + a v(x) + b u(x). v = p_k s B_k A_k x with the block k = argmax_k p_k of the visual half, p = softmax(R_v
x̄), x̄ the mean of the layer's inputs over the row's prompt; u likewise of the instruction half with R_u e, e the unit mean
of the embeddings of the words asked; (a, b) = softmax(f_v · v, f_u · u) for every token. The two routers learn in the first
task only.
Stored once: one adapter of rank r, two routers and f (2 × out) per layer, float32; nothing per task. Cost per step: 1×,
inference the same; no second model and no embedding pass.
Reference: Wang et al. 2025, SMoLoRA (ICCV, arXiv 2411.13949; Minato-Zackie/SMoLoRA). Fidelity: released gates are 0 or 1, so
that no gradient reaches the routers; here the chosen block is multiplied by its probability. The paper embeds the
instruction's template with a MiniLM, chosen by an index of the instruction's type; here e comes from the words themselves,
so no index is needed. Means are over the prompt alone, in training too (released: over all tokens, answers and padding
included, and in generation over the one new token). The paper: feed-forward layers and projector, 4 + 4 blocks of rank 16.
Not under activation checkpointing, nor on layers that do not see the prompt (the cross-attention of Mllama); both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from mllm_cl.data.collate import IGNORED
from mllm_cl.errors import MethodError
from mllm_cl.methods._experts import Experts, first_router, language_only, spread
from mllm_cl.methods._routing import top_probability
from mllm_cl.methods.base import Context, RouteBatch
from mllm_cl.models.adapters import lora_layers


class SMoLoRA(Experts):
    """SMoLoRA.

    Args:
        blocks: blocks of each half; twice as many must divide `model.lora.r`.
    """

    name = "smolora"
    summary = "LoRA blocks for seeing and for answering, each routed by the row's prompt, fused per token"

    def __init__(self, *, blocks: Annotated[int, Field(ge=1)] = 2) -> None:
        super().__init__(2 * blocks)
        self.blocks = blocks
        self._prompt: Tensor | None = None  # which tokens are the prompt's (N, L); None while an answer is continued
        self._visual: dict[str, Tensor] = {}  # module -> gates (N, blocks) of the prompt that is continued
        self._asked = torch.zeros(0, 0)  # e (N, hidden)
        self._listening: nn.Module | None = None
        self._marks = torch.zeros(0, dtype=torch.long)

    def prepare(self, ctx: Context) -> None:
        language_only(ctx, self.name)
        if self.gates:
            return
        base: Any = ctx.model.get_base_model()
        hidden = base.get_input_embeddings().weight.shape[1]
        for module, layer in lora_layers(ctx.model):
            self.gates[f"visual/{module}"] = first_router(self.blocks, layer.in_features, ctx.rng)
            self.gates[f"asked/{module}"] = first_router(self.blocks, hidden, ctx.rng)
            self.gates[f"fusion/{module}"] = first_router(2, layer.out_features, ctx.rng)

    def trains(self, name: str, index: int) -> bool:
        return index == 1 or name.startswith("fusion/")

    def begin_task(self, ctx: Context) -> None:
        self._listen(ctx)
        super().begin_task(ctx)

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        self._listen(ctx)
        return super().route(ctx, batch)

    def _listen(self, ctx: Context) -> None:
        base: Any = ctx.model.get_base_model()
        if self._listening is not base:
            tokenizer = ctx.processor.tokenizer  # type: ignore[attr-defined]
            marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
            self._marks = torch.tensor(sorted(marks))
            base.register_forward_pre_hook(self._read, with_kwargs=True)
            self._listening = base

    def _read(self, base: Any, args: tuple, inputs: dict[str, Any]) -> None:
        """Before every forward pass: which tokens are the prompt's, and what is asked there."""
        if base.training and torch.is_grad_enabled() and base.is_activation_checkpointing:
            raise MethodError(
                f"methods.{self.name}: the gates of a prompt are not known when a layer is run again in the backward pass.",
                fix="turn training.activation_checkpointing (gradient_checkpointing) off.",
            )
        past = inputs.get("past_key_values")
        if past is not None and past.get_seq_length():
            self._prompt = None
            return
        ids, labels, mask = inputs["input_ids"], inputs.get("labels"), inputs.get("attention_mask")
        # `generate` leaves out a mask that hides nothing
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if labels is not None:
            mask = mask & ((labels != IGNORED).cumsum(dim=1) == 0)
        words = mask & ~torch.isin(ids, self._marks.to(ids.device))
        table = base.get_input_embeddings().weight.detach()
        self._asked = normalize(mean_over(embedding(ids, table).float(), words), dim=-1)
        self._prompt, self._visual = mask, {}

    def gate(self, own: Mapping[str, Tensor], module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
        visual = self._seen(own[f"visual/{module}"], module, inputs)
        asked = top_probability(self._asked @ own[f"asked/{module}"].mT)
        states = states * spread(torch.cat([visual, asked], dim=-1), states.shape[-1]).unsqueeze(1)  # (N, L, R)
        halves = states.chunk(2, dim=-1)
        fusion = zip(scaled.chunk(2, dim=-1), own[f"fusion/{module}"])  # s B of a half (out, R / 2), its f (out,)
        scores = torch.stack([half @ (part.mT @ own_f) for half, (part, own_f) in zip(halves, fusion)], dim=-1)
        fused = scores.softmax(dim=-1)  # (N, L, 2)
        return torch.cat([half * fused[..., side : side + 1] for side, half in enumerate(halves)], dim=-1)

    def _seen(self, router: Tensor, module: str, inputs: Tensor) -> Tensor:
        """Gates of the visual half: (N, blocks), from the prompt; kept while its answer is generated."""
        if self._prompt is None:
            return self._visual[module]
        if inputs.shape[:2] != self._prompt.shape:
            raise MethodError(
                f"methods.{self.name}: layer {module} was given {tuple(inputs.shape)} for {tuple(self._prompt.shape)}.",
                expected="(rows, tokens, features)",
                fix="leave this layer out of model.lora.target_modules.",
            )
        gates = top_probability(mean_over(inputs, self._prompt) @ router.mT)
        if not torch.is_grad_enabled():
            self._visual[module] = gates
        return gates


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of a mask: (N, L, F), (N, L) -> (N, F); 0 for a row without any."""
    weights = mask.unsqueeze(-1).to(states)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
