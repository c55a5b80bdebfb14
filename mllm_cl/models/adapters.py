"""Names, creates, stacks, switches, saves and loads the adapters of one model. The base weights are never written.

Three names exist: `default` is the deployable adapter (continued over all tasks, or what all tasks have been
consolidated into), `task` the fresh adapter of the current task, `previous` a frozen copy of the last stage. Per-task
adapters are named after their tasks (`task_adapter`).

Switching goes through `active`, not through PEFT's `set_adapter` or `disable_adapter`: those turn `requires_grad` of
whatever they activate on, which would silently unfreeze the consolidated adapter in the middle of a training step.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_cl.errors import ModelError
from mllm_cl.models.gather import full_shape, full_tensor, write_full
from mllm_cl.models.lora_folders import plain_config, read_lora_folder
from mllm_cl.spectral import LowRankDelta

DEFAULT, TASK, PREVIOUS = "default", "task", "previous"
_OF_TASK = "of-"


def task_adapter(task: str) -> str:
    """Returns the adapter name of a task: PEFT cannot use dots, and some words (`keys`, `lora_A`) mean something to
    it."""
    return _OF_TASK + task.replace(".", "+")


def task_of_adapter(name: str) -> str | None:
    """Inverse of `task_adapter`; `None` for adapters that belong to no single task."""
    return name.removeprefix(_OF_TASK).replace("+", ".") if name.startswith(_OF_TASK) else None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yields the LoRA layers with their names in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def factors(layer: LoraLayer, name: str) -> tuple[nn.Linear, nn.Linear]:
    """Returns the two factors of an adapter in a layer: A with weight (rank, in) and B with weight (out, rank)."""
    return cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])


def add_adapter(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig, seed: int) -> PeftModel:
    """Adds an adapter whose random initialisation depends on `seed` alone, frozen and inactive.

    A plain model is wrapped by PEFT first. What an earlier adapter trains goes on being trained. Returns the
    `PeftModel`.
    """
    config = copy.deepcopy(config)
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    with seeded(model, seed), warnings.catch_warnings():
        # PEFT still reads the old name of an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        if isinstance(model, PeftModel):
            active = next(lora_layers(model))[1].active_adapters
            model.add_adapter(name, config)
        else:
            active = []
            model = get_peft_model(model, config, adapter_name=name)
    set_active(model, active)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Within the context random numbers depend on `seed` alone; the global generators are left as they were."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def remove_adapter(model: PeftModel, name: str) -> None:
    """Deletes an adapter; others stay as they are."""
    active = [other for other in next(lora_layers(model))[1].active_adapters if other != name]
    set_active(model, [other for other in adapter_names(model) if other != name][:1])
    model.delete_adapter(name)
    set_active(model, active)


def adapter_names(model: PeftModel) -> list[str]:
    """Returns the names of the adapters that exist."""
    return list(model.peft_config)


def set_active(model: PeftModel, names: Sequence[str]) -> None:
    """Makes exactly these adapters part of the forward pass; none of them is the untouched base."""
    for _, layer in lora_layers(model):
        layer._active_adapter = list(names)
        layer._disable_adapters = not names
    model.base_model.active_adapter = list(names)  # type: ignore[assignment]
    model.active_adapter = names[0] if names else next(iter(model.peft_config), DEFAULT)


def set_trainable(model: PeftModel, names: Sequence[str]) -> list[nn.Parameter]:
    """Makes exactly the parameters of these adapters trainable and returns them, in a fixed order."""
    model.requires_grad_(False)
    trainable = []
    for _, layer in lora_layers(model):
        for name in names:
            if name in layer.lora_A:
                trainable += [factor.weight.requires_grad_(True) for factor in factors(layer, name)]
    return trainable


@contextlib.contextmanager
def active(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Within the context exactly these adapters are on (`()` is the untouched base); `requires_grad` is not touched.

    Raises:
        ModelError: an adapter does not exist; PEFT would silently answer with the base instead.
    """
    for name in names:
        if name not in model.peft_config:
            raise ModelError(
                f"adapter {name!r} does not exist.", expected=", ".join(model.peft_config) or "none exists"
            )
    layers = [layer for _, layer in lora_layers(model)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = list(names), not names
    try:
        yield
    finally:
        for layer, (adapters, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = adapters, disabled


@contextlib.contextmanager
def weighted(model: PeftModel, weights: Mapping[str, float]) -> Iterator[None]:
    """Within the context the update is the sum of the named adapters' updates times their weights."""
    names = [name for name, weight in weights.items() if weight != 0]
    layers = [layer for _, layer in lora_layers(model)]
    before = [dict(layer.scaling) for layer in layers]
    with active(model, names):
        try:
            for layer in layers:
                for name in names:
                    if name in layer.scaling:
                        layer.scaling[name] *= weights[name]
            yield
        finally:
            for layer, scaling in zip(layers, before):
                layer.scaling.update(scaling)


def adapter_deltas(model: PeftModel, name: str) -> dict[str, LowRankDelta]:
    """Returns the exact update of an adapter, per module: (out, in) as low-rank factors."""
    deltas = {}
    for module, layer in lora_layers(model):
        if name in layer.lora_A:
            lora_a, lora_b = factors(layer, name)
            deltas[module] = LowRankDelta.from_lora(
                full_tensor(lora_a.weight), full_tensor(lora_b.weight), layer.scaling[name]
            )
    return deltas


def lora_factors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Returns copies of an adapter's factors, scaling included: `module/A` (rank, in) and `module/B` (out, rank)."""
    copies = {}
    for module, layer in lora_layers(model):
        if name in layer.lora_A:
            lora_a, lora_b = factors(layer, name)
            copies[f"{module}/A"] = full_tensor(lora_a.weight).clone()
            copies[f"{module}/B"] = full_tensor(lora_b.weight) * layer.scaling[name]
    return copies


def clear_adapter(model: PeftModel, name: str) -> None:
    """Sets the update of an adapter to zero, in place (B = 0)."""
    with torch.no_grad():
        for _, layer in lora_layers(model):
            if name in layer.lora_B:
                factors(layer, name)[1].weight.zero_()


def write_deltas(model: PeftModel, name: str, deltas: Mapping[str, LowRankDelta], rank: int) -> None:
    """Makes `name` the adapter with exactly these updates, all at `rank` (padded with zeros) and scaling 1; one that was trained
    stays trainable."""
    trained = any(parameter.requires_grad for parameter in adapter_parameters(model, name).values())
    config = plain_config(next(iter(model.peft_config.values())), rank)
    current = [other for other in next(lora_layers(model))[1].active_adapters if other != name]
    if name in adapter_names(model):
        remove_adapter(model, name)
    add_adapter(model, name, config, seed=0)
    write_update(model, name, deltas)
    set_active(model, [*current, name])
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(trained)


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Returns the tensors of an adapter under the names that PEFT uses in its files."""
    state = {}
    for module, layer in lora_layers(model):
        if name in layer.lora_A:
            for kind, factor in zip(("lora_A", "lora_B"), factors(layer, name)):
                state[_key(module, kind)] = full_tensor(factor.weight).cpu().contiguous().clone()
    return state


def load_adapter_state(model: PeftModel, name: str, state: Mapping[str, Tensor], place: str = "adapter") -> None:
    """Copies tensors (names as in PEFT's files) into an existing adapter.

    Raises:
        ModelError: a tensor is missing, left over, or has another shape: the adapter belongs to another base model.
    """
    expected = adapter_state(model, name)
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if missing or unknown or wrong:
        example = sorted(missing or unknown or wrong)[0]
        raise ModelError(
            f"{place}: does not fit this base model ({len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(wrong)} of another shape; for example {example}).",
            expected="an adapter that was trained on the same base model",
            fix="give the base model it was trained on.",
        )
    with torch.no_grad():
        for module, layer in lora_layers(model):
            for kind, factor in zip(("lora_A", "lora_B"), factors(layer, name)):
                write_full(factor.weight, state[_key(module, kind)])


def _key(module: str, kind: str) -> str:
    """Name of a factor in PEFT's files."""
    return f"base_model.model.{module}.{kind}.weight"


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Makes `target` a frozen, inactive copy of `source`."""
    if target in adapter_names(model):
        remove_adapter(model, target)
    add_adapter(model, target, model.peft_config[source], seed=0)  # type: ignore[arg-type]
    load_adapter_state(model, target, adapter_state(model, source))


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Writes an adapter as a plain PEFT folder: `adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model, name), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = cast(PreTrainedModel, model.get_base_model()).name_or_path
    config.save_pretrained(str(folder))


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    """Reads a plain PEFT LoRA folder into the adapter `name`, frozen and inactive.

    Raises:
        ModelError: the folder is not a LoRA folder or belongs to another base model.
    """
    config, state = read_lora_folder(folder)
    if isinstance(model, PeftModel) and name in adapter_names(model):
        remove_adapter(model, name)
    try:
        model = add_adapter(model, name, config, seed=0)
    except ValueError as error:  # nothing was matched, so nothing was injected
        raise ModelError(
            f"{folder}: its target modules are not in this base model ({str(error).splitlines()[0]}).",
            expected="an adapter that was trained on the same base model",
            fix="give the base model it was trained on.",
        ) from error
    try:
        load_adapter_state(model, name, state, str(folder))
    except ModelError:
        remove_adapter(model, name)
        raise
    return model


def reset_adapter(model: PeftModel, name: str, seed: int) -> None:
    """Gives an adapter its initial weights again (zero update), in place, from `seed` alone."""
    config = model.peft_config[name]
    with seeded(model, seed):
        for _, layer in lora_layers(model):
            layer.reset_lora_parameters(name, config.init_lora_weights)  # type: ignore[union-attr]


def adapter_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of an adapter by name, in a fixed order."""
    parameters = {}
    for module, layer in lora_layers(model):
        if name in layer.lora_A:
            lora_a, lora_b = factors(layer, name)
            parameters |= {f"{module}.lora_A": lora_a.weight, f"{module}.lora_B": lora_b.weight}
    return parameters


def write_update(model: PeftModel, name: str, deltas: Mapping[str, LowRankDelta]) -> None:
    """Writes updates of at most the adapter's own rank into it, in place; its scaling stays what it is."""
    with torch.no_grad():
        for module, layer in lora_layers(model):
            own_a, own_b = factors(layer, name)
            lora_a, lora_b = deltas[module].to_lora(full_shape(own_a.weight)[0])
            write_full(own_a.weight, lora_a)
            write_full(own_b.weight, lora_b / layer.scaling[name])


def read_state(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of an adapter folder.

    Raises:
        ModelError: there are none.
    """
    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read ({error}).") from error
