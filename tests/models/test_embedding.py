"""Embeddings: by hand, and the same whatever the batch."""

from __future__ import annotations

import torch

from mllm_cl.data.collate import Collator
from mllm_cl.models.embedding import embed_inputs


def test_embeddings_are_mean_and_last_state(loaded, make_row):
    model, processor = loaded
    inputs = Collator(processor, for_generation=True)([make_row("a", "What is this?", "x")])
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    mean, last = hidden.mean(dim=0), hidden[-1]
    expected = torch.cat([mean / mean.norm(), last / last.norm()])
    embedding = embed_inputs(model, inputs)[0]
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad
    assert torch.allclose(embedding, expected, atol=1e-6)


def test_padding_does_not_matter(loaded, make_row):
    model, processor = loaded
    collate = Collator(processor, for_generation=True)
    rows = [make_row("a", "?", "x"), make_row("b", "A much longer question than that?", "x", None)]
    together = embed_inputs(model, collate(rows))
    alone = torch.cat([embed_inputs(model, collate([row])) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
