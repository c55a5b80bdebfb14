"""The verbs of `mllm-cl`, and how every one of them ends: exit codes, messages, interruptions.

Importing this file imports neither torch nor transformers; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mllm_cl
from mllm_cl.cli import (
    compare,
    consolidate,
    data,
    demo,
    doctor,
    evaluate,
    export,
    matrix,
    methods,
    pull,
    push,
    report,
    run,
)
from mllm_cl.cli.quiet import be_quiet
from mllm_cl.errors import MllmClError

USER_MISTAKE, INTERRUPTED = 2, 130


class Verbs(TyperGroup):
    """Turns a mistake of the user into one message and exit code 2, and Ctrl-C into a note and 130."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MllmClError as error:
            if ctx.params.get("verbose"):
                traceback.print_exception(error)
            show_error(str(error))
            raise typer.Exit(USER_MISTAKE) from error
        except KeyboardInterrupt:
            typer.secho("Interrupted. What was completed is kept; the same command continues.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def show_error(message: str) -> None:
    """Writes one message to stderr, red on a terminal."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mllm-cl {mllm_cl.__version__}")
        raise typer.Exit


def _underscores(name: str) -> str:
    """`--output-path` is `--output_path`."""
    return name.replace("-", "_")


app = typer.Typer(
    cls=Verbs,
    name="mllm-cl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _underscores},
    help="Teach a multimodal LLM one task after another without losing what it could do before.",
    epilog="Start with: mllm-cl demo",
)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show log lines, and tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    be_quiet(verbose)


NEED_ARGUMENTS = (run.run, consolidate.consolidate, push.push, pull.pull, export.export)

for verb, example in (
    (demo.demo, "mllm-cl demo --methods finetune,llava_c"),
    (run.run, "mllm-cl run recipes/quickstart/llava_c.yaml seed=1 output_dir=runs/seed-1"),
    (matrix.matrix, "mllm-cl matrix runs/demo/llava_c --csv > matrix.csv"),
    (report.report, "mllm-cl report runs/demo/llava_c --baseline runs/demo/finetune"),
    (compare.compare, "mllm-cl compare runs/demo/finetune runs/demo/llava_c --output_path runs/compare"),
    (
        consolidate.consolidate,
        "mllm-cl consolidate runs/a/stages/01-plates/adapter other/adapter --rate saturate --out merged",
    ),
    (push.push, "mllm-cl push runs/plates-then-menus owner/plates-then-menus --private --dry-run"),
    (pull.pull, "mllm-cl pull owner/plates-then-menus --out runs/pulled"),
    (export.export, "mllm-cl export runs/plates-then-menus --merge --out merged"),
    (methods.methods, "mllm-cl methods replay"),
    (doctor.doctor, "mllm-cl doctor"),
):
    app.command(epilog=f"Example: {example}", no_args_is_help=verb in NEED_ARGUMENTS)(verb)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data")
