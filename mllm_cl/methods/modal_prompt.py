"""modal_prompt: a soft prompt per task; image and text of a row say together which tasks' prompts it gets.

Idea: prompts of earlier tasks stay as they are, and each has a prototype in the space of the rows' features that finds the
rows it is for.
Formula: e_t (length, hidden) the prompt of task t, p_t = mean over its tokens of f_t(e_t), f_t: Linear – SiLU – Linear; guide
g_i(x) = ½ cos(c_image(x), p_i) + ½ cos(c_text(x), p_i), the text's alone where there is no image. Training: input [prompts of the
`past` earlier tasks with the largest guide; e_t; x], L = ℓ + strength · ((1 − cos(c_image, p_t)) + (1 − cos(c_text, p_t))), and
only e_t and f_t are trained. Inference: the prompts of the `top` tasks with the largest guide, the best next to the text.
Stored per task: (length + 1) × hidden float32, as f_t is needed in its own task only. Cost per step: 1.5×, for the features are
a forward pass of the base, and up to (past + 1) × length tokens more; inference the same with top × length.
Reference: ModalPrompt, Zeng et al. (EMNLP 2025, arXiv 2410.05849; AuroraZengfh/ModalPrompt). Written from a description of
its equations.
Fidelity: the features are mean last hidden states of the untouched base over image and over text tokens instead of CLIP's, and
hidden wide instead of 768.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from mllm_cl.methods._prompts import ChosenPrompts, Query, Vectors, word_vectors
from mllm_cl.methods._routing import similarities
from mllm_cl.methods.base import Context

_LAYERS = ("in", "in_bias", "out", "out_bias")  # of f_t


class ModalPrompt(ChosenPrompts):
    """ModalPrompt.

    Args:
        length: tokens of every task's prompt.
        past: prompts of earlier tasks beside that of the task that is learnt.
        top: prompts of every row at inference.
        strength: weight of the distance between prototype and features.
    """

    name = "modal_prompt"
    summary = "a soft prompt per task, chosen per sample by its image and its text"

    def __init__(
        self,
        *,
        length: Annotated[int, Field(ge=1)] = 10,
        past: Annotated[int, Field(ge=0)] = 2,
        top: Annotated[int, Field(ge=1)] = 3,
        strength: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        super().__init__()
        self.length, self.past, self.top, self.strength = length, past, top, strength

    def prepare(self, ctx: Context) -> None:
        words = word_vectors(ctx, self.length)
        hidden = words.shape[1]
        bound = hidden**-0.5  # as a linear layer of torch starts
        shapes = ((hidden, hidden), (hidden,), (hidden, hidden), (hidden,))
        drawn = [(torch.rand(shape, generator=ctx.rng) * 2 - 1) * bound for shape in shapes]
        self.learnt |= {f"{ctx.index}/prompt": words}
        self.learnt |= {f"{ctx.index}/{layer}": weights for layer, weights in zip(_LAYERS, drawn)}

    def trains(self, name: str, index: int) -> bool:
        return name.startswith(f"{index}/")

    def end_task(self, ctx: Context) -> None:
        super().end_task(ctx)
        own = str(ctx.index)
        self.learnt[f"{own}/prototype"] = prototype(self.learnt, own)
        for layer in _LAYERS:
            del self.learnt[f"{own}/{layer}"]
        self._attach(ctx, None)

    def pick(self, own: Vectors, ask: Callable[[], Query], learning: int | None) -> Tensor | None:
        tasks = sorted({name.partition("/")[0] for name in own}, key=int)
        now = [] if learning is None else [str(learning)]
        others = [task for task in tasks if task not in now]
        count = min(self.top if learning is None else self.past, len(others))
        newest = [own[f"{task}/prompt"].unsqueeze(0) for task in now]
        if not count:
            return newest[0]
        stacked = torch.stack([own[f"{task}/prompt"] for task in others])  # (T, length, H)
        prototypes = torch.stack([prototype(own, task) for task in others]).detach()
        best = guide(ask(), prototypes).topk(count, dim=1).indices.flip(1)  # (N, count), the best one last
        chosen = stacked[best].flatten(1, 2)
        return torch.cat([chosen, *(prompt.expand(len(chosen), -1, -1) for prompt in newest)], dim=1)

    def attraction(self, own: Vectors, query: Query, index: int) -> Tensor:
        mine = prototype(own, str(index)).unsqueeze(0)
        distance = 1 - cosine_similarity(query.text, mine)
        return self.strength * (distance + query.pictured * (1 - cosine_similarity(query.image, mine)))


def prototype(own: Vectors, task: str) -> Tensor:
    """p of a task (hidden,): from its prompt and f while it is learnt, else what was kept of it."""
    kept = own.get(f"{task}/prototype")
    if kept is not None:
        return kept
    first, first_bias, second, second_bias = (own[f"{task}/{layer}"] for layer in _LAYERS)
    return (silu(own[f"{task}/prompt"] @ first.mT + first_bias) @ second.mT + second_bias).mean(dim=0)


def guide(query: Query, prototypes: Tensor) -> Tensor:
    """g of every row and task: (T, hidden) -> (N, T)."""
    image, text = similarities(query.image, prototypes), similarities(query.text, prototypes)
    pictured = query.pictured.unsqueeze(1)
    return (text + pictured * image) / (1 + pictured)
