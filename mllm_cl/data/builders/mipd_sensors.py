"""MIPD's files: object labels, and the scalar sensors as tables.

Formats as in the authors' loader (`BUCT-IUSRC/Dataset__MIPD`, M2-Fusion) and in the screenshots of its readme. Names and
folders of the scalar files are not published, so they are options of the builder.
"""

from __future__ import annotations

import bisect
import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from mllm_cl.errors import DataError

DAY = 86_400.0
DEVICES = {
    "e8:cb:ed:5a:54:12": "FR",
    "e8:cb:ed:5a:53:cc": "RR",
    "38:1e:c7:e3:a3:85": "FL",
    "e8:cb:ed:5a:57:4d": "RL",
}
LIGHT_BOUNDS = (200.0, 30_000.0)  # lux; level 1 below the first, level 3 above the second
VIBRATION_BOUNDS = (25.0, 100.0)  # micrometres
_TIMES = ("%H:%M:%S.%f", "%H:%M:%S", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M:%S")


@dataclass(frozen=True)
class RoadUser:
    """One labelled object; distances in metres (camera frame: x right, z ahead), the box in pixels."""

    kind: str
    occlusion: int
    box: tuple[float, float, float, float]
    x: float
    z: float

    @property
    def distance(self) -> float:
        """Ground range."""
        return float(np.hypot(self.x, self.z))


def read_labels(path: Path) -> list[RoadUser]:
    """Returns the objects of a label file: KITTI lines of 15, 16 (score) or 17 (score and track) fields.

    Raises:
        DataError: another number of fields, or a field that is no number.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) not in (15, 16, 17):
            raise DataError(f"{path}, line {number}: {len(fields)} fields.", expected="15, 16 or 17 (KITTI)")
        try:
            values = [float(value) for value in fields[1:15]]
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}.", expected="numbers after the class") from error
        box = (values[3], values[4], values[5], values[6])
        found.append(RoadUser(fields[0], int(values[1]), box, x=values[10], z=values[12]))
    return found


@dataclass(frozen=True)
class Series:
    """Values over seconds, in order of time, perhaps of several devices."""

    times: tuple[float, ...]
    values: tuple[float, ...]
    devices: tuple[str, ...] = ()

    def latest(self, time: float, oldest: float) -> float | None:
        """Returns the last value not after `time` and not older than `oldest` seconds."""
        place = bisect.bisect_right(self.times, time) - 1
        return self.values[place] if place >= 0 and time - self.times[place] <= oldest else None

    def most(self, time: float, window: float) -> dict[str, float]:
        """Returns the largest value of each device within `window` seconds before and after `time`."""
        start, stop = bisect.bisect_left(self.times, time - window), bisect.bisect_right(self.times, time + window)
        found: dict[str, float] = {}
        for place in range(start, stop):
            device = self.devices[place]
            found[device] = max(found.get(device, self.values[place]), self.values[place])
        return found


def read_series(path: Path, time_column: str, value_column: str, device_column: str | None = None) -> Series:
    """Returns a sensor's table (CSV). Times of day that jump back by half a day or more mean that midnight has passed.

    Raises:
        DataError: a column is missing, a value is no number, a device or a form of time is unknown.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        wanted = [time_column, value_column, *([device_column] if device_column else [])]
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(map(repr, missing))}; there are: {', '.join(reader.fieldnames or ())}.",
                fix="name the columns in `stream.options.columns`.",
            )
        entries, shift, last = [], 0.0, None
        for number, line in enumerate(reader, start=2):
            seconds = seconds_of(line[time_column], f"{path}, line {number}")
            if last is not None and seconds + shift < last - DAY / 2:
                shift += DAY
            last = seconds + shift
            try:
                value = float(line[value_column])
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}, line {number}: {line[value_column]!r} is no number.") from error
            device = ""
            if device_column:
                device = DEVICES.get(line[device_column].strip().lower(), "")
                if not device:
                    raise DataError(
                        f"{path}, line {number}: unknown device {line[device_column]!r}.", expected=", ".join(DEVICES)
                    )
            entries.append((last, value, device))
    entries.sort(key=lambda entry: entry[0])
    times, values, devices = zip(*entries) if entries else ((), (), ())
    return Series(times, values, devices)


def seconds_of(text: str, place: str) -> float:
    """Returns the seconds since midnight of a time of day or a date with one.

    Raises:
        DataError: the text is neither.
    """
    for form in _TIMES:
        try:
            time = datetime.strptime(text.strip(), form)
        except ValueError:
            continue
        return time.hour * 3600 + time.minute * 60 + time.second + time.microsecond / 1e6
    raise DataError(f"{place}: {text!r} is no time.", expected="such as 19:01:49.4 or 2024/1/3 15:32")


def level(value: float, bounds: tuple[float, float]) -> int:
    """Returns 1 below the first bound, 3 above the second, else 2; a value on a bound belongs to level 2."""
    return 1 if value < bounds[0] else 3 if value > bounds[1] else 2
