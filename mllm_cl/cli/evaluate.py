"""`mllm-cl evaluate CHECKPOINT --tasks a,b --output_path DIR`; flags as in lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run folder, RUN/stages/NN-task, a PEFT adapter folder, a model (folder, Hub id), or `base`.",
            show_default=False,
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Names of tasks and general benchmarks, with commas.", show_default=False)],
    output_path: Annotated[Path, typer.Option("--output_path", help="Folder for the results.", show_default=False)],
    stream: Annotated[
        str | None,
        typer.Option(help="A built-in stream or a stream.yaml. By default that of the run, else quickstart."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Instead of the one that the checkpoint names.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch_size", help="Rows per batch; `auto` halves when memory runs out.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows per task.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max_new_tokens", min=1, help="Longest answer. By default the task's own."),
    ] = None,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which rows.")] = "test",
) -> None:
    """Measure a checkpoint on tasks and general benchmarks; writes predictions.jsonl and result.json for each."""
    rows_per_batch = _batch_size(batch_size)
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.reporting.formatting import duration, score
    from mllm_cl.training.checkpoint_loading import find_checkpoint, load_checkpoint
    from mllm_cl.training.standalone import check_output, choose_rows, choose_stream, measure

    check_output(output_path)
    found = find_checkpoint(checkpoint, base_model)
    with make_progress() as progress:
        with progress.waiting("reading the rows"):
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            chosen = choose_rows(
                choose_stream(stream, found.recipe),
                names,
                split=split,
                limit=limit,
                max_new_tokens=max_new_tokens,
                recipe=found.recipe,
            )
        with progress.waiting("loading the model"):
            loaded = load_checkpoint(found)
        results = measure(loaded, chosen, output_path, batch_size=rows_per_batch, progress=progress)
    rows = [["task", "metric", "score", "rows", "time"]]
    rows += [[r.task, r.metric, score(r.score, r.stderr), str(r.n), duration(r.seconds)] for r in results]
    show_table(rows, f"{checkpoint} ({found.label}), {split} rows, percent ± standard error")
    say(f"results: {output_path}")


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither `auto` nor a number of rows", param_hint="--batch_size")
    return int(text)
