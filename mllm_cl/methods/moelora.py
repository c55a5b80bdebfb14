"""moelora: several LoRA experts in every layer, mixed token by token.

Idea: different inputs use different experts, so a later task need not overwrite all of what an earlier one has learnt.
Formula: y = W x + s Σ_e softmax(R x)_e B_e A_e x, with E experts of rank r / E and a router R (E, in) per layer, for every
token alone; experts and routers go on from task to task. One expert is plain fine-tuning.
Stored once: one adapter of rank r and a router per layer, E × in float32; nothing per task. Cost per step: 1× and E × in
multiplications more per token and layer, inference the same; the update depends on the token and cannot be merged.
Reference: MoELoRA in CoIN (Chen et al. 2024, NeurIPS, arXiv 2403.08350; zackschen/CoIN). Fidelity: dense softmax, no balance
loss, s = α / r, as released; A starts as PEFT starts it, there with deviation 0.01. CoIN uses 8 experts at rank 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mllm_cl.methods._experts import Experts, spread
from mllm_cl.methods._routing import token_gates


class MoELoRA(Experts):
    """MoELoRA.

    Args:
        experts: experts per layer; must divide `model.lora.r`.
    """

    name = "moelora"
    summary = "LoRA experts in every layer, mixed per token by a learnt router"

    def __init__(self, *, experts: Annotated[int, Field(ge=1)] = 4) -> None:
        super().__init__(experts)

    def gate(self, own: Mapping[str, Tensor], module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
        return states * spread(token_gates(inputs, own[module]), states.shape[-1])
