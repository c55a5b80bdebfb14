"""`mllm-cl data list | show | validate | prepare`: streams, built in or your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_cl.streams import Stream

app = typer.Typer(no_args_is_help=True, help="List, look into, check and prepare streams.")

StreamArgument = Annotated[
    str, typer.Argument(metavar="STREAM", help="A built-in stream, or the path of a stream.yaml.", show_default=False)
]


@app.command("list", epilog="Example: mllm-cl data list")
def list_data() -> None:
    """List the built-in streams and general benchmarks."""
    from mllm_cl.cli.display import show_table
    from mllm_cl.data.builders import BENCHMARKS, STREAMS

    rows = [["name", "kind", "description"]]
    for kind, catalogue in (("stream", STREAMS), ("general benchmark", BENCHMARKS)):
        rows += [[name, kind, entry.description] for name, entry in catalogue.items()]
    show_table(rows)


@app.command(epilog="Example: mllm-cl data show quickstart")
def show(stream: StreamArgument) -> None:
    """Show the tasks of a stream: rows, answer formats, and what a model without eyes could reach."""
    from mllm_cl.cli.display import make_progress, show_table
    from mllm_cl.streams import describe

    with make_progress() as progress, progress.waiting("reading the rows"):
        found = load(stream)
        tasks = describe(found)
    rows = [["task", "metric", "train", "validation", "test", "images", "answers", "formats", "majority baseline"]]
    for task in tasks:
        formats = ", ".join(f"{name} {share:.0%}" for name, share in task["answer_formats"].items())
        majority = f"{100 * task['majority_share']:.1f} % ({task['majority_answer']!r})"
        counts = [str(task[key]) for key in ("train", "validation", "test", "images", "distinct_answers")]
        rows.append([task["task"], task["metric"], *counts, formats, majority])
    show_table(rows, f"{found.name}: {len(found)} tasks")
    described = [[task["task"], task["description"]] for task in tasks if task["description"]]
    if described:
        show_table([["task", "description"], *described])


@app.command(epilog="Example: mllm-cl data validate my-stream/stream.yaml")
def validate(stream: StreamArgument) -> None:
    """Check every row and every image of a stream, and say what to do about each problem. Exit code 2 on errors."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.data.problems import format_problems
    from mllm_cl.errors import StreamError
    from mllm_cl.streams import validate_stream

    source = load(stream) if is_built_in(stream) else stream
    with make_progress() as progress, progress.waiting("checking rows and images"):
        report = validate_stream(source)
    if report.problems:
        say(format_problems(report.problems, limit=None))
    if not report.is_valid:
        count = len(report.errors)
        raise StreamError(
            f"{report.name}: {count} {'error' if count == 1 else 'errors'} in the data, listed above.",
            fix="correct the rows and validate again.",
        )
    for task, counts in report.counts.items():
        say(f"{task}: " + ", ".join(f"{rows} {split}" for split, rows in counts.items()) + " rows")
    say(f"{report.name}: no errors" + (f", {len(report.warnings)} warnings" if report.warnings else ""))


@app.command(epilog="Example: mllm-cl data prepare quickstart")
def prepare(
    name: Annotated[str, typer.Argument(help="A built-in stream or benchmark.", show_default=False)],
) -> None:
    """Make a built-in stream or benchmark ready, and check that it is."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.data.builders import BENCHMARKS, STREAMS
    from mllm_cl.data.validate import validate_rows
    from mllm_cl.errors import StreamError, suggest
    from mllm_cl.streams import ensure_valid, load_benchmark, load_stream

    if name not in STREAMS and name not in BENCHMARKS:
        raise StreamError(f"{name!r} is not built in.", expected=suggest(name, [*STREAMS, *BENCHMARKS]))
    with make_progress() as progress, progress.waiting(f"building {name}"):
        if name in STREAMS:
            stream = ensure_valid(load_stream(name))
            rows = sum(len(task.train) + len(task.validation) + len(task.test) for task in stream)
        else:
            benchmark = load_benchmark(name)
            rows, problems = len(benchmark), validate_rows(benchmark, split="test", name=name)
            if problems:
                raise StreamError(f"{name}: {problems[0]}")
    say(f"{name}: nothing to download; built and checked, {rows} rows. It is ready.")


def is_built_in(stream: str) -> bool:
    from mllm_cl.data.builders import STREAMS

    return stream in STREAMS


def load(stream: str) -> Stream:
    """Returns a stream by name, stream file, or folder with a stream.yaml."""
    from mllm_cl.streams import load_stream, read_stream

    if not is_built_in(stream) and Path(stream).is_dir():
        return read_stream(stream)
    return load_stream(stream)
