"""Whole weights out of sharded ones: FSDP2 on two processes of a CPU mesh, and what ZeRO-3 leaves of a parameter."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mllm_cl.models import adapters, gather
from mllm_cl.models.parts import lora_targets

pytestmark = pytest.mark.ddp


def sharded_job(rank: int, folder: str, plain) -> None:
    """Shards the model over two processes and compares what is read from it and written into it with the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    checks = {}
    parameters = dict(plain.named_parameters())
    sharded = dict(model.named_parameters())
    checks["sharded"] = all(isinstance(value, DTensor) for value in sharded.values())
    checks["smaller"] = any(value.to_local().numel() < parameters[name].numel() for name, value in sharded.items())
    checks["whole"] = all(torch.equal(gather.full_tensor(value), parameters[name]) for name, value in sharded.items())
    checks["shape"] = all(gather.full_shape(value) == parameters[name].shape for name, value in sharded.items())

    state, before = adapters.adapter_state(model, "default"), adapters.adapter_state(plain, "default")
    checks["state"] = all(torch.equal(state[name], before[name]) for name in before)
    deltas, expected = adapters.adapter_deltas(model, "default"), adapters.adapter_deltas(plain, "default")
    checks["spectrum"] = all(
        torch.equal(deltas[name].singular_values(), expected[name].singular_values()) for name in expected
    )

    halved = {name: delta * 0.5 for name, delta in expected.items()}
    adapters.write_update(model, "default", halved)
    adapters.write_update(plain, "default", halved)
    after, wanted = adapters.adapter_state(model, "default"), adapters.adapter_state(plain, "default")
    checks["written"] = all(torch.equal(after[name], wanted[name]) for name in wanted)
    adapters.load_adapter_state(model, "default", before)
    again = adapters.adapter_state(model, "default")
    checks["loaded"] = all(torch.equal(again[name], before[name]) for name in before)
    checks["still sharded"] = all(isinstance(value, DTensor) for value in model.parameters())

    module = next(layer for _, layer in adapters.lora_layers(model)).get_base_layer()
    original = next(layer for _, layer in adapters.lora_layers(plain)).get_base_layer()
    checks["weight"] = torch.equal(gather.full_weight(module), original.weight.float())
    failed = [name for name, held in checks.items() if not held]
    Path(folder, f"result-{rank}").write_text(",".join(failed) or "all hold")
    dist.destroy_process_group()


def test_dtensors_are_read_and_written_whole(fresh, tmp_path):
    model, _ = fresh()
    adapted = adapters.add_adapter(model, "default", LoraConfig(r=4, target_modules=lora_targets(model)), seed=1)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(adapted, "default").values():
            parameter.normal_()
    multiprocessing.start_processes(sharded_job, (str(tmp_path), adapted), nprocs=2, start_method="fork")
    assert [(tmp_path / f"result-{rank}").read_text() for rank in (0, 1)] == ["all hold", "all hold"]


def test_parameters_of_zero_3_are_gathered(monkeypatch):
    """DeepSpeed leaves an empty tensor with the true shape beside it; here a stand-in gives the values back."""
    whole = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 7, torch.Size((2, 3))  # type: ignore[attr-defined]
    asked = []

    @contextlib.contextmanager
    def gathered_parameters(parameters, modifier_rank):
        asked.append(modifier_rank)
        for each in parameters:
            each.data = whole.clone()
        yield
        if modifier_rank == 0:
            whole.copy_(parameters[0].data)
        for each in parameters:
            each.data = torch.empty(0)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=gathered_parameters)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    assert gather.full_shape(parameter) == (2, 3)
    assert torch.equal(gather.full_tensor(parameter), torch.arange(6.0).reshape(2, 3))
    assert parameter.shape == (0,)
    gather.write_full(parameter, torch.ones(2, 3))
    assert torch.equal(whole, torch.ones(2, 3))
    assert asked == [None, 0]


def test_plain_parameters_are_not_copied():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert gather.full_tensor(parameter).data_ptr() == parameter.data_ptr()
    assert not gather.full_tensor(parameter).requires_grad
    gather.write_full(parameter, torch.zeros(3))
    assert not parameter.any()
