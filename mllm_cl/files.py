"""Writing files so that a killed process or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mllm_cl.errors import RunError
from mllm_cl.parse import parse_json

PARTIAL = ".partial"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained(place: Path | str) -> Iterator[None]:
    """Turns a failed write inside into a `RunError` that says what to do.

    Raises:
        RunError: the disk is full, the folder is not writable, or the file system failed otherwise.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _FULL:
            raise RunError(
                f"{place}: the disk is full.",
                fix="free some space and start the same command again; what was completed is kept.",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(
                f"{place}: not writable ({error}).", fix="choose another output_dir, or change its owner."
            ) from error
        raise RunError(f"{place}: cannot be written ({error}).", fix="check the file system.") from error


def _errno(error: Exception) -> int | None:
    """The number of a failed system call; safetensors only writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: temporary file, flush to disk, rename.

    Raises:
        RunError: it cannot be written; an older file of that name is kept.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + PARTIAL)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinity are errors, not invalid JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` (replacing what was there) only if the block completes.

    Raises:
        RunError: it cannot be written; the folder that was there is kept.
    """
    with explained(path):
        temporary = path.with_name(path.name + PARTIAL)
        remove(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish(temporary: Path, path: Path) -> None:
    """Makes a finished temporary folder `path`: whoever looks finds the old folder, none, or the whole new one."""
    for part in [*temporary.rglob("*"), temporary]:
        _sync(part)
    old = path.with_name(f"{path.name}.old{PARTIAL}")
    remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    _sync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Deletes what killed processes left half written below a folder."""
    for path in sorted(folder.rglob(f"*{PARTIAL}"), reverse=True):
        remove(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_sha256(folder: Path, besides: str | None = None) -> str:
    """Returns a hash of the names and contents of all files below a folder, but for those of the name `besides`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != besides:
            digest.update(str(path.relative_to(folder)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_gated(stage: Path) -> bool:
    """True if a stage folder is more than PEFT makes of its adapter: methods put gates between its factors, or prompts
    into the rows."""
    states = sorted((stage / "method").glob("*/state.json"))
    return any(parse_json(path.read_text(encoding="utf-8"))["data"].get("gated") for path in states)
