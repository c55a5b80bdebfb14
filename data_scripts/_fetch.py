"""What the data scripts share: show what would come from where and under which licence, ask, fetch, unpack, check.

python data_scripts/NAME.py                  shows everything, fetches nothing
python data_scripts/NAME.py --yes            fetches; start it again after an interruption
python data_scripts/NAME.py --yes --only COCO --out /data/coin
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from mllm_cl.cli.display import make_progress, say, show_table
from mllm_cl.data.builders.family import Family, default_root
from mllm_cl.data.download import Remote, fetch, remote_size
from mllm_cl.data.extract import extract
from mllm_cl.errors import DataError, MllmClError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Part:
    """Something to fetch together.

    Args:
        name (`str`): for `--only`.
        what (`str`): one line.
        remotes (`Sequence[Remote]`): files by address.
        hub (`str`, *optional*): data set on the Hugging Face Hub; its files are listed there, with sizes and checksums.
        patterns (`Sequence[str]`): which files of the Hub data set.
        strip (`str`): prefix of the Hub paths that is left out below the folder.
        unpack (`str`, *optional*): folder (below the data set's) into which archives are unpacked; `None`: left packed.
    """

    name: str
    what: str
    remotes: Sequence[Remote] = ()
    hub: str | None = None
    patterns: Sequence[str] = ("*",)
    strip: str = ""
    unpack: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything a script does for one family.

    Args:
        family (`Family`): licence, citation and layout come from it.
        parts (`Sequence[Part]`): what can be fetched.
        by_hand (`Sequence[str]`): what cannot: forms to sign, drives without addresses.
        convert (`Callable`, *optional*): folder -> what was done, run after everything has been fetched.
    """

    family: Family
    parts: Sequence[Part] = ()
    by_hand: Sequence[str] = ()
    convert: Callable[[Path], str] | None = None
    endpoint: str | None = field(default=None)


def hub_files(part: Part, endpoint: str | None = None) -> list[Remote]:
    """Returns the files of a Hub data set that match the part, with sizes and (for large files) checksums.

    Raises:
        DataError: the data set cannot be listed, or no file matches.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers

    assert part.hub is not None
    try:
        entries = list(HfApi(endpoint=endpoint).list_repo_tree(part.hub, recursive=True, repo_type="dataset"))
    except Exception as error:  # the Hub's client raises its own, httpx's and urllib3's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{part.hub}: the files on the Hub cannot be listed ({reason}).",
            fix="check the connection; for gated data `hf auth login` and accept the terms.",
        ) from error
    headers = {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}
    found = [
        Remote(
            hf_hub_url(part.hub, entry.path, repo_type="dataset", endpoint=endpoint),
            entry.path.removeprefix(part.strip),
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            headers,
        )
        for entry in entries
        if isinstance(entry, RepoFile) and any(fnmatch(entry.path, pattern) for pattern in part.patterns)
    ]
    if not found:
        raise DataError(f"{part.hub}: no file matches {', '.join(part.patterns)}.", fix="the data set has changed.")
    return found


def readable(size: int | None) -> str:
    """Returns a number of bytes for people."""
    if size is None:
        return "unknown size"
    amount, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def run(plan: Plan, arguments: Sequence[str] | None = None) -> int:
    """Runs a script; returns its exit code: 0 when all that was asked for is there, 2 otherwise."""
    parser = argparse.ArgumentParser(description=f"Fetches {plan.family.title}.")
    parser.add_argument("--yes", action="store_true", help="fetch; without it everything is only shown")
    parser.add_argument(
        "--out", type=Path, default=default_root(plan.family.name), help="folder (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", metavar="PART", help="fetch only these parts")
    options = parser.parse_args(arguments)
    try:
        return _run(plan, options.out, options.yes, options.only)
    except MllmClError as error:
        print(error, file=sys.stderr)
        return 2


def _run(plan: Plan, out: Path, is_wanted: bool, only: Sequence[str] | None) -> int:
    names = [part.name for part in plan.parts]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise DataError(f"--only {unknown[0]}: no such part.", expected="one of: " + ", ".join(names))
    chosen = [part for part in plan.parts if not only or part.name in only]
    say(plan.family.card())
    say(f"\nlicence: {plan.family.licence}")
    files = {part.name: _files(part, plan.endpoint) for part in chosen}
    if chosen:
        _show(chosen, files)
    for step in plan.by_hand:
        say(f"by hand: {step}")
    if not is_wanted:
        say(f"\nNothing was fetched. `--yes` fetches into {out}, and accepts the licence above on your behalf.")
        return 0
    for part in chosen:
        _fetch(part, files[part.name], out)
    if plan.convert is not None:
        say(plan.convert(out))
    return _finish(plan, out)


def _files(part: Part, endpoint: str | None) -> list[Remote]:
    return list(part.remotes) + (hub_files(part, endpoint) if part.hub else [])


def _show(parts: Sequence[Part], files: dict[str, list[Remote]]) -> None:
    rows = [["part", "files", "size", "from", "what"]]
    for part in parts:
        sizes = [remote_size(remote) for remote in files[part.name]]
        known = sum(size for size in sizes if size is not None)
        total = readable(known) if None not in sizes else f"at least {readable(known)}" if known else "unknown size"
        place = part.hub or ", ".join(sorted({remote.url.split("/")[2] for remote in files[part.name]}))
        rows.append([part.name, str(len(sizes)), total, place, part.what])
    show_table(rows)


def _fetch(part: Part, files: Sequence[Remote], out: Path) -> None:
    total = sum(remote.size or 0 for remote in files)
    with make_progress() as progress, progress.bar(f"fetching {part.name} (bytes)", total) as advance:
        paths = [fetch(remote, out, advance) for remote in files]
    if part.unpack is None:
        return
    archives = [path for path in paths if path.name.lower().endswith(ARCHIVES)]
    with make_progress() as progress, progress.waiting(f"unpacking {part.name}"):
        for archive in archives:
            extract(archive, out / part.unpack)


def _finish(plan: Plan, out: Path) -> int:
    missing = plan.family.missing(out)
    if missing:
        say("still missing: " + ", ".join(missing))
        for step in plan.by_hand:
            say(f"by hand: {step}")
        return 2
    check = f"mllm-cl data validate {plan.family.name} --root {out}"
    say(f"{plan.family.title}: the rows are in {out}. Check rows and images with `{check}`.")
    return 0
