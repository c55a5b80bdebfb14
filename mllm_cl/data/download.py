"""Downloads that can be stopped and started again, and are checked before they count.

A file is written to `NAME.part` and renamed when its size and checksum are right. Only `http` and `https` are followed;
an `Authorization` header is not sent on to another host, and is never part of a message.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from mllm_cl.errors import DataError

Progress = Callable[[int], None]  # bytes that have come since the last call
_CHUNK = 1 << 20
_TIMEOUT = 60.0
_WAITS = (1.0, 5.0, 15.0)  # seconds before another attempt


@dataclass(frozen=True)
class Remote:
    """One file to download.

    Args:
        url (`str`): where it is.
        path (`str`): where it goes, below the folder of the data set.
        size (`int`, *optional*): bytes, when known.
        sha256 (`str`, *optional*): hex digest, when known.
        headers (`dict`): sent to the host of `url` only.
    """

    url: str
    path: str
    size: int | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def fetch(remote: Remote, folder: Path, progress: Progress | None = None, waits: tuple[float, ...] = _WAITS) -> Path:
    """Returns the path of the downloaded file; does nothing if it is there with the right size and checksum.

    Args:
        remote (`Remote`): what to download.
        folder (`Path`): the folder that `remote.path` is below.
        progress (`Callable`, *optional*): told the number of bytes as they come.
        waits (`tuple`): seconds before each further attempt; a cut connection goes on where it stopped.

    Raises:
        DataError: the address or path is not allowed, the server refuses, the size or checksum is wrong, or the disk is
            full. Nothing that looks complete is left behind.
    """
    target = safe_target(folder, remote.path)
    if target.exists():
        _check(target, remote, "delete it and start again, if you trust the source.")
        return target
    _allow(remote.url)
    free = shutil.disk_usage(_existing(target.parent)).free
    if remote.size is not None and remote.size > free:
        raise DataError(f"{target}: {remote.size:,} bytes wanted, {free:,} free.", fix="free some space.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for wait in (*waits, None):
        try:
            _receive(remote, part, progress)
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError, _CutOff) as error:
            if wait is None or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise _refused(remote, error) from error
            time.sleep(wait)
    try:
        _check(part, remote, "the download is not what was published; try again later.")
    except DataError:
        part.unlink()
        raise
    part.rename(target)
    return target


def remote_size(remote: Remote) -> int | None:
    """Returns the number of bytes that the server announces, or `None` if it does not say."""
    if remote.size is not None:
        return remote.size
    _allow(remote.url)
    request = urllib.request.Request(remote.url, headers=dict(remote.headers), method="HEAD")
    try:
        with _open(request) as response:
            length = response.headers.get("Content-Length")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
    return int(length) if length and length.isdigit() else None


def safe_target(folder: Path, path: str) -> Path:
    """Returns `folder / path` if that lies below the folder.

    Raises:
        DataError: an absolute path, `..`, a drive, or a link on the way leads out of it.
    """
    pure = PurePosixPath(path)
    is_odd = "\\" in path or ":" in path or "\0" in path
    if not path or pure.is_absolute() or ".." in pure.parts or is_odd:
        raise DataError(f"{path!r}: not a path below {folder}.", expected="a relative path without `..`")
    target = folder / pure
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{target}: a link on the way leads out of {folder}.", fix="remove the link.")
    return target


class _CutOff(Exception):
    """The connection ended before the announced length."""


def _receive(remote: Remote, part: Path, progress: Progress | None) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = dict(remote.headers)
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = _open(urllib.request.Request(remote.url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is complete, or longer than the file
            raise
        if remote.size is None or start != remote.size:
            part.unlink()
            raise _CutOff from error
        return
    with response:
        if start and response.status != 206:
            start = 0  # the server sends everything again
        elif start and not _begins_at(response.headers.get("Content-Range"), start):
            part.unlink()  # another part than asked for: begin again
            raise _CutOff
        elif start and progress:
            progress(start)
        length = response.headers.get("Content-Length")
        with part.open("ab" if start else "wb") as file:
            come = _copy(response, file, remote, start, progress)
    if length is not None and come != int(length):
        raise _CutOff


def _begins_at(content_range: str | None, start: int) -> bool:
    """True if an answer with a part says nothing about where it begins, or that it begins there."""
    return content_range is None or content_range.strip().lower().startswith(f"bytes {start}-")


def _copy(response: IO[bytes], file: IO[bytes], remote: Remote, start: int, progress: Progress | None) -> int:
    come = 0
    try:
        while data := response.read(_CHUNK):
            file.write(data)
            come += len(data)
            if progress:
                progress(len(data))
            if remote.size is not None and start + come > remote.size:
                raise DataError(
                    f"{remote.url}: more than the published {remote.size:,} bytes come.", fix="try again later."
                )
    except OSError as error:
        if isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise DataError(f"{file.name}: cannot be written ({error.strerror}).", fix="free some space.") from error
    file.flush()
    os.fsync(file.fileno())
    return come


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https; credentials stay with their host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _allow(newurl)
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            found.remove_header("Authorization")
        return found


def _open(request: urllib.request.Request):
    request.add_unredirected_header("User-Agent", "mllm_cl")
    return urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT)


def _allow(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url}: not an address to download from.", expected="http:// or https://")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check(path: Path, remote: Remote, fix: str) -> None:
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        raise DataError(f"{path}: {size:,} bytes.", expected=f"{remote.size:,} bytes, as published", fix=fix)
    if remote.sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
        if digest.hexdigest() != remote.sha256.lower():
            raise DataError(
                f"{path}: the checksum is {digest.hexdigest()[:12]}....",
                expected=f"{remote.sha256[:12]}... (SHA-256, as published)",
                fix=fix,
            )


def _refused(remote: Remote, error: Exception) -> DataError:
    if isinstance(error, urllib.error.HTTPError):
        reason = f"the server answers {error.code} {error.reason}"
        fix = "log in (`hf auth login`) and accept the terms of the data set." if error.code in (401, 403) else None
    else:
        reason = "the connection was cut" if isinstance(error, _CutOff) else str(getattr(error, "reason", error))
        fix = "check the connection and start the same command again; what has come is kept."
    return DataError(f"{remote.url}: {reason}.", fix=fix or "check the address, or download the file by hand.")
