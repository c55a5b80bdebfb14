"""ewc: elastic weight consolidation, a quadratic penalty that holds important weights of the adapter.

Idea: after each task measure how much the likelihood depends on each weight; later, pay for moving those that matter.
Formula: L = CE + strength · ½ Σ_i Ω_i (θ_i − θ*_i)², Ω_i = mean over examples of (∂ log p(y|x)/∂θ_i)², one example at a
time; online form Ω ← decay · Ω + Ω_t with one anchor θ* (Schwarz et al. 2018). Ω_t is normalised to mean 1 after each
task, so that `strength` keeps its meaning over models.
Stored: Ω and θ*, float32, twice the adapter. Cost per step: 1×; per task one pass over `samples` rows at batch size 1.
Reference: Kirkpatrick et al. 2017 (arXiv 1612.00796). TRACE, LIBERO and Continual-NExT square the gradient of a batch
mean, which shrinks Ω by the batch size; Prism reads gradients that DeepSpeed has freed, so its penalty is zero.
Fidelity: empirical Fisher (answers from the data). Estimated at the end of the task, where B ≠ 0 and A has gradients.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods._terms import quadratic_penalty
from mllm_cl.methods.base import Context, Method, MethodState, TrainBatch
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


class EWC(Method):
    """Online elastic weight consolidation on the continued adapter.

    Args:
        strength: λ.
        samples: training rows on which Ω is estimated.
        decay: γ; 1 sums the importance of all tasks.
    """

    name = "ewc"
    summary = "quadratic penalty weighted by the per-example Fisher information"
    adapters = "one"

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        samples: Annotated[int, Field(ge=1)] = 128,
        decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        self.strength, self.samples, self.decay = strength, samples, decay
        self.importance: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if not self.anchors or self.strength == 0:
            return {}
        self._place(next(ctx.model.parameters()).device)
        penalty = quadratic_penalty(adapter_parameters(ctx.model, DEFAULT), self.anchors, self.importance)
        return {"ewc": self.strength * penalty * batch.share("step")}

    def _place(self, device: torch.device) -> None:
        """Moves a state that was loaded from disk to the model, once."""
        if next(iter(self.anchors.values())).device != device:
            self.importance = {name: tensor.to(device) for name, tensor in self.importance.items()}
            self.anchors = {name: tensor.to(device) for name, tensor in self.anchors.items()}

    def end_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        fisher = fisher_information(ctx, parameters, self.samples)
        mean = torch.cat([tensor.flatten() for tensor in fisher.values()]).mean().clamp_min(1e-30)
        for name, tensor in fisher.items():
            past = self.importance.get(name)
            self.importance[name] = tensor / mean + (0 if past is None else self.decay * past.to(tensor.device))
        self.anchors = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def state_dict(self) -> MethodState:
        tensors = {f"importance/{name}": tensor for name, tensor in self.importance.items()}
        return MethodState(tensors=tensors | {f"anchor/{name}": tensor for name, tensor in self.anchors.items()})

    def load_state_dict(self, state: MethodState) -> None:
        for prefix, target in (("importance/", self.importance), ("anchor/", self.anchors)):
            target.clear()
            target |= {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}


def fisher_information(ctx: Context, parameters: dict[str, nn.Parameter], samples: int) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each row's summed log-likelihood; all processes share the rows."""
    was_training = ctx.model.training
    ctx.model.eval()  # dropout off: the importance of the model that is deployed
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    seen = 0
    for index, batch in enumerate(ctx.calibration(samples, 1)):
        seen += 1
        if index % ctx.accelerator.num_processes != ctx.accelerator.process_index:
            continue
        loss = ctx.model(**batch, num_items_in_batch=1).loss  # the sum over the row's target tokens
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients):
            if gradient is not None:  # the vision side of a row without images
                square += gradient.float().pow(2)
    ctx.model.train(was_training)
    total = ctx.accelerator.reduce(squares, reduction="sum")
    return {name: square / max(seen, 1) for name, square in total.items()}  # type: ignore[union-attr]
