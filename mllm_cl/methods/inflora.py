"""inflora: fix A so that a task's update cannot touch the directions in which earlier tasks read.

Idea: with A fixed to input directions that earlier tasks do not use, every update B A leaves their outputs alone, for any
optimizer and any sharding.
Formula: A_t = leading `rank` left singular vectors of (I − M Mᵀ) C_t, divided by √3, C_t = mean x xᵀ of the layer's inputs
before the task; only B is trained; afterwards M grows by the leading directions of C (after the task) until it captures
energy + (1 − energy) · t / T of its squared norm.
Stored: M, at most in × in per distinct input (q, k and v share one, so do gate and up). Cost per step: 1×, half the
trainable parameters; per task two forward passes over `samples` rows.
Reference: Liang and Li 2024 (arXiv 2404.00228). Fidelity: as in the paper, except that C is sketched to `width` columns (exact
where the layer is not wider) and that M is stored, not the smaller of M and its complement.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mllm_cl.methods._statistics import fix_a, sketch_inputs
from mllm_cl.methods.base import Context, Method, MethodState
from mllm_cl.models.adapters import TASK, lora_layers
from mllm_cl.spectral.subspace import allowed_directions, extend_basis


class InfLora(Method):
    """Interference-free LoRA.

    Args:
        energy: share of the inputs' energy that is protected after the first of many tasks; grows to 1 at the last.
        samples: training rows whose inputs are looked at.
        width: columns of the sketch.
    """

    name = "inflora"
    summary = "fix A outside the input directions of earlier tasks, train B"
    adapters = "stacked"
    roles = frozenset({"initialisation"})

    def __init__(
        self,
        *,
        energy: Annotated[float, Field(gt=0, le=1)] = 0.95,
        samples: Annotated[int, Field(ge=1)] = 128,
        width: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        self.energy, self.samples, self.width = energy, samples, width
        self.basis: dict[str, Tensor] = {}  # leader of a group of layers -> M (in, k)

    def begin_task(self, ctx: Context) -> None:
        sketches = sketch_inputs(ctx, self.samples, self.width)
        for module, layer in lora_layers(ctx.model):
            sketch = sketches.of(module)
            basis = self._basis(sketches.leader[module], sketch)
            fix_a(layer, allowed_directions(basis, sketch, layer.r[TASK]) / 3**0.5)

    def end_task(self, ctx: Context) -> None:
        energy = self.energy + (1 - self.energy) * ctx.index / len(ctx.stream)
        for leader, sketch in sketch_inputs(ctx, self.samples, self.width).values.items():
            self.basis[leader] = extend_basis(self._basis(leader, sketch), sketch, energy).float()

    def _basis(self, leader: str, sketch: Tensor) -> Tensor:
        known = self.basis.get(leader)
        return sketch.new_zeros(len(sketch), 0) if known is None else known.to(sketch.device)

    def state_dict(self) -> MethodState:
        return MethodState(tensors=dict(self.basis))

    def load_state_dict(self, state: MethodState) -> None:
        self.basis = dict(state.tensors)
