"""`mllm-cl consolidate`: against dense NumPy, on folders that PEFT itself wrote, loaded back by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

Call = Callable[..., Any]


class Net(nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 8, bias=False), nn.Linear(8, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: getattr(model, name).weight.detach().double().numpy().copy() for name in ("q_proj", "v_proj")}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """Returns a function that lets PEFT write a LoRA folder; -> folder, dense update of each matrix."""

    def make(name: str, seed: int, **settings: Any) -> tuple[Path, dict[str, np.ndarray]]:
        torch.manual_seed(0)
        net = Net()
        before = weights(net)
        config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(net, config)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        model.save_pretrained(str(tmp_path / name))
        merged = weights(model.merge_and_unload())
        return tmp_path / name, {key: merged[key] - before[key] for key in before}

    return make


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """The update that plain PEFT makes of a folder."""
    torch.manual_seed(0)
    net = Net()
    before = weights(net)
    merged = weights(PeftModel.from_pretrained(net, str(folder)).merge_and_unload())  # type: ignore[arg-type]
    return {key: merged[key] - before[key] for key in before}


def power_up(update: np.ndarray, strength: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    scaled = s * (s / s[0])
    return (u * (scaled * strength * np.linalg.norm(s) / np.linalg.norm(scaled))) @ vt


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_updates_are_scaled_and_added_in_turn(settings, make_folder, call: Call, tmp_path):
    (one, first), (two, second) = make_folder("one", 1, **settings), make_folder("two", 2)
    options = ("--rate", "power_up", "--strength", 0.8, "--schedule", "inverse")
    done = call("consolidate", one, two, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    shares = [0.8, 0.8 / 2]
    for name, update in loaded(tmp_path / "out").items():
        expected = power_up(first[name], shares[0]) + power_up(second[name], shares[1])
        assert np.allclose(update, expected, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 6


def test_what_was_trained_on_counts_by_its_difference(make_folder, call: Call, tmp_path):
    (one, first), (two, second) = make_folder("one", 1), make_folder("two", 2)
    options = ("--rate", "uniform", "--strength", 0.5, "--continued")
    assert call("consolidate", one, two, *options, "--out", tmp_path / "out").code == 0
    for name, update in loaded(tmp_path / "out").items():
        assert np.allclose(update, 0.5 * first[name] + 0.5 * (second[name] - first[name]), atol=1e-5)


def test_merges_and_options(make_folder, call: Call, tmp_path):
    (one, first), (two, second) = make_folder("one", 1), make_folder("two", 2)
    options = ("--merge", "task_arithmetic", "--option", "scale=0.25", "--max_rank", 2)
    done = call("consolidate", one, two, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    for name, update in loaded(tmp_path / "out").items():
        u, s, vt = np.linalg.svd(0.25 * (first[name] + second[name]))
        assert np.allclose(update, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    assert "rank 2" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "missing"], "missing: not an adapter folder"),
        (["one", "stage"], "stage/adapter."),
        (["one", "dora"], "weight-decomposed (DoRA)"),
        (["one", "narrow"], "is not on the same matrices"),
        (["one", "other-base"], "other-base: belongs to somebody/else"),
        (["one", "--rate", "power_upp"], "power_up"),
        (["one", "--merge", "tiess"], "ties"),
        (["one", "--option", "gamma"], "expected name=number"),
        (["one", "--rate", "power_up", "--option", "gamme=2"], "gamma"),
        (["one", "--strength", "-1"], "strength"),
        (["one", "--schedule", "sometimes"], "inverse"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained_and_write_nothing(arguments, message, make_folder, call: Call, tmp_path):
    make_folder("one", 1)
    make_folder("stage/adapter", 2)
    make_folder("dora", 1, use_dora=True)
    make_folder("narrow", 1, target_modules=["q_proj"])
    folder, _ = make_folder("other-base", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    named = {"one", "missing", "stage", "dora", "narrow", "other-base"}
    done = call("consolidate", *(tmp_path / a if a in named else a for a in arguments), "--out", tmp_path / "out")
    assert done.code == 2, done.out + done.trace
    assert message in done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("r", "3"), ("r", -1), ("lora_alpha", None), ("lora_alpha", 1e400), ("rank_pattern", [1])],
)
def test_settings_that_give_no_scaling_are_explained(field, value, make_folder, call: Call, tmp_path):
    folder, _ = make_folder("one", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    done = call("consolidate", folder, "--out", tmp_path / "out")
    assert done.code == 2, done.out + done.trace
    assert "save" in done.err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(make_folder, call: Call, tmp_path):
    one, _ = make_folder("one", 1)
    (tmp_path / "out").mkdir()
    done = call("consolidate", one, "--out", tmp_path / "out")
    assert done.code == 2
    assert "exists already" in done.err
