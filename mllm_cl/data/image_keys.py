"""The identity of an image: what tells whether two rows show the same picture, without opening any file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def image_key(reference: Any) -> str:
    """Returns the identity of an image: its normal path (and box), or the hash of its bytes."""
    if isinstance(reference, (str, Path)):
        return os.path.normpath(reference)
    if isinstance(reference, Image.Image):
        header = f"{reference.mode}{reference.size}".encode()
        return "sha256:" + hashlib.sha256(header + reference.tobytes()).hexdigest()
    if isinstance(reference, Mapping):
        if reference.get("tiles"):
            return f"{reference.get('columns', 1)} columns of " + " + ".join(map(image_key, reference["tiles"]))
        if isinstance(reference.get("bytes"), bytes):
            return "sha256:" + hashlib.sha256(reference["bytes"]).hexdigest()
        crop = f"#{','.join(map(str, reference['crop']))}" if reference.get("crop") else ""
        return os.path.normpath(str(reference.get("path"))) + crop
    return repr(reference)
