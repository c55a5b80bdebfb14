"""AIDE, MIPD and InterHand2.6M: frames, boxes, sensors and joints by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_cl.data.builders.aide import FRAMES, box_of, label_of
from mllm_cl.data.builders.interhand import angle_at, bend_of, gesture_of
from mllm_cl.data.builders.mipd import Sensors
from mllm_cl.data.builders.mipd_sensors import (
    LIGHT_BOUNDS,
    VIBRATION_BOUNDS,
    level,
    read_labels,
    read_series,
)
from mllm_cl.data.images import load_image
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import message_text
from mllm_cl.errors import DataError
from mllm_cl.streams import Stream, load_stream

FolderOf = Callable[[str], Path]


def load(name: str, root: Path, **options: Any) -> Stream:
    return load_stream(name, root=root, options=options)


def question(row: Any) -> str:
    return message_text(row["messages"][0])


def answers(rows: Any) -> list[str]:
    return [row["answers"][0] for row in rows]


# AIDE ----------------------------------------------------------------------------------------------------------------


def test_the_sixteen_official_frames() -> None:
    assert FRAMES == (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44)


def test_labels_are_repaired_and_unknown_ones_refused(public_folder: FolderOf) -> None:
    stream = load("aide", public_folder("aide"))
    assert answers(stream["vbr"].train)[1] == "Forward Moving"
    assert answers(stream["der"].train)[1] == "Anxiety"
    with pytest.raises(RowError, match="`emotion_label` is 'Bored'"):
        label_of({"emotion_label": "Bored"}, "der")
    with pytest.raises(RowError, match="no text `emotion_label`"):
        label_of({}, "der")


def test_boxes_too_small_for_use_are_none() -> None:
    def content(face: list[float], body: list[float]) -> dict[str, Any]:
        return {
            "pose_list": [{"imgname": f"{n}.jpg", "result": [{"face_bbox": face, "bbox": body}]} for n in range(45)]
        }

    good = content([1, 2, 10, 10], [0, 0, 10, 20])
    assert box_of(good, "face", 0) == (1, 2, 11, 12)
    assert box_of(good, "body", 44) == (0, 0, 10, 20)
    assert box_of(content([1, 2, 9, 10], []), "face", 0) is None
    assert box_of(content([], [0, 0, 10, 19]), "body", 0) is None
    with pytest.raises(RowError, match="`pose_list` has 44 entries"):
        box_of({"pose_list": good["pose_list"][:44]}, "face", 44)


@pytest.mark.parametrize(
    ("options", "count", "sizes"),
    [
        ({}, 3, {(64, 36)}),
        ({"views": ["front", "left", "right", "inside"], "layout": "grid"}, 1, {(128, 72)}),
        ({"frames": 4, "views": ["inside"], "layout": "strip"}, 1, {(256, 36)}),
        ({"frames": 4, "views": ["front", "left"]}, 8, {(64, 36)}),
    ],
)
def test_views_frames_and_layouts(options: dict, count: int, sizes: set, public_folder: FolderOf) -> None:
    row = load("aide", public_folder("aide"), **options)["tcr"].test[0]
    assert len(row["images"]) == count == sum(block["type"] == "image" for block in row["messages"][0]["content"])
    assert {load_image(image).size for image in row["images"]} == sizes


def test_frames_are_taken_evenly_and_in_numeric_order(public_folder: FolderOf) -> None:
    row = load("aide", public_folder("aide"), frames=4, views=["front"])["tcr"].train[0]
    assert [Path(image).stem for image in row["images"]] == ["5", "17", "29", "41"]


def test_letters_name_the_shuffled_class(public_folder: FolderOf) -> None:
    stream = load("aide", public_folder("aide"), answers="letter")
    again = load("aide", public_folder("aide"), answers="letter")
    for row, other in zip(stream["dbr"].train, again["dbr"].train):
        assert question(row) == question(other)
        letter = row["answers"][0]
        assert f"{letter}. {row['label']}\n" in question(row)
        assert row["choices"]["ABCDEFG".index(letter)] == row["label"]


def test_aide_mistakes(public_folder: FolderOf, tmp_path: Path) -> None:
    root = Path(shutil.copytree(public_folder("aide"), tmp_path / "aide"))
    path = root / "AIDE_Dataset/annotation/0001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "emotion_label": "Bored"}))
    with pytest.raises(RowError) as caught:
        load("aide", root)["der"].train[0]
    assert f"{root / 'AIDE_Dataset/annotation/0001.json'}, clip 1" in str(caught.value)
    (root / "training.csv").write_text("clip,file\n")
    with pytest.raises(DataError, match="the header is clip,file"):
        load("aide", root, frames=2)
    with pytest.raises(DataError, match=r"stream.options.frames: 3 given"):
        load("aide", root, frames=3)


# MIPD ----------------------------------------------------------------------------------------------------------------


def test_label_lines_of_15_16_and_17_fields(public_folder: FolderOf, tmp_path: Path) -> None:
    root = public_folder("mipd") / "training/label_2"
    for number in range(3):
        car, person = read_labels(root / f"{number:06d}.txt")[:2]
        assert (car.kind, car.box, car.x, car.z) == ("Car", (10, 10, 40, 40), -3.0, 12.0)
        assert person.distance == pytest.approx((2**2 + 8**2) ** 0.5)
    for line, part in (("Car 1 2", "3 fields"), ("Car " + "x " * 14, "could not convert")):
        (tmp_path / "a.txt").write_text(line)
        with pytest.raises(DataError, match=part):
            read_labels(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("bounds", "values"),
    [(LIGHT_BOUNDS, {199.9: 1, 200: 2, 30_000: 2, 30_001: 3}), (VIBRATION_BOUNDS, {24: 1, 25: 2, 100: 2, 101: 3})],
)
def test_levels_at_their_bounds(bounds: tuple[float, float], values: dict[float, int]) -> None:
    assert {value: level(value, bounds) for value in values} == values


def test_series_pass_midnight_and_grow_old(tmp_path: Path) -> None:
    path = tmp_path / "light.csv"
    path.write_text("t,v\n23:59:58,1\n23:59:59.5,2\n00:00:01,3\n")
    series = read_series(path, "t", "v")
    midnight = 86_400.0
    assert series.times == (midnight - 2, midnight - 0.5, midnight + 1)
    assert [series.latest(midnight + t, 2.0) for t in (-3, -2, 0, 1, 3, 3.1)] == [None, 1, 2, 3, 3, None]
    for text, part in (
        ("t,v\nnoon,1\n", "'noon' is no time"),
        ("t,v\n12:00:00,x\n", "no number"),
        ("a,b\n", "no column"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=part):
            read_series(path, "t", "v")
    path.write_text("t,v,d\n12:00:00,1,aa:bb\n")
    with pytest.raises(DataError, match="unknown device 'aa:bb'"):
        read_series(path, "t", "v", "d")


def test_sensor_answers_and_what_is_written_beside_the_image(public_folder: FolderOf) -> None:
    stream = load("mipd", public_folder("mipd"))
    assert answers(stream["light"].train) == ["dark", "medium", "medium"]
    assert [row["messages"][-1]["content"][0]["text"] for row in stream["road"].train] == [
        "smooth",
        "rough",
        "speed bump",
    ]
    assert question(stream["light"].train[0]).startswith("Sensors: light 150 lux; vibration um FL 5 FR 6 RL 7 RR 8.\n")
    assert question(stream["road"].train[1]).startswith("Sensors: light 200 lux; vibration um FL 30.\n")
    assert question(stream["count"].test[1]).startswith("Sensors: light unknown; vibration um unknown.\n")
    assert Sensors().text() == "Sensors: light unknown; vibration um unknown."
    for task in ("light", "road"):  # a value may be shown, its level may not
        shown = {question(row).split("\n")[0] for row in stream[task].train}
        assert not any(
            word in text for text in shown for word in ("dark", "medium", "bright", "smooth", "rough", "bump")
        )
    blind = load("mipd", public_folder("mipd"), sensors="none")
    assert question(blind["light"].train[0]).startswith("Sensors: light unknown; vibration um unknown.\n")
    assert answers(blind["light"].train) == answers(stream["light"].train)


def test_label_answers(public_folder: FolderOf) -> None:
    stream = load("mipd", public_folder("mipd"))
    assert set(answers(stream["nearest"].train)) == {"Pedestrian"}
    for row in [*stream["count"].train, *stream["count"].test]:
        assert row["answers"] == ["1"]  # the hidden car does not count
    for row in [*stream["side"].train, *stream["side"].test]:
        kind, side = question(row).split("Is there a ")[1].split("?")[0].split(" on the ")
        assert row["answers"] == ["yes" if (kind, side) in (("Car", "left"), ("Pedestrian", "right")) else "no"]


def test_dropped_sensors_change_what_is_shown_not_the_answer(public_folder: FolderOf) -> None:
    shown = load("mipd", public_folder("mipd"), sensor_dropout=1.0)["light"]
    assert {question(row).split("\n")[0] for row in shown.train} == {Sensors().text()}
    assert "70000 lux" in question(shown.test[0])


def test_mipd_columns_can_be_renamed(public_folder: FolderOf, tmp_path: Path) -> None:
    root = Path(shutil.copytree(public_folder("mipd"), tmp_path / "mipd"))
    path = root / "training/sensors/light.csv"
    path.write_text(path.read_text().replace("Illuminance value", "lux"))
    with pytest.raises(DataError, match="no column 'Illuminance value'; there are: Collection time, lux"):
        load("mipd", root)
    assert len(load("mipd", root, columns={"light": "lux"})["light"].train) == 3
    with pytest.raises(DataError, match=r"stream.options.columns: 'lights' given"):
        load("mipd", root, columns={"lights": "lux"})
    (root / "training/sensors/times.csv").unlink()
    with pytest.raises(DataError, match="the times of the frames do not exist"):
        load("mipd", root, columns={"light": "lux"}, window=0.3)


# InterHand2.6M -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("angle", "name"),
    [
        (104.9, "bent completely inward"), (105.0, "bent inward"), (149.9, "bent inward"),
        (150.0, "slightly bent inward"), (169.9, "slightly bent inward"), (170.0, "straight"), (np.nan, None),
    ],
)  # fmt: skip
def test_bends_at_their_bounds(angle: float, name: str | None) -> None:
    assert bend_of(angle) == name


def test_angles() -> None:
    x, o, y = np.array([1.0, 0, 0]), np.zeros(3), np.array([0, 2.0, 0])
    assert angle_at(x, o, y) == pytest.approx(90)
    assert angle_at(x, o, -3 * x) == pytest.approx(180)
    assert np.isnan(angle_at(x * np.nan, o, y))


def test_gestures_come_from_sequence_names() -> None:
    names = (
        "0007_thumbup_normal",
        "0007_thumbup_rigid",
        "0115_rocker_backside",
        "0266_dh_pray",
        "ROM01_No_Interaction",
    )
    assert [gesture_of(name) for name in names] == ["thumbup", "thumbup", "rocker", None, None]


def test_hands_by_hand(public_folder: FolderOf) -> None:
    stream = load("interhand", public_folder("interhand"), crop=False)
    assert answers(stream["handedness"].train) == ["right", "right", "left", "left", "both", "both", "both", "both"]
    assert answers(stream["bend"].train).count("bent inward") == 1
    by_id = {row["id"]: row["answers"][0] for row in stream["touch"].train}
    assert [by_id[name] for name in sorted(by_id)] == [
        "yes",
        "no",
        "no",
    ]  # image 2 has the hands together; 7 has no wrist
    assert set(answers(stream["relation"].train)) == {"right"}  # at 500 mm, the left one at 560 mm
    assert stream["gesture"].train[0]["images"] == [
        str(public_folder("interhand") / "images/train/Capture0/0007_thumbup_normal/cam400262/image0000.jpg")
    ]


def test_interhand_options_and_mistakes(public_folder: FolderOf, tmp_path: Path) -> None:
    root = Path(shutil.copytree(public_folder("interhand"), tmp_path / "hands"))
    only = load("interhand", root, tasks=["touch"], per_sequence=1)
    assert [task.name for task in only] == ["touch"]
    assert len(only["touch"].train) == 2
    with pytest.raises(DataError, match="tasks: 'pose' given"):
        load("interhand", root, tasks=["pose"])
    with pytest.raises(DataError, match="at least 1"):
        load("interhand", root, per_sequence=0)
    path = root / "annotations/val/InterHand2.6M_val_joint_3d.json"
    joints = json.loads(path.read_text())
    joints["0"]["3"]["world_coord"] = joints["0"]["3"]["world_coord"][:41]
    path.write_text(json.dumps(joints))
    with pytest.raises(DataError, match=r"do not fit together \(ValueError: joints \(41, 3\)"):
        load("interhand", root, per_sequence=8)
