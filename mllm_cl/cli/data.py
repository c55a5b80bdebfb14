"""`mllm-cl data list | show | validate | prepare`: streams, built in or your own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

if TYPE_CHECKING:
    from mllm_cl.streams import Stream
    from mllm_cl.training.progress import Progress

app = typer.Typer(no_args_is_help=True, help="List, look into, check and prepare streams.")

MOST = 40
"""Pairs of splits with near-duplicates that are listed on the terminal."""

StreamArgument = Annotated[
    str, typer.Argument(metavar="STREAM", help="A built-in stream, or the path of a stream.yaml.", show_default=False)
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a public benchmark; `$MLLM_CL_DATA/NAME` or `data/NAME` when not given.", show_default=False
    ),
]
OptionOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the builder; may be repeated.")
]


@app.command("list", epilog="Example: mllm-cl data list")
def list_data() -> None:
    """List the built-in streams and general benchmarks."""
    from mllm_cl.cli.display import show_table
    from mllm_cl.data.builders import BENCHMARKS, STREAMS

    rows = [["name", "kind", "description"]]
    for kind, catalogue in (("stream", STREAMS), ("general benchmark", BENCHMARKS)):
        for name, entry in catalogue.items():
            rows.append([name, f"{kind}, to be fetched" if entry.family else kind, entry.description])
    show_table(rows)


@app.command(epilog="Example: mllm-cl data show quickstart --html quickstart.html")
def show(
    stream: StreamArgument,
    root: RootOption = None,
    option: OptionOption = None,
    duplicates: Annotated[
        int | None, typer.Option(metavar="N", help="Look for near-duplicates among N rows per split; opens images.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a sheet with sample rows and their prompts.")] = None,
    model: Annotated[str, typer.Option(help="Model whose processor renders the prompts of the sheet.")] = "tiny-llava",
    samples: Annotated[int, typer.Option(min=1, help="Rows per split on the sheet.")] = 3,
) -> None:
    """Show the tasks of a stream: rows, answer formats, lengths, near-duplicates, what a model without eyes could reach."""
    from mllm_cl.cli.data_sheet import duplicate_table, length_table, summary_table, write_sheet
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.data.builders import find_family
    from mllm_cl.streams import describe
    from mllm_cl.streams.duplicates import near_duplicates

    family = find_family(stream)
    if family is not None:
        say(family.card())
    with make_progress() as progress, progress.waiting("reading the rows"):
        found = load(stream, root, option)
        tasks = describe(found)
    show_table(summary_table(tasks), f"{found.name}: {len(found)} tasks")
    lengths = [["task", "of", *length_table(tasks[0])[0][1:]]] if tasks else []
    lengths += [[task["task"], *line] for task in tasks for line in length_table(task)[1:]]
    show_table(lengths, "lengths in characters")
    described = [[task["task"], task["description"]] for task in tasks if task["description"]]
    if described:
        show_table([["task", "description"], *described])
    formats = [[place, reason] for place, reason in formats_of(found)]
    if formats:
        show_table([["file", "format"], *formats])
    shared = None
    if duplicates is not None:
        rows = sum(min(len(part), duplicates) for task in found for part in (task.train, task.validation, task.test))
        with make_progress() as progress, progress.bar("looking for near-duplicates", rows) as advance:
            shared = near_duplicates(found, most=duplicates, progress=advance)
        show_table(duplicate_table(shared[:MOST]), f"near-duplicates: {len(shared)} pairs of splits")
        if len(shared) > MOST:
            say(f"... and {len(shared) - MOST} more; `--html` shows all")
    if html is not None:
        with make_progress() as progress, progress.waiting("rendering sample rows"):
            write_sheet(html, found, tasks, shared, model=model, samples=samples)
        say(f"written to {html}")


@app.command(epilog="Example: mllm-cl data validate my-stream/stream.yaml")
def validate(
    stream: StreamArgument,
    root: RootOption = None,
    option: OptionOption = None,
    drop_bad: Annotated[
        Path | None,
        typer.Option(metavar="LIST", help="Write the rows with errors to this list, for `stream.exclude` of a recipe."),
    ] = None,
    images: Annotated[str, typer.Option(help="decode, header, exists or none: how far to check images.")] = "decode",
    workers: Annotated[int, typer.Option(min=1, help="Threads that open images.")] = 8,
) -> None:
    """Check every row and every image of a stream, and say what to do about each problem. Exit code 2 on errors."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.data.problems import format_problems
    from mllm_cl.data.validate import Checks, ImageCheck
    from mllm_cl.errors import StreamError, suggest
    from mllm_cl.streams import validate_stream
    from mllm_cl.streams.exclude import write_exclusions

    known = get_args(ImageCheck)
    if images not in known:
        raise StreamError(f"--images {images}: unknown check.", expected=suggest(images, known))
    check = cast("ImageCheck", images)
    source = load(stream, root, option) if is_built_in(stream) else stream
    with make_progress() as progress, told(progress) as tell:
        report = validate_stream(source, checks=Checks(images=check, progress=tell, workers=workers))
    if report.problems:
        say(format_problems(report.problems, limit=None))
    left = report.errors
    if drop_bad is not None:
        count = write_exclusions(drop_bad, report.located)
        left = [problem for problem in report.errors if problem.position is None]
        say(
            f"{count} rows with errors are listed in {drop_bad}; a recipe leaves them out with `stream.exclude: {drop_bad}`"
        )
    if left:
        count = len(left)
        raise StreamError(
            f"{report.name}: {count} {'error' if count == 1 else 'errors'} in the data, listed above.",
            fix="correct the rows and validate again"
            + (", or list them with `--drop-bad`." if drop_bad is None else "."),
        )
    for task, counts in report.counts.items():
        say(f"{task}: " + ", ".join(f"{rows} {split}" for split, rows in counts.items()) + " rows")
    done = "no errors" if not report.errors else "no errors in the rows that are left"
    say(f"{report.name}: {done}" + (f", {len(report.warnings)} warnings" if report.warnings else ""))


@app.command(epilog="Example: mllm-cl data prepare quickstart")
def prepare(
    name: Annotated[str, typer.Argument(help="A built-in stream or benchmark.", show_default=False)],
    root: RootOption = None,
    option: OptionOption = None,
) -> None:
    """Make a built-in stream or benchmark ready, and check that it is. Public data are fetched by `data_scripts/`."""
    from mllm_cl.cli.display import make_progress, say
    from mllm_cl.data.builders import BENCHMARKS, STREAMS, find_family
    from mllm_cl.data.validate import validate_rows
    from mllm_cl.errors import StreamError, suggest
    from mllm_cl.streams import ensure_valid, load_benchmark

    if name not in STREAMS and name not in BENCHMARKS:
        raise StreamError(f"{name!r} is not built in.", expected=suggest(name, [*STREAMS, *BENCHMARKS]))
    family = find_family(name)
    if family is not None:
        say(family.card())
    with make_progress() as progress, progress.waiting(f"building {name}"):
        if name in STREAMS:
            stream = ensure_valid(load(name, root, option))
            rows = sum(len(task.train) + len(task.validation) + len(task.test) for task in stream)
        else:
            benchmark = load_benchmark(name)
            rows, problems = len(benchmark), validate_rows(benchmark, split="test", name=name)
            if problems:
                raise StreamError(f"{name}: {problems[0]}")
    origin = "nothing to download; built" if family is None else f"found in {family.root(root)}"
    say(f"{name}: {origin} and checked, {rows} rows. It is ready.")


def is_built_in(stream: str) -> bool:
    from mllm_cl.data.builders import STREAMS

    return stream in STREAMS


def load(stream: str, root: Path | None = None, option: list[str] | None = None) -> Stream:
    """Returns a stream by name, stream file, or folder with a stream.yaml."""
    from mllm_cl.streams import load_stream, read_stream

    if not is_built_in(stream) and Path(stream).is_dir():
        return read_stream(stream)
    return load_stream(stream, root=root, options=parse_options(option or []))


def parse_options(given: list[str]) -> dict[str, Any]:
    """Returns `KEY=VALUE` texts as a mapping; values are YAML.

    Raises:
        StreamError: a text without `=`, or a value that is not YAML.
    """
    from mllm_cl.errors import StreamError
    from mllm_cl.parse import YamlMistake, parse_yaml

    options = {}
    for text in given:
        key, separator, value = text.partition("=")
        try:
            options[key] = parse_yaml(value)
        except YamlMistake as error:
            raise StreamError(f"--option {text!r}: the value is not YAML.", fix="quote it.") from error
        if not separator or not key:
            raise StreamError(f"--option {text!r}: not an option.", expected="KEY=VALUE, for example scoring=corrected")
    return options


def formats_of(stream: Stream) -> list[tuple[str, str]]:
    """Returns each data file of a stream with the format that was found in it, and why."""
    from mllm_cl.data.rows import Rows

    found: dict[str, str] = {}
    for task in stream:
        for rows in (task.train, task.validation, task.test):
            if isinstance(rows, Rows) and rows.origin and rows.format:
                found.setdefault(rows.origin, rows.format)
    return list(found.items())


@contextlib.contextmanager
def told(progress: Progress) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that shows one bar per split."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, tuple[Callable[[int], None], int]] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in bars:
                stack.close()
                bars[name] = (stack.enter_context(progress.bar(f"checking {name}", total)), 0)
            advance, before = bars[name]
            advance(done - before)
            bars[name] = (advance, done)

        yield tell
