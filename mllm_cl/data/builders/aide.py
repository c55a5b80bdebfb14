"""AIDE: four driver-monitoring tasks on clips of four synchronous cameras.

* Paper: Yang et al., AIDE, ICCV 2023 (arXiv 2307.13933); repository `ydk122024/AIDE`; the four tasks as MMTL-UniAD
  (CVPR 2025, arXiv 2504.02264) learns them. Non-commercial research only.
* Size: 2,898 clips of about 3 s: 1,884 / 405 / 609 train / validation / test (counted in the published CSVs). Subjects are
  not held out: drivers of the test clips are in the training clips.
* Order: tcr (traffic context), vbr (vehicle behaviour), der (driver emotion), dbr (driver behaviour): from the
  environment to the driver, as CauPsi orders them. Ours; AIDE learns them jointly.
* Row: a question about one to sixteen moments in one to six views, the class name (or an option letter) as answer.
  Face and body views are crops of the in-car frame, made when a batch is made.

Not recoverable: class counts of the official split (`mllm-cl data show aide` counts them); class counts quoted elsewhere
come from another protocol. Always answering "Peace" is right in about 59 % of der, so the metric is macro-F1; every
result has the accuracy, which AIDE and MMTL-UniAD print, beside it.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.checks import read_json, surprise
from mllm_cl.data.builders.family import Family, Files, check_option, question_row
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Origin, Row, Rows
from mllm_cl.errors import DataError

CLASSES = {
    "tcr": ("Traffic Jam", "Waiting", "Smooth Traffic"),
    "vbr": ("Parking", "Turning", "Backward Moving", "Changing Lane", "Forward Moving"),
    "der": ("Anxiety", "Peace", "Weariness", "Happiness", "Anger"),
    "dbr": (
        "Smoking", "Making Phone", "Looking Around", "Dozing Off", "Normal Driving", "Talking", "Body Movement",
    ),
}  # fmt: skip
KEYS = {
    "tcr": "scene_centric_context_label",
    "vbr": "vehicle_based_context_label",
    "der": "emotion_label",
    "dbr": "driver_behavior_label",
}
REPAIRED = {"Forward": "Forward Moving"}
FRAMES = (0, *(index for index in range(45) if index % 3 == 2))
CAMERAS = {"front": "frontframes", "left": "leftframes", "right": "rightframes", "inside": "incarframes"}
VIEWS = (*CAMERAS, "face", "body")
DEFAULT_VIEWS = {
    "tcr": ("front", "left", "right"),
    "vbr": ("front", "left", "right"),
    "der": ("inside", "face", "body"),
    "dbr": ("inside", "face", "body"),
}
LEAST = {"face": (10, 10), "body": (10, 20)}  # width, height in pixels
QUESTIONS = {
    "tcr": (
        "What is the traffic situation around the car?",
        "How is the traffic flowing?",
        "Which traffic context do the images show?",
        "What does the road traffic look like?",
        "Name the traffic condition.",
    ),
    "vbr": (
        "What is the vehicle doing?",
        "Which manoeuvre does the car perform?",
        "How is the car moving?",
        "Name the behaviour of the vehicle.",
        "What does the car do in this clip?",
    ),
    "der": (
        "Which emotion does the driver show?",
        "How does the driver feel?",
        "What is the driver's emotional state?",
        "Name the driver's emotion.",
        "What mood is the driver in?",
    ),
    "dbr": (
        "What is the driver doing?",
        "Which behaviour does the driver show?",
        "Name the driver's behaviour.",
        "What is the person at the wheel doing?",
        "How does the driver behave?",
    ),
}
MEASURES = {"macro_f1": "macro_f1", "accuracy": "exact_match"}
_CSV = {"train": "training.csv", "validation": "validation.csv", "test": "testing.csv"}
_SIZES = {"train": 1884, "validation": 405, "test": 609}
_ABOUT = {"tcr": "traffic context", "vbr": "vehicle behaviour", "der": "driver emotion", "dbr": "driver behaviour"}

FAMILY = Family(
    name="aide",
    title="AIDE",
    link="https://github.com/ydk122024/AIDE",
    licence="non-commercial research only; access on request at the repository",
    citation="Yang et al., AIDE: A Vision-Driven Multi-View, Multi-Modal, Multi-Tasking Dataset, ICCV 2023, arXiv 2307.13933",
    layout="""
  training.csv validation.csv testing.csv       columns 0, 1: clip folder, annotation (relative to the root)
  AIDE_Dataset/0001/frontframes/0.jpg ...       and leftframes, rightframes, incarframes
  AIDE_Dataset/annotation/0001.json
""",
    script="data_scripts/aide.py",
    gaps=(
        "test clips show drivers of the training clips",
        "the official loader flips images horizontally and vertically in every split; nothing is flipped here",
        "the papers print accuracy: the score here is macro-F1, and the accuracy stands beside it in every result",
        "the order of the tasks and the questions are ours; face and body crops come from the annotated boxes",
    ),
    files=tuple(map(Files, _CSV.values())),
)


@dataclass(frozen=True)
class Options:
    """How clips become questions.

    Args:
        views (several of `VIEWS`, *optional*): cameras and crops; by default those of `DEFAULT_VIEWS`.
        frames (`int`, defaults to 1): moments, taken evenly from the official sixteen.
        layout (`str`, defaults to `"multi"`): every image by itself, `"grid"`: the views of a moment in one image,
            `"strip"`: the moments of a view in one image.
        answers (`str`, defaults to `"name"`): the class name, or the `"letter"` of shuffled options.
    """

    views: Sequence[str] | None = None
    frames: int = 1
    layout: str = "multi"
    answers: str = "name"


def build(
    root: str | Path | None = None,
    *,
    views: Sequence[str] | None = None,
    frames: int = 1,
    layout: str = "multi",
    answers: str = "name",
    measure: str = "macro_f1",
) -> list[dict[str, Any]]:
    """Returns the four tasks; the arguments between `root` and `measure` are those of `Options`.

    `measure` is `macro_f1` or `accuracy`; tasks that are learnt as one (`stream.merge`) need the latter, which scores rows.

    Raises:
        DataError: files are missing, an option is unknown, or a CSV or annotation is not as published.
    """
    for view in views or ():
        check_option("views", view, VIEWS)
    check_option("frames", frames, (1, 2, 4, 8, 16))
    check_option("layout", layout, ("multi", "grid", "strip"))
    check_option("answers", answers, ("name", "letter"))
    check_option("measure", measure, tuple(MEASURES))
    place = FAMILY.open(root)
    options = Options(views, frames, layout, answers)
    clips = {split: list(_clips(place, name)) for split, name in _CSV.items()}
    return [
        {
            "name": task,
            **{
                split: Rows(_Clips(place, tuple(found), task, split, options), origin=Origin(str(place / _CSV[split])))
                for split, found in clips.items()
            },
            "metric": MEASURES[measure],
            "max_new_tokens": 16,
            "description": _ABOUT[task],
            "sizes": _SIZES,
        }
        for task in CLASSES
    ]


def _clips(root: Path, name: str) -> Iterator[tuple[str, str]]:
    with (root / name).open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != ["0", "1"]:
        raise DataError(
            f"{root / name}: the header is {','.join(lines[0]) if lines else 'missing'}.", expected="the header `0,1`"
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != 2:
            raise DataError(f"{root / name}, line {number}: {len(line)} columns.", expected="two: clip, annotation")
        yield line[0].rstrip("/"), line[1]


@dataclass(frozen=True)
class _Clips(Sequence[Row]):
    root: Path
    clips: tuple[tuple[str, str], ...]
    task: str
    split: str
    options: Options

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index):  # type: ignore[override]
        clip, annotation = self.clips[index]
        name = f"{clip.rsplit('/', 1)[-1]}/{self.task}"
        try:
            content = read_json(self.root / annotation)
            return self._row(name, self.root / clip, content)
        except RowError as error:
            raise error.at(str(self.root / annotation), index + 1, "clip", name) from error

    def _row(self, name: str, clip: Path, content: Mapping[str, Any]) -> Row:
        label = label_of(content, self.task)
        rng = random.Random(f"aide/{name}")  # the same question in every build
        question, answer, choices = rng.choice(QUESTIONS[self.task]), label, list(CLASSES[self.task])
        if self.options.answers == "letter":
            rng.shuffle(choices)
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFG", choices))
            question = f"{question}\n{listed}\nAnswer with the option's letter from the given choices directly."
            answer = "ABCDEFG"[choices.index(label)]
        else:
            question += f"\nAnswer with one of: {', '.join(choices)}."
        images = self._images(clip, content)
        return question_row(name, question, images, answer, self.split, choices=choices, label=label)

    def _images(self, clip: Path, content: Mapping[str, Any]) -> list[Any]:
        views = self.options.views or DEFAULT_VIEWS[self.task]
        step = len(FRAMES) // self.options.frames
        moments = FRAMES[step // 2 :: step]
        table = [[self._image(clip, content, view, moment) for view in views] for moment in moments]
        if self.options.layout == "grid":
            return [{"tiles": row, "columns": 2 if len(row) > 1 else 1} for row in table]
        if self.options.layout == "strip":
            return [{"tiles": list(column), "columns": len(moments)} for column in zip(*table)]
        return [image for row in table for image in row]

    def _image(self, clip: Path, content: Mapping[str, Any], view: str, moment: int) -> Any:
        if view in CAMERAS:
            return str(clip / CAMERAS[view] / f"{moment}.jpg")
        frame = str(clip / CAMERAS["inside"] / f"{moment}.jpg")
        box = box_of(content, view, moment) or box_of(content, "body", moment)
        return frame if box is None else {"path": frame, "crop": box}


def label_of(content: Any, task: str) -> str:
    """Returns the class of a clip; case and the known short form `Forward` are repaired.

    Raises:
        RowError: the annotation has no such key, or an unknown class.
    """
    raw = content.get(KEYS[task]) if isinstance(content, Mapping) else None
    if not isinstance(raw, str):
        raise surprise(f"the annotation has no text `{KEYS[task]}`.", "the annotation file of a clip")
    label = " ".join(word.capitalize() for word in raw.split())
    label = REPAIRED.get(label, label)
    if label not in CLASSES[task]:
        raise surprise(f"`{KEYS[task]}` is {raw!r}.", "one of: " + ", ".join(CLASSES[task]))
    return label


def box_of(content: Mapping[str, Any], view: str, moment: int) -> tuple[float, float, float, float] | None:
    """Returns the face or body box (left, top, right, bottom) at a moment, or `None` if there is none of usable size.

    Raises:
        RowError: the annotation has no list of poses with an entry for the frame.
    """
    poses = content.get("pose_list")
    if not isinstance(poses, list) or len(poses) <= moment:
        count = len(poses) if isinstance(poses, list) else "no"
        raise surprise(f"`pose_list` has {count} entries.", f"one per frame, at least {FRAMES[-1] + 1}")
    by_name = {pose.get("imgname"): pose for pose in poses if isinstance(pose, Mapping)}
    pose = by_name.get(f"{moment}.jpg", poses[moment])
    found = pose.get("result") if isinstance(pose, Mapping) else None
    box = found[0].get("face_bbox" if view == "face" else "bbox") if found else None
    if not box or len(box) != 4:
        return None
    left, top, width, height = map(float, box)
    least = LEAST[view]
    return (left, top, left + width, top + height) if width >= least[0] and height >= least[1] else None
