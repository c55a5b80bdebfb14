"""METEOR through pycocoevalcap (`pip install mllm_cl[caption]`) and Java; there is no other faithful implementation."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence


def meteor_available() -> bool:
    """True if both pycocoevalcap and a Java runtime are here."""
    return importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None


def meteor(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float | None:
    """Returns corpus METEOR (0 to 1) of tokenised captions, or `None` where it cannot be computed.

    A process of its own runs until the set is scored, about 2 GB for a moment.
    """
    if not captions or not meteor_available():
        return None
    from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[import-not-found]  # an extra

    scorer = Meteor()
    try:
        # an empty line would make the Java side wait for ever
        said = {index: [" ".join(words) or "."] for index, words in enumerate(captions)}
        wanted = {index: [" ".join(words) or "." for words in group] for index, group in enumerate(references)}
        return float(scorer.compute_score(wanted, said)[0])
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
