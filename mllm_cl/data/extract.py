"""Unpacks archives that strangers made: nothing is written before every entry has been found harmless.

Refused are absolute paths, `..`, drives, links and devices, two entries of one path, more files or bytes than a limit,
and entries that meet a link on disk. Files that are already there with the right size are kept, so an interrupted
extraction goes on.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from mllm_cl.data.download import safe_target
from mllm_cl.errors import DataError

MOST_FILES = 5_000_000
MOST_BYTES = 2 * 1024**4


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def extract(
    archive: Path,
    folder: Path,
    *,
    progress: Callable[[int], None] | None = None,
    most_files: int = MOST_FILES,
    most_bytes: int = MOST_BYTES,
) -> list[Path]:
    """Returns the files of an archive (.zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz) after unpacking it below a folder.

    Args:
        archive, folder (`Path`): what to unpack, and where.
        progress (`Callable`, *optional*): told the number of bytes of every file that is done.
        most_files, most_bytes (`int`): limits of what an archive may unfold to.

    Raises:
        DataError: the archive is damaged, of an unknown kind, or has an entry that is refused; nothing was written then.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return _unpack(_zip_members(archive, opened), archive, folder, progress, most_files, most_bytes)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened:
                return _unpack(_tar_members(archive, opened), archive, folder, progress, most_files, most_bytes)
    except (RuntimeError, NotImplementedError) as error:  # a password, a method of compression that Python lacks
        raise DataError(f"{archive}: cannot be unpacked here ({error}).", fix="unpack it by hand.") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(
            f"{archive}: the archive is damaged ({error}).", fix="delete it and download it again."
        ) from error
    raise DataError(f"{archive}: not an archive.", expected=".zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz")


def _zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[Member]:
    for entry in opened.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(archive, entry.filename, "a link or a device")
        if not entry.is_dir():
            yield Member(entry.filename, entry.file_size, lambda entry=entry: opened.open(entry))


def _tar_members(archive: Path, opened: tarfile.TarFile) -> Iterator[Member]:
    for entry in opened:
        if not (entry.isfile() or entry.isdir()):
            raise _refused(archive, entry.name, "a link or a device")
        if entry.isfile():
            yield Member(entry.name, entry.size, lambda entry=entry: _opened(opened, entry))
        else:
            safe_name(archive, entry.name)


def _opened(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(entry)
    assert file is not None  # a regular file
    return file


def _unpack(
    members: Iterable[Member],
    archive: Path,
    folder: Path,
    progress: Callable[[int], None] | None,
    most_files: int,
    most_bytes: int,
) -> list[Path]:
    checked: dict[Path, Member] = {}
    folders: set[Path] = set()
    total = 0
    for member in members:
        safe_name(archive, member.name)
        try:
            target = safe_target(folder, member.name.removeprefix("./"))
        except DataError as error:
            raise _refused(archive, member.name, error.given) from error
        total += member.size
        if target in checked:
            raise _refused(archive, member.name, "a second entry of this path")
        folders.update(target.parents)
        if target in folders or any(parent in checked for parent in target.parents):
            raise _refused(archive, member.name, "a file and a folder at once")
        if len(checked) >= most_files or total > most_bytes:
            raise _refused(archive, member.name, f"more than {most_files:,} files or {most_bytes:,} bytes")
        checked[target] = member
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if total > free:
        raise DataError(f"{archive}: unfolds to {total:,} bytes, {free:,} are free.", fix="free some space.")
    for target, member in checked.items():
        if not (target.is_file() and target.stat().st_size == member.size):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            try:
                _copy(member, part, archive)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.rename(target)
        if progress:
            progress(member.size)
    return list(checked)


def _copy(member: Member, part: Path, archive: Path) -> None:
    with member.open() as source, part.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if part.stat().st_size != member.size:
        raise DataError(f"{archive}: {member.name!r} is not {member.size:,} bytes long.", fix="download it again.")


def safe_name(archive: Path, name: str) -> None:
    """Raises `DataError` if an entry's name could lead out of the folder that an archive is unpacked into."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":") or "\0" in name:
        raise _refused(archive, name, "an absolute path")
    if ".." in parts:
        raise _refused(archive, name, "a path with `..`")


def _refused(archive: Path, name: str, what: str) -> DataError:
    return DataError(
        f"{archive}: the entry {name!r} is {what}; nothing was unpacked.",
        expected="relative paths of ordinary files",
        fix="do not use this archive; get it from the official source.",
    )
