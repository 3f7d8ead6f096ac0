"""The data sets of the study, and which clips of them train, choose and test.

    all clips --(the data's own test split, or a fifth of the sources)--> test                      the same in all rows
              `-> the rest --(15 %, whole groups, by seed)--> val: picks epochs and variants   the same for all shares
                           `-> train: share 100, 50, 25, 10 %; each subset lies in the larger ones, class by class

A training gets a list of train and val alone; where the test clips are is none of its business (see `ledger`).
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lean3d.config import DataConfig
from lean3d.data.annotations import Row
from lean3d.data.manifest import Clip, Manifest, held_back, read_manifest
from lean3d.data.synthetic import Difficulty, make_motion_set
from lean3d.errors import DataError

VAL_SHARE = 0.15
TEST_SHARE = 0.2  # where the data have no test split of their own
MOTION_CLIPS = (80, 20)  # of each class, to train and to test


@dataclass(frozen=True)
class Task:
    """A data set, and the clip that every net gets of it."""

    name: str
    root: str = ""
    """Below the folder of clips."""
    where: dict[str, str] = field(default_factory=dict)
    groups: str | None = None
    motion: Difficulty | None = None
    """Of the generated set, in place of `root`."""
    channels: int = 1
    size: tuple[int, int] = (40, 56)
    num_frames: int = 16
    sampling_rate: int = 1
    num_clips: int = 1
    """Views of a test video, spread over its time."""
    clips: tuple[int, int] = (800, 200)
    """About how many clips train and test, to foretell how long a row takes."""


def _lips(task: str) -> Task:
    return Task(task, "grid_lips/clips.csv", where={"task": task})


TASKS = {
    task.name: task
    for task in (
        _lips("digit"),
        _lips("color"),
        _lips("letter"),
        Task("fight", "surv_fight", groups="sources.csv", sampling_rate=3, num_clips=2, clips=(240, 60)),
        Task("motion-plain", motion="plain", channels=3, size=(48, 48)),
        Task("motion-distracting", motion="distracting", channels=3, size=(48, 48)),
        Task("motion-degraded", motion="degraded", channels=3, size=(48, 48)),
    )
}


@dataclass(frozen=True)
class Places:
    """Where things lie on this machine."""

    clips: Path
    """The folder with `grid_lips` and `surv_fight`."""
    work: Path
    """Runs and generated clips."""
    results: Path
    """The JSON lines that are kept."""


@dataclass(frozen=True)
class Parts:
    """The clips of one row."""

    classes: tuple[str, ...]
    train: tuple[Clip, ...]
    val: tuple[Clip, ...]
    test: tuple[Clip, ...]

    def manifest(self, *names: str) -> Manifest:
        """Some of the parts as a manifest, whose splits are these parts."""
        clips = tuple(clip for name in names for clip in getattr(self, name))
        return Manifest(self.classes, tuple(sorted(clips, key=lambda clip: clip.path)), "+".join(names))


def default_clips() -> Path:
    """Where the real clips are: in LEAN3D_SHARED, or beside the checkout."""
    return Path(os.environ.get("LEAN3D_SHARED") or Path(__file__).parents[3] / "shared") / "data"


def parts(task: Task, share: int, seed: int, places: Places) -> Parts:
    """The clips of a row.

    Args:
        task: The data set; a generated one is made where it is missing.
        share: Percentage of the training clips, 1 to 100.
        seed: Of the validation part and the subset; test clips don't depend on it.
        places: Where clips are.

    Raises:
        DataError: The clips are not there, or a part would be empty.
    """
    manifest = read_manifest(_data_config(task, places))
    train, test = manifest.select("train"), manifest.select("test")
    rows = [Row(_name(clip), manifest.classes[clip.label], "train", clip.group) for clip in train]
    chosen = held_back(rows, VAL_SHARE, f"{seed} val")
    val = tuple(Clip(c.path, c.label, "val", c.group) for c in train if _name(c) in chosen)
    rest = [clip for clip in train if _name(clip) not in chosen]
    found = Parts(manifest.classes, subset(rest, share, seed), val, test)
    for name in ("train", "val", "test"):
        if not getattr(found, name):
            raise DataError(f"{task.name} with a share of {share} % has no clips in {name}")
    return found


def subset(clips: Sequence[Clip], share: int, seed: int) -> tuple[Clip, ...]:
    """`share` percent of each class, at least one clip, and always a part of what a larger share gives."""
    by_class: dict[int, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_class[clip.label].append(clip)

    def place(clip: Clip) -> bytes:
        return hashlib.sha256(f"{seed} {_name(clip)}".encode()).digest()

    kept = [
        clip
        for members in by_class.values()
        for clip in sorted(members, key=place)[: math.ceil(len(members) * share / 100 - 1e-9)]
    ]
    return tuple(sorted(kept, key=lambda clip: clip.path))


def content_digest(clips: Sequence[Clip]) -> str:
    """SHA-256 of the clips' names, labels, splits and bytes, in hex; where they lie does not matter."""
    digest = hashlib.sha256()
    for clip in clips:
        path = Path(clip.path)
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{_name(clip)} {clip.label} {clip.split} {content}\n".encode())
    return digest.hexdigest()


def _name(clip: Clip) -> str:
    """Folder and file: what a clip is called wherever the data set lies."""
    return "/".join(Path(clip.path).parts[-2:])


def _data_config(task: Task, places: Places) -> DataConfig:
    if task.motion is not None:
        return DataConfig(root=str(_motion_set(task, places.work)), val_share=0)
    root = places.clips / task.root
    if not root.exists():
        raise DataError(f"{task.name} needs clips at {root}: set LEAN3D_SHARED to the folder that holds data/")
    groups = str(root / task.groups) if task.groups else None
    return DataConfig(root=str(root), where=task.where, groups=groups, val_share=0, test_share=TEST_SHARE)


def _motion_set(task: Task, work: Path) -> Path:
    """The generated set, made by whoever comes first; others wait for it."""
    assert task.motion is not None
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{task.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        train, test = MOTION_CLIPS
        return make_motion_set(
            work / task.name, clips_per_class=train, test_clips_per_class=test, difficulty=task.motion, workers=1
        )
