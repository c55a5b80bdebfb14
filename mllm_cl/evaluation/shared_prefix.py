"""Questions on one image share the keys and values of what stands before they differ: system prompt and image pass once.

Rows of a batch that name the same images begin with the same tokens, images included. These are passed once for each
image, the cache is repeated for its rows, and `generate` goes on behind it with the rest of every row. Between the two
parts lies the padding of the rest, which the attention mask hides and which counts in no position.

This is right where a token depends on the tokens before it alone, all of them. Refused by rule: inputs beyond tokens,
mask and images (bidirectional prefixes, cross-attention), caches that do not keep all keys and values (linear attention,
windows shorter than the rows), hooks, which may read a whole row (gated experts, soft prompts), sampling and beams. And
before a model shares anything for the first time, a few rows are answered both ways: where the logits of a step differ by
more than rounding, nothing is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mllm_cl.data.collate import Collator, image_token_ids
from mllm_cl.data.rows import Row
from mllm_cl.evaluation.vision_features import may_change

logger = logging.getLogger(__name__)

_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
_POSITIONS = ("image_grid_thw",)  # says where the tokens behind an image are, too
_USED_UP = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")
_WORTH = 0.8  # share of the tokens above which passing them in two parts is not worth it

_agreed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What the comparison said of a model. It depends on how the model computes, not on its weights."""


@dataclass(frozen=True)
class Split:
    """The tokens of a batch in two parts: what the rows of an image have in common, and the rest of each row.

    Args:
        heads: for each image, the row whose inputs stand for it.
        owner: for each row, the place of its image in `heads`. Shape (rows,).
        first: the common parts by name of the input: (images, first), padded on the left.
        whole: common part and rest of every row: (rows, first + rest), each of the two padded on the left.
    """

    heads: list[int]
    owner: Tensor
    first: dict[str, Tensor]
    whole: dict[str, Tensor]

    @property
    def passed(self) -> int:
        """How many tokens go through the model before the first new one."""
        rows, length = self.whole["input_ids"].shape
        images, first = self.first["input_ids"].shape
        return images * first + rows * (length - first)


def split_batch(inputs: dict[str, Any], groups: Sequence[int], image_ids: Sequence[int], pad: int) -> Split | None:
    """Returns the two parts of a batch, `None` where it has none: no images twice, rows without, questions before images.

    Args:
        inputs: what the collator gives, padded on the left.
        groups: a number for each row, the same for rows of the same images.
        image_ids: the tokens that stand for images.
        pad: the token for padding.
    """
    ids = inputs["input_ids"]
    starts = (ids.shape[1] - inputs["attention_mask"].sum(1)).tolist()
    pixels = torch.isin(ids, torch.tensor(image_ids, device=ids.device))
    if len(set(groups)) == len(groups) or not pixels.any(1).all():
        return None
    behind = [int(own.nonzero().max()) + 1 - start for own, start in zip(pixels, starts)]  # the last image
    members = {group: [row for row, own in enumerate(groups) if own == group] for group in dict.fromkeys(groups)}
    common = {
        group: _common([ids[row, starts[row] :] for row in own]) if len(own) > 1 else behind[own[0]]
        for group, own in members.items()
    }
    if any(common[group] < behind[row] for row, group in enumerate(groups)):
        return None
    cuts = [start + common[group] for start, group in zip(starts, groups)]
    longest, rest = max(common.values()), ids.shape[1] - min(cuts)

    def first_of(name: str, row: int) -> Tensor:
        return _left_padded(inputs[name][row, starts[row] : cuts[row]], longest, pad if name == "input_ids" else 0)

    def rest_of(name: str, row: int) -> Tensor:
        return _left_padded(inputs[name][row, cuts[row] :], rest, pad if name == "input_ids" else 0)

    heads = [own[0] for own in members.values()]
    places = {group: place for place, group in enumerate(members)}
    names = [name for name in _PER_TOKEN if name in inputs]
    return Split(
        heads,
        torch.tensor([places[group] for group in groups], device=ids.device),
        {name: torch.stack([first_of(name, row) for row in heads]) for name in names},
        {
            name: torch.stack([torch.cat([first_of(name, row), rest_of(name, row)]) for row in range(len(ids))])
            for name in names
        },
    )


def _common(rows: Sequence[Tensor]) -> int:
    """How many first tokens all rows share; at least one of each stays behind them."""
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(same.long().cumprod(0).sum())


def _left_padded(values: Tensor, length: int, pad: int) -> Tensor:
    return nn.functional.pad(values, (length - len(values), 0), value=pad)


class SharedPrefix:
    """Greedy generation behind shared keys and values, for one model as it is now.

    Args:
        model: the model.
        collator: makes inputs of rows, padded on the left.
        config: how answers are generated.
    """

    def __init__(self, model: Any, collator: Collator, config: GenerationConfig) -> None:
        self.model, self.collator, self.config = model, collator, config
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.rows = 0  # answered this way

    @property
    def possible(self) -> bool:
        """Asked for every batch: routing its rows may have put hooks into the model."""
        return (
            _is_greedy(self.config)
            and not any(layer._forward_pre_hooks for layer in self.model.modules())
            and not any(may_change(hook) for layer in self.model.modules() for hook in layer._forward_hooks.values())
        )

    def generate(
        self, rows: Sequence[Row], groups: Sequence[int], inputs: dict[str, Any], **options: Any
    ) -> Tensor | None:
        """Returns the tokens of the answers, (rows, longest answer); `None` where the batch has to be passed whole.

        Args:
            groups: a number for each row, the same for rows of the same images.
            inputs: what the collator gives for the rows.
            options: passed on to `generate` of the model.
        """
        split = self._split(groups, inputs) if self.possible else None
        if split is None or split.passed > _WORTH * inputs["input_ids"].numel():
            return None
        if self.model not in _agreed:
            _agreed[self.model] = self._agrees(rows, groups, inputs, **options)
        agreed = _agreed[self.model]
        output = self._in_two_parts(rows, split, inputs, self.config, **options) if agreed else None
        if output is None:
            return None
        self.rows += len(rows)
        return output[:, split.whole["input_ids"].shape[1] :]

    def _split(self, groups: Sequence[int], inputs: dict[str, Any]) -> Split | None:
        if not set(inputs) <= {*_PER_TOKEN, *_POSITIONS, *_USED_UP}:
            return None
        pad: Any = self.config.pad_token_id
        return split_batch(inputs, groups, image_token_ids(self.collator.processor), pad)

    def _in_two_parts(
        self, rows: Sequence[Row], split: Split, inputs: dict[str, Any], config: GenerationConfig, **options: Any
    ) -> Any:
        """What `generate` of the model returns, `None` where its cache does not keep every key and value."""
        pictures = self._pictures(rows, inputs, split.heads)
        one = copy.deepcopy(config)
        one.max_new_tokens, one.min_new_tokens, one.return_dict_in_generate = 1, None, True
        cache = self.model.generate(**{**pictures, **split.first}, generation_config=one, **options).past_key_values
        if getattr(self.base.model, "rope_deltas", None) is not None:  # of the common parts (Qwen-VL)
            self.base.model.rope_deltas = None
        if not _keeps_all(cache, split.whole["input_ids"].shape[1] + (config.max_new_tokens or 0)):
            return None
        cache.batch_select_indices(split.owner)
        positions = {name: inputs[name] for name in _POSITIONS if name in inputs}
        return self.model.generate(
            **split.whole, **positions, past_key_values=cache, generation_config=config, **options
        )

    def _agrees(self, rows: Sequence[Row], groups: Sequence[int], inputs: dict[str, Any], **options: Any) -> bool:
        """Whether a few rows have the same logits both ways, step by step as long as their answers are the same."""
        shared = next(group for group in groups if groups.count(group) > 1)
        own = [row for row, group in enumerate(groups) if group == shared]
        others = [row for row, group in enumerate(groups) if group != shared]
        few = own[:2] + others[-1:]
        inputs = {name: inputs[name][few] for name in _PER_TOKEN if name in inputs} | self._pictures(rows, inputs, few)
        split = self._split([groups[row] for row in few], inputs)
        assert split is not None  # the batch could be split
        config = copy.deepcopy(self.config)
        config.output_logits = config.return_dict_in_generate = True
        parts = self._in_two_parts([rows[row] for row in few], split, inputs, config, **options)
        if parts is None:
            return False
        whole = self.model.generate(**inputs, generation_config=config, **options)
        alike = torch.ones(len(few), dtype=torch.bool, device=whole.sequences.device)
        for one, other in zip(whole.logits, parts.logits):  # (rows, vocabulary) for each step
            allowed = (1e-4 if one.dtype == torch.float32 else 5e-2) * one[alike].abs().max()
            if (one[alike] - other[alike]).abs().max() > allowed:
                logger.warning("questions on one image do not share keys and values: the logits would differ")
                return False
            alike &= one.argmax(-1) == other.argmax(-1)
            if not alike.any():
                break
        return True

    def _pictures(self, rows: Sequence[Row], inputs: dict[str, Any], places: list[int]) -> dict[str, Tensor]:
        """The images of some rows: out of the inputs where each row has one entry, else made again."""
        found = {name: inputs[name] for name in (*_POSITIONS, *_USED_UP) if name in inputs}
        grid, pixels = found.get("image_grid_thw"), found["pixel_values"]
        if grid is not None and len(grid) == len(rows):
            per_image = pixels.split(grid.prod(-1).tolist())
            return {"image_grid_thw": grid[places], "pixel_values": torch.cat([per_image[place] for place in places])}
        if all(len(value) == len(rows) for value in found.values()):  # every row has an image, so each has one
            return {name: value[places] for name, value in found.items()}
        made = self.collator([rows[place] for place in places])
        return {name: made[name].to(pixels.device) for name in found}


def _is_greedy(config: GenerationConfig) -> bool:
    return bool(
        config.num_beams == 1
        and config.num_return_sequences in (1, None)
        and config.use_cache
        and not config.do_sample
        and config.cache_implementation is None
        and not config.prefill_chunk_size
    )


def _keeps_all(cache: Any, length: int) -> bool:
    """Whether every layer holds the keys and values of so many tokens."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > length)
        for layer in cache.layers
    )
