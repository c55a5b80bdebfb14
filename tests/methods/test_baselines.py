"""Recipes as methods, A-GEM, EMA, MiCA and LoRA-Null: who is trained, and the formulas by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mllm_cl.errors import MethodError
from mllm_cl.methods._layers import is_attention
from mllm_cl.methods._statistics import sketch_inputs
from mllm_cl.methods.agem import AGem
from mllm_cl.methods.attention_only import AttentionOnly
from mllm_cl.methods.bottom_frozen import BottomFrozen
from mllm_cl.methods.ema import EMA
from mllm_cl.methods.gate_up_only import GateUpOnly
from mllm_cl.methods.lora_null import LoraNull
from mllm_cl.methods.mica import MiCA
from mllm_cl.methods.token_weights import TokenWeights, top_entropy
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_parameters, factors, lora_layers


def trained(ctx) -> set[str]:
    layers = dict(lora_layers(ctx.model))
    return {name for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}


@pytest.mark.parametrize("policy", ["one", "stacked"])
def test_parts_of_the_model_are_trained(policy, begin, small_stream):
    stream = small_stream(2, rows=4)
    leaves = {
        AttentionOnly: {"q_proj", "k_proj", "v_proj", "o_proj"},
        GateUpOnly: {"gate_proj", "up_proj"},
    }
    for kind, expected in leaves.items():
        learner, ctx = begin(stream, kind(), policy=policy)
        assert {name.rpartition(".")[2] for name in trained(ctx)} == expected
        learner.end_task(ctx)
        _, ctx = begin(stream, learner=learner)
        assert {name.rpartition(".")[2] for name in trained(ctx)} == expected
    for share, blocks in ((0.0, {"0", "1"}), (0.5, {"1"}), (0.9, {"1"})):
        _, ctx = begin(stream, BottomFrozen(share=share), policy=policy)
        assert {name.split("layers.")[1].split(".")[0] for name in trained(ctx)} == blocks
    assert is_attention("model.layers.0.self_attn.q_proj")
    assert is_attention("transformer.h.0.attention.query_key_value")
    assert not is_attention("model.layers.0.mlp.up_proj")


def test_training_nothing_is_refused(begin, small_stream, fresh):
    from peft import LoraConfig

    from mllm_cl.training.learner import Learner

    learner = Learner(*fresh(), [GateUpOnly()], LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MethodError, match=r"gate_up_only: none of the LoRA layers .*q_proj"):
        begin(small_stream(1, rows=4), learner=learner)


def test_token_weights_by_hand(begin, small_stream, micro_batch):
    stream = small_stream(1, rows=4)
    for rule in ("eaft", "dft", "talr"):
        _, ctx = begin(stream, method := TokenWeights(rule=rule, alpha=2.0, floor=0.3))
        batch = micro_batch(ctx.collate(list(stream[0].train)))
        outputs = ctx.model.eval()(**batch.inputs)
        labels, expected = batch.inputs["labels"], []
        for row in range(4):
            places = [i for i in range(labels.shape[1] - 1) if labels[row, i + 1] != -100]
            p = outputs.logits[row, places].detach().double().softmax(dim=-1)
            loss = [-math.log(p[k, labels[row, i + 1]].item()) for k, i in enumerate(places)]
            for k, own in enumerate(loss):
                top = p[k].sort(descending=True).values[:20]
                top = top / top.sum()
                weight = {
                    "eaft": (-(top * top.log()).sum().item() / 3) ** 2,
                    "dft": math.exp(-own),
                    "talr": max(0.3, math.exp(-own / (sum(loss) / len(loss)))),
                }[rule]
                expected.append((weight - 1) * own)
        term = method.loss_terms(ctx, ctx.model, batch, outputs)["token_weights"]
        assert term.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert top_entropy(torch.zeros(1, 50)).item() == pytest.approx(math.log(20), rel=1e-5)
    ignored = micro_batch(ctx.collate([{**stream[0].train[0], "ignored": True}]))
    plain = ctx.model(**{name: value for name, value in ignored.inputs.items() if name != "labels"})
    assert method.loss_terms(ctx, ctx.model, ignored, plain)["token_weights"].item() == 0


def test_agem_takes_away_what_hurts_the_memory(begin, disturb, small_stream):
    stream = small_stream(2, rows=6)
    learner, ctx = begin(stream, method := AGem(size=4, batch=4))
    disturb(ctx.model, DEFAULT)
    method.before_step(ctx)  # no memory, nothing to do
    learner.end_task(ctx)
    again = AGem(size=4, batch=4)
    again.load_state_dict(method.state_dict())
    learner, ctx = begin(stream, learner=learner)
    parameters = list(adapter_parameters(ctx.model, DEFAULT).values())
    rows = [stream[0].train[int(row_id.split("/")[1])] for _, row_id in method.memory]
    loss = ctx.model.eval()(**ctx.collate(rows), num_items_in_batch=1).loss
    m = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    generator = torch.Generator().manual_seed(0)
    for sign in (-1.0, 1.0):
        noise = torch.randn(len(m), generator=generator) * m.norm() / len(m) ** 0.5
        g, place = sign * m + noise, 0
        for parameter in parameters:
            parameter.grad = g[place : place + parameter.numel()].reshape(parameter.shape).clone()
            place += parameter.numel()
        again.before_step(ctx)
        found = torch.cat([parameter.grad.flatten() for parameter in parameters])
        expected = g - (g @ m) / (m @ m) * m if g @ m < 0 else g
        assert torch.allclose(found, expected, atol=1e-3 * float(m.abs().max()))
        assert bool(g @ m < 0) == (sign < 0)
        if sign < 0:
            assert abs(float(found @ m)) < 1e-3 * float(m @ m)
    assert ctx.cost["projected_steps"] == 1
    assert ctx.cost["memory_rows"] == 8


def test_ema_deploys_the_slow_weights_and_trains_the_fast_ones(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, method := EMA(decay=0.75))
    parameters = adapter_parameters(ctx.model, DEFAULT)
    slow = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(3):
        disturb(ctx.model, DEFAULT, seed=step)
        method.after_step(ctx)
        slow = {name: 0.75 * slow[name] + 0.25 * parameter.detach() for name, parameter in parameters.items()}
        if step == 1:
            again = EMA(decay=0.75)
            again.load_state_dict(method.state_dict())
            learner.methods[0] = method = again
    fast = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    learner.end_task(ctx)
    for name, parameter in adapter_parameters(learner.model, DEFAULT).items():
        assert torch.allclose(parameter, slow[name], atol=1e-6)
    learner, ctx = begin(stream, learner=learner)
    for name, parameter in adapter_parameters(ctx.model, DEFAULT).items():
        assert torch.equal(parameter, fast[name])
        assert torch.allclose(method.slow[name], slow[name], atol=1e-6)


def test_mica_writes_where_the_base_does_not(begin, small_stream):
    _, ctx = begin(small_stream(1, rows=4), MiCA(), rank=4)
    for _, layer in lora_layers(ctx.model):
        a, b = (factor.weight for factor in factors(layer, TASK))
        weight = layer.get_base_layer().weight.detach()
        assert (a.requires_grad, b.requires_grad) == (True, False)
        assert float(a.abs().max()) == 0
        rank = min(4, len(b))
        assert torch.allclose(b[:, :rank].mT @ b[:, :rank], torch.eye(rank), atol=1e-4)
        spectrum = torch.linalg.svdvals(weight)
        smallest = spectrum[-rank:] if weight.shape[0] <= weight.shape[1] else torch.zeros(1)
        assert float((b.mT @ weight).norm(dim=1).max()) <= float(smallest.max()) + 1e-4


@pytest.mark.parametrize("freeze", [False, True])
def test_lora_null_is_blind_to_general_inputs(freeze, begin, small_stream, tmp_path):
    from mllm_cl.data.builders.general import general_rows

    _, ctx = begin(small_stream(1, rows=4), LoraNull(freeze=freeze, samples=3), rank=4)
    moments = sketch_inputs(ctx, 3, 2**31, rows=general_rows("train", size=3, seed=0))
    for name, layer in lora_layers(ctx.model):
        a, b = (factor.weight for factor in factors(layer, TASK))
        assert (a.requires_grad, b.requires_grad) == (not freeze, True)
        values = torch.linalg.eigvalsh(moments.of(name).double())
        assert float((a.double() @ moments.of(name).double() @ a.double().mT).trace()) <= float(values[:4].sum()) + 1e-4
    path = tmp_path / "own.json"
    conversations = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    path.write_text(json.dumps([{"id": "only", "conversations": conversations}]))
    begin(small_stream(1, rows=4), LoraNull(source=str(path)))
    with pytest.raises(MethodError, match="there is no"):
        LoraNull(source="nowhere.json")
