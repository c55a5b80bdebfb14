"""SI and MAS: their importance by hand; what they share with EWC is tested there."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.methods.mas import MAS, output_size
from mllm_cl.methods.online_ewc import OnlineEWC
from mllm_cl.methods.si import SI
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


def normalised(importance: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mean = torch.cat([tensor.flatten() for tensor in importance.values()]).mean()
    return {name: tensor / mean for name, tensor in importance.items()}


def test_si_follows_the_path(begin, small_stream):
    learner, ctx = begin(small_stream(2, rows=4), method := SI(damping=0.1))
    parameters = adapter_parameters(ctx.model, DEFAULT)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    path = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for name, parameter in parameters.items():
            gradient, move = (torch.randn(parameter.shape, generator=generator) for _ in range(2))
            parameter.grad = gradient
            with torch.no_grad():
                before = parameter.clone()
                parameter.add_(0.1 * move)
                path[name] -= gradient * (parameter - before)
        method.after_step(ctx)
        if step == 1:  # a checkpoint in the middle
            again = SI(damping=0.1)
            again.load_state_dict(method.state_dict())
            learner.methods[0] = method = again
    learner.end_task(ctx)
    expected = normalised(
        {name: path[name].clamp_min(0) / ((p.detach() - start[name]) ** 2 + 0.1) for name, p in parameters.items()}
    )
    for name, tensor in method.importance.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-6)
        assert torch.equal(method.anchors[name], parameters[name])
    assert method.walk == {}
    assert not any(name.startswith(("path", "last", "start")) for name in method.state_dict().tensors)


def test_mas_is_the_mean_absolute_gradient_of_the_output(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, method := MAS(samples=4))
    disturb(ctx.model, DEFAULT)
    parameters = adapter_parameters(ctx.model, DEFAULT)
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    ctx.model.eval()
    for row in stream[0].train:
        inputs = ctx.collate([row])
        labels = inputs.pop("labels")
        logits = ctx.model(**inputs).logits
        size = sum((logits[0, i] ** 2).mean() for i in range(labels.shape[1] - 1) if labels[0, i + 1] != -100)
        assert output_size(ctx, inputs | {"labels": labels}).item() == pytest.approx(size.item(), rel=1e-5)
        for name, gradient in zip(parameters, torch.autograd.grad(size, list(parameters.values()))):
            expected[name] += gradient.abs() / 4
    learner.end_task(ctx)
    for name, tensor in normalised(expected).items():
        assert torch.allclose(method.importance[name], tensor, rtol=1e-3, atol=1e-6)


def test_online_ewc_forgets_by_its_decay(begin, disturb, small_stream):
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, method := OnlineEWC(samples=4, decay=0.25))
    disturb(ctx.model, DEFAULT)
    learner.end_task(ctx)
    first = {name: tensor.clone() for name, tensor in method.importance.items()}
    learner, ctx = begin(stream, learner=learner)
    learner.end_task(ctx)
    whole = torch.cat([tensor.flatten() for tensor in method.importance.values()]).mean()
    assert whole.item() == pytest.approx(1.25, rel=1e-4)
    assert all((method.importance[name] >= 0.25 * first[name] - 1e-6).all() for name in first)
