"""Keeps the chatter of the libraries below us off the terminal; `--verbose` lets it through."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Message (regular expression at its beginning), category, and why a user can do nothing about it.
KNOWN_NOISE: tuple[tuple[str, type[Warning], str], ...] = (
    (".*is_gradient_checkpointing", FutureWarning, "peft reads a property that transformers is about to rename"),
    (".*pin_memory.*no accelerator", UserWarning, "torch's loader on a machine without an accelerator"),
    (".*torch_dtype.*deprecated", FutureWarning, "an argument that peft still passes on"),
    (".*save_embedding_layers", UserWarning, "peft; adapters never hold embeddings here"),
    (".*broadcast_buffers", FutureWarning, "torch renames an argument that transformers passes on"),
    (".*lr_scheduler.step\\(\\).*before.*optimizer.step\\(\\)", UserWarning, "torch, after a resumed first step"),
)
# Loggers that warn of what a user need not do.
KNOWN_CHATTER: tuple[tuple[str, str], ...] = (
    (
        "bitsandbytes.backends.cpu.ops",
        "at every import on processors with AVX512-BF16: a faster 4-bit kernel is not installed",
    ),
)


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment, so that progress bars are not torn apart."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def be_quiet(verbose: bool = False, level: int = logging.WARNING) -> None:
    """Sets log levels and filters for a command.

    Args:
        verbose: everything from `mllm_cl` at level INFO, and the libraries as they are.
        level: of `mllm_cl` otherwise.
    """
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("mllm_cl")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else level)
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # they tear ours apart; read when it is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning per loader process
    for name, _ in KNOWN_CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category, _ in KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)
