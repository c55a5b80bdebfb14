"""`mllm-cl export RUN_OR_ADAPTER --merge --out DIR`: a full model for servers; without --merge, what a push uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, RUN/stages/NN-task, or a PEFT folder.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the base model with the adapter merged in.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The base model, instead of the one that the checkpoint names.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; that of the recipe when not given.")
    ] = None,
    repo_id: Annotated[str, typer.Option(help="owner/name that the card names, without --merge.")] = "owner/name",
) -> None:
    """Write a model that other programs load: merged for vLLM and TGI, or the folder of a published run."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.errors import RunError

    if out.exists():
        raise RunError(f"{out}: exists already.", expected="a new folder", fix="choose another --out.")
    if not merge:
        from mllm_cl.cli.push import hub_section, publish
        from mllm_cl.reporting import read_run

        section = hub_section(read_run(checkpoint).recipe, base_model=base_model, licence=None)
        publication = publish(Path(checkpoint), repo_id, None, section)
        publication.write(out)
        say(f"{out}: {publication.stage_name}, {len(publication.files)} files, as `mllm-cl push` uploads them")
        return
    from mllm_cl.files import is_gated
    from mllm_cl.models.merged import write_merged
    from mllm_cl.training.checkpoint_loading import find_checkpoint

    found = find_checkpoint(checkpoint, base_model)
    if found.folder is None:
        raise RunError(f"{checkpoint}: is a base model, there is nothing to merge.", expected="a run or an adapter")
    adapter = found.folder / "adapter" if found.kind == "stage" else found.folder
    if is_gated(adapter.parent):
        raise RunError(
            f"{adapter}: holds experts whose gates depend on what is asked, so there is no one update to merge.",
            expected="the adapter of a method without gates",
            fix="use it with mllm_cl, as the card of `mllm-cl push` shows.",
        )
    with make_progress() as progress, progress.waiting("merging"):
        merged = write_merged(found.model, adapter, out, dtype=dtype)
    say(f"{out}: {found.label} merged into {found.model.name_or_path}, {merged.dtype}, {merged.matrices} matrices")
    if found.model.quantization is not None:
        say(
            f"note:   trained on the base in {found.model.quantization}, merged into it unquantised: answers may differ."
        )
    if found.model.image_mode != "native":
        say(
            f"note:   trained with image_mode {found.model.image_mode}: prepare images the same way before they are sent."
        )
