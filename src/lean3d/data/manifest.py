"""Which clips there are, with which labels, and which of them train, validate and test."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lean3d.config import DataConfig
from lean3d.data.annotations import Annotations, Row, natural, read_annotations
from lean3d.data.shards import is_address, member_of
from lean3d.errors import ConfigError, DataError

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Clip:
    """One labelled video."""

    path: str
    """Absolute path of a video file or of a folder of pictures."""
    label: int
    """Number of its class; -1: not labelled."""
    split: str
    """train, val or test."""
    group: str = ""
    """Clips of equal group lie in one split; an empty one is a group of its own."""


@dataclass(frozen=True)
class Manifest:
    """All clips of a data set, each in its split."""

    classes: tuple[str, ...]
    """Names of the classes, by number."""
    clips: tuple[Clip, ...]
    """Clips, sorted by path."""
    source: str
    """The folder or the file that this was read from."""

    def select(self, split: Split) -> tuple[Clip, ...]:
        """The clips of one split."""
        return tuple(clip for clip in self.clips if clip.split == split)

    def counts(self) -> dict[str, int]:
        """How many clips each split has, train, val and test."""
        counts = Counter(clip.split for clip in self.clips)
        return {split: counts[split] for split in ("train", "val", "test")}

    def digest(self) -> str:
        """SHA-256 of all this, in hex. Paths count from their common folder: a moved data set keeps its digest."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(self.classes)
        common = os.path.commonpath([Path(clip.path).parent for clip in self.clips]) if self.clips else ""
        for clip in self.clips:
            path = Path(os.path.relpath(clip.path, common)).as_posix()
            writer.writerow([path, clip.label, clip.split, clip.group])
        return hashlib.sha256(table.getvalue().encode()).hexdigest()

    def to_csv(self, path: str | Path) -> None:
        """Write `path,label,split,group`, which `read_manifest` reads; a clip without label has an empty one."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "split", "group"])
            for clip in self.clips:
                label = self.classes[clip.label] if clip.label >= 0 else ""
                writer.writerow([clip.path, label, clip.split, clip.group])


def read_manifest(config: DataConfig) -> Manifest:
    """Read the labels at `config.root` and settle every clip's split.

    Splits that are written down stay. Without a test split, `test_share` of the clips becomes one; then, without a val
    split, `val_share` of the remaining train clips. Both are drawn class by class as far as groups allow: a group is
    never torn apart and no class loses its last train clip. The draw follows from `split_seed` and the clips' paths
    alone, not from the order of files.

    Raises:
        DataError: Nothing is found, or labels, splits and files don't fit together.
        ConfigError: A share is out of range.
    """
    return settle(read_annotations(config), config)


def settle(found: Annotations, config: DataConfig, *, strict: bool = True) -> Manifest:
    """What `read_manifest` makes of labels that are read already.

    Args:
        found: The clips as they are written down.
        config: Shares and seed of the splits.
        strict: Whether a written split that tears a group apart, and a class that can't be learnt for lack of train
            clips, is an error; else it is taken as it is.

    Raises:
        DataError, ConfigError: See `read_manifest`.
    """
    for name in ("val_share", "test_share"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"data.{name} must be at least 0 and less than 1, got {getattr(config, name)}")
    rows = _without_repeats(found)
    if not rows:
        raise DataError(f"no clips in {found.source}")
    _check_files(rows, found.base)
    rows = [replace(row, split=row.split or "train") for row in rows]
    if strict and found.own_groups:
        _check_groups(rows, found.source)
    for split, share in (("test", config.test_share), ("val", config.val_share)):
        if not any(row.split == split for row in rows):
            train = [row for row in rows if row.split == "train"]
            chosen = held_back(train, share, f"{config.split_seed} {split}")
            rows = [replace(row, split=split) if row.path in chosen else row for row in rows]
    labels = {row.label for row in rows if row.label is not None}
    classes = found.classes or tuple(sorted(labels, key=natural))
    if strict:
        _check_classes(rows, found.source)
    number: dict[str | None, int] = {name: i for i, name in enumerate(classes)} | {None: -1}
    clips = [Clip(_place(found.base, r.path), number[r.label], r.split or "train", r.group) for r in rows]
    return Manifest(classes, tuple(sorted(clips, key=lambda clip: clip.path)), found.source)


def held_back(rows: Sequence[Row], share: float, seed: str) -> set[str]:
    """Paths of about this share of the rows, class by class, in whole groups.

    Groups are gone through in an order that hashes seed and name, and a group is taken if that brings the classes
    nearer to their shares (at least one clip of a class that has three) without emptying one of them: first groups
    that go into what is still free, then those that go a little over it.
    """
    if share <= 0:
        return set()
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"group {row.group}" if row.group else f"clip {Path(row.path).as_posix()}"].append(row)
    have = Counter(row.label for row in rows)
    want = {label: max(share * count, 1.0 if count >= 3 else 0.0) for label, count in have.items()}
    taken: Counter[str | None] = Counter()
    chosen: set[str] = set()
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for spare in (0.5, float("inf")):
        for name in order:
            adds = Counter(row.label for row in groups[name])
            gain = sum(abs(want[k] - taken[k]) - abs(want[k] - taken[k] - n) for k, n in adds.items())
            fits = all(taken[k] + n <= min(want[k] + spare, have[k] - 1) for k, n in adds.items())
            if gain > 0 and fits and groups[name][0].path not in chosen:
                taken += adds
                chosen.update(row.path for row in groups[name])
    return chosen


def _without_repeats(found: Annotations) -> list[Row]:
    """Rows sorted by path, each path once; the same path with another label or split is an error."""
    rows: dict[str, Row] = {}
    for row in sorted(found.rows, key=lambda row: row.path):
        row = row if is_address(row.path) else replace(row, path=os.path.normpath(row.path))
        other = rows.setdefault(row.path, row)
        if other.split != row.split:
            raise DataError(f"{row.path} is in two splits, {other.split} and {row.split}, in {found.source}")
        if other.label != row.label:
            raise DataError(f"{row.path} has two labels, {other.label!r} and {row.label!r}, in {found.source}")
    return list(rows.values())


def _place(base: Path, path: str) -> str:
    """Where a clip lies, absolute."""
    return path if is_address(path) else str(Path(base, path))


def _check_files(rows: list[Row], base: Path) -> None:
    """A few missing files are bad files of the run; if all of a sample are missing, the folder is the wrong one.

    What lies in an object store is not asked for here.
    """
    sample = [_place(base, row.path) for row in rows[:: max(len(rows) // 50, 1)]]
    files = [Path(member.shard if (member := member_of(path)) else path) for path in sample if not is_address(path)]
    if files and not any(file.exists() for file in files):
        raise DataError(
            f"the clips are not where the labels say: {files[0]} does not exist; set data.videos to their folder"
        )


def _check_groups(rows: list[Row], source: str) -> None:
    sides: dict[str, str] = {}
    for row in rows:
        if row.group and sides.setdefault(row.group, row.split or "train") != row.split:
            raise DataError(
                f"{source} has clips of group {row.group!r} in {sides[row.group]} and in {row.split}: "
                "correct the splits, or leave the split or the group column away"
            )


def _check_classes(rows: Iterable[Row], source: str) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.label is not None:
            sides[row.split or "train"].add(row.label)
        elif row.split != "test":
            raise DataError(f"{row.path} has no label in {source}; only test clips may be without")
    if not sides["train"]:
        return  # a set to test on
    if len(sides["train"]) < 2:
        raise DataError(f"{source} has one class only, {min(sides['train'])!r}; a classifier needs at least two")
    for split in ("val", "test"):
        if lost := sorted(sides[split] - sides["train"]):
            raise DataError(f"{source} has no train clips of {', '.join(map(repr, lost[:5]))}, which {split} has")
