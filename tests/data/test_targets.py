"""Reference targets on disk: what goes in comes out, row by row, whoever wrote which part."""

from __future__ import annotations

import pickle

import pytest
import torch

from mllm_cl.data.targets import Targets, part_path, write_part
from mllm_cl.errors import RunError


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_come_back_in_order(tmp_path, parts):
    rows = [{"values": torch.randn(n, 4), "ids": torch.arange(n * 4).reshape(n, 4)} for n in (3, 1, 2, 5, 4)]
    texts = ["eins", "", 'zwei "2"', "drei", "äöü"]
    paths = [part_path(tmp_path, "key", part, parts) for part in range(parts)]
    for part, path in enumerate(paths):
        write_part(path, texts[part::parts], rows[part::parts])
    targets = Targets(paths)
    assert targets.texts == texts
    assert len(targets) == 5
    for index in (4, 0, 2, 1, 3):
        assert all(torch.equal(targets[index][name], rows[index][name]) for name in rows[index])


def test_texts_alone_and_nothing_at_all(tmp_path):
    write_part(tmp_path / "a.safetensors", ["x", "y"], [{}, {}])
    write_part(tmp_path / "b.safetensors", [], [])
    assert Targets([tmp_path / "a.safetensors"]).texts == ["x", "y"]
    assert Targets([tmp_path / "a.safetensors"])[1] == {}
    assert len(Targets([tmp_path / "b.safetensors"])) == 0


def test_worker_processes_open_the_files_themselves(tmp_path):
    write_part(tmp_path / "a.safetensors", ["x"], [{"hidden": torch.ones(2, 3)}])
    again = pickle.loads(pickle.dumps(Targets([tmp_path / "a.safetensors"])))
    assert torch.equal(again[0]["hidden"], torch.ones(2, 3))


def test_a_failed_write_is_explained_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        write_part(tmp_path / "file" / "a.safetensors", ["x"], [{"hidden": torch.ones(1, 1)}])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
