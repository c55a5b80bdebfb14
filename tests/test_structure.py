"""The shape of the package: who imports whom, how long files are, and that the README shows the real tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mllm_cl"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "parse", "recipe", "model_section", "files"}
EVERYTHING = {
    *BASE, "spectral", "models", "data", "streams", "methods", "evaluation", "training", "reporting", "hub",
}  # fmt: skip
MAY_IMPORT = {
    "errors": set(),
    "parse": set(),
    "files": {"errors", "parse"},
    "model_section": {"errors"},
    "recipe": {"errors", "parse", "model_section"},
    "spectral": {"errors"},
    "models": BASE | {"spectral"},
    "data": BASE,
    "streams": BASE | {"data"},
    "evaluation": BASE | {"spectral", "models", "data", "streams"},
    "methods": BASE | {"spectral", "models", "data", "streams"},
    "training": BASE | {"spectral", "models", "data", "streams", "methods", "evaluation"},
    "reporting": BASE | {"evaluation"},
    "hub": BASE | {"evaluation", "reporting"},
    "cli": EVERYTHING,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions."""
    rooms = set()
    package = ["mllm_cl", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "mllm_cl" else [module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mllm_cl.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert imported_rooms(path) <= MAY_IMPORT[room] | {room}


def test_the_import_check_sees_an_upward_import(tmp_path: Path) -> None:
    path = PACKAGE / "data" / "rows.py"
    assert "training" not in imported_rooms(path)
    loop = imported_rooms(PACKAGE / "training" / "loop.py")
    assert {"evaluation", "methods", "streams"} <= loop
    assert not loop <= MAY_IMPORT["data"]


def test_spectral_needs_only_torch() -> None:
    for path in (PACKAGE / "spectral").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in {*sys.stdlib_module_names, "torch", "mllm_cl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (250 if room_of(path) == "methods" else 400)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, mllm_cl; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def tree_of_readme() -> list[str]:
    """Paths in the README's tree block, folders with a trailing slash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no tree block"
    paths, stack = [], []
    for line in block.group(1).splitlines()[1:]:
        match = re.match(r"^([│ ]*)[├└]── (\S+)", line)
        assert match, f"not a line of a tree: {line!r}"
        depth = len(match.group(1)) // 4
        stack = [*stack[:depth], match.group(2)]
        paths.append("".join(stack))
    return paths


def test_the_readme_shows_the_tree() -> None:
    shown = set(tree_of_readme())
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "mllm_cl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    modules = {
        path.removeprefix("mllm_cl/")
        for path in tracked
        if path.endswith(".py") and (ROOT / path).exists() and not path.endswith("__init__.py")
    }
    missing = sorted(path for path in modules if path not in shown)
    assert not missing, f"not in the README's tree: {missing}"
    gone = sorted(path for path in shown if not (PACKAGE / path).exists())
    assert not gone, f"in the README's tree but not on disk: {gone}"


def test_no_pickle_and_no_remote_code() -> None:
    for path in [*FILES, *(ROOT / "recipes").rglob("*.py"), *(ROOT / "data_scripts").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for forbidden in ("torch.load(", "torch.save(", "import pickle", "allow_pickle=True", "trust_remote_code=True"):
            assert forbidden not in text, f"{path}: {forbidden}"


def test_texts_are_parsed_in_one_place() -> None:
    for path in FILES:
        if path != PACKAGE / "parse.py":
            text = path.read_text(encoding="utf-8")
            for other in ("json.load(", "json.loads(", "yaml.load(", "yaml.safe_load("):
                assert other not in text, f"{path}: {other} ends in a RecursionError for brackets without end"


def test_no_large_files() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, tracked):
        path = ROOT / name.decode()
        assert not path.exists() or path.stat().st_size <= 4 * 2**20, path
