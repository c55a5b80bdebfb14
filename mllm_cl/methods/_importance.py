"""What EWC, SI and MAS share: a quadratic penalty, its state, and importance estimated one example at a time.

    penalty = strength · ½ Σ_i Ω_i (θ_i − θ*_i)²        Ω ← decay · Ω + Ω_t / mean(Ω_t), θ* after the last task

Ω_t is normalised to mean 1, so that `strength` keeps its meaning over models. All of them hold on to single weights, so
they need one adapter that continues. Importance is taken in evaluation mode, at the end of the task (at its start B = 0,
and A has no gradient), on rows drawn from the whole task, shared between the processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mllm_cl.methods._terms import quadratic_penalty
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState, TrainBatch
from mllm_cl.models.adapters import DEFAULT, adapter_parameters

Importance = dict[str, Tensor]


class QuadraticPenalty(Method):
    """Base of the importance methods; a subclass says in `end_task` what the importance of its task is."""

    adapters = "one"
    needs = frozenset({"continued", "adapter"})
    supports = WITHIN_STEPS

    def __init__(self, *, strength: float, decay: float) -> None:
        self.strength, self.decay = strength, decay
        self.importance: Importance = {}
        self.anchors: dict[str, Tensor] = {}

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if not self.anchors or self.strength == 0:
            return {}
        self._place(next(ctx.model.parameters()).device)
        penalty = quadratic_penalty(adapter_parameters(ctx.model, DEFAULT), self.anchors, self.importance)
        return {self.name: self.strength * penalty * batch.share("step")}

    def _place(self, device: torch.device) -> None:
        """Moves a state that was loaded from disk to the model, once."""
        if next(iter(self.anchors.values())).device != device:
            self.importance = {name: tensor.to(device) for name, tensor in self.importance.items()}
            self.anchors = {name: tensor.to(device) for name, tensor in self.anchors.items()}

    def consolidate(self, ctx: Context, own: Importance) -> None:
        """Adds the importance of the task and moves the anchor to where the adapter is."""
        mean = torch.cat([tensor.flatten() for tensor in own.values()]).mean().clamp_min(1e-30)
        for name, tensor in own.items():
            past = self.importance.get(name)
            self.importance[name] = tensor / mean + (0 if past is None else self.decay * past.to(tensor.device))
        parameters = adapter_parameters(ctx.model, DEFAULT)
        self.anchors = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def state_dict(self) -> MethodState:
        tensors = {f"importance/{name}": tensor for name, tensor in self.importance.items()}
        return MethodState(tensors=tensors | {f"anchor/{name}": tensor for name, tensor in self.anchors.items()})

    def load_state_dict(self, state: MethodState) -> None:
        for prefix, target in (("importance/", self.importance), ("anchor/", self.anchors)):
            target.clear()
            target |= {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}


def negative_log_likelihood(ctx: Context, batch: dict[str, Any]) -> Tensor:
    """Sum over the target tokens of all rows."""
    return ctx.model(**batch, num_items_in_batch=1).loss


def mean_over_examples(
    ctx: Context,
    parameters: dict[str, nn.Parameter],
    samples: int,
    value: Callable[[Context, dict[str, Any]], Tensor],
    take: Callable[[Tensor], Tensor],
) -> Importance:
    """Mean over examples of `take(gradient of value)`, 0 for what is not trained; all processes share the rows."""
    was_training = ctx.model.training
    ctx.model.eval()  # dropout off: the importance of the model that is deployed
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    seen = 0
    for index, batch in enumerate(ctx.calibration(samples, 1)):
        seen += 1
        if index % ctx.accelerator.num_processes != ctx.accelerator.process_index:
            continue
        gradients = torch.autograd.grad(value(ctx, batch), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients):
            if gradient is not None:  # the vision side of a row without images
                sums[name] += take(gradient.float())
    ctx.model.train(was_training)
    whole = ctx.accelerator.reduce(sums, reduction="sum")
    return {name: total / max(seen, 1) for name, total in whole.items()}  # type: ignore[union-attr]


def fisher_information(ctx: Context, parameters: dict[str, nn.Parameter], samples: int) -> Importance:
    """Mean over examples of the squared gradient of each row's summed log-likelihood."""
    return mean_over_examples(ctx, parameters, samples, negative_log_likelihood, torch.square)
