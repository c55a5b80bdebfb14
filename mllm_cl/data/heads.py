"""What a file that should hold JSON really is, told from its first bytes: the usual accidents, by name."""

from __future__ import annotations

import codecs
from pathlib import Path

from mllm_cl.errors import DataError

_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_KINDS = (  # first bytes, what it is, what to do
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "run `git lfs pull`."),
    (b"\x1f\x8b", "compressed with gzip", "unpack it (`gunzip`)."),
    (b"PK\x03\x04", "a zip archive", "unpack it."),
    (b"\xfd7zXZ", "compressed with xz", "unpack it."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it."),
    (b"PAR1", "a parquet file", "give it the ending .parquet."),
    (b"<", "a web page or XML", "download the file itself, not the page that shows it."),
)


def check_head(path: Path, head: bytes) -> None:
    """Raises `DataError` if the first bytes of a file are not those of UTF-8 text with JSON in it.

    Args:
        path (`Path`): for the message.
        head (`bytes`): the beginning of the file.
    """
    if not head.strip():
        raise DataError(f"{path}: the file is empty.", expected="a list of rows", fix="fill or remove it.")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for start, kind, fix in _KINDS:
        if text.startswith(start):
            raise DataError(f"{path}: the file is {kind}.", expected="JSON or JSONL in UTF-8", fix=fix)
    if head.startswith(_BYTE_ORDER_MARKS) or b"\0" in head[:4]:
        wide = head.startswith(codecs.BOM_UTF32_BE) or b"\0\0" in head[:8]
        name = "UTF-32" if wide else "UTF-16"
        raise DataError(f"{path}: the file is {name}.", expected="UTF-8", fix="save the file as UTF-8.")
