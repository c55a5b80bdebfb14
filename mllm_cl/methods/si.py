"""si: synaptic intelligence, importance measured along the way that training takes.

Idea: credit every weight with the share of the loss decrease that its own movement has brought.
Formula: ω_i ← ω_i − g_i Δθ_i at every step; after the task Ω_i += max(ω_i, 0) / ((θ_i − θ_i at its start)² + damping);
penalty as `ewc`.
Stored: Ω and θ*, float32, twice the adapter; while a task trains three further copies. Cost per step: 1×; per task no extra pass.
Reference: Zenke et al. 2017 (arXiv 1703.04200). Fidelity: g is the gradient of the whole loss after clipping, as the optimizer
sees it; per-task importance is normalised to mean 1 (see `mllm_cl/methods/_importance.py`), so `damping` matters for weights
that hardly moved.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mllm_cl.methods._importance import QuadraticPenalty
from mllm_cl.methods.base import AROUND_STEPS, Context, MethodState
from mllm_cl.models.adapters import DEFAULT, adapter_parameters

_WALKING = ("path", "last", "start")


class SI(QuadraticPenalty):
    """Synaptic intelligence.

    Args:
        strength: λ.
        damping: ξ, keeps the importance of weights that did not move finite.
        decay: share of the importance of earlier tasks that is kept; 1 sums all.
    """

    name = "si"
    summary = "quadratic penalty weighted by each weight's share of the loss decrease"
    supports = AROUND_STEPS

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        damping: Annotated[float, Field(gt=0)] = 1e-3,
        decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        super().__init__(strength=strength, decay=decay)
        self.damping = damping
        self.walk: dict[str, dict[str, Tensor]] = {}

    def begin_task(self, ctx: Context) -> None:
        now = {name: p.detach().float().clone() for name, p in adapter_parameters(ctx.model, DEFAULT).items()}
        self.walk = {"path": {name: tensor * 0 for name, tensor in now.items()}, "last": now}
        self.walk["start"] = {name: tensor.clone() for name, tensor in now.items()}

    def after_step(self, ctx: Context) -> None:
        path, last = self.walk["path"], self.walk["last"]
        for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
            now = parameter.detach().float()
            if parameter.grad is not None:
                device = parameter.device
                path[name] = path[name].to(device) - parameter.grad.float() * (now - last[name].to(device))
            last[name] = now.clone()

    def end_task(self, ctx: Context) -> None:
        own = {}
        for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
            device = parameter.device
            moved = parameter.detach().float() - self.walk["start"][name].to(device)
            own[name] = self.walk["path"][name].to(device).clamp_min(0) / (moved.pow(2) + self.damping)
        self.consolidate(ctx, own)
        self.walk = {}

    def state_dict(self) -> MethodState:
        state = super().state_dict()
        state.tensors |= {f"{kind}/{name}": t for kind, own in self.walk.items() for name, t in own.items()}
        return state

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        walk = {
            kind: {k.removeprefix(f"{kind}/"): t for k, t in state.tensors.items() if k.startswith(f"{kind}/")}
            for kind in _WALKING
        }
        self.walk = walk if walk["last"] else {}
