"""Looking at every file of a data set before a training does.

    DIR -> labels, splits -> every file decoded, in child processes -> facts -> findings -> manifest.csv, check.json

A finding is either a problem, which a training would suffer from and which a script should stop at, or a note.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import datetime
import io
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lean3d.config import DataConfig
from lean3d.data.annotations import find_videos, read_annotations
from lean3d.data.fingerprint import alike
from lean3d.data.isolate import Inspection, inspect_many
from lean3d.data.manifest import Clip, Manifest, settle
from lean3d.data.transforms import flip_labels
from lean3d.errors import ConfigError, DataError
from lean3d.version import __version__

CHECK_FILE = "check.json"
MANIFEST_FILE = "manifest.csv"

LONG_INTERVAL = 48
"""Frames between keyframes, on average, from which on random access is slow enough for a note."""
UNBALANCED = 10
"""A note is written where the largest class has so many times the clips of the smallest."""
SHOWN = 12
"""Cases of one finding, and classes, that have their pictures in check.json."""

FACTS = (
    *("ok", "reason", "codec", "pixel_format", "width", "height", "num_frames", "fps", "variable_rate", "duration"),
    *("keyframe_interval", "rotation", "has_audio", "size_bytes", "content_hash"),
)
"""Columns of manifest.csv beside path, label, split and group: fields of `Inspection`."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: Its name, in a few words.
        problem: Whether a training would suffer from it; else it is a note.
        text: What it means, and what to do.
        cases: Each case's files; a class name's case has none.
        notes: To each case a phrase: why the file is bad, which splits the copies are in, a class.
    """

    kind: str
    problem: bool
    text: str
    cases: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Health:
    """What `examine` found.

    Attributes:
        manifest: All clips with labels and splits.
        facts: One inspection a clip, in the manifest's order, without thumbnails and fingerprints.
        findings: Problems first.
        thumbnails: JPEG files by path, of some of the clips.
        seconds: How long it took.
    """

    manifest: Manifest
    facts: tuple[Inspection, ...]
    findings: tuple[Finding, ...]
    thumbnails: dict[str, bytes]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not any(finding.problem for finding in self.findings)

    def kinds(self) -> list[dict[str, Any]]:
        """Files of equal codec and size together, the most frequent first: plain numbers for a table."""
        kinds: dict[tuple[str, int, int], list[Inspection]] = defaultdict(list)
        for fact in self.facts:
            if fact.ok:
                kinds[fact.codec or "?", fact.width, fact.height].append(fact)
        rows = []
        for (codec, width, height), facts in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
            row: dict[str, Any] = {"codec": codec, "width": width, "height": height, "files": len(facts)}
            for name in ("fps", "num_frames", "keyframe_interval"):
                values = [getattr(fact, name) for fact in facts]
                row[name] = [min(values), max(values)]
            row["variable_rate"] = sum(fact.variable_rate for fact in facts)
            row["rotated"] = sum(fact.rotation != 0 for fact in facts)
            rows.append(row)
        return rows

    def labels(self) -> list[dict[str, Any]]:
        """Clips of each class in each split, in the order of the classes; unlabelled ones last."""
        counts = Counter((clip.label, clip.split) for clip in self.manifest.clips)
        names = [*enumerate(self.manifest.classes), (-1, "")]
        rows = [
            {"class": name, **{split: counts[label, split] for split in ("train", "val", "test")}}
            for label, name in names
        ]
        return rows if any(clip.label < 0 for clip in self.manifest.clips) else rows[:-1]

    def totals(self) -> dict[str, float]:
        """Files, bad ones, frames, seconds and bytes."""
        good = [fact for fact in self.facts if fact.ok]
        return {
            "files": len(self.facts),
            "bad": len(self.facts) - len(good),
            "frames": sum(fact.num_frames for fact in good),
            "seconds": sum(fact.duration for fact in good),
            "bytes": sum(fact.size_bytes for fact in self.facts),
        }

    def write(self, folder: str | Path) -> None:
        """Write check.json, and manifest.csv, which `lean3d train` takes: with ``--data.where ok yes``, the good ones.

        Args:
            folder: It is made where it is missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": 1,
            "version": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "source": self.manifest.source,
            "digest": self.manifest.digest(),
            "seconds": self.seconds,
            "healthy": self.healthy,
            "totals": self.totals(),
            "kinds": self.kinds(),
            "labels": self.labels(),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "samples": self._samples(),
            "thumbnails": {path: base64.b64encode(jpeg).decode("ascii") for path, jpeg in self.thumbnails.items()},
        }
        (folder / CHECK_FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        with (folder / MANIFEST_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "split", "group", *FACTS])
            for clip, fact in zip(self.manifest.clips, self.facts, strict=True):
                label = self.manifest.classes[clip.label] if clip.label >= 0 else ""
                writer.writerow(
                    [clip.path, label, clip.split, clip.group, *(_cell(getattr(fact, name)) for name in FACTS)]
                )

    def _samples(self) -> list[list[str]]:
        """[path, class] of the clips that stand for their classes."""
        names = [*self.manifest.classes, "not labelled"]
        chosen = _one_a_class(self.manifest.clips, [fact.ok for fact in self.facts])
        return [[clip.path, names[clip.label]] for clip in chosen]


def examine(
    config: DataConfig,
    *,
    workers: int | None = None,
    seconds: float = 60.0,
    memory: int = 2 << 30,
    progress: Callable[[int, int, int], None] | None = None,
) -> Health:
    """Decode every file of a data set and say what is wrong with it. No file can end or stop this.

    Args:
        config: Where the clips are and how labels are written down. A folder of videos without labels will do, too.
        workers: Processes; default: one for each core.
        seconds: Longest time for one file.
        memory: Bytes that decoding one file may need.
        progress: Told files done, files in all, bad files.

    Raises:
        DataError: No clips, or annotations that can't be read.
        ConfigError: A number below 1.
    """
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    for name, value in (("workers", workers), ("seconds", seconds), ("memory", memory)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    began = time.monotonic()
    manifest = read_clips(config)
    found: dict[str, Inspection] = {}
    thumbnails: dict[str, bytes] = {}
    bad = 0
    paths = [clip.path for clip in manifest.clips]
    inspections = inspect_many(paths, workers, seconds=seconds, memory=memory, frame_template=config.frame_template)
    for inspection in inspections:
        bad += not inspection.ok
        if inspection.thumbnail is not None:
            thumbnails[inspection.path] = _jpeg(inspection.thumbnail)
        found[inspection.path] = dataclasses.replace(inspection, thumbnail=None)
        if progress is not None:
            progress(len(found), len(paths), bad)
    facts = tuple(found[path] for path in paths)
    findings = find(manifest, facts)
    facts = tuple(dataclasses.replace(fact, fingerprint=None) for fact in facts)
    shown = {path for finding in findings for case in finding.cases[:SHOWN] for path in case}
    shown |= {clip.path for clip in _one_a_class(manifest.clips, [fact.ok for fact in facts])}
    kept = {path: jpeg for path, jpeg in thumbnails.items() if path in shown}
    return Health(manifest, facts, findings, kept, time.monotonic() - began)


def run(
    config: DataConfig,
    out: str | Path,
    *,
    workers: int | None = None,
    seconds: float = 60.0,
    memory: int = 2 << 30,
    quiet: bool = False,
) -> Health:
    """`examine` with a progress bar, and its files in the folder `out`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar:
        task = bar.add_task("files", total=None)

        def watch(done: int, total: int, bad: int) -> None:
            bar.update(task, completed=done, total=total, description=f"files ({bad} bad)" if bad else "files")

        health = examine(config, workers=workers, seconds=seconds, memory=memory, progress=watch)
    health.write(out)
    return health


def read_clips(config: DataConfig) -> Manifest:
    """The clips with labels and splits as they are written, faults and all; without labels every video in the folder.

    Raises:
        DataError: There are neither labels nor videos, or annotations can't be read.
    """
    try:
        found = read_annotations(config)
    except DataError:
        root = Path(config.root).expanduser().absolute()
        videos = find_videos(root) if config.root and root.is_dir() and config.format == "auto" else []
        if not videos:
            raise
        return Manifest((), tuple(Clip(str(path), -1, "") for path in videos), str(root))
    return settle(found, config, strict=False)


def find(manifest: Manifest, facts: Sequence[Inspection]) -> tuple[Finding, ...]:
    """What is wrong or remarkable, problems first; kinds without a case are left out."""
    clips = manifest.clips
    whole = [(clip, fact) for clip, fact in zip(clips, facts, strict=True) if fact.ok]
    findings = [
        _finding(
            "bad files",
            True,
            "They can't be decoded. A training would skip and count them; mend or remove them.",
            [((fact.path,), fact.reason or "") for fact in facts if not fact.ok],
        ),
        *_copies(manifest, whole),
        *_near_copies(whole),
        _finding(
            "a group in two splits",
            True,
            "Clips of one source were torn apart, so a test would ask for what the training has seen; keep each group "
            "in one split.",
            _torn_groups(clips),
        ),
        _finding(
            "classes without training clips",
            True,
            "They have clips to validate or test on, and none to learn from.",
            [((), name) for name in _unlearnt(manifest)],
        ),
        _finding(
            "left and right",
            False,
            "A horizontal flip would make these classes others that do not exist, so trainings don't flip. If a flip "
            "changes nothing about a class, say so: --augment.flip-map NAME NAME.",
            [((), name) for name in _one_sided(manifest.classes)],
        ),
        _finding(
            "variable frame rate",
            False,
            "Times of frames are read from the files, so this is no error; players and cameras differ.",
            [((fact.path,), f"{fact.fps:.2f} frames/s on average") for _, fact in whole if fact.variable_rate],
        ),
        _finding(
            "far-apart keyframes",
            False,
            f"More than {LONG_INTERVAL} frames on average, all of which are decoded to reach the last of them; lean3d "
            "data prepare writes files that are read faster.",
            [
                ((fact.path,), f"{fact.keyframe_interval:.0f} frames")
                for _, fact in whole
                if fact.keyframe_interval > LONG_INTERVAL
            ],
        ),
        _finding(
            "unequal classes",
            False,
            "Rare classes are learnt last; more clips of them help most.",
            _rare(clips, manifest.classes),
        ),
    ]
    found = [finding for finding in findings if finding.notes]
    return tuple(sorted(found, key=lambda finding: not finding.problem))


def _finding(kind: str, problem: bool, text: str, cases: Iterable[tuple[tuple[str, ...], str]]) -> Finding:
    listed = list(cases)
    return Finding(kind, problem, text, tuple(files for files, _ in listed), tuple(note for _, note in listed))


def _copies(manifest: Manifest, whole: Sequence[tuple[Clip, Inspection]]) -> list[Finding]:
    """Clips of equal content: in two splits, with two labels, or merely twice."""
    same: dict[str | None, list[Clip]] = defaultdict(list)
    for clip, fact in whole:
        same[fact.content_hash].append(clip)
    leaks, conflicts, repeats = [], [], []
    for clips in same.values():
        if len(clips) < 2:
            continue
        files = tuple(clip.path for clip in clips)
        if len(splits := _ordered(clip.split for clip in clips)) > 1:
            leaks.append((files, " and ".join(splits)))
        if len(labels := {clip.label for clip in clips}) > 1:
            names = [*manifest.classes, "not labelled"]
            conflicts.append((files, " and ".join(names[label] for label in sorted(labels))))
        if len(splits) == len(labels) == 1:
            repeats.append((files, f"{len(files)} files"))
    return [
        _finding(
            "copies in two splits",
            True,
            "A test that asks for clips of the training says nothing; keep one of each.",
            leaks,
        ),
        _finding("copies with two labels", True, "One of them must be wrong.", conflicts),
        _finding("copies", False, "The same frames under several names count that many times.", repeats),
    ]


def _near_copies(whole: Sequence[tuple[Clip, Inspection]]) -> list[Finding]:
    """Clips whose pictures move alike, and which are not equal: one of them was encoded anew, scaled or recoloured."""
    equal: dict[str | None, list[Clip]] = defaultdict(list)
    prints: dict[str | None, np.ndarray | None] = {}
    for clip, fact in whole:
        equal[fact.content_hash].append(clip)
        prints[fact.content_hash] = fact.fingerprint
    hashes = list(equal)
    together: dict[int, set[int]] = {}  # to each clip all that a row of near copies leads to
    least: dict[int, float] = {}
    for first, second, cosine in alike(list(prints.values())):
        joined = together.get(first, {first}) | together.get(second, {second})
        lowest = min(cosine, least.get(first, 1.0), least.get(second, 1.0))
        for place in joined:
            together[place], least[place] = joined, lowest
    leaks, repeats = [], []
    for place in sorted(together):
        if place > min(together[place]):
            continue
        clips = [clip for other in sorted(together[place]) for clip in equal[hashes[other]]]
        files, splits, note = (
            tuple(clip.path for clip in clips),
            _ordered(c.split for c in clips),
            f"{least[place]:.2f}",
        )
        if len(splits) > 1:
            leaks.append((files, f"{' and '.join(splits)}, alike to {note}"))
        else:
            repeats.append((files, f"{len(files)} files, alike to {note}"))
    text = "What moves in them moves in the same places at the same times, so one seems to be encoded anew from another"
    return [
        _finding("near copies in two splits", True, f"{text}: look at them, and keep one, or all in one split.", leaks),
        _finding("near copies", False, f"{text}.", repeats),
    ]


def _torn_groups(clips: Sequence[Clip]) -> list[tuple[tuple[str, ...], str]]:
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.group:
            groups[clip.group].append(clip)
    torn = []
    for name, members in groups.items():
        splits = _ordered(clip.split for clip in members)
        if len(splits) > 1:
            firsts = tuple(next(clip.path for clip in members if clip.split == split) for split in splits)
            torn.append((firsts, f"{name}: {' and '.join(splits)}"))
    return torn


def _unlearnt(manifest: Manifest) -> list[str]:
    """Classes that only val or test have, where there is a train split."""
    trained = {clip.label for clip in manifest.clips if clip.split == "train"}
    others = {clip.label for clip in manifest.clips if clip.split in ("val", "test") and clip.label >= 0}
    return [manifest.classes[label] for label in sorted(others - trained)] if trained else []


def _one_sided(classes: Sequence[str]) -> list[str]:
    """Classes that keep a training from flipping clips, since a flip would give them another name."""
    if not classes or flip_labels(classes, {}) is not None:
        return []
    sided = [name for name in classes if flip_labels([name], {}) is None]
    return [name for name in sided if all(flip_labels([name, other], {}) is None for other in sided if other != name)]


def _rare(clips: Sequence[Clip], classes: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    counts = Counter(clip.label for clip in clips if clip.label >= 0 and clip.split == "train")
    if not counts or max(counts.values()) < UNBALANCED * min(counts.values()):
        return []
    most = max(counts.values())
    return [
        ((), f"{classes[label]}: {count} clips, the largest class has {most}")
        for label, count in sorted(counts.items(), key=lambda item: item[1])
        if most >= UNBALANCED * count
    ]


def _one_a_class(clips: Sequence[Clip], good: Sequence[bool]) -> list[Clip]:
    """The first good clip of each class, of at most `4 * SHOWN` classes; without classes, as many clips."""
    chosen: dict[Any, Clip] = {}
    for clip, whole in zip(clips, good, strict=True):
        if whole and len(chosen) < 4 * SHOWN:
            chosen.setdefault(clip.label if clip.label >= 0 else clip.path, clip)
    return list(chosen.values())


def _ordered(splits: Iterable[str]) -> list[str]:
    found = set(splits)
    return [split for split in ("train", "val", "test") if split in found]


def _jpeg(pixels: np.ndarray) -> bytes:
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG", quality=75)
    return memory.getvalue()


def _cell(value: Any) -> Any:
    """A fact as a table holds it: yes and no, numbers without a tail of digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value
