"""Downloads and archives from strangers, over a loopback server: resumed, checked, and never outside their folder."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.data.builders.ucit import FAMILY as UCIT
from mllm_cl.data.download import Remote, fetch, remote_size, safe_target
from mllm_cl.data.extract import extract
from mllm_cl.errors import DataError
from mllm_cl.streams import load_stream, validate_stream

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files` with ranges; `cuts` bytes of an answer are left away as many times as listed."""

    def __init__(self, lab: Lab, *args: Any) -> None:
        self.lab = lab
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.lab.seen.append((self.path, dict(self.headers)))
        if self.path in self.lab.redirects:
            self.send_response(302)
            self.send_header("Location", self.lab.redirects[self.path])
            self.end_headers()
            return
        path = self.path.split("?")[0]
        if path not in self.lab.files:
            self.send_error(self.lab.status)
            return
        body, start = self.lab.files[path], 0
        if "Range" in self.headers and self.lab.has_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start and self.lab.shift:
            self.send_header("Content-Range", f"bytes {start - self.lab.shift}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        cut = self.lab.cuts.pop(0) if self.command == "GET" and self.lab.cuts else 0
        if self.command == "GET":
            self.wfile.write(body[start : len(body) - cut])

    def log_message(self, *args: Any) -> None:
        pass


class Lab:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/a.bin": CONTENT}
        self.redirects: dict[str, str] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.cuts: list[int] = []
        self.has_ranges, self.status, self.shift = True, 404, 0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def remote(self, name: str = "a.bin", **fields: Any) -> Remote:
        return Remote(f"{self.url}/{name}", name, **fields)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    lab = Lab()
    thread = threading.Thread(target=lab.server.serve_forever, daemon=True)
    thread.start()
    yield lab
    lab.server.shutdown()
    lab.server.server_close()
    thread.join()


SHA = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_fetched_once_and_checked(lab: Lab, tmp_path: Path) -> None:
    told: list[int] = []
    remote = lab.remote(size=len(CONTENT), sha256=SHA)
    path = fetch(remote, tmp_path, told.append)
    assert path == tmp_path / "a.bin"
    assert path.read_bytes() == CONTENT
    assert sum(told) == len(CONTENT)
    fetch(remote, tmp_path)
    assert len(lab.seen) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]
    assert remote_size(lab.remote()) == len(CONTENT)
    assert remote_size(lab.remote("none")) is None


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_cut_connection_goes_on(lab: Lab, tmp_path: Path, has_ranges: bool) -> None:
    lab.cuts, lab.has_ranges = [9000, 500], has_ranges
    assert fetch(lab.remote(sha256=SHA), tmp_path, waits=(0, 0)).read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in lab.seen]
    if has_ranges:
        assert ranges == [None, f"bytes={len(CONTENT) - 9000}-", f"bytes={len(CONTENT) - 500}-"]


def test_a_server_that_sends_another_part_is_asked_from_the_beginning(lab: Lab, tmp_path: Path) -> None:
    lab.cuts, lab.shift = [9000], 7
    assert fetch(lab.remote(), tmp_path, waits=(0, 0)).read_bytes() == CONTENT
    assert [headers.get("Range") for _, headers in lab.seen] == [None, f"bytes={len(CONTENT) - 9000}-", None]


def test_an_interrupted_run_goes_on_with_the_next(lab: Lab, tmp_path: Path) -> None:
    lab.cuts = [9000]
    with pytest.raises(DataError, match="the connection was cut") as caught:
        fetch(lab.remote(), tmp_path, waits=())
    assert "what has come is kept" in str(caught.value)
    assert (tmp_path / "a.bin.part").stat().st_size == len(CONTENT) - 9000
    assert fetch(lab.remote(sha256=SHA), tmp_path, waits=()).read_bytes() == CONTENT
    assert lab.seen[-1][1]["Range"] == f"bytes={len(CONTENT) - 9000}-"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"sha256": "0" * 64}, "the checksum is"),
        ({"size": 5}, "more than the published 5 bytes come"),
        ({"size": len(CONTENT) + 1}, "expected: 10,241 bytes, as published"),
        ({"size": 10**18}, "bytes wanted"),
    ],
)
def test_what_is_not_as_published_is_refused(lab: Lab, tmp_path: Path, fields: dict, part: str) -> None:
    with pytest.raises(DataError) as caught:
        fetch(lab.remote(**fields), tmp_path, waits=())
    assert part in str(caught.value)
    assert not (tmp_path / "a.bin").exists()


def test_a_file_that_is_there_but_wrong_is_not_touched(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="4 bytes"):
        fetch(lab.remote(size=len(CONTENT)), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert not lab.seen


def test_refusals_of_the_server(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404 Not Found"):
        fetch(lab.remote("none"), tmp_path, waits=(0,))
    assert len(lab.seen) == 1  # a refusal is not tried again
    lab.status = 403
    with pytest.raises(DataError, match="accept the terms"):
        fetch(lab.remote("none"), tmp_path)
    lab.status = 503
    with pytest.raises(DataError, match="503"):
        fetch(lab.remote("none"), tmp_path, waits=(0,))
    assert len(lab.seen) == 4
    with pytest.raises(DataError, match="not an address to download from"):
        fetch(Remote("file:///etc/passwd", "a"), tmp_path)
    lab.redirects["/go"] = "file:///etc/passwd"
    with pytest.raises(DataError, match="is not allowed"):
        fetch(lab.remote("go"), tmp_path)


def test_credentials_stay_with_their_host(lab: Lab, tmp_path: Path) -> None:
    secret = {"Authorization": "Bearer hf_secret"}
    lab.redirects["/here"] = f"{lab.url}/a.bin"
    lab.redirects["/away"] = f"http://localhost:{lab.server.server_port}/a.bin"
    fetch(Remote(f"{lab.url}/here", "here", headers=secret), tmp_path)
    assert lab.seen[-1][1]["Authorization"] == "Bearer hf_secret"
    fetch(Remote(f"{lab.url}/away", "away", headers=secret), tmp_path)
    assert "Authorization" not in lab.seen[-1][1]
    assert "hf_secret" not in repr(Remote("http://x", "y", headers=secret))


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../../b", "C:/a", "a\\b", "", "a\0b"])
def test_paths_that_leave_the_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a path below"):
        safe_target(tmp_path, path)


def test_a_link_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/out").symlink_to(tmp_path)
    with pytest.raises(DataError, match="a link on the way"):
        safe_target(tmp_path / "data", "out/a")


def zipped(path: Path, *entries: tuple[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def tarred(path: Path, *entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, link
            archive.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    return path


def chained(path: Path) -> Path:
    """A link to the folder above, and a file behind it."""
    with tarfile.open(path, "w") as archive:
        for number, (name, target) in enumerate((("a", "."), ("a/b", ".."), ("c", "a/b/.."))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, target) if number != 2 else (tarfile.LNKTYPE, target)
            archive.addfile(info)
        info = tarfile.TarInfo("a/b/evil")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    return path


GOOD = (("a.txt", b"one"), ("images/b.txt", b"two"))


@pytest.mark.parametrize(("make", "name"), [(zipped, "x.zip"), (tarred, "x.tar"), (tarred, "x.tar.gz")])
def test_archives_are_unpacked(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive, told = make(tmp_path / name, *GOOD), []
    paths = extract(archive, tmp_path / "out", progress=told.append)
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == ["a.txt", "images/b.txt"]
    assert (tmp_path / "out/images/b.txt").read_bytes() == b"two"
    assert told == [3, 3]
    stamp = (tmp_path / "out/a.txt").stat().st_mtime_ns
    (tmp_path / "out/images/b.txt").write_bytes(b"t")  # an interrupted one
    extract(archive, tmp_path / "out")
    assert (tmp_path / "out/images/b.txt").read_bytes() == b"two"
    assert (tmp_path / "out/a.txt").stat().st_mtime_ns == stamp


ESCAPES: list[tuple[str, Callable[[Path], Path], str]] = [
    ("absolute", lambda p: zipped(p / "x.zip", *GOOD, ("/etc/x", b"")), "is an absolute path"),
    ("parent", lambda p: zipped(p / "x.zip", *GOOD, ("../x", b"")), "is a path with `..`"),
    ("inner parent", lambda p: tarred(p / "x.tar", *GOOD, ("a/../../x", b"")), "is a path with `..`"),
    ("backslash", lambda p: zipped(p / "x.zip", *GOOD, ("..\\x", b"")), "is a path with `..`"),
    ("drive", lambda p: zipped(p / "x.zip", *GOOD, ("C:/x", b"")), "is an absolute path"),
    ("zip link", lambda p: zipped(p / "x.zip", ("x", b"/etc/passwd"), mode=0o120777), "is a link or a device"),
    ("soft link", lambda p: tarred(p / "x.tar", ("x", b""), kind=tarfile.SYMTYPE, link="/etc"), "is a link"),
    ("hard link", lambda p: tarred(p / "x.tar", ("x", b""), kind=tarfile.LNKTYPE, link="../y"), "is a link"),
    ("device", lambda p: tarred(p / "x.tar", ("x", b""), kind=tarfile.CHRTYPE), "is a link or a device"),
    ("folder out", lambda p: tarred(p / "x.tar", ("../x", b""), kind=tarfile.DIRTYPE), "is a path with `..`"),
    ("link chain", lambda p: chained(p / "x.tar"), "is a link or a device"),
    ("fifo", lambda p: tarred(p / "x.tar", ("x", b""), kind=tarfile.FIFOTYPE), "is a link or a device"),
    ("backslash inside", lambda p: zipped(p / "x.zip", *GOOD, ("images\\c.txt", b"")), "not a path below"),
    ("backslash root", lambda p: zipped(p / "x.zip", *GOOD, ("\\windows\\x", b"")), "is an absolute path"),
    ("tar drive", lambda p: tarred(p / "x.tar", *GOOD, ("c:\\x", b"")), "is an absolute path"),
    ("zip device", lambda p: zipped(p / "x.zip", ("x", b""), mode=0o020666), "is a link or a device"),
    ("file and folder", lambda p: zipped(p / "x.zip", ("a/b", b"1"), ("a", b"2")), "is a file and a folder at once"),
    ("folder and file", lambda p: tarred(p / "x.tar", ("a", b"1"), ("a/b", b"2")), "is a file and a folder at once"),
    ("twice", lambda p: tarred(p / "x.tar", *GOOD, ("./a.txt", b"")), "is a second entry of this path"),
]


@pytest.mark.parametrize(("make", "part"), [case[1:] for case in ESCAPES], ids=[case[0] for case in ESCAPES])
def test_archives_that_try_to_escape_write_nothing(make: Callable, part: str, tmp_path: Path) -> None:
    archive = make(tmp_path)
    with pytest.raises(DataError) as caught:
        extract(archive, tmp_path / "in" / "out")
    assert part in str(caught.value)
    assert "nothing was unpacked" in str(caught.value)
    assert sorted(item.name for item in tmp_path.iterdir()) == [archive.name]


def broken_stream(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 40)
    data = bytearray(path.read_bytes())
    data[40:60] = b"\xff" * 20
    path.write_bytes(data)


def rewritten(path: Path, find: bytes, replace: bytes) -> Path:
    data = path.read_bytes()
    assert find in data
    path.write_bytes(data.replace(find, replace))
    return path


def test_archives_that_lie_about_sizes_or_want_a_password(tmp_path: Path) -> None:
    path = zipped(tmp_path / "huge.zip", ("a", b"x" * 1000))
    rewritten(path, (1000).to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little"))  # sizes stored and unfolded
    with pytest.raises(DataError, match="more than"):
        extract(path, tmp_path / "out", most_bytes=10**9)
    assert not (tmp_path / "out").exists()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(5_000_000))
    with pytest.raises(DataError, match="1,000,000 bytes"):
        extract(tmp_path / "bomb.zip", tmp_path / "out", most_bytes=10**6)
    rewritten(tmp_path / "bomb.zip", (5_000_000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    with pytest.raises(DataError, match="the archive is damaged"):  # no more than the 50 bytes is written on the way
        extract(tmp_path / "bomb.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    locked = zipped(tmp_path / "locked.zip", ("secret-entry", b"x"))
    data = bytearray(locked.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be unpacked here.*password"):
        extract(locked, tmp_path / "out")


def test_damaged_and_endless_archives(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", ("a", os.urandom(2000)))
    with pytest.raises(DataError, match="more than 5 files or 100 bytes"):
        extract(archive, tmp_path / "out", most_files=5, most_bytes=100)
    data = bytearray(archive.read_bytes())
    data[500] ^= 255
    archive.write_bytes(data)
    with pytest.raises(DataError, match="the archive is damaged"):
        extract(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "y.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="not an archive"):
        extract(tmp_path / "y.zip", tmp_path / "out")
    broken_stream(tmp_path / "z.zip")
    with pytest.raises(DataError, match="the archive is damaged"):
        extract(tmp_path / "z.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    tar = tarred(tmp_path / "x.tar.gz", ("a", os.urandom(3000)))
    tar.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(DataError, match="the archive is damaged"):
        extract(tar, tmp_path / "out")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a data script as if it had been started from its folder."""
    folder = Path(__file__).parents[2] / "data_scripts"

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr(sys, "path", list(sys.path))
    load("_fetch")
    return load


def hub(lab: Lab, files: dict[str, bytes]) -> None:
    """Makes the server answer as a Hub data set with these files."""
    tree = [
        {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
        | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}}
        for path, data in files.items()
    ]
    lab.files["/api/datasets/HaiyangGuo/UCIT/tree/main"] = json.dumps(tree).encode()
    lab.files |= {f"/datasets/HaiyangGuo/UCIT/resolve/main/{path}": data for path, data in files.items()}


def test_a_data_script_shows_first_and_fetches_on_demand(
    lab: Lab, scripts: Any, public_streams: Any, tmp_path: Path, capsys: Any
) -> None:
    made = tmp_path / "made"
    public_streams.MAKERS["ucit"](made)
    files = {f"UCIT/{path.relative_to(made)}": path.read_bytes() for path in sorted(made.rglob("*.json"))}
    packed = zipped(
        tmp_path / "images.zip",
        *((str(path.relative_to(made / "datasets")), path.read_bytes()) for path in sorted(made.rglob("*.png"))),
    )
    hub(lab, files | {"UCIT/images.zip": packed.read_bytes()})
    script = scripts("ucit")
    plan = script.Plan(UCIT, script.PLAN.parts, script.PLAN.by_hand, endpoint=lab.url)
    out = tmp_path / "ucit"

    assert script.run(plan, ["--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "CC BY-NC-SA 4.0" in shown
    assert "HaiyangGuo/UCIT" in shown
    assert f"{len(files)}" in shown
    assert "Nothing was fetched" in shown
    assert not out.exists()

    assert script.run(plan, ["--yes", "--out", str(out), "--only", "instructions"]) == 0
    assert not (out / "datasets").exists()
    assert script.run(plan, ["--yes", "--out", str(out)]) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == {
        str(path.relative_to(made)) for path in made.rglob("*.png")
    }
    assert validate_stream(load_stream("ucit", root=out)).errors == []
    assert script.run(plan, ["--only", "nothing"]) == 2
    assert "one of: instructions, archives" in capsys.readouterr().err


def test_a_data_script_fails_when_files_are_missing(lab: Lab, scripts: Any, tmp_path: Path, capsys: Any) -> None:
    hub(lab, {"UCIT/ArxivQA/train_4w.json": b"[]"})
    script = scripts("ucit")
    plan = script.Plan(UCIT, script.PLAN.parts[:1], ("ask somebody",), endpoint=lab.url)
    assert script.run(plan, ["--yes", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().out
    assert "still missing: ImageNet-R/train.json" in shown
    assert "by hand: ask somebody" in shown
    lab.files.clear()
    assert script.run(plan, ["--out", str(tmp_path / "out")]) == 2
    assert "the files on the Hub cannot be listed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "data_scripts").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_every_script_has_a_plan_for_its_family(path: Path, scripts: Any) -> None:
    if path.stem == "build_tiny_llava":
        return
    module = scripts(path.stem)
    plans = [value for value in vars(module).values() if isinstance(value, module.Plan)]
    assert plans
    for plan in plans:
        assert plan.family.script.split()[0] == f"data_scripts/{path.name}"
        assert plan.parts or plan.by_hand
        for part in plan.parts:
            assert part.hub or part.remotes
            for remote in part.remotes:
                safe_target(Path("data"), remote.path)


def test_trace_is_unpacked_from_an_archive_put_by_hand(scripts: Any, public_streams: Any, tmp_path: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    public_streams.MAKERS["trace"](made)
    out.mkdir()
    entries = [
        (f"LLM-CL_Benchmark/{path.relative_to(made)}", path.read_bytes()) for path in sorted(made.rglob("*.json"))
    ]
    zipped(out / "LLM-CL_Benchmark.zip", *entries)
    script = scripts("trace_text")
    assert script.run(script.PLAN, ["--yes", "--out", str(out)]) == 0
    assert script.run(script.PLAN, ["--yes", "--out", str(tmp_path / "empty")]) == 2
