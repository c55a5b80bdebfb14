"""How much memory a recipe needs, before any weight is read.

Weights, adapters, gradients and optimizer states are counted from the architecture. Activations come from a training step
of the decoder on tensors without values: every operation reports what it allocates and what is freed again, and the
largest sum is the peak. Image towers whose weights are frozen keep nothing for the backward pass and are left out; where
bridge or tower are trained, they make the features of the same images in that step.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mllm_cl.data.collate import COMPANIONS, Collator
from mllm_cl.data.rows import Row
from mllm_cl.errors import ModelError
from mllm_cl.evaluation.engine import GenerationSettings, token_counts
from mllm_cl.methods import adapter_policy
from mllm_cl.methods.base import Method
from mllm_cl.models.load import empty_model, processor_of_section
from mllm_cl.models.parts import language_linears, lora_targets
from mllm_cl.recipe import Recipe
from mllm_cl.training.arguments import DEFAULTS
from mllm_cl.training.capabilities import check_lora

MIB = 2**20
# bytes per trainable parameter; optimizers that are not listed count like AdamW
_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
_ADAMW_BYTES = 8
_FAILURES = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)  # of a model without values
_QUANTISED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}  # codes, scales, scales of the scales


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for; `training` and `evaluation` are peaks on top of the rest.

    Args:
        weights: base weights.
        adapters: all adapters that exist while a task is learnt.
        gradients: of what is trained.
        optimizer: states of the optimizer.
        activations: peak of one training step, inquiries and other companions of the methods included.
        methods: copies of adapters that methods keep for reference.
        evaluation: peak of one generation batch (cache of keys and values, activations).
        allocator: what the C library keeps of the memory that a step gives back; 0 where the device has no C library.
        libraries: what the process holds before it has a model; 0 where the device does not hold it.
        rows, length: rows of a batch and tokens of its longest row that this holds for.
        towers_left_out: tower or bridge are trained, but what they need in a step cannot be told without values.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    methods: int
    evaluation: int
    allocator: int
    libraries: int
    rows: int
    length: int
    towers_left_out: bool = False

    @property
    def total(self) -> int:
        """The peak of the run: of training or of evaluation, whichever is larger."""
        training = self.gradients + self.optimizer + self.activations + self.allocator
        return self.libraries + self.weights + self.adapters + self.methods + max(training, self.evaluation)


def estimate_memory(
    recipe: Recipe,
    methods: Sequence[Method],
    train: Sequence[Row],
    test: Sequence[Row],
    *,
    earlier: int = 0,
    on_cpu: bool = False,
    libraries: int = 0,
) -> MemoryEstimate:
    """Estimates the peak memory of a run on one device.

    Args:
        recipe: what would be run.
        methods: its methods.
        train, test: rows of its tasks; the longest of them are taken.
        earlier: tasks before the one whose steps are estimated.
        on_cpu: trained on the CPU, where freed pieces of many sizes stay with the process: as much again as a step needs,
            measured with and without `MALLOC_MMAP_THRESHOLD_=65536` (docs/performance.md).
        libraries: bytes that the process holds already.

    Raises:
        MllmClError: the model's configuration or processor cannot be loaded.
    """
    section, training = recipe.model, DEFAULTS | recipe.training
    processor = processor_of_section(section)
    rows = int(training["per_device_train_batch_size"])
    collate, held = Collator(processor), longest(processor, train, rows)
    length = collate(held)["input_ids"].shape[1]
    sees = section.train_bridge or section.train_vision

    model = empty_model(section)
    targets = lora_targets(model, bridge=section.train_bridge, vision=section.train_vision)
    quantised = section.quantization
    weights = sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    if quantised is not None:
        weights -= round(sum(_saved_bytes(module.weight, quantised) for module in _language_linears(model)))
    settings = check_lora(section.lora)
    settings.target_modules = settings.target_modules or targets
    adapted = _with_adapter(model, settings)
    one = sum(_bytes(p) for name, p in adapted.named_parameters() if ".lora_" in name)
    policy = adapter_policy(methods, section.adapters)
    copies = _adapters_at_once(policy, section.max_rank or 4 * settings.r, settings.r)

    seen, left_out = [collate((held * 2)[:size]) if sees else {} for size in (1, 2)], False
    with _explained(section.name_or_path), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _make_fake(adapted, mode)
        together = rows + math.ceil(rows * sum(method.companions_per_row(earlier) for method in methods))
        try:
            steps = [_training_peak(adapted, size, length, training, batch) for size, batch in enumerate(seen, 1)]
        except _FAILURES:  # the shapes inside some towers depend on values
            if not sees:
                raise
            left_out = True
            steps = [_training_peak(adapted, size, length, training) for size in (1, 2)]
        # what a row adds, and what is there anyway
        activations = round(steps[0] + (steps[1] - steps[0]) * (together - 1))
        asked = min(len(test), GenerationSettings(batch_size=recipe.evaluation.batch_size).rows_per_batch)
        answered = (
            max(token_counts(processor, longest(processor, test, 1)), default=0) + recipe.evaluation.max_new_tokens
        )
        evaluation = _generation_peak(adapted, max(1, asked), answered)
    gc.collect()
    trained = one // 4  # adapters are float32
    return MemoryEstimate(
        weights=weights,
        adapters=round(one * copies),
        gradients=one,
        optimizer=trained * optimizer_bytes(str(training.get("optim", "adamw"))),
        activations=activations,
        methods=one if policy == "one" and any("previous" in method.needs for method in methods) else 0,
        evaluation=evaluation,
        allocator=activations if on_cpu else 0,
        libraries=libraries,
        rows=rows,
        length=length,
        towers_left_out=left_out,
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what a model raises when it is run without values into one clear message."""
    try:
        yield
    except _FAILURES as error:
        raise ModelError(
            f"{name}: its memory cannot be estimated, the model does not run without values "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}).",
            fix="measure a run of one step instead (training.max_steps=1); all else that doctor says holds.",
        ) from error


def optimizer_bytes(name: str) -> int:
    """Returns what an optimizer of transformers keeps per trainable parameter."""
    return _OPTIMIZER_BYTES.get(name.split(".")[-1].lower(), _ADAMW_BYTES)


def longest(processor: Any, rows: Sequence[Row], count: int) -> list[Row]:
    """Returns the rows that are longest together with their companions: what a batch can be at worst."""
    together = [[row, *itertools.chain(*row.get(COMPANIONS, {}).values())] for row in rows]
    owners = [(index, one) for index, own in enumerate(together) for one in own]
    counts = [0] * len(rows)
    for (index, _), own in zip(owners, token_counts(processor, [one for _, one in owners])):
        counts[index] += own
    order = sorted(range(len(rows)), key=lambda index: -counts[index])
    return [rows[index] for index in order[:count]]


def _adapters_at_once(policy: str, max_rank: int, rank: int) -> float:
    """Adapters of one task's size that are there at the end of a task; merging needs the old and the new one."""
    return {"one": 1.0, "per_task": 1.0}.get(policy, 1.0 + max_rank / rank)


def _language_linears(model: PreTrainedModel) -> Iterator[nn.Linear]:
    return (cast(nn.Linear, model.get_submodule(name)) for name in language_linears(model))


def _with_adapter(model: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(model, copy.deepcopy(settings))  # type: ignore[return-value]


def _saved_bytes(weight: Tensor, quantization: str) -> float:
    return _bytes(weight) - weight.numel() * _QUANTISED_BYTES[quantization]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turns parameters and buffers without values into ones that say they are on the CPU, so that the same kernels are
    chosen as in a real run."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.detach(), torch.device("cpu"))
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.detach(), torch.device("cpu"))


def _training_peak(
    model: PeftModel, rows: int, length: int, training: dict[str, Any], batch: Mapping[str, Any] | None = None
) -> int:
    """Peak bytes of forward and backward through decoder and head, gradients of the parameters left out.

    Args:
        batch: inputs whose images pass through tower and bridge in the same step.
    """
    base: Any = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    base.train()
    if training.get("activation_checkpointing"):
        base.activation_checkpointing_enable({"use_reentrant": False})
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = base.get_input_embeddings().weight
    with _peak() as peak:
        inputs = torch.zeros(rows, length, embedding.shape[1], dtype=embedding.dtype)
        labels = torch.zeros(rows * length, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(training.get("bf16"))):
            features = _image_features(base, batch or {})
            out = decoder(inputs_embeds=inputs, use_cache=False)
            logits = (
                out.logits if "logits" in out else head(out.last_hidden_state)
            ).float()  # some have their own head
            loss = nn.functional.cross_entropy(logits.view(rows * length, -1), labels, reduction="sum")
            loss = sum((feature.float().sum() for feature in features), loss)
        del out, logits, features
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    own = sum(_bytes(gradient) for gradient in gradients if gradient is not None)
    return max(0, peak.largest - own)


def _image_features(base: Any, batch: Mapping[str, Any]) -> list[Tensor]:
    """What tower and bridge make of the images of a batch, as far as it depends on what is trained."""
    if "pixel_values" not in batch:
        return []
    known = inspect.signature(base.get_image_features).parameters
    made = base.get_image_features(**{name: value for name, value in batch.items() if name in known})
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _generation_peak(model: PeftModel, rows: int, length: int) -> int:
    """Peak bytes of reading a batch of prompts, with the cache that it leaves."""
    base: Any = model.get_base_model()
    base.eval()
    embedding = base.get_input_embeddings().weight
    with torch.no_grad(), _peak() as peak:
        inputs = torch.zeros(rows, length, embedding.shape[1], dtype=embedding.dtype)
        out = base.get_decoder()(inputs_embeds=inputs, use_cache=True)
        if "logits" not in out:
            base.get_output_embeddings()(out.last_hidden_state[:, -1:])
    return peak.largest


def _without_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation; products over groups of experts have a rule for tensors without values in bfloat16 alone."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)


class _Peak(TorchDispatchMode):
    """Sums the storages that are alive; `largest` is the peak of that sum in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.largest = 0, 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = _without_values(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size
        self.largest = max(self.largest, self.alive)


@contextmanager
def _peak() -> Iterator[_Peak]:
    with _Peak() as peak:
        yield peak


def readable(count: float) -> str:
    """Returns bytes as people read them."""
    if count < 1024 * MIB:
        return f"{count / MIB:.1f} MiB" if count < 100 * MIB else f"{math.ceil(count / MIB)} MiB"
    return f"{count / (1024 * MIB):.2f} GiB"
