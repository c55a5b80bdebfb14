"""Writing files: complete or not at all, and a message that says what to do."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mllm_cl.errors import RunError
from mllm_cl.files import (
    explained,
    folder_bytes,
    folder_sha256,
    new_folder,
    publish,
    remove,
    remove_unfinished,
    write_json,
    write_text,
)


@pytest.fixture
def failing(monkeypatch):
    """Returns a function after which nothing can be renamed any more."""

    def fail(number: int) -> None:
        def replace(source: str, target: str) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "replace", replace)

    return fail


def test_text_and_json(tmp_path):
    write_text(tmp_path / "deep/er/file.txt", "ä\n")
    assert (tmp_path / "deep/er/file.txt").read_bytes() == "ä\n".encode()
    write_json(tmp_path / "file.json", {"ä": [1.5, None]})
    assert json.loads((tmp_path / "file.json").read_text()) == {"ä": [1.5, None]}
    assert "ä" in (tmp_path / "file.json").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", float("nan"))
    assert json.loads((tmp_path / "file.json").read_text()) == {"ä": [1.5, None]}


@pytest.mark.parametrize(
    ("number", "message", "fix"),
    [
        (errno.ENOSPC, "the disk is full", "start the same command again"),
        (errno.EDQUOT, "the disk is full", "free some space"),
        (errno.EACCES, "not writable", "choose another output_dir"),
        (errno.EROFS, "not writable", "choose another output_dir"),
        (errno.EIO, "cannot be written", "check the file system"),
    ],
)
def test_a_failed_write_keeps_what_was_there(number, message, fix, tmp_path, failing):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with new_folder(tmp_path / "folder") as place:
        (place / "file").write_text("old")
    failing(number)
    with pytest.raises(RunError, match=message) as caught:
        write_text(path, "new")
    assert fix in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(RunError, match=message), new_folder(tmp_path / "folder") as place:
        (place / "file").write_text("new")
    assert path.read_text() == "old"
    assert (tmp_path / "folder/file").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_full_disk_under_safetensors():
    """Its errors are no `OSError`."""
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(RunError, match="the disk is full"), explained("x"):
        raise SafetensorError(message)
    with pytest.raises(RunError, match="cannot be written"), explained("x"):
        raise SafetensorError("something else")


def test_safetensors_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="cannot be written"), explained("x"):
        save_file({"a": torch.zeros(1)}, tmp_path / "none/file.safetensors")


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "folder"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with new_folder(tmp_path / "folder") as place:
            (place / content).write_text(content)
            assert place.parent == tmp_path
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_at_no_moment_is_half_a_folder_there(tmp_path, monkeypatch):
    """Whoever looks finds the old folder, none, or the whole new one; also when another was left over by a kill."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").write_text("")
    (tmp_path / "folder.old.partial").mkdir()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/new").write_text("")
    seen = []
    for name in ("replace", "unlink", "rmdir", "fsync"):
        original = getattr(os, name)

        def look(*args, _original=original, **kwargs):
            seen.append(sorted(path.name for path in (tmp_path / "folder").glob("*")))
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, name, look)
    publish(tmp_path / "new.partial", tmp_path / "folder")
    assert {tuple(names) for names in seen} == {("old",), (), ("new",)}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_leftovers(tmp_path):
    (tmp_path / "a/checkpoint-3.partial/deep.partial").mkdir(parents=True)
    (tmp_path / "a/matrix.json.partial").write_text("{")
    (tmp_path / "a/kept").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    remove(tmp_path / "a")
    remove(tmp_path / "a")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    remove(tmp_path / "link")
    assert (tmp_path / "target").is_dir()


def test_what_a_folder_holds(tmp_path):
    def fill(folder: Path) -> Path:
        (folder / "sub").mkdir(parents=True)
        (folder / "a").write_text("12")
        (folder / "sub/b").write_text("345")
        return folder

    one, two = fill(tmp_path / "one"), fill(tmp_path / "two")
    assert folder_bytes(one) == 5
    assert folder_sha256(one) == folder_sha256(two)
    (two / "sub/b").rename(two / "sub/c")
    assert folder_sha256(one) != folder_sha256(two)
