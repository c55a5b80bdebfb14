"""`mllm-cl consolidate ADAPTER ADAPTER ... --out DIR`: one adapter from several, after training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mllm_cl.models.lora_folders import LoraFolder
    from mllm_cl.spectral import LowRankDelta


def consolidate(
    adapters: Annotated[
        list[Path], typer.Argument(help="LoRA folders of the same base model, in the order of the tasks.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new adapter; must not exist.")],
    rate: Annotated[str, typer.Option(help="Spectral rate: saturate, uniform, power_up, wiener, ...")] = "saturate",
    strength: Annotated[float, typer.Option(help="Share of each update's norm that is kept.")] = 0.9,
    match: Annotated[str, typer.Option(help="Norm that the strength refers to: none, fro, nuclear, spectral.")] = "fro",
    schedule: Annotated[str, typer.Option(help="Strength over tasks: constant, inverse, inverse_sqrt.")] = "constant",
    granularity: Annotated[str, typer.Option(help="matrix, layer_type or global.")] = "matrix",
    cap: Annotated[float | None, typer.Option(help="Largest rate of any direction.")] = None,
    merge: Annotated[str | None, typer.Option(help="Merge all updates at once instead: ties, tsv, opcm, ...")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Parameter of the rate or merge, as name=number; may be repeated.")
    ] = None,
    continued: Annotated[
        bool, typer.Option("--continued", help="Each adapter was trained on from the one before it.")
    ] = False,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank the result is cut to; exact when not given.")
    ] = None,
) -> None:
    """Consolidate LoRA folders into one, without a base model and without data.

    Task after task, the spectral rate scales the singular values of the task's update before it is added.
    """
    from mllm_cl.cli.display import say
    from mllm_cl.errors import RunError
    from mllm_cl.files import new_folder
    from mllm_cl.models.lora_folders import write_updates
    from mllm_cl.spectral import merge_many

    if out.exists():
        raise RunError(f"{out}: exists already.", expected="a new folder", fix="choose another --out.")
    options = dict(_option(text) for text in option or [])
    folders = _read(adapters)
    updates = [folder.updates for folder in folders]
    if continued:
        updates = [updates[0], *map(_difference, updates[1:], updates)]
    if merge is not None:
        result, error = merge_many(updates, merge, rank=max_rank, **options)
    else:
        settings = {"match": match, "cap": cap, "granularity": granularity, **options}
        result, error = _in_turn(updates, rate, strength, schedule, max_rank, settings)
    with new_folder(out) as place:
        rank = write_updates(place, folders[-1].config, result)
    say(f"{out}: {len(adapters)} adapters, {len(result)} matrices, rank {rank}, relative error of the cut {error:.2g}")


def _in_turn(
    tasks: list[dict[str, LowRankDelta]],
    rate: str,
    strength: float,
    schedule: str,
    max_rank: int | None,
    settings: dict[str, Any],
) -> tuple[dict[str, LowRankDelta], float]:
    """W_t = W_{t-1} + SAC(D_t), cut to `max_rank`; returns the last one and the largest error of any cut."""
    from mllm_cl.spectral import LowRankDelta, consolidate_many, strength_at

    consolidated = {name: LowRankDelta.zeros(*update.shape) for name, update in tasks[0].items()}
    worst = 0.0
    for stage, updates in enumerate(tasks, start=1):
        share = strength_at(strength, schedule, stage)
        scaled = consolidate_many(updates, rate, strength=share, previous=consolidated, **settings)
        for name, update in scaled.items():
            consolidated[name], error = (consolidated[name] + update).truncate(rank=max_rank or min(update.shape))
            worst = max(worst, error)
    return consolidated, worst


def _difference(later: dict[str, LowRankDelta], earlier: dict[str, LowRankDelta]) -> dict[str, LowRankDelta]:
    return {name: update + earlier[name] * -1.0 for name, update in later.items()}


def _read(folders: list[Path]) -> list[LoraFolder]:
    from mllm_cl.errors import ModelError
    from mllm_cl.models.lora_folders import read_updates

    found = [read_updates(folder) for folder in folders]
    first = found[0]
    for folder, other in zip(folders[1:], found[1:]):
        same = first.updates.keys() == other.updates.keys()
        if not same or any(first.updates[name].shape != other.updates[name].shape for name in first.updates):
            raise ModelError(
                f"{folder}: is not on the same matrices as {folders[0]}.",
                expected="adapters on the same modules of the same base model",
            )
        bases = [str(config.base_model_name_or_path) for config in (first.config, other.config)]
        if bases[0] != bases[1]:
            raise ModelError(
                f"{folder}: belongs to {bases[1]}, {folders[0]} to {bases[0]}.",
                expected="adapters of the same base model",
                fix=f"if it is the same model, write the same base_model_name_or_path into {folder}/adapter_config.json.",
            )
    return found


def _option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise typer.BadParameter(f"--option {text!r}: expected name=number, for example gamma=2") from None
