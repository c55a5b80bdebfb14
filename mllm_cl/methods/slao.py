"""slao: continue the last adapter from an orthonormal A, average the B of all tasks.

Idea: the two factors of a LoRA are not alike: A can be replaced by the newest one, B is where the tasks are kept.
Formula: A_t starts as Qᵀ with A_{t−1}ᵀ = Q R, B_t as B_{t−1} (as trained, not merged); after training A ← A_t and
B ← B + (B_t − B) / √t, which is what is deployed.
Stored: the factors as trained and the merged B, 1.5 adapters. Cost per step: 1×; per task one thin QR per matrix.
Reference: SLAO, Merge before Forget (ICLR 2026, arXiv 2512.23017). Fidelity: factors are merged by definition of the method; the
decrease 1/√t is our reading of the paper; `decay` sets the exponent.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods.base import Context, Method, MethodState
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


class Slao(Method):
    """Single LoRA by asymmetric, orthogonal merging.

    Args:
        decay: the newest B counts stage ** −decay.
    """

    name = "slao"
    summary = "restart A orthonormal, average B over the tasks, on one adapter"
    adapters = "one"
    roles = frozenset({"consolidation"})

    def __init__(self, *, decay: Annotated[float, Field(ge=0)] = 0.5) -> None:
        self.decay = decay
        self.trained: dict[str, Tensor] = {}
        self.merged: dict[str, Tensor] = {}

    def begin_task(self, ctx: Context) -> None:
        with torch.no_grad():
            for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
                if name in self.trained:
                    last = self.trained[name].to(parameter.device)
                    parameter.copy_(orthonormal_rows(last) if name.endswith("lora_A") else last)

    def end_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        self.trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith("lora_B"):
                    past = self.merged.get(name, parameter).to(parameter.device)
                    parameter.copy_(past + ctx.index**-self.decay * (parameter - past))
                    self.merged[name] = parameter.detach().clone()

    def state_dict(self) -> MethodState:
        tensors = {f"trained/{name}": tensor for name, tensor in self.trained.items()}
        return MethodState(tensors=tensors | {f"merged/{name}": tensor for name, tensor in self.merged.items()})

    def load_state_dict(self, state: MethodState) -> None:
        for kind, own in (("trained/", self.trained), ("merged/", self.merged)):
            own.clear()
            own |= {k.removeprefix(kind): tensor for k, tensor in state.tensors.items() if k.startswith(kind)}


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Returns Qᵀ of Aᵀ = Q R with no negative number on R's diagonal: (rank, in) -> (rank, in)."""
    q, r = torch.linalg.qr(matrix.double().mT)
    return torch.where(r.diagonal() < 0, -q, q).mT.to(matrix.dtype)
