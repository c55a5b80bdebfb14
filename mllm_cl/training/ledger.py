"""The ledger: an append-only JSON-lines file that says what a run has completed.

An entry counts once its line is complete on disk. A line that a killed process left unfinished is cut off on opening.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mllm_cl.errors import RunError
from mllm_cl.files import explained
from mllm_cl.parse import parse_json

NEEDED = {
    "started": ("stream_fingerprint", "base_fingerprint", "tasks", "processes", "rank"),
    "stage_trained": ("stage", "task", "adapter_sha256", "trained"),
}
"""What a run is continued from: the fields of these events must be there."""


class Ledger:
    """The ledger of a run folder.

    Args:
        path: `ledger.jsonl`; created at the first entry.
        writable: only the main process writes.
    """

    def __init__(self, path: Path, writable: bool = True) -> None:
        self.path, self.writable = path, writable
        self.entries = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content) and self.writable:
            with explained(self.path), self.path.open("r+b") as file:
                file.truncate(len(complete))
        return [self._entry(number, line) for number, line in enumerate(complete.splitlines(), start=1)]

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = parse_json(line)
            missing = [key for key in ("event", *NEEDED.get(entry.get("event"), ())) if key not in entry]
            if not missing:
                return entry
            raise ValueError(f"no {', '.join(missing)}")
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self.path}: line {number} is not JSON of a run ({error}).",
                expected="one JSON object per line, as the run wrote it",
                fix="restore the file, or start in another output_dir.",
            ) from error

    def append(self, event: str, **fields: Any) -> None:
        """Adds an entry and waits until it is on disk (on other processes: only remembers it)."""
        entry = {"event": event, **fields, "time": round(time.time(), 3)}
        if self.writable:
            with explained(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.entries.append(entry)

    def find(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """Returns the last entry of this kind with these fields, or `None`."""
        wanted = fields.items()
        for entry in reversed(self.entries):
            if entry["event"] == event and all(entry.get(key) == value for key, value in wanted):
                return entry
        return None
