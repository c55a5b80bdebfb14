"""Statistics of what flows through the LoRA layers: inputs and weight gradients, as linear sketches.

Layers that are given the very same tensor (q, k, v; gate, up) share one statistic. Every process looks at its part of the
rows and the sketches are summed, so their number does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mllm_cl.data.rows import Row
from mllm_cl.methods.base import Context
from mllm_cl.models.adapters import TASK, factors, lora_layers
from mllm_cl.models.gather import full_weight
from mllm_cl.spectral.subspace import sketch_matrix


@dataclass
class Sketches:
    """What `sketch_inputs` and `sketch_gradients` return.

    Args:
        leader: module -> the module whose statistic it shares (its own for the first of a group).
        values: leader -> sketch (in, width), float32; for gradients one per module.
    """

    leader: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def of(self, module: str) -> Tensor:
        """The sketch of a module."""
        return self.values[self.leader[module]]


def base_weight(layer: LoraLayer) -> Tensor:
    """Returns the untouched weight of a layer: (out, in) float32, dequantised where it is in 4 or 8 bits."""
    return full_weight(layer.get_base_layer())


def fix_a(layer: LoraLayer, rows: Tensor) -> None:
    """Makes these rows (rank, in) the A of the fresh adapter and freezes it; only B is trained."""
    weight = factors(layer, TASK)[0].weight
    with torch.no_grad():
        weight.copy_(rows)
    weight.requires_grad_(False)


def sketch_inputs(
    ctx: Context, samples: int, width: int, batch_size: int = 4, rows: Sequence[Row] | None = None
) -> Sketches:
    """Mean of x xᵀ over tokens, sketched to `width` columns, for every LoRA layer of the model as it is now.

    Args:
        samples: rows of the task that are looked at, drawn at random.
        rows: look at these instead.
    """
    found, tokens = Sketches(), 0
    starts = range(0, len(rows or ()), batch_size)
    batches = None if rows is None else (ctx.collate(rows[start : start + batch_size]) for start in starts)
    with _watching(ctx, found) as seen, torch.no_grad():
        for batch, weight in _own_share(ctx, batches or ctx.calibration(samples, batch_size)):
            seen.clear()
            ctx.model(**{name: value for name, value in batch.items() if name != "labels"})
            for module, inputs in seen.items():
                states = _tokens(inputs, batch["attention_mask"])  # (tokens, in)
                projected = states if (omega := _omega(states, states.shape[1], width)) is None else states @ omega
                found.values[module] = found.values.get(module, 0) + weight * (states.mT @ projected)
            tokens += weight * int(batch["attention_mask"].sum())
    return _summed(
        ctx, found, float(tokens), {m: _size(layer.in_features) for m, layer in lora_layers(ctx.model)}, width
    )


def sketch_gradients(ctx: Context, samples: int, width: int, batch_size: int = 4) -> Sketches:
    """Mean over rows of the gradient of the weight, transposed (in, out) and sketched to `width` columns.

    The loss is the summed negative log-likelihood of a row's target tokens. No gradient of a weight is ever formed.
    """
    found, rows = Sketches(), 0
    names = dict(lora_layers(ctx.model))
    parameters = [parameter for parameter in ctx.model.parameters() if parameter.requires_grad]
    with _watching(ctx, found, alone=True) as seen:

        def keep(module: str) -> Any:
            def hook(gradient: Tensor) -> None:  # (batch, length, out)
                inputs = seen[module].reshape(-1, seen[module].shape[-1]).float()
                outputs = gradient.reshape(-1, gradient.shape[-1]).float()
                omega = _omega(outputs, outputs.shape[1], width)
                projected = outputs if omega is None else outputs @ omega
                found.values[module] = found.values.get(module, 0) + inputs.mT @ projected

            return hook

        def listen(module: str) -> Any:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if output.requires_grad:  # not below the lowest trained layer
                    output.register_hook(keep(module))

            return hook

        handles = [layer.register_forward_hook(listen(module)) for module, layer in names.items()]  # type: ignore[attr-defined]
        try:
            for batch, weight in _own_share(ctx, ctx.calibration(samples, batch_size)):
                seen.clear()
                loss = ctx.model(**batch, num_items_in_batch=1).loss * weight
                torch.autograd.grad(loss, parameters, allow_unused=True)
                rows += weight * len(batch["input_ids"])
        finally:
            for handle in handles:
                handle.remove()
    return _summed(
        ctx, found, float(rows), {module: _size(layer.out_features) for module, layer in names.items()}, width
    )


def _summed(ctx: Context, found: Sketches, count: float, columns: dict[str, int], width: int) -> Sketches:
    """The mean over all processes; zeros for layers that no row has reached (the vision side without images)."""
    for others in gather_object([found.leader]):
        found.leader = others | found.leader
    for module, layer in lora_layers(ctx.model):
        leader = found.leader.setdefault(module, module)
        if leader not in found.values:
            found.values[leader] = torch.zeros(
                _size(layer.in_features), min(width, columns[leader]), device=ctx.model.device
            )
    total = ctx.accelerator.reduce(torch.tensor(count, device=ctx.model.device), reduction="sum")
    whole: Any = ctx.accelerator.reduce(dict(sorted(found.values.items())), reduction="sum")
    found.values = {module: value / total.clamp_min(1) for module, value in whole.items()}  # type: ignore[union-attr]
    return found


@contextmanager
def _watching(ctx: Context, found: Sketches, alone: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the context (evaluation mode) the inputs of the layers appear in the mapping, once per distinct tensor."""
    seen: dict[str, Tensor] = {}
    last: list[tuple[str, Tensor]] = []

    def watch(module: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not alone and last and last[-1][1] is args[0]:
                found.leader[module] = last[-1][0]
                return
            last[:] = [(module, args[0])]
            found.leader[module] = module
            seen[module] = args[0].detach()

        return hook

    was_training = ctx.model.training
    ctx.model.eval()
    handles = [layer.register_forward_pre_hook(watch(module)) for module, layer in lora_layers(ctx.model)]  # type: ignore[attr-defined]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        ctx.model.train(was_training)


def _own_share(ctx: Context, batches: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """This process's part of the batches with weight 1; one with weight 0 where there is none for it, since
    all processes must know all shapes when they add up."""
    own, first = 0, None
    for index, batch in enumerate(batches):
        first = first or batch
        if index % ctx.accelerator.num_processes == ctx.accelerator.process_index:
            own += 1
            yield batch, 1
    if not own and first is not None:
        yield first, 0


def _tokens(inputs: Tensor, mask: Tensor) -> Tensor:
    """Rows of the inputs that are tokens and not padding; all rows for the vision side, which has a length of its own."""
    if inputs.dim() == 3 and inputs.shape[:2] == mask.shape:
        return inputs[mask.bool()].float()  # (batch, length, in) -> (tokens, in)
    return inputs.reshape(-1, inputs.shape[-1]).float()


def _size(features: Any) -> int:
    """PEFT knows the sizes of linear layers, and types them as optional."""
    return int(features)


def _omega(like: Tensor, columns: int, width: int) -> Tensor | None:
    omega = sketch_matrix(columns, width)
    return None if omega is None else omega.to(like)
