"""`mllm-cl evaluate CHECKPOINT... --tasks a,b --output_path DIR`, and `evaluate score`, `evaluate ls`.

Flags are named as in lm-evaluation-harness. Without a verb of its own, `evaluate` measures checkpoints.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from mllm_cl.cli.evaluate_arguments import (
    VERBOSITY,
    VLLM,
    batch_size_of,
    check_model,
    checkpoint_of_model_args,
    generation_options,
    limit_of,
    refuse,
    refuse_with_vllm,
    with_system_instruction,
)
from mllm_cl.cli.evaluate_lmms import measure_with_lmms_eval, refuse_flags, split_tasks

MEASURE = "checkpoints"


class MeasuresByDefault(TyperGroup):
    """Reads `evaluate X ...` as `evaluate checkpoints X ...` unless X is another verb."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            refuse(args)
            args = [MEASURE, *(args or ["--help"])]
        return super().parse_args(ctx, args)  # type: ignore[arg-type]


app = typer.Typer(
    cls=MeasuresByDefault, help="Measure checkpoints; score predictions again; list what can be measured."
)


@app.command(
    MEASURE,
    epilog="Example: mllm-cl evaluate runs/demo/llava_c --tasks compass,coin-count --output_path results",
)
def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "-t",
            help="Names of tasks and general benchmarks, with commas; lmms:mme,pope: of lmms-eval.",
            show_default=False,
        ),
    ],
    output_path: Annotated[
        Path, typer.Option("--output_path", "-o", help="Folder for the results.", show_default=False)
    ],
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Run folders, RUN/stages/NN-task, PEFT adapter folders, models (folder, Hub id), or `base`.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="What answers: `hf` (transformers), or `vllm`.")] = "hf",
    model_args: Annotated[
        str | None,
        typer.Option("--model_args", help="Instead of CHECKPOINT: pretrained=MODEL,peft=ADAPTER.", show_default=False),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(help="A built-in stream or a stream.yaml. By default that of the run, else quickstart."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Instead of the one that the checkpoint names.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch_size", "-b", help="Rows per batch; `auto` halves when memory runs out.")
    ] = "auto",
    max_batch_size: Annotated[
        int | None, typer.Option("--max_batch_size", min=1, help="Where `--batch_size auto` begins (64).")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="`cpu` or `cuda`; the best there is when not given.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--limit", "-L", help="Most rows per task, or a share below 1. For trying out.")
    ] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Rows of each task to leave out at the start.")] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max_new_tokens", min=1, help="Longest answer. By default the task's own."),
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            "--gen_kwargs", help="num_beams=3,do_sample=true,temperature=0.7,until=### ...", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling, when --gen_kwargs asks for it.")] = 0,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which rows.")] = "test",
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Whose scorers: strict, llava, lmms_eval, coin, ... See `evaluate ls`."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="For all tasks instead of their own; `choice_likelihood` reads the likeliest choice, without generating.",
        ),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option("--log_samples", "-s", help="Write samples.jsonl too, with the fields of lm-evaluation-harness."),
    ] = False,
    predict_only: Annotated[
        bool, typer.Option("--predict_only", "-x", help="Write predictions and score nothing.")
    ] = False,
    allow_failures: Annotated[
        bool, typer.Option("--allow_failures", help="Score the other rows when some could not be answered.")
    ] = False,
    num_fewshot: Annotated[int, typer.Option("--num_fewshot", help="Only 0: tasks are asked without examples.")] = 0,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", help="Always so; for commands written for other harnesses.")
    ] = True,
    system_instruction: Annotated[
        str | None, typer.Option("--system_instruction", help="System turn of every row.", show_default=False)
    ] = None,
    verbosity: Annotated[str, typer.Option("--verbosity", "-v", help=", ".join(VERBOSITY) + ".")] = "WARNING",
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="Folder with lmms-eval tasks of your own.", show_default=False)
    ] = None,
) -> None:
    """Measure checkpoints on tasks and general benchmarks; writes predictions.jsonl and result.json for each cell.

    The same command continues where an interrupted one stopped, and measures nothing twice. See also
    `mllm-cl evaluate score --help` (score predictions again without a model) and `mllm-cl evaluate ls --help`.
    """
    names = list(checkpoints or [])
    check_model(model)
    if model_args is not None:
        name, base_model = checkpoint_of_model_args(model_args, names, base_model)
        names = [name]
    if not names:
        raise typer.BadParameter("name a checkpoint, or give --model_args pretrained=MODEL", param_hint="CHECKPOINT")
    if num_fewshot:
        raise typer.BadParameter("only 0 is possible: tasks are asked without examples", param_hint="--num_fewshot")
    if metric is not None and predict_only:
        raise typer.BadParameter("cannot be given with --predict_only", param_hint="--metric")
    if verbosity.upper() not in VERBOSITY:
        raise typer.BadParameter(f"{verbosity!r} is none of {', '.join(VERBOSITY)}", param_hint="--verbosity")
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter(f"{seed} does not fit into 64 bits", param_hint="--seed")
    logging.getLogger("mllm_cl").setLevel(verbosity.upper())
    wanted, rows_per_batch = limit_of(limit), batch_size_of(batch_size, max_batch_size)
    options = generation_options(gen_kwargs)
    max_new_tokens = max_new_tokens or options.pop("max_new_tokens", None)
    ours, theirs = split_tasks(tasks)
    if theirs:
        refuse_flags(
            {
                "--max_new_tokens": max_new_tokens and "max_new_tokens" not in (gen_kwargs or ""),
                "--split": split != "test",
                "--profile": profile,
                "--predict_only": predict_only,
                "--allow_failures": allow_failures,
            }
        )
    elif include_path is not None:
        raise typer.BadParameter(
            "only for `lmms:` tasks; name your own tasks with --stream STREAM.yaml", param_hint="--include_path"
        )
    if model == VLLM:
        refuse_with_vllm(metric, device, theirs)
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.cli.evaluate_arguments import use_device
    from mllm_cl.evaluation.engine import GenerationSettings
    from mllm_cl.evaluation.samples import write_samples
    from mllm_cl.reporting.formatting import duration, score
    from mllm_cl.training.checkpoint_loading import find_checkpoint, load_checkpoints
    from mllm_cl.training.standalone import (
        check_output,
        choose_rows,
        choose_stream,
        folder_names,
        measure,
        with_profile,
    )
    from mllm_cl.training.vllm_checkpoints import prepare_vllm

    use_device(device)
    check_output(output_path)
    found = [find_checkpoint(name, base_model) for name in names]
    if theirs:
        from mllm_cl.evaluation.bridges.lmms_run import LmmsOptions

        size = batch_size if rows_per_batch == "auto" else str(rows_per_batch)
        handed = LmmsOptions(size, wanted, offset, seed, gen_kwargs, include_path, device)
        labels = list(folder_names(names, found))
        measure_with_lmms_eval(names, labels, theirs, output_path, handed, base_model)
        if not ours:
            return
    with make_progress() as progress:
        with progress.waiting("reading the rows"):
            chosen = choose_rows(
                choose_stream(stream, found[0].recipe),
                ours,
                split=split,
                limit=wanted,
                offset=offset,
                max_new_tokens=max_new_tokens,
                recipe=found[0].recipe,
                profile=profile,
                predict_only=predict_only or metric is not None,
            )
            if metric is not None:
                chosen = [replace(item, metric=with_profile(metric, profile)) for item in chosen]
            if system_instruction is not None:
                chosen = [replace(item, rows=with_system_instruction(item.rows, system_instruction)) for item in chosen]
        named = folder_names(names, found)
        settings = GenerationSettings(batch_size=rows_per_batch, options=tuple(sorted(options.items())), seed=seed)
        load = load_checkpoints
        if model == VLLM:
            settings, load = prepare_vllm(named, chosen, settings)
        measured = measure(
            named,
            chosen,
            output_path,
            settings=settings,
            progress=progress,
            allow_failures=allow_failures,
            load=load,
        )
    several = len(named) > 1
    rows = [["task", *(["checkpoint"] if several else []), "metric", "score", "rows", "failed", "time"]]
    for result in measured.results:
        value = "predictions only" if not result.metric else score(result.score, result.stderr)
        shown = [result.task, *([result.stage] if several else []), result.scorer or "none", value, str(result.n)]
        rows.append([*shown, str(result.n_failed), duration(result.seconds)])
    if len(rows) > 1:
        title = names[0] + f" ({found[0].label})" if not several else f"{len(named)} checkpoints"
        trying = "; limited, so for trying out only" if limit or offset else ""
        show_table(rows, f"{title}, {split} rows, percent ± standard error{trying}")
    if log_samples:
        write_samples(output_path, chosen)
    say(f"results: {output_path}")
    if measured.failures:
        for failure in measured.failures:
            typer.secho(f"failed: {failure.checkpoint}, {failure.reason}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


@app.command("score", epilog="Example: mllm-cl evaluate score results --metric pope:llava")
def score_again(
    predictions: Annotated[
        list[Path], typer.Argument(metavar="PREDICTIONS...", help="predictions.jsonl, or folders.", show_default=False)
    ],
    metric: Annotated[
        str | None, typer.Option("--metric", help="Another scorer; by default the one they were scored with.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Whose scorer, where a benchmark has several.")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", "-o", help="Folder for the results; only shown when not given.")
    ] = None,
) -> None:
    """Score written predictions again, without a model."""
    from mllm_cl.cli.display import say, show_table
    from mllm_cl.evaluation.rescoring import distinct_names, find_predictions, read_predictions, rescore
    from mllm_cl.files import write_json
    from mllm_cl.reporting.formatting import score

    rows = [["predictions", "metric", "profile", "score", "rows"]]
    contents = [read_predictions(path) for place in predictions for path in find_predictions(place)]
    scores = [rescore(content, metric, profile) for content in contents]
    for content, folder, (name, scored) in zip(contents, distinct_names(contents), scores):
        path = content.path
        rows.append([str(path), name, scored.profile, score(scored.value, scored.stderr), str(len(content.lines))])
        if output_path is not None:
            result = {
                "task": content.name,
                "metric": name,
                "scorer": scored.identity,
                "profile": scored.profile,
                "score": scored.value,
                "stderr": scored.stderr,
                "unit": scored.unit,
                "n": len(content.lines),
                "clusters": scored.clusters,
                "metrics": {key: dict(value) for key, value in scored.metrics.items()},
                "predictions": str(path),
            }
            write_json(output_path / folder / f"{scored.identity.replace('/', '-')}.json", result)
    show_table(rows, "scored again, percent ± standard error")
    if output_path is not None:
        say(f"results: {output_path}")


@app.command("ls", epilog="Example: mllm-cl evaluate ls scorers")
def list_what(
    what: Annotated[Literal["tasks", "scorers", "profiles"], typer.Argument(help="What to list.")] = "tasks",
) -> None:
    """List tasks and general benchmarks, scorers, or the profiles of each benchmark."""
    from mllm_cl.cli.display import show_table

    if what == "tasks":
        from mllm_cl.data.builders import BENCHMARKS, STREAMS

        rows = [["name", "kind", "metric", "description"]]
        rows += [[name, "stream", "of each task", entry.description] for name, entry in STREAMS.items()]
        rows += [
            [name, "general benchmark", entry.metric or "by a judge", entry.description]
            for name, entry in BENCHMARKS.items()
        ]
        show_table(rows, "give a stream with --stream and its task names with --tasks")
        return
    from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, SCORERS

    if what == "profiles":
        rows = [["benchmark", "profile", "scorer", "what it does"]]
        for benchmark, own in BENCHMARK_SCORERS.items():
            rows += [[benchmark, profile, name, SCORERS[name].description] for profile, name in own.items()]
    else:
        rows = [["scorer", "kind", "profile", "version", "what it does"]]
        rows += [[name, e.kind, e.profile, str(e.version), e.description] for name, e in SCORERS.items()]
    show_table(rows, None)
