"""Candidates behind one pass over their inquiry: the same logits as with the inquiry passed for each, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build_family
from PIL import Image

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import user_message
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.likelihood import Ranker


@pytest.mark.parametrize(
    ("family", "possible"),
    [
        *((name, True) for name in ("LLaVA", "LLaVA-NeXT", "InternVL", "Idefics3", "Aya Vision")),
        *((name, False) for name in ("Qwen2-VL", "Gemma 3", "Mllama")),
    ],
)
def test_a_shared_inquiry_changes_no_logit(family: str, possible: bool, tmp_path: Any) -> None:
    model, processor = build_family(family, tmp_path)
    row: Any = {
        "id": "r",
        "messages": [user_message("What is this?", 1)],
        "images": [Image.new("RGB", (56, 28), (200, 30, 60))],
        "answers": ["red"],
        "choices": ["red", "a photo of a cat", "no yes"],
    }
    engine: Any = Ranker.over([row])(model, Collator(processor, for_generation=True), GenerationSettings(), None)
    tokens = [engine._tokens(row, text) for text in row["choices"]]
    longest = max(map(len, tokens))
    ids, mask = torch.zeros(2, 3, longest, dtype=torch.long)
    for place, own in enumerate(tokens):
        ids[place, : len(own)], mask[place, : len(own)] = torch.tensor(own), 1
    with torch.no_grad():
        shared = engine._behind_shared(engine.collator([row]), ids, mask)
        together = engine._together(engine.collator([row] * 3), ids, mask)
    assert (shared is not None) == possible
    assert torch.isfinite(together[mask.bool()]).all()
    if shared is None:
        return
    known = mask.bool()
    assert torch.allclose(shared[known], together[known], atol=1e-4)
    assert not torch.allclose(shared[0, 0], shared[0, 1])
