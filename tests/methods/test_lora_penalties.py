"""O-LoRA, N-LoRA, CLoRA and RegLoRA: the penalties by hand and on dense matrices."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.methods.clora import CLora
from mllm_cl.methods.n_lora import NLora, row_norm
from mllm_cl.methods.o_lora import OLora
from mllm_cl.methods.reglora import RegLora, largest, masked_mean, pack, unpack
from mllm_cl.models.adapters import TASK, adapter_deltas, factors, lora_layers


@pytest.fixture
def second_task(begin, disturb, small_stream):
    """Returns a function: method -> context of the second task, and the factors that the first task ended with."""

    def go(method):
        stream = small_stream(2, rows=4)
        learner, ctx = begin(stream, method, rank=4)
        disturb(ctx.model, TASK, seed=1)
        first = {
            name: [f.weight.detach().clone() for f in factors(layer, TASK)] for name, layer in lora_layers(ctx.model)
        }
        learner.end_task(ctx)
        again = type(method)()
        vars(again).update({k: v for k, v in vars(method).items() if k not in ("past", "masks")})
        again.load_state_dict(method.state_dict())
        learner.methods[0] = again
        learner, ctx = begin(stream, learner=learner)
        disturb(ctx.model, TASK, seed=2)
        return again, ctx, first

    return go


def now(ctx):
    return {name: [f.weight.detach() for f in factors(layer, TASK)] for name, layer in lora_layers(ctx.model)}


def terms(method, ctx, micro_batch):
    batch = micro_batch({})
    return {name: term.item() for name, term in method.loss_terms(ctx, ctx.model, batch, None).items()}


def test_o_lora_counts_the_overlap_of_the_input_directions(second_task, micro_batch):
    method, ctx, first = second_task(OLora(strength=0.5, norm_strength=0.1))
    overlap = sum((first[name][0] @ a.mT).abs().sum() for name, (a, _) in now(ctx).items())
    norms = sum(a.norm() + b.norm() for a, b in now(ctx).values())
    found = terms(method, ctx, micro_batch)
    assert found["o_lora"] == pytest.approx(0.5 * overlap.item(), rel=1e-5)
    assert found["o_lora_norm"] == pytest.approx(0.1 * norms.item(), rel=1e-5)


def test_o_lora_is_silent_in_the_first_task(begin, small_stream, micro_batch):
    _, ctx = begin(small_stream(2, rows=4), method := OLora())
    assert terms(method, ctx, micro_batch) == {}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_n_lora_is_the_norm_of_the_update_and_not_of_another_product(variant, second_task, micro_batch):
    method, ctx, _ = second_task(NLora(strength=2.0, variant=variant))
    if variant == "paper":
        updates = [delta.dense() for delta in adapter_deltas(ctx.model, TASK).values()]
        expected = torch.stack([update.abs().sum() / len(update) for update in updates]).mean()
    else:
        square = [(a @ b).abs().sum() for a, b in now(ctx).values() if a.shape[1] == b.shape[0]]
        expected = torch.stack(square).mean()
    assert terms(method, ctx, micro_batch)["n_lora"] == pytest.approx(2 * expected.item(), rel=1e-4)
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [1.0]])
    assert row_norm(a, b).item() == pytest.approx((9 + 3) / 2)


def test_clora_closes_fixed_directions(second_task, micro_batch):
    method, ctx, _ = second_task(CLora(strength=3.0, width=5))
    expected = []
    for a, b in now(ctx).values():
        v, u = method.closed(a.shape[1], a.device), method.closed(b.shape[0], b.device)
        assert v.shape == (a.shape[1], 5)
        assert torch.allclose(v.mT @ v, torch.eye(5), atol=1e-5)
        expected.append(0.5 * ((a @ v) ** 2).sum() + 0.5 * ((u.mT @ b) ** 2).sum())
    assert terms(method, ctx, micro_batch)["clora"] == pytest.approx(3 * torch.stack(expected).mean().item(), rel=1e-4)
    assert torch.equal(CLora(width=5).closed(32, a.device), method.closed(32, a.device))
    assert CLora(width=512).closed(32, a.device).shape == (32, 16)


def test_reglora_protects_what_earlier_tasks_changed_most(second_task, micro_batch):
    method, ctx, first = second_task(RegLora(strength=10.0, share=0.1))
    expected = []
    for name, (a, b) in now(ctx).items():
        past = (first[name][1] @ first[name][0]).abs()
        threshold = past.flatten().sort(descending=True).values[round(0.1 * past.numel()) - 1]
        expected.append((b @ a).abs()[past >= threshold].mean())
        assert method.masks[name].dtype == torch.uint8
        assert method.masks[name].numel() <= past.numel() / 8 + len(past)
    assert terms(method, ctx, micro_batch)["reglora"] == pytest.approx(
        10 * torch.stack(expected).mean().item(), rel=1e-4
    )


def test_bit_masks_round_trip():
    mask = torch.rand(5, 19, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(unpack(pack(mask), 19), mask)
    assert pack(mask).shape == (5, 3)
    assert largest(torch.tensor([[3.0, -5.0], [1.0, 2.0]]), 0.5).tolist() == [[True, True], [False, False]]
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [1.0]])
    assert masked_mean(a, b, pack(torch.tensor([[False, True], [True, False]]))).item() == pytest.approx((6 + 1) / 2)
