"""The room itself: examples in docstrings, what it imports, what it exports."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import mllm_cl.spectral

FOLDER = Path(mllm_cl.spectral.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
LIBRARY = {"torch", "__future__", "collections", "dataclasses", "inspect", "logging", "math", "re"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    # import_module: `mllm_cl.spectral.consolidate` as an attribute is the function of that name
    outcome = doctest.testmod(importlib.import_module(f"mllm_cl.spectral.{name}"))
    assert outcome.failed == 0
    assert name.startswith("_") or outcome.attempted > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_imports_torch_and_errors_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= LIBRARY
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            assert node.module.split(".")[0] in LIBRARY
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            assert node.module == "errors"


def test_everything_exported_exists():
    for name in mllm_cl.spectral.__all__:
        assert getattr(mllm_cl.spectral, name) is not None
