"""What the reference says to inquiries, computed once per task into `ctx.cache` by all processes together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from mllm_cl.data.rows import Row, Rows, assistant_message
from mllm_cl.data.targets import Targets, part_path, write_part
from mllm_cl.methods._probe import Probe
from mllm_cl.methods.base import Context, ReferenceKind
from mllm_cl.streams.fingerprint import digest_rows

_CHUNK = 32


def held_inquiries(
    ctx: Context, inquiries: Sequence[Row], reference: ReferenceKind, rollout: int, probe: Probe
) -> Rows:
    """Returns the inquiries with the reference's answer and, under `targets`, what `probe` keeps of its states.

    Targets are read from disk when a row is asked for; nothing is computed again after a restart.
    """
    kept = reference_targets(ctx, inquiries, reference, rollout, probe)

    def complete(index: int) -> Row:
        return {**answered(inquiries[index], kept.texts[index]), "targets": kept[index]}  # type: ignore[typeddict-item]

    return Rows(range(len(inquiries)), complete)


def reference_targets(
    ctx: Context, inquiries: Sequence[Row], reference: ReferenceKind, rollout: int, probe: Probe | None = None
) -> Targets:
    """Returns the reference's greedy answers of up to `rollout` tokens and, with a probe, its states.

    The key covers the inquiries with their images, the reference's weights, the template and the settings. Process k of
    n answers the inquiries k, k + n, ...
    """
    if ctx.cache is None:
        raise RuntimeError(f"{ctx.task.name} is complete: there is no place for what is computed once per task")
    settings = {
        "inquiries": digest_rows(list(inquiries)),
        "reference": ctx.reference_key(reference),
        "template": ctx.processor.chat_template,
        "rollout": rollout,
        "probe": asdict(probe) if probe else None,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    processes, own = ctx.accelerator.num_processes, ctx.accelerator.process_index
    parts = [part_path(ctx.cache, key, part, processes) for part in range(processes)]
    if not parts[own].exists():
        write_part(parts[own], *_answers(ctx, inquiries[own::processes], reference, rollout, probe))
    ctx.accelerator.wait_for_everyone()
    ctx.cost["reference_rows"] += len(inquiries)
    return Targets(parts)


def _answers(
    ctx: Context, inquiries: Sequence[Row], reference: ReferenceKind, rollout: int, probe: Probe | None
) -> tuple[list[str], list[dict[str, Tensor]]]:
    targets: list[dict[str, Tensor]] = []
    with ctx.reference(reference):
        texts = ctx.generate(inquiries, rollout) if rollout else [""] * len(inquiries)
        if probe is None:
            return texts, [{} for _ in texts]
        rows = [answered(row, text) for row, text in zip(inquiries, texts)]
        for start in range(0, len(rows), _CHUNK):
            inputs = ctx.collate(rows[start : start + _CHUNK])
            mask = probe.mask(inputs)
            states = probe.states(ctx.model, inputs, mask)
            targets += [probe.keep(own) for own in states.split(mask.sum(dim=1).tolist())]
    return texts, targets


def answered(row: Row, text: str) -> Row:
    """Appends the assistant's turn; an empty one still renders its marker, where an answer would start."""
    return {**row, "messages": [*row["messages"], assistant_message(text)]}
