"""How numbers are written in reports: one place, so that HTML, Markdown and the terminal agree."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

NOT_MEASURED = "not measured"


def score(value: float | None, stderr: float | None = None) -> str:
    """Returns a score with one decimal, and its error when there is one.

    >>> score(56.727), score(56.7, 1.25), score(None)
    ('56.7', '56.7 ± 1.2', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value + 0.0:.1f}" + (f" ± {stderr:.1f}" if stderr is not None else "")


def change(value: float | None, stderr: float | None = None) -> str:
    """Returns a difference with its sign; the minus is the typographic one.

    >>> change(-16.65), change(2.0), change(0.0)
    ('−16.6', '+2.0', '0.0')
    """
    if value is None:
        return NOT_MEASURED
    text = f"{abs(value):.1f}"
    sign = "" if text == "0.0" else "−" if value < 0 else "+"
    return sign + text + (f" ± {stderr:.1f}" if stderr is not None else "")


def count(value: float | None) -> str:
    """Returns a whole number, shortened from ten thousand on.

    >>> count(950), count(239_900_000), count(None)
    ('950', '239.9 M', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f} {unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Returns a number of bytes.

    >>> size(3_300_000), size(512)
    ('3.1 MiB', '512 B')
    """
    if value is None:
        return NOT_MEASURED
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def flops(value: float | None) -> str:
    """Returns a number of floating-point operations with three digits.

    >>> flops(2.345e15), flops(0), flops(None)
    ('2.35 PFLOP', '0 FLOP', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}FLOP"
    return f"{value:.0f} FLOP"


def ratio(value: float | None) -> str:
    """Returns a ratio with two decimals."""
    return NOT_MEASURED if value is None else f"{value:.2f}"


def mebibytes(value: float | None) -> str:
    """Returns a number of MiB, like `size`."""
    return NOT_MEASURED if value is None else size(value * 2**20)


def duration(value: float | None) -> str:
    """Returns seconds in the two largest units.

    >>> duration(0.34), duration(75), duration(3725)
    ('0.3 s', '1 min 15 s', '1 h 02 min')
    """
    if value is None:
        return NOT_MEASURED
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def decimal(value: float | None) -> str:
    """Returns a number with three significant digits, such as a loss."""
    return NOT_MEASURED if value is None else f"{value:.3g}"


def plain(value: object) -> str:
    """Returns a setting as a person would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(value)
    return ", ".join(plain(item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def shorten(text: str, limit: int = 280) -> str:
    """Returns `text` cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def flatten(content: object, prefix: str = "") -> dict[str, object]:
    """Returns nested mappings as dotted keys.

    >>> flatten({"model": {"lora": {"r": 8}}, "seed": 0})
    {'model.lora.r': 8, 'seed': 0}
    """
    if not isinstance(content, Mapping) or not content:
        return {prefix: content} if prefix else {}
    found: dict[str, object] = {}
    for key, value in content.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def markdown_cell(value: object) -> str:
    """Returns text that stays text inside a cell of a GitHub Markdown table, whatever it holds."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    text = re.sub(r"([\\`*\[|~#!$])", r"\\\1", text).replace("@", "&#64;").replace("://", "&#58;//")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)  # inside a word it is no markup


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Returns a GitHub Markdown table; columns of numbers are set right.

    >>> print(markdown_table(["a", "b"], [["x|y", 1]]))
    | a | b |
    |---|--:|
    | x\\|y | 1 |
    """
    lines = [list(header), *map(list, rows)]
    cells = ["| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines]
    numeric = [all(re.match(rf"[−+-]?\d|$|{NOT_MEASURED}", str(row[j])) for row in rows) for j in range(len(header))]
    rule = "|" + "|".join("--:" if number and j else "---" for j, number in enumerate(numeric)) + "|"
    return "\n".join([cells[0], rule, *cells[1:]])
