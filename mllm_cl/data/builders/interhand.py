"""InterHand2.6M: questions about hands whose answers follow from the annotated joints.

* Paper: Moon et al., ECCV 2020; repository `facebookresearch/InterHand2.6M` (archived). CC BY-NC 4.0.
* Size: 2,590,347 images (train H+M 1,361,062, validation M 380,125, test H+M 849,160); about 80 GB at 5 fps.
* Tasks, ours, in this order: handedness, gesture (single-hand names of the sequences), bend (angle of the middle joint of
  the right index finger), touch (least distance between the hands), relation (which hand is nearer to the camera).
* Row: one frame, cropped to the annotated box on request; closed answers.
* Rules: bends at 105, 150 and 170 degrees as in HandVQA (CVPR 2026); touching below 20 mm; a dead zone of 20 mm for the
  relation; a hand counts only if its wrist is valid; ROM sequences have no gesture.

Not recoverable: the public table of 27 gesture classes. Here a gesture is the name inside `seq_name` without number and
variant (`0007_thumbup_normal` -> `thumbup`); only names that occur in train and test are asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_cl.data.builders.checks import read_json
from mllm_cl.data.builders.family import Family, Files, check_option, question_row
from mllm_cl.data.rows import Origin, Row, Rows
from mllm_cl.errors import DataError

RIGHT_WRIST, LEFT_WRIST = 20, 41
TASKS = ("handedness", "gesture", "bend", "touch", "relation")
BENDS = ((105, "bent completely inward"), (150, "bent inward"), (170, "slightly bent inward"))
TOUCH_MM = DEAD_ZONE_MM = 20.0
_INDEX = (7, 6, 5)  # right index finger: base, middle and end joint of the angle; 4 is the tip
_VARIANTS = ("normal", "relaxed", "rigid", "backside", "frontside", "palm", "side", "wide")
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_QUESTIONS = {
    "handedness": "Which hands are visible: right, left, or both?",
    "gesture": "Which gesture does the hand show? Answer with its name.",
    "bend": "How far is the right index finger bent at its middle joint: "
    "straight, slightly bent inward, bent inward, or bent completely inward?",
    "touch": "Do the two hands touch? Answer yes or no.",
    "relation": "Which hand is nearer to the camera: right or left?",
}

FAMILY = Family(
    name="interhand",
    title="InterHand2.6M",
    link="https://mks0601.github.io/InterHand2.6M/",
    licence="CC BY-NC 4.0: non-commercial use only",
    citation="Moon et al., InterHand2.6M: A Dataset and Baseline for 3D Interacting Hand Pose Estimation, ECCV 2020",
    layout="""
  images/train/Capture0/0007_thumbup_normal/cam400262/image0001.jpg     and val, test
  annotations/train/InterHand2.6M_train_data.json ..._camera.json ..._joint_3d.json     and val, test
""",
    script="data_scripts/interhand.py",
    gaps=(
        "the public mapping of sequence names to 27 gestures was not readable: names are used as they are",
        "tasks, order and questions are ours; thresholds are HandVQA's where it has them",
        "the annotation files are read whole: several GB of memory at full size",
    ),
    files=tuple(
        Files(f"annotations/{split}/InterHand2.6M_{split}_{kind}.json")
        for split in _SPLITS.values()
        for kind in ("data", "camera", "joint_3d")
    ),
)


def build(
    root: str | Path | None = None,
    *,
    tasks: Sequence[str] = TASKS,
    crop: bool = True,
    per_sequence: int = 8,
) -> list[dict[str, Any]]:
    """Returns the tasks.

    Args:
        root: folder of the layout.
        tasks (several of `TASKS`): which, in this order.
        crop (`bool`, defaults to `True`): crop images to the annotated box, with a margin of a fifth.
        per_sequence (`int`, defaults to 8): frames asked about in each sequence and camera, evenly spaced; neighbouring
            frames are nearly the same.

    Raises:
        DataError: files are missing or their parts do not fit together.
    """
    for task in tasks:
        check_option("tasks", task, TASKS)
    if per_sequence < 1:
        raise DataError(f"stream.options.per_sequence: {per_sequence} given.", expected="at least 1")
    place = FAMILY.open(root)
    frames = {split: _frames(place, folder, per_sequence) for split, folder in _SPLITS.items()}
    shared = set.intersection(*({frame.gesture for frame in frames[split]} for split in ("train", "test"))) - {None}

    def rows(task: str, split: str) -> Rows:
        asked = [(frame, answer) for frame in frames[split] if (answer := answer_of(task, frame)) is not None]
        if task == "gesture":
            asked = [(frame, answer) for frame, answer in asked if answer in shared]
        source = _Asked(tuple(asked), task, split, crop)
        return Rows(source, origin=Origin(f"{place}/annotations/{_SPLITS[split]} ({task})"))

    return [
        {
            "name": task,
            **{split: rows(task, split) for split in _SPLITS},
            "metric": "exact_match",
            "max_new_tokens": 16,
            "description": _QUESTIONS[task],
        }
        for task in tasks
    ]


@dataclass(frozen=True)
class Frame:
    """One annotated image; joints in camera coordinates (42, 3) in mm, NaN where not valid."""

    name: str
    image: str
    box: tuple[float, float, float, float]
    hands: str | None
    sequence: str
    joints: np.ndarray

    @property
    def gesture(self) -> str | None:
        """Name of the single-hand gesture that the sequence shows; `None` for two hands and for ROM sequences."""
        return gesture_of(self.sequence) if self.hands in ("right", "left") else None


def gesture_of(sequence: str) -> str | None:
    """Returns the gesture inside a sequence name.

    Example:

    ```python
    >>> from mllm_cl.data.builders.interhand import gesture_of
    >>> gesture_of("0007_thumbup_normal"), gesture_of("0390_dh_touchROM"), gesture_of("0266_dh_pray")
    ('thumbup', None, None)

    ```
    """
    parts = re.split(r"[_-]", sequence)
    if "rom" in sequence.casefold() or "dh" in parts or len(parts) < 2 or not parts[0].isdigit():
        return None
    words = [part for part in parts[1:] if part.casefold() not in _VARIANTS]
    return "_".join(words).casefold() or None


def _frames(root: Path, split: str, per_sequence: int) -> list[Frame]:
    place = root / "annotations" / split
    prefix = f"InterHand2.6M_{split}_"
    data, cameras, joints = (read_json(place / f"{prefix}{kind}.json") for kind in ("data", "camera", "joint_3d"))
    try:
        images = {image["id"]: image for image in data["images"]}
        by_view: dict[tuple, list[Mapping[str, Any]]] = {}
        for annotation in data["annotations"]:
            image = images[annotation["image_id"]]
            view = (image["capture"], image["seq_name"], image["camera"])
            by_view.setdefault(view, []).append(annotation)
        frames = []
        for view in sorted(by_view, key=str):
            found = sorted(by_view[view], key=lambda annotation: images[annotation["image_id"]]["frame_idx"])
            step = max(1, len(found) // per_sequence)
            for annotation in found[::step][:per_sequence]:
                frames.append(_frame(root, split, images[annotation["image_id"]], annotation, cameras, joints))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{place}: the annotation files do not fit together ({type(error).__name__}: {error}).",
            expected="the three files of one release of InterHand2.6M",
            fix="download the annotations again.",
        ) from error
    return frames


def _frame(
    root: Path, split: str, image: Mapping, annotation: Mapping, cameras: Mapping, joints: Mapping
) -> Frame:  # fmt: skip
    capture = str(image["capture"])  # an integer here, a text key in the other files
    camera = cameras[capture]
    position = np.array(camera["campos"][image["camera"]], dtype=float)
    rotation = np.array(camera["camrot"][image["camera"]], dtype=float)
    entry = joints[capture][str(image["frame_idx"])]
    world = np.array(entry["world_coord"], dtype=float)
    valid = np.array(annotation["joint_valid"], dtype=float).reshape(-1) > 0
    if world.shape != (42, 3) or valid.shape != (42,) or rotation.shape != (3, 3):
        raise ValueError(f"joints {world.shape}, valid {valid.shape}, rotation {rotation.shape}")
    for wrist, hand in ((RIGHT_WRIST, slice(0, 21)), (LEFT_WRIST, slice(21, 42))):
        if not valid[wrist]:
            valid[hand] = False
    seen = (world - position) @ rotation.T
    seen[~valid] = np.nan
    x, y, width, height = map(float, annotation["bbox"])
    hands = annotation["hand_type"] if annotation.get("hand_type_valid", 1) else None
    return Frame(
        name=f"{split}/{capture}/{image['seq_name']}/{image['camera']}/{image['frame_idx']}",
        image=str(root / "images" / split / image["file_name"]),
        box=(x - width / 5, y - height / 5, x + 1.2 * width, y + 1.2 * height),
        hands=hands,
        sequence=image["seq_name"],
        joints=seen,
    )


def answer_of(task: str, frame: Frame) -> str | None:
    """Returns the answer, or `None` if the question cannot be asked about this frame."""
    right, left = frame.joints[:21], frame.joints[21:]
    if task == "handedness":
        return None if frame.hands is None else {"interacting": "both"}.get(frame.hands, frame.hands)
    if task == "gesture":
        return frame.gesture
    if task == "bend":
        return bend_of(angle_at(*(frame.joints[joint] for joint in _INDEX)))
    if frame.hands != "interacting":
        return None
    if task == "touch":
        distances = np.linalg.norm(right[:, None] - left[None], axis=2)  # (21, 21), mm
        return None if np.isnan(distances).all() else "yes" if np.nanmin(distances) < TOUCH_MM else "no"
    depth = frame.joints[RIGHT_WRIST, 2] - frame.joints[LEFT_WRIST, 2]
    return None if np.isnan(depth) or abs(depth) < DEAD_ZONE_MM else "right" if depth < 0 else "left"


def angle_at(before: np.ndarray, joint: np.ndarray, after: np.ndarray) -> float:
    """Returns the angle at a joint in degrees (180: straight); NaN if a point is not valid."""
    one, other = before - joint, after - joint
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def bend_of(angle: float) -> str | None:
    """Returns the name of a bend; an angle on a bound belongs to the straighter one."""
    if np.isnan(angle):
        return None
    return next((name for bound, name in BENDS if angle < bound), "straight")


@dataclass(frozen=True)
class _Asked(Sequence[Row]):
    frames: tuple[tuple[Frame, str], ...]
    task: str
    split: str
    crop: bool

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index):  # type: ignore[override]
        frame, answer = self.frames[index]
        image = {"path": frame.image, "crop": frame.box} if self.crop else frame.image
        return question_row(f"{frame.name}/{self.task}", _QUESTIONS[self.task], [image], answer, self.split)
