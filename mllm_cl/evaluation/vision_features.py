"""Image features kept while a set of rows is answered: questions on one picture pass through the vision tower once.

Kept are only what `get_image_features` of the model returns, where that is known to depend on the pixels of one image
alone: no adapter, hook or parametrization lies in vision tower or bridge (another route could not change them), and the
features of the first image, computed alone, are those of the batch. They live as long as one call of `generate_batches`,
in which weights do not change; the key is the image processor's output, so image and processor settings are part of it.
Families whose inputs do not come one per image (Idefics), or whose features are more than one tensor per image (the deep
features of Qwen3-VL), are computed every time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mllm_cl.models.parts import part_names

MOST_BYTES = 512 * 2**20
_ACCESSOR = "get_image_features"
_NOTES_HIDDEN_STATES = "transformers.utils.output_capturing"
_PLAIN = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}


def untouched(model: nn.Module) -> bool:
    """Says whether the vision side is the same for every row: it is there, and nothing is put on it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [name for part in part_names(base).values() for name in part]
    modules = [module for name in names for module in base.get_submodule(name).modules()]
    return bool(modules) and not any(
        isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        or is_parametrized(module)
        or any(may_change(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
        for module in modules
    )


def may_change(hook: Callable[..., Any]) -> bool:
    """Whether a hook is any but the one that transformers leaves on a tower to note its hidden states."""
    return getattr(hook, "__module__", None) != _NOTES_HIDDEN_STATES


class VisionFeatures:
    """Keeps image features by content, the ones not used for longest dropped first.

    Args:
        model: the model; one that cannot be served is left as it is, see `possible`.
        most_bytes: bound of what is kept.
    """

    def __init__(self, model: nn.Module, most_bytes: int = MOST_BYTES) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.owner = getattr(base, "base_model", base)
        self.original = getattr(self.owner, _ACCESSOR, None)
        self.possible = self.original is not None and untouched(model)
        self.most_bytes, self.bytes, self.computed = most_bytes, 0, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kind: tuple[type, type] | None = None  # of the output, and of its features

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Lets the model ask here for image features."""
        if not self.possible:
            yield
            return

        @functools.wraps(self.original)  # type: ignore[arg-type]
        def features(*args: Any, **kwargs: Any) -> Any:  # `generate` reads the signature
            return self._features(*args, **kwargs)

        vars(self.owner)[_ACCESSOR] = features
        try:
            yield
        finally:
            del vars(self.owner)[_ACCESSOR]

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments  # type: ignore[arg-type]
        given = {**given, **given.pop("kwargs", {})}
        images = _images(given) if self.possible else None
        if images is None:
            return self.original(*args, **kwargs)  # type: ignore[misc]
        keys = [_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images) if key not in self._kept}
        if new:
            output = self.original(**_together(list(new.values())))  # type: ignore[misc]
            features = _per_image(output, len(new))
            if features is None or (self._kind is None and not self._separable(next(iter(new.values())), features[0])):
                self.possible = False
                return self.original(*args, **kwargs)  # type: ignore[misc]
            self._kind = type(output), type(output.pooler_output)
            self.computed += len(new)
            fresh = dict(zip(new, features))
        else:
            fresh = {}
        assert self._kind is not None  # something was computed before anything was kept
        found = [fresh[key] if key in fresh else self._kept[key] for key in keys]
        self._keep(keys, fresh)
        output, container = self._kind
        return output(pooler_output=torch.stack(found) if container is Tensor else container(found))

    def _separable(self, image: dict[str, Any], feature: Tensor) -> bool:
        """Whether an image alone has the features that it has among others, up to rounding."""
        alone = _per_image(self.original(**image), 1)  # type: ignore[misc]
        if alone is None or alone[0].shape != feature.shape:
            return False
        allowed = 1e-4 if feature.dtype == torch.float32 else 5e-2
        largest = feature.abs().max().float()
        return bool((alone[0] - feature).abs().max().float() <= allowed * largest)

    def _keep(self, keys: Sequence[bytes], fresh: dict[bytes, Tensor]) -> None:
        for key in dict.fromkeys(keys):
            if key in fresh:
                self._kept[key] = fresh[key].clone()  # not a view that keeps the whole batch
                self.bytes += fresh[key].nbytes
            self._kept.move_to_end(key)
        while self.bytes > self.most_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes


def _images(given: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the arguments of each image alone, `None` where they cannot be told apart."""
    pixels = given.get("pixel_values")
    if not isinstance(pixels, Tensor) or given.get("return_dict") is False:
        return None
    grid = given.get("image_grid_thw")
    if isinstance(grid, Tensor):
        lengths = grid.prod(-1).tolist()
        if sum(lengths) != len(pixels):
            return None
    elif pixels.dim() == 4 or (pixels.dim() == 5 and given.get("image_sizes") is not None):
        lengths = [1] * len(pixels)
    else:
        return None
    count = len(lengths)
    parts: dict[str, Sequence[Any]] = {}
    for name, value in given.items():
        if name == "pixel_values":
            parts[name] = pixels.split(lengths)
        elif isinstance(value, Tensor):
            if value.dim() == 0 or len(value) != count:
                return None
            parts[name] = value.split(1)
        else:
            parts[name] = [value] * count
    return [{name: values[index] for name, values in parts.items()} for index in range(count)]


def _together(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.cat([image[name] for image in images]) if isinstance(value, Tensor) else value
        for name, value in images[0].items()
    }


def _key(image: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    for name, value in sorted(image.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name}={value!r}".encode())
    return digest.digest()


def _per_image(output: Any, count: int) -> list[Tensor] | None:
    """Returns the features of each image, `None` where the output holds anything else that matters."""
    features = getattr(output, "pooler_output", None)
    if not isinstance(features, (Tensor, list, tuple)) or len(features) != count:
        return None
    if any(value is not None for name, value in output.items() if name not in _PLAIN):
        return None
    found = list(features)
    return found if all(isinstance(feature, Tensor) for feature in found) else None
