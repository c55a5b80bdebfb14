"""The command line: `mllm-cl VERB`. One file per verb; each parses and calls. Start with `app.py`."""

from __future__ import annotations


def main() -> None:
    """The console script `mllm-cl`."""
    from mllm_cl.cli.app import app

    app()
