"""MIPD (ParallelBody): a road camera with light and vibration sensors as text. EXPERIMENTAL.

* Paper: Wang et al. (arXiv 2411.05881; IEEE T-ITS 2025); repository `BUCT-IUSRC/Dataset__MIPD`. 126 sequences, about
  8,500 annotated frames.
* Tasks, all ours: count, nearest, side (from the labels), light, road (from the sensors, given as text beside the frame).
* Row: one frame and one line of sensor values, `unknown` where a sensor is missing or too old; closed answers.

Not recoverable: licence, split sizes, file names and columns of the scalar sensors (options `light`, `vibration`,
`times`, `columns`; the defaults are our assumption), speed and sound formats (not read), any weather label (there is
none). The level's number is never written beside a question about that level: raw values only.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.family import Family, Files, check_option, question_row
from mllm_cl.data.builders.mipd_sensors import (
    LIGHT_BOUNDS,
    VIBRATION_BOUNDS,
    RoadUser,
    Series,
    level,
    read_labels,
    read_series,
    seconds_of,
)
from mllm_cl.data.rows import Origin, Row, Rows
from mllm_cl.errors import DataError

COLUMNS = {
    "light time": "Collection time",
    "light": "Illuminance value",
    "vibration time": "time",
    "vibration device": "Equipment Name",
    "vibration": "Z-axis vibration displacement (um)",
    "frame": "frame",
    "frame time": "time",
}
TASKS = ("count", "nearest", "side", "light", "road")
_ABOUT = {
    "count": "how many road users of a class",
    "nearest": "class of the nearest road user",
    "side": "is there one on that side",
    "light": "how bright it is, from the sensor",
    "road": "speed bump, rough or smooth, from the sensors",
}
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_LIGHT, _ROAD = ("dark", "medium", "bright"), ("smooth", "rough", "speed bump")

FAMILY = Family(
    name="mipd",
    title="MIPD (experimental)",
    link="https://github.com/BUCT-IUSRC/Dataset__MIPD",
    licence="not stated where we could read it; ask the authors",
    citation="MIPD: A Multi-sensory Interactive Perception Dataset for Embodied Intelligent Driving, arXiv 2411.05881",
    layout="""
  ImageSets/train.txt val.txt test.txt                  one frame id a line
  training/image_2/000000.png (or image/)  training/label_2/000000.txt (or label/)
  training/sensors/times.csv light.csv vibration.csv    names and columns are our assumption (options)
""",
    script="data_scripts/mipd.py",
    gaps=(
        "experimental: the layout of the scalar sensors is not published, ours is a guess that options can change",
        "level bounds are ambiguous in the readme: 1 < 200 <= 2 <= 30,000 < 3 lux, 1 < 25 <= 2 <= 100 < 3 micrometres here",
        "no weather label exists; speed and sound have no published format and are not read",
    ),
    files=tuple(Files(f"ImageSets/{name}.txt") for name in _SPLITS.values()),
)


@dataclass(frozen=True)
class Sensors:
    """The scalar values of one moment; `None` or a missing wheel means unknown."""

    light: float | None = None
    vibration: Mapping[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """Returns the line beside the image, in fixed order and with units."""
        light = "unknown" if self.light is None else f"{self.light:.0f} lux"
        wheels = " ".join(
            f"{wheel} {self.vibration[wheel]:.0f}" for wheel in ("FL", "FR", "RL", "RR") if wheel in self.vibration
        )
        return f"Sensors: light {light}; vibration um {wheels or 'unknown'}."


def build(
    root: str | Path | None = None,
    *,
    sensors: str = "raw",
    sensor_dropout: float = 0.0,
    folder: str = "training",
    times: str = "sensors/times.csv",
    light: str = "sensors/light.csv",
    vibration: str = "sensors/vibration.csv",
    columns: Mapping[str, str] | None = None,
    max_age: float = 2.0,
    window: float = 0.25,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns the five tasks.

    Args:
        root: folder of the layout.
        sensors (`str`, defaults to `"raw"`): values beside the image, or `"none"` (the ablation: all unknown).
        sensor_dropout (`float`, defaults to 0): probability of hiding each value of a training row.
        folder, times, light, vibration: where the files lie.
        columns (`dict`, *optional*): other names for the columns of `COLUMNS`.
        max_age (`float`, defaults to 2): oldest light value to use, in seconds.
        window (`float`, defaults to 0.25): vibration counts this many seconds before and after a frame.

    Raises:
        DataError: files or columns are missing, or a value is not what was expected.
    """
    check_option("sensors", sensors, ("raw", "none"))
    for name in columns or {}:
        check_option("columns", name, tuple(COLUMNS))
    place, names = FAMILY.open(root), {**COLUMNS, **(columns or {})}
    base = place / folder
    images = _folder(base, "image_2", "image")
    labels = _folder(base, "label_2", "label")
    clock = _frame_times(base / times, names)
    lights = read_series(base / light, names["light time"], names["light"])
    shakes = read_series(base / vibration, names["vibration time"], names["vibration"], names["vibration device"])
    frames: dict[str, list[_Frame]] = {}
    for split, file in _SPLITS.items():
        listing = (place / "ImageSets" / f"{file}.txt").read_text(encoding="utf-8")
        frames[split] = [
            _Frame(name, _image(images, name), labels / f"{name}.txt", clock.get(name)) for name in listing.split()
        ]
    options = _Options(sensors, sensor_dropout, max_age, window, seed)

    def rows(task: str, split: str) -> Rows:
        asked = [frame for frame in frames[split] if _applies(task, frame, lights, shakes, options)]
        source = _Questions(task, split, tuple(asked), lights, shakes, options)
        return Rows(source, origin=Origin(f"{place}/ImageSets/{_SPLITS[split]}.txt ({task})"))

    return [
        {
            "name": task,
            **{split: rows(task, split) for split in _SPLITS},
            "metric": "exact_match",
            "max_new_tokens": 16,
            "description": _ABOUT[task],
        }
        for task in TASKS
    ]


@dataclass(frozen=True)
class _Frame:
    name: str
    image: str
    labels: Path
    time: float | None


@dataclass(frozen=True)
class _Options:
    sensors: str
    dropout: float
    max_age: float
    window: float
    seed: int


def _folder(base: Path, *names: str) -> Path:
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise DataError(f"{base}: no folder {' or '.join(names)}.", expected=FAMILY.layout)


def _image(folder: Path, name: str) -> str:
    for suffix in (".png", ".jpg"):
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    raise DataError(f"{folder}: no image {name}.png or {name}.jpg.", fix="correct ImageSets, or add the image.")


def _frame_times(path: Path, names: Mapping[str, str]) -> dict[str, float]:
    """Frame id -> seconds since midnight."""
    if not path.is_file():
        raise DataError(
            f"{path}: the times of the frames do not exist.",
            expected=f"a CSV with the columns {names['frame']!r} and {names['frame time']!r}",
            fix="name another file in `stream.options.times`; its format is our assumption.",
        )
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (names["frame"], names["frame time"]) if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: no column {', '.join(map(repr, missing))}.", fix="name them in options.columns.")
        return {
            line[names["frame"]]: seconds_of(line[names["frame time"]], f"{path}, line {number}")
            for number, line in enumerate(reader, start=2)
        }


def sensors_at(
    time: float | None, lights: Series, shakes: Series, max_age: float = 2.0, window: float = 0.25
) -> Sensors:
    """Returns the values of a moment: the last light value that is not too old, each wheel's largest vibration."""
    if time is None:
        return Sensors()
    return Sensors(lights.latest(time, max_age), shakes.most(time, window))


def visible(found: Sequence[RoadUser]) -> list[RoadUser]:
    """Returns the road users that can be asked about: labelled, ahead, not largely hidden."""
    return [user for user in found if user.kind != "DontCare" and user.occlusion <= 2 and user.z > 0]


@dataclass(frozen=True)
class _Questions(Sequence[Row]):
    task: str
    split: str
    frames: tuple[_Frame, ...]
    lights: Series
    shakes: Series
    options: _Options

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index):  # type: ignore[override]
        frame, options = self.frames[index], self.options
        rng = random.Random(f"mipd/{options.seed}/{self.split}/{self.task}/{frame.name}")
        sensors = sensors_at(frame.time, self.lights, self.shakes, options.max_age, options.window)
        question, answer = ask(self.task, visible(read_labels(frame.labels)), sensors, rng)
        shown = sensors if options.sensors == "raw" else Sensors()
        if self.split == "train" and options.dropout:
            shown = Sensors(
                None if rng.random() < options.dropout else shown.light,
                {wheel: value for wheel, value in shown.vibration.items() if rng.random() >= options.dropout},
            )
        text = f"{shown.text()}\n{question}"
        return question_row(f"{frame.name}/{self.task}", text, [frame.image], answer, self.split)


def ask(task: str, users: Sequence[RoadUser], sensors: Sensors, rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer; the task is known to apply (`light` and `road` need their sensor)."""
    kinds = sorted({user.kind for user in users})
    if task == "count":
        kind = rng.choice(kinds)
        count = sum(user.kind == kind for user in users)
        return f"How many objects of the class {kind} are visible? Answer with a number.", str(count)
    if task == "nearest":
        nearest = min(users, key=lambda user: user.distance)
        return "Which class of road user is nearest? Answer with one word.", nearest.kind
    if task == "side":
        kind, side = rng.choice(kinds), rng.choice(("left", "right"))
        there = any(user.kind == kind and (user.x < 0) == (side == "left") for user in users)
        return f"Is there a {kind} on the {side}? Answer yes or no.", "yes" if there else "no"
    if task == "light":
        assert sensors.light is not None
        bounds = "dark (below 200 lux), medium, or bright (above 30000 lux)"
        return f"How bright is it: {bounds}?", _LIGHT[level(sensors.light, LIGHT_BOUNDS) - 1]
    strongest = max(sensors.vibration.values())
    bounds = "smooth (vibration below 25 um), rough, or a speed bump (above 100 um)"
    return f"How is the road: {bounds}?", _ROAD[level(strongest, VIBRATION_BOUNDS) - 1]


def _applies(task: str, frame: _Frame, lights: Series, shakes: Series, options: _Options) -> bool:
    if task in ("light", "road"):
        sensors = sensors_at(frame.time, lights, shakes, options.max_age, options.window)
        return sensors.light is not None if task == "light" else bool(sensors.vibration)
    if not frame.labels.is_file():
        raise DataError(f"{frame.labels}: the labels of frame {frame.name} do not exist.", fix="correct ImageSets.")
    return bool(visible(read_labels(frame.labels)))
