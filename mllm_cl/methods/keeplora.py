"""keeplora: fix A to the task's gradient directions outside what the base and earlier tasks use, train B.

Idea: protect the leading input directions of the pre-trained weights as well as those of earlier tasks; what is left of
the task's own gradient says where to learn.
Formula: M_0 = leading input directions of W_0 (`base_energy`); A_t = leading `rank` left singular vectors of
(I − M Mᵀ) Gᵀ, G the mean gradient of the weight before the task; only B is trained; afterwards M grows by the directions
of G (after the task) until it captures `energy` of its squared norm.
Stored: M, at most in × in per matrix. Cost per step: 1×, half the trainable parameters; per task two gradient passes over
`samples` rows, and once one SVD per base weight.
Reference: KeepLoRA, Luo et al. (ICLR 2026, arXiv 2601.19659). Fidelity: as in the paper; G is never formed but sketched from
inputs and output gradients (`width` columns, exact where the layer is not wider), so it needs no 80 GB. The base weights must
be in floating point.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mllm_cl.methods._statistics import base_weight, fix_a, sketch_gradients
from mllm_cl.methods.base import Context, Method, MethodState
from mllm_cl.models.adapters import TASK, lora_layers
from mllm_cl.spectral.subspace import allowed_directions, extend_basis


class KeepLora(Method):
    """KeepLoRA.

    Args:
        base_energy: share of the energy of the base weights whose input directions are protected.
        energy: share of the energy of each task's gradient that is protected after it; tasks on the same kind of pictures
            need more than the paper's 0.99 (docs/methods_table.md).
        samples: training rows of which gradients are taken.
        width: columns of the sketch.
    """

    name = "keeplora"
    summary = "fix A to gradient directions outside those of the base and of earlier tasks, train B"
    adapters = "stacked"
    roles = frozenset({"initialisation"})

    def __init__(
        self,
        *,
        base_energy: Annotated[float, Field(ge=0, lt=1)] = 0.6,
        energy: Annotated[float, Field(gt=0, le=1)] = 0.99,
        samples: Annotated[int, Field(ge=1)] = 128,
        width: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        self.base_energy, self.energy, self.samples, self.width = base_energy, energy, samples, width
        self.basis: dict[str, Tensor] = {}  # module -> M (in, k)

    def begin_task(self, ctx: Context) -> None:
        sketches = sketch_gradients(ctx, self.samples, self.width)
        for module, layer in lora_layers(ctx.model):
            if module not in self.basis:
                weight = base_weight(layer).mT  # (in, out)
                self.basis[module] = extend_basis(weight.new_zeros(len(weight), 0), weight, self.base_energy).float()
            sketch = sketches.of(module)
            fix_a(layer, allowed_directions(self.basis[module].to(sketch.device), sketch, layer.r[TASK]))

    def end_task(self, ctx: Context) -> None:
        for module, sketch in sketch_gradients(ctx, self.samples, self.width).values.items():
            basis = self.basis[module].to(sketch.device)
            self.basis[module] = extend_basis(basis, sketch, self.energy).float()

    def state_dict(self) -> MethodState:
        return MethodState(tensors=dict(self.basis))

    def load_state_dict(self, state: MethodState) -> None:
        self.basis = dict(state.tensors)
