"""What methods of soft prompts share: the base and its adapter stay what they are, vectors in the sequence are learnt.

A subclass says what there is (`prepare`), what of it is trained (`trains`) and which prompts a row gets (`pick`). What rows are
chosen by, their query, is what the untouched base makes of the inquiry: the answer and its loss have no part in it, so training
and inference ask the same question.

Notation: N rows, L tokens, P tokens of the prompt, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize

from mllm_cl.data.collate import IGNORED, image_token_ids
from mllm_cl.methods._live import frozen, restore, revived, trained
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState, RouteBatch, TrainBatch
from mllm_cl.models.adapters import DEFAULT, PREVIOUS, active, set_trainable
from mllm_cl.models.soft_prompts import SoftPrompts, adapters_on

Vectors = Mapping[str, Tensor]
_NOT_ASKED = ("labels", "num_items_in_batch", "output_hidden_states", "return_dict")


@dataclass(frozen=True)
class Query:
    """What the untouched base makes of inquiries: means over last hidden states, of unit length, (N, H) float32.

    Args:
        whole: over all tokens of the inquiry.
        image: over those that stand for images; 0 for a row without.
        text: over the others.
        pictured: (N,) 1.0 where the row has an image, else 0.0.
    """

    whole: Tensor
    image: Tensor
    text: Tensor
    pictured: Tensor


class Prompts(Method):
    """Base of the methods that learn soft prompts instead of adapters."""

    adapters = "one"
    needs = frozenset({"continued"})
    supports = WITHIN_STEPS
    roles = frozenset({"routing", "training"})

    def __init__(self) -> None:
        self.learnt: dict[str, Tensor] = {}  # at the end of the last task
        self._live: dict[str, nn.Parameter] = {}
        self._last: dict[str, Tensor] = {}
        self._images: list[int] = []
        self._asked: tuple[Tensor, Query] | None = None

    # what a subclass says ----------------------------------------------------------------------------------------------

    def prepare(self, ctx: Context) -> None:
        """Adds to `learnt` what this task needs: name -> what it starts from."""
        raise NotImplementedError

    def trains(self, name: str, index: int) -> bool:
        """True if `name` is trained in task number `index`."""
        return True

    def pick(self, own: Vectors, ask: Callable[[], Query], learning: int | None) -> Tensor | None:
        """The prompts of every row (N, P, H), from the vectors by name; `None` while there are none.

        Args:
            ask: the query of the rows; costs a forward pass.
            learning: number of the task that is being learnt, `None` at inference.
        """
        raise NotImplementedError

    # hooks ---------------------------------------------------------------------------------------------------------------

    def begin_task(self, ctx: Context) -> None:
        self._last = dict(self.learnt)
        self.prepare(ctx)
        self._live = {}
        self._attach(ctx, ctx.index)

    def parameters(self, ctx: Context) -> Mapping[str, nn.Parameter]:
        set_trainable(ctx.model, [])
        return trained(self._live, lambda name: self.trains(name, ctx.index))

    def end_task(self, ctx: Context) -> None:
        self.learnt = frozen(self._live)
        self._attach(ctx, None)

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        """The prompts are chosen inside of the model: here it is only seen to it that they are there."""
        self._attach(ctx, None)
        return None

    def _attach(self, ctx: Context, learning: int | None) -> None:
        model, device = ctx.model, next(ctx.model.parameters()).device
        if self._live.keys() != self.learnt.keys():
            self._live = revived(self.learnt, device)
        self._images, self._asked = image_token_ids(ctx.processor), None

        def choose(inputs: dict[str, Any]) -> Tensor | None:
            on = adapters_on(model)
            own: Vectors = self._live if DEFAULT in on else self._last if PREVIOUS in on else {}
            now = learning if DEFAULT in on and model.training else None
            if not own:
                return None
            prompts = self.pick({n: t.to(device) for n, t in own.items()}, lambda: self._query(model, inputs), now)
            return None if prompts is None else prompts.expand(len(inputs["input_ids"]), -1, -1)

        prompts = SoftPrompts.of(model) or SoftPrompts(model, ctx.processor, choose)
        prompts.choose = choose

    def _query(self, model: PeftModel, inputs: dict[str, Any]) -> Query:
        """Asks the untouched base, once for the same token ids."""
        ids = inputs["input_ids"]
        if self._asked is not None and self._asked[0] is ids:
            return self._asked[1]
        soft = SoftPrompts.of(model)
        assert soft is not None
        given = {name: value for name, value in inputs.items() if name not in _NOT_ASKED}
        was_training = model.training
        model.eval()
        with torch.no_grad(), soft.paused(), active(model, []):
            states = model.get_base_model()(**given, output_hidden_states=True).hidden_states[-1].float()
        model.train(was_training)
        whole = inputs["attention_mask"].bool()
        if "labels" in inputs:  # up to the first token of the answer
            whole = whole & ((inputs["labels"] != IGNORED).cumsum(dim=1) == 0)
        pictures = torch.isin(ids, torch.tensor(self._images, dtype=ids.dtype, device=ids.device)) & whole
        means = [_mean(states, mask) for mask in (whole, pictures, whole & ~pictures)]
        query = Query(*means, pictured=pictures.any(dim=1).float())
        self._asked = (ids, query)
        return query

    def state_dict(self) -> MethodState:
        return MethodState({f"vectors/{name}": tensor for name, tensor in self.learnt.items()}, {"gated": True})

    def load_state_dict(self, state: MethodState) -> None:
        self.learnt = {name.removeprefix("vectors/"): tensor for name, tensor in state.tensors.items()}
        if self._live.keys() == self.learnt.keys():
            restore(self._live, self.learnt)


class ChosenPrompts(Prompts):
    """Prompts that are chosen by the row's query, and a loss that draws to it what they are chosen by."""

    def attraction(self, own: Vectors, query: Query, index: int) -> Tensor:
        """The loss of every row (N,), already weighted, in task number `index`."""
        raise NotImplementedError

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        rows = self.attraction(self._live, self._query(ctx.model, batch.inputs), ctx.index)
        taught = (batch.inputs["labels"] != IGNORED).any(dim=1)  # not those that fill up the last batch of an epoch
        return {self.name: (rows * taught).sum() / taught.sum().clamp_min(1) * batch.share("rows")}


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, of unit length; 0 where there is none: (N, L, H), (N, L) -> (N, H)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return normalize((states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1), dim=-1)


def word_vectors(ctx: Context, count: int) -> Tensor:
    """Embeddings of words drawn at random, as the model makes them: (count, H) float32; what prompts start from."""
    embed: Any = ctx.model.get_base_model().get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(len(ctx.processor.tokenizer), (1, count), generator=ctx.rng)  # type: ignore[attr-defined]
    with torch.no_grad():
        return embed(ids.to(embed.weight.device))[0].float().cpu().clone()
