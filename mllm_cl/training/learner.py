"""The learner: what persists from task to task, that is the model with its adapters, the methods and the stage.

Three adapter policies, one life cycle:

- `one`: the adapter `default` is trained on and on. A frozen copy `previous` exists while a method needs it.
- `stacked`: the frozen `default` (consolidated adapter) and a fresh `task` are both on; after the task the exact update of
  `task` is added to `default`, whose rank grows up to `max_rank` and is then recompressed.
- `per_task`: every task has an adapter of its own name; methods route.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import Row
from mllm_cl.errors import ModelError, RecipeError
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.methods import Context, Method, RouteBatch, adapter_policy
from mllm_cl.methods.base import AdapterPolicy, Epochs, ReferenceKind, overrides
from mllm_cl.models import adapters, extra_parameters
from mllm_cl.models.embedding import embed_inputs
from mllm_cl.models.load import base_fingerprint
from mllm_cl.models.parts import lora_targets, part_names
from mllm_cl.models.sharding import Shards
from mllm_cl.recipe import Recipe
from mllm_cl.streams import Stream, Task
from mllm_cl.training.capabilities import check_lora
from mllm_cl.training.seeds import derived_seed
from mllm_cl.training.states import load_states, save_states

logger = logging.getLogger(__name__)

_EMBEDDED_AT_ONCE = 64


class Learner:
    """A model that learns task after task.

    Args:
        model: the base model, or a `PeftModel` with a LoRA adapter called `default`.
        processor: its processor.
        methods: in the order in which they are applied.
        lora: LoRA settings of every adapter; the language part is the default target.
        seed: everything random is derived from it and the stage.
        policy: adapter policy when the methods leave the choice.
        max_rank: rank that the consolidated adapter is recompressed to; 4 x r when not given.
        bridge, vision: put LoRA on these parts too.
        part_rates: learning rates of `bridge` and `vision` when they are not the optimizer's.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        methods: Sequence[Method] = (),
        lora: LoraConfig | None = None,
        *,
        seed: int = 0,
        policy: AdapterPolicy | None = None,
        max_rank: int | None = None,
        bridge: bool = False,
        vision: bool = False,
        part_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.processor, self.methods, self.seed, self.stage = processor, list(methods), seed, 0
        self.policy = adapter_policy(self.methods, policy)
        self.part_rates = dict(part_rates or {})
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.part_names = part_names(base) if self.part_rates else {}
        if isinstance(model, PeftModel):
            config = next(iter(model.peft_config.values()))
            if not isinstance(config, LoraConfig) or adapters.DEFAULT not in model.peft_config:
                raise ModelError(
                    "the model has no LoRA adapter called 'default'.",
                    fix="wrap it with get_peft_model(model, LoraConfig(...)).",
                )
            self.lora, self.model = config, model
        else:
            self.lora = copy.deepcopy(lora) if lora is not None else LoraConfig(r=8, lora_alpha=16)
            if self.lora.target_modules is None:
                self.lora.target_modules = lora_targets(model, bridge=bridge, vision=vision)
            model.config.use_cache = True
            try:
                self.model = adapters.add_adapter(model, adapters.DEFAULT, self.lora, derived_seed(seed, "adapter"))
            except ValueError as error:  # PEFT found nothing to put an adapter on
                raise ModelError(
                    f"model.lora: no adapter can be put on this model ({str(error).splitlines()[0]}).",
                    expected="target_modules that the model has; the language part when not given",
                    fix="correct or remove model.lora.target_modules.",
                ) from error
        self.max_rank = max_rank or 4 * self.lora.r
        self.truncation_error = 0.0
        self._seen: list[Task] = []
        self._base_key: str | None = None
        self.shards: Shards | None = None
        self.zero: dict[str, Any] | None = None  # DeepSpeed's `zero_optimization`, if tasks get an engine
        vars(self.model.get_base_model())["_mllm_cl_learner"] = self  # found again by `Learner.of` in a user's own loop
        self._deploy()

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, methods: Sequence[Method]
    ) -> Learner:
        """Returns the learner of a recipe, on a base model that has been loaded for it."""
        section = recipe.model
        return cls(
            model,
            processor,
            methods,
            check_lora(section.lora),
            seed=recipe.seed,
            policy=section.adapters,
            max_rank=section.max_rank,
            bridge=section.train_bridge,
            vision=section.train_vision,
            part_rates=section.part_rates,
        )

    @staticmethod
    def of(model: PreTrainedModel | PeftModel) -> Learner | None:
        """Returns the learner that a model belongs to, if any."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return base.__dict__.get("_mllm_cl_learner")

    def shard(self) -> None:
        """Lays the frozen weights in shards over all processes, while tasks are trained (FSDP2)."""
        self._base_key = base_fingerprint(self.model)  # reading the state of a sharded model would leave it in shards
        self.shards = Shards(self.model)

    def sharded(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, the training of a task, the frozen weights are in shards if they were to be sharded."""
        return contextlib.nullcontext() if self.shards is None else self.shards.sharded()

    @property
    def adapters_in_shards(self) -> bool:
        """True if no process has the whole adapters while a task is trained."""
        return self.zero is not None and self.zero["stage"] == 3

    @property
    def layers_in_shards(self) -> bool:
        """True if all processes have to run the layers equally often while a task is trained."""
        return self.shards is not None or self.adapters_in_shards

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, in the midst of the training, processes may run the model as often as each likes."""
        return contextlib.nullcontext() if self.shards is None else self.shards.whole()

    def remember(self, task: Task) -> Stream:
        """Returns the stream of the tasks so far, for a loop that does not know the whole stream."""
        self._seen[self.stage :] = [task]
        return Stream("own loop", tuple(self._seen))

    def trained_name(self, task: Task) -> str:
        """Name of the adapter that learns a task."""
        if self.policy == "per_task":
            return adapters.task_adapter(task.name)
        return adapters.DEFAULT if self.policy == "one" else adapters.TASK

    def needs(self, what: str) -> bool:
        """True if one of the methods declares this need."""
        return any(what in method.needs for method in self.methods)

    def begin_task(
        self, task: Task, stream: Stream, accelerator: Accelerator, cache: Path | None = None, epochs: int = 1
    ) -> Context:
        """Prepares adapters and methods for a task; afterwards exactly the task's parameters are trainable.

        Args:
            cache: where methods keep what they compute once per task, the same folder for all processes; a temporary
                one when not given.
            epochs: passes over the task's rows.
        """
        if self.shards is not None:
            self.shards.stay_whole()
        index = self.stage + 1
        ctx = self._context(task, stream, index, accelerator, cache or Path(self._scratch.name), epochs)
        trained = self.trained_name(task)
        if self.policy == "one":
            if self.needs("previous"):
                adapters.copy_adapter(self.model, adapters.DEFAULT, adapters.PREVIOUS)
        else:
            if trained in adapters.adapter_names(self.model):
                adapters.remove_adapter(self.model, trained)
            adapters.add_adapter(self.model, trained, self.lora, derived_seed(self.seed, "adapter", index))
        adapters.set_active(self.model, [adapters.DEFAULT, trained] if self.policy == "stacked" else [trained])
        adapters.set_trainable(self.model, [trained])
        for method in self.methods:
            method.begin_task(ctx)
        extra_parameters.attach(
            self.model, {f"{m.name}/{name}": own for m in self.methods for name, own in m.parameters(ctx).items()}
        )
        return ctx

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        """Returns what the methods make of the task's rows."""
        for method in self.methods:
            rows = method.train_rows(ctx, rows)
        return rows

    def end_task(self, ctx: Context) -> None:
        """Lets the methods finish, folds the fresh adapter, and leaves the deployable model."""
        for method in self.methods:
            method.end_task(ctx)
        if self.policy == "stacked":
            self._fold()
        extra_parameters.detach(self.model)
        adapters.set_trainable(self.model, [])
        self.stage = ctx.index
        self._deploy()

    def _fold(self) -> None:
        """default <- default + task, exactly, at the smallest uniform rank up to `max_rank`."""
        past = adapters.adapter_deltas(self.model, adapters.DEFAULT)
        fresh = adapters.adapter_deltas(self.model, adapters.TASK)
        ranks = [max(update.rank for update in updates.values()) for updates in (past, fresh)]
        rank = max(1, min(self.max_rank, sum(ranks)))
        folded, errors = {}, [0.0]
        for name, update in fresh.items():
            folded[name], error = (past[name] + update).truncate(rank=rank)
            errors.append(error)
        self.truncation_error = max(errors)
        if self.truncation_error > 0:
            logger.info("recompressed to rank %d: largest relative error %.3g", rank, self.truncation_error)
        adapters.write_deltas(self.model, adapters.DEFAULT, folded, rank)
        adapters.remove_adapter(self.model, adapters.TASK)

    def _deploy(self) -> None:
        """Makes the deployable adapter the active one."""
        own = [] if self.policy == "per_task" else [adapters.DEFAULT]
        adapters.set_active(self.model, own)

    def parameters(self) -> int:
        """Number of parameters that are trainable now."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def routes(self) -> bool:
        """True if a method chooses adapters per sample."""
        return any(overrides(method, "route") for method in self.methods)

    def router(self, ctx: Context, task: str | None) -> Callable[[Sequence[Row]], list[dict[str, float]] | None] | None:
        """Returns the routing function for rows of `task` (`None`: a general benchmark); before the first task there is none."""
        if not self.routes() or self.stage == 0:
            return None

        def route(rows: Sequence[Row]) -> list[dict[str, float]] | None:
            batch = RouteBatch(rows=rows, tasks=[task] * len(rows))
            for method in self.methods:
                choice = method.route(ctx, batch)
                if choice is not None:
                    return choice
            return None

        return route

    # what is saved ---------------------------------------------------------------------------------------------------

    def save_adapters(self, folder: Path) -> None:
        """Writes the deployable adapters as plain PEFT folders: one in the root, or one subfolder per task."""
        if self.policy != "per_task":
            adapters.save_adapter(self.model, adapters.DEFAULT, folder)
            return
        for name in adapters.adapter_names(self.model):
            task = adapters.task_of_adapter(name)
            if task is not None:
                adapters.save_adapter(self.model, name, folder / task)

    def save_states(self, folder: Path) -> None:
        """Writes the state of the methods."""
        save_states(folder, self.methods)

    def load_stage(self, adapter_folder: Path, method_folder: Path, stage: int) -> None:
        """Restores the learner as it was at the end of a stage."""
        if self.policy == "per_task":
            for folder in sorted(path for path in adapter_folder.iterdir() if path.is_dir()):
                adapters.load_adapter(self.model, folder, adapters.task_adapter(folder.name))
        else:
            adapters.load_adapter(self.model, adapter_folder, adapters.DEFAULT)
        load_states(method_folder, self.methods)
        self.stage = stage
        adapters.set_trainable(self.model, [])
        self._deploy()

    # facilities of the context ---------------------------------------------------------------------------------------

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="mllm-cl-")

    def context(self, task: Task, stream: Stream, accelerator: Accelerator) -> Context:
        """Returns the context of the stage that is completed, for routing."""
        return self._context(task, stream, self.stage, accelerator)

    def _context(
        self,
        task: Task,
        stream: Stream,
        index: int,
        accelerator: Accelerator,
        cache: Path | None = None,
        epochs: int = 1,
    ) -> Context:
        rng = torch.Generator().manual_seed(derived_seed(self.seed, "methods", index))

        def calibration(count: int, batch_size: int) -> Iterator[dict[str, Any]]:
            drawn = torch.Generator().manual_seed(derived_seed(self.seed, "calibration", index))
            order = torch.randperm(len(task.train), generator=drawn)
            chosen = order[:count].tolist()
            for start in range(0, len(chosen), batch_size):
                yield self._collate([task.train[position] for position in chosen[start : start + batch_size]])

        return Context(
            task=task,
            index=index,
            stream=stream,
            model=self.model,
            processor=self.processor,
            accelerator=accelerator,
            rng=rng,
            max_rank=self.max_rank,
            cache=cache,
            reference=self._reference,
            reference_key=self._reference_key,
            generate=self._generate,
            embed=self._embed,
            calibration=calibration,
            collate=self._collate,
            epochs=Epochs(epochs),
        )

    def _collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._on_device(Collator(self.processor).inputs(rows))

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}

    @contextlib.contextmanager
    def _reference(self, kind: ReferenceKind) -> Iterator[None]:
        """The untouched base, or the model of the previous stage; no gradients, no dropout."""
        if kind not in ("base", "previous"):
            raise RecipeError(f"reference {kind!r} does not exist.", expected="base or previous")
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), adapters.active(self.model, self._adapters_of(kind)):
                yield
        finally:
            self.model.train(was_training)

    def _adapters_of(self, kind: ReferenceKind) -> list[str]:
        if kind == "base":
            return []
        return [adapters.PREVIOUS if self.policy == "one" else adapters.DEFAULT]

    def _reference_key(self, kind: ReferenceKind) -> str:
        self._base_key = self._base_key or base_fingerprint(self.model)
        digest = hashlib.sha256(self._base_key.encode())
        for name in self._adapters_of(kind):
            for key, tensor in sorted(adapters.adapter_parameters(self.model, name).items()):
                digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _generate(self, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
        return generate(self.model, self.processor, rows, GenerationSettings(max_new_tokens=max_new_tokens))

    def _embed(self, rows: Sequence[Row]) -> Tensor:
        collator = Collator(self.processor, for_generation=True)
        with self._reference("base"):
            parts = [
                embed_inputs(self.model, self._on_device(collator(list(rows[start : start + _EMBEDDED_AT_ONCE]))))
                for start in range(0, len(rows), _EMBEDDED_AT_ONCE)
            ]
        return torch.cat(parts)
