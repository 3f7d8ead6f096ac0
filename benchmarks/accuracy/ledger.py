"""Who read which test clips with which weights, so that nobody tunes on them: a row reads its test clips once.

`ledger.jsonl` has a line before the clips are read and one when the result is kept:

    {"row": ..., "event": "opened", "model": SHA-256 of the weights, "test": SHA-256 of the clips, "date": ...}
    {"row": ..., "event": "closed", "result": SHA-256 of the result, "date": ...}

A reading that was cut off before its result was kept may be repeated with the same weights and clips: it gives what the
first would have given, and nobody has seen that. Everything else is refused.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lean3d.errors import Lean3dError


class ReadTwiceError(Lean3dError):
    """A row wanted to look at its test clips again."""


class Ledger:
    """The ledger in a file, which may not be there yet."""

    def __init__(self, path: Path):
        self.path = path

    def open_test(self, row: str, model: str, test: str) -> None:
        """Write down that a row is about to read its test clips.

        Args:
            row: The row's key.
            model: SHA-256 of the weights that are tested.
            test: SHA-256 of the test clips.

        Raises:
            ReadTwiceError: The row has its result, or began a test with other weights or clips.
        """
        with self._locked():
            entries = self.entries(row)
            if any(entry["event"] == "closed" for entry in entries):
                raise ReadTwiceError(
                    f"row {row} has read its test clips and has its result: choices are made on val; what is new "
                    f"needs a row of its own ({self.path})"
                )
            if not entries:
                self._append({"row": row, "event": "opened", "model": model, "test": test})
            elif (entries[-1]["model"], entries[-1]["test"]) != (model, test):
                raise ReadTwiceError(
                    f"row {row} began to read its test clips with weights {entries[-1]['model'][:12]} and clips "
                    f"{entries[-1]['test'][:12]}, and now comes with {model[:12]} and {test[:12]} ({self.path})"
                )

    def close_test(self, row: str, result: Any) -> None:
        """Write down that a row's result is kept.

        Raises:
            ReadTwiceError: The row did not open its test, or closed it before.
        """
        with self._locked():
            if [entry["event"] for entry in self.entries(row)] != ["opened"]:
                raise ReadTwiceError(f"row {row} has no open test in {self.path}")
            self._append({"row": row, "event": "closed", "result": digest(result)})

    def check(self, row: str, result: Any) -> bool:
        """Whether this is the result that the row's one reading gave."""
        return any(e["event"] == "closed" and e["result"] == digest(result) for e in self.entries(row))

    def entries(self, row: str) -> list[dict[str, Any]]:
        """The lines of a row, in order."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [entry for entry in map(json.loads, text.splitlines()) if entry["row"] == row]

    def _append(self, entry: dict[str, Any]) -> None:
        entry["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def digest(content: Any) -> str:
    """SHA-256 of plain JSON data, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
