"""ema: a fast adapter that learns and a slow one that is deployed (dual learner).

Idea: the running mean of the weights forgets more slowly than the weights, and learns all that they agree on.
Formula: after every step θ_slow ← decay · θ_slow + (1 − decay) · θ_fast; training goes on from θ_fast, θ_slow is deployed.
Stored: the fast adapter (the slow one is the deployed adapter). Cost per step: 1×.
Reference: Arani et al. 2022, CLS-ER (arXiv 2201.12604); SuRe (arXiv 2511.22367) with replay. Fidelity: one
slow mean, without the second one, the memory and the consistency loss of CLS-ER. With few steps per task choose a decay of
about 1 − 10 / steps: a mean over more steps than there are has not arrived.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods.base import AROUND_STEPS, Context, Method, MethodState
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


class EMA(Method):
    """Exponential moving average of the adapter.

    Args:
        decay: β of the slow adapter, per optimizer step.
    """

    name = "ema"
    summary = "deploy the running mean of the adapter, go on training from the adapter itself"
    supports = AROUND_STEPS
    adapters = "one"
    roles = frozenset({"consolidation"})

    def __init__(self, *, decay: Annotated[float, Field(ge=0, lt=1)] = 0.99) -> None:
        self.decay = decay
        self.fast: dict[str, Tensor] = {}
        self.slow: dict[str, Tensor] = {}

    def begin_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        self.slow = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._write(ctx, self.fast)

    def after_step(self, ctx: Context) -> None:
        for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
            self.slow[name] = self.slow[name].to(parameter.device).lerp(parameter.detach(), 1 - self.decay)

    def end_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        self.fast = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._write(ctx, self.slow)
        self.slow = {}

    def _write(self, ctx: Context, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
                if name in tensors:
                    parameter.copy_(tensors[name])

    def state_dict(self) -> MethodState:
        tensors = {f"fast/{name}": tensor for name, tensor in self.fast.items()}
        return MethodState(tensors=tensors | {f"slow/{name}": tensor for name, tensor in self.slow.items()})

    def load_state_dict(self, state: MethodState) -> None:
        self.fast, self.slow = (
            {k.removeprefix(kind): tensor for k, tensor in state.tensors.items() if k.startswith(kind)}
            for kind in ("fast/", "slow/")
        )
