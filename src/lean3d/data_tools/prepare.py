"""Writing a data set anew, in the form that trainings read fastest.

    clip -> decode -> shrink -> encode with many keyframes -> decode again, compare -> OUT/the same path.mp4
                                                                                    or packed: OUT/train-000000.tar

A file stands under its final name only when it was compared, and prepared.csv then has a line about it; so a run that
was killed goes on with the next file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import av
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lean3d.config import DataConfig
from lean3d.data.dataset import BadFile
from lean3d.data.drawing import ON_EVERY_CPU
from lean3d.data.isolate import call_many
from lean3d.data.manifest import Clip, Manifest
from lean3d.data.readers import Reader, VideoReader, open_video
from lean3d.data.shards import Member
from lean3d.data_tools.check import read_clips
from lean3d.errors import BackendError, ConfigError, DataError, DecodeError

Codec = Literal["h264", "mjpeg"]

ENCODERS: dict[str, tuple[str, str]] = {"h264": ("libx264", "yuv420p"), "mjpeg": ("mjpeg", "yuvj420p")}
"""FFmpeg's encoder of each codec, and the pixel format that it is given."""
QUALITY = {"h264": 20, "mjpeg": 4}
"""H.264's crf and MJPEG's quantiser, where nothing else is said: hardly a loss to be seen."""

SETTINGS_FILE = "prepare.json"
JOURNAL_FILE = "prepared.csv"
CLIPS_FILE = "clips.csv"
INDEX_FILE = "index.csv"
BAD_FILE = "bad_files.csv"
LOOSE = ".clips"
"""Where clips wait until they are packed."""

_CHUNK = 32  # frames in memory at a time
_MEMORY = 4 << 30
_ANNOTATIONS = frozenset({".csv", ".json", ".list", ".md", ".tsv", ".txt"})


@dataclass(frozen=True)
class Prepared:
    """What `run` left.

    Attributes:
        out: The folder.
        root: What a training is given: the folder, or index.csv.
        files: Clips that are there now.
        kept: Those of them that were there from an earlier run.
        bad: Clips that could not be decoded; they are in bad_files.csv.
        bytes_before: Of the clips that are there now, in the old set.
        bytes_after: In the new one.
    """

    out: Path
    root: Path
    files: int
    kept: int
    bad: tuple[BadFile, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Encoded:
    """What became of one clip."""

    ok: bool
    reason: str | None
    num_frames: int = 0
    size_bytes: int = 0


class Job(NamedTuple):
    """A clip to encode: from which file or folder, to which file."""

    source: str
    target: str
    name: str
    """Of the new file, from the folder that clips are in."""


def run(
    config: DataConfig,
    out: str | Path,
    *,
    short_side: int = 256,
    gop: int = 12,
    codec: Codec = "h264",
    quality: int | None = None,
    shards: bool = False,
    shard_mb: float = 64.0,
    workers: int | None = None,
    seconds: float = 600.0,
    quiet: bool = False,
) -> Prepared:
    """Encode every clip of a data set anew, each compared with its source; nothing of the old set is touched.

    Every clip keeps its number of frames and their times; it is turned as players turn it, and loses its sound. Labels,
    splits and groups of all clips go to clips.csv, in shards to index.csv and beside each clip; files of annotations
    are copied to the folder annotations.

    Args:
        config: Where the clips are and how labels are written down.
        out: A new or empty folder, or one that a run with the same settings began, which then goes on.
        short_side: Largest length of the shorter side in pixels, at least 16; nothing is enlarged.
        gop: Frames from one keyframe to the next, at least 1.
        codec: "h264", or "mjpeg", which every FFmpeg can write.
        quality: The encoder's quantiser; default: `QUALITY`.
        shards: Pack the clips into tar archives.
        shard_mb: Megabytes of a shard, above 0.
        workers: Processes; default: one for each core.
        seconds: Longest time for one clip.
        quiet: No progress bar.

    Raises:
        ConfigError: A number out of its range, or `out` holds something else, or is the data set itself.
        BackendError: This PyAV has no such encoder.
        DataError: There is nothing to prepare, or no clip could be decoded.
        OSError: The disk is full, or `out` can't be written.
    """
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    for name, value, least in (("short_side", short_side, 16), ("gop", gop, 1), ("workers", workers, 1)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if shard_mb <= 0 or seconds <= 0:
        raise ConfigError(f"shard_mb and seconds must be above 0, got {shard_mb} and {seconds}")
    if ENCODERS[codec][0] not in av.codecs_available:
        raise BackendError(f"this PyAV has no encoder {ENCODERS[codec][0]}; type --codec mjpeg, which every one has")
    out = Path(out).expanduser().absolute()
    manifest = read_clips(config)
    _check_apart(out, manifest)
    settings: dict[str, Any] = {
        "short_side": short_side,
        "gop": gop,
        "codec": codec,
        "quality": QUALITY[codec] if quality is None else quality,
    }
    _claim(out, {"format": 1, "source": manifest.source, **settings, "shards": shards})
    folder = out / LOOSE if shards and not (out / INDEX_FILE).exists() else out
    jobs = _jobs(manifest, folder)
    if (out / INDEX_FILE).exists():
        return _packed_before(out, manifest)
    before = _journal(out, folder)
    todo = [job for job in jobs if before.get(job.name) != _stamp(job.source)]
    sizes = {job.source: _size(job.source) for job in jobs}
    bad: dict[str, BadFile] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar, (out / JOURNAL_FILE).open("a", newline="") as file:
        task = bar.add_task("clips", total=len(jobs), completed=len(jobs) - len(todo))
        journal = csv.writer(file, lineterminator="\n")
        calls = call_many(
            "lean3d.data_tools.prepare:encode",
            todo,
            workers,
            seconds=seconds,
            memory=_MEMORY,
            frame_template=config.frame_template,
            **settings,
        )
        with contextlib.closing(calls):
            for job, answer in calls:
                if isinstance(answer, Encoded) and answer.ok:
                    journal.writerow([job.name, *_stamp(job.source), answer.num_frames, answer.size_bytes])
                    file.flush()
                elif answer.reason.startswith(_DISK):
                    raise OSError(f"{job.target} can't be written: {answer.reason.removeprefix(_DISK)}")
                else:
                    bad[job.source] = BadFile(job.source, answer.reason)
                bar.update(task, advance=1, description=f"clips ({len(bad)} bad)" if bad else "clips")
    good = [(clip, job) for clip, job in zip(manifest.clips, jobs, strict=True) if job.source not in bad]
    _write_bad(out, bad.values())
    if not good:
        first = next(iter(bad.values()))
        raise DataError(f"none of {len(jobs)} clips could be decoded; the first is {first.path}: {first.reason}")
    _copy_annotations(manifest, config, out)
    after = sum(Path(job.target).stat().st_size for _, job in good)
    if shards:
        _pack(out, manifest, good, round(shard_mb * 1e6), quiet)
    else:
        _write_table(out / CLIPS_FILE, manifest, ((clip, job.name) for clip, job in good))
    return Prepared(
        out,
        out / INDEX_FILE if shards else out,
        len(good),
        len(jobs) - len(todo),
        tuple(bad.values()),
        sum(sizes[job.source] for _, job in good),
        after,
    )


# ---- one clip, in a child process

_DISK = "disk: "


def encode(
    job: Job, *, short_side: int, gop: int, codec: Codec, quality: int, frame_template: str = "{:05d}.jpg"
) -> Encoded:
    """Write one clip anew and compare it with its source; it appears at its target when it is whole.

    Returns:
        What became of it. A full disk is not the clip's fault: its reason then begins with "disk: ".
    """
    target = Path(job.target)
    unfinished = target.with_name(f".{target.name}.part")
    try:
        with open_video(job.source, frame_template) as reader:
            reader.check()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _encode(reader, unfinished, short_side, gop, codec, quality)
                _compare(reader, unfinished)
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)
            return Encoded(True, None, reader.num_frames, target.stat().st_size)
    except DecodeError as error:
        return Encoded(False, error.reason)
    except MemoryError:
        return Encoded(False, "needs too much memory")
    except (av.FFmpegError, OSError) as error:  # of the encoder and the disk: the reader's errors are DecodeErrors
        return Encoded(False, f"{_DISK}{error.strerror or error}")


def _encode(reader: Reader, path: Path, short_side: int, gop: int, codec: str, quality: int) -> None:
    encoder, pixels = ENCODERS[codec]
    scale = min(1.0, short_side / min(reader.size))
    height, width = (max(2, round(side * scale / 2) * 2) for side in reader.size)  # yuv420p needs even sides
    base = reader.time_base if isinstance(reader, VideoReader) else 1 / _rate(reader)
    times = [round(Fraction(seconds) / base) for seconds in reader.timestamps]  # exact: all are multiples of it
    options = {"crf": str(quality), "g": str(gop), "preset": "medium", **ON_EVERY_CPU}
    if codec == "mjpeg":
        options = {"flags": "qscale", "global_quality": str(118 * quality)}  # in units of FFmpeg's lambda
    with av.open(str(path), "w", format="mp4") as container:
        stream = cast(av.VideoStream, container.add_stream(encoder, rate=_rate(reader), options=options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        for first in range(0, reader.num_frames, _CHUNK):
            numbers = range(first, min(first + _CHUNK, reader.num_frames))
            for number, picture in zip(numbers, reader.get_frames(numbers, size=(height, width)).numpy(), strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = times[number], base
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _rate(reader: Reader) -> Fraction:
    return max(Fraction(reader.fps).limit_denominator(1001), Fraction(1, 100))


def _compare(reader: Reader, path: Path) -> None:
    """See that the new file has the old one's frames at the old one's times, and that all can be decoded.

    Raises:
        DecodeError: It has not: the encoder or its container can't hold this video.
    """
    with open_video(path) as new:
        new.check()
        if new.num_frames != reader.num_frames:
            raise DecodeError(path, f"has {new.num_frames} frames after encoding, {reader.num_frames} before")
        late = float(np.abs(np.asarray(new.timestamps) - np.asarray(reader.timestamps)).max())
        if late > 1e-6:
            raise DecodeError(path, f"has frames that are {late:.3g} s off after encoding")


# ---- what is to be done, and what was done before


def _check_apart(out: Path, manifest: Manifest) -> None:
    source = Path(manifest.source).absolute()
    folder = source.parent if source.is_file() else source
    inside = [clip.path for clip in manifest.clips if out.resolve() in Path(clip.path).resolve().parents]
    if inside or out.resolve() == folder.resolve():
        raise ConfigError(f"{out} holds the clips themselves; name a folder apart from them for the new ones")
    if folder.resolve() in out.resolve().parents:
        raise ConfigError(f"{out} lies in the data set {folder}, which would then hold every clip twice; name another")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into an empty folder, or find the same ones there."""
    file = out / SETTINGS_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{key} {before[key]} (now {value})" for key, value in settings.items() if before[key] != value]
        if changed:
            raise ConfigError(f"{out} was begun with {', '.join(changed)}: type that, or name a new folder")
        return
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and nothing that prepare began; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _jobs(manifest: Manifest, folder: Path) -> list[Job]:
    """For each clip its new file: the same path below the common folder, as mp4."""
    paths = [Path(clip.path) for clip in manifest.clips]
    source = Path(manifest.source)
    common = source if source.is_dir() and all(source in path.parents for path in paths) else None
    base = common or Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(base) for path in paths]
    plain = [
        name.parent / f"{name.name if path.is_dir() else name.stem}.mp4"
        for name, path in zip(names, paths, strict=True)
    ]
    count = Counter(plain)  # a.avi beside a.mov would be one file
    new = [str(short if count[short] == 1 else f"{name}.mp4") for short, name in zip(plain, names, strict=True)]
    return [Job(str(path), str(folder / name), name) for path, name in zip(paths, new, strict=True)]


def _stamp(source: str) -> tuple[str, str]:
    """Size and time of a file, by which one that changed is told from the one that was encoded."""
    try:
        stat = Path(source).stat()
        return str(stat.st_size), str(stat.st_mtime_ns)
    except OSError:
        return "", ""


def _journal(out: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """The stamps of sources whose new files are there, by the new files' names."""
    done: dict[str, tuple[str, str]] = {}
    file = out / JOURNAL_FILE
    if not file.is_file():
        return done
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.reader(lines):
            if len(row) == 5:  # a kill may have cut the last line off
                target = folder / row[0]
                if target.is_file() and str(target.stat().st_size) == row[4]:
                    done[row[0]] = row[1], row[2]
    return done


def _size(source: str) -> int:
    path = Path(source)
    files = list(path.iterdir()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- labels, lists, shards


def _write_table(path: Path, manifest: Manifest, rows: Iterable[tuple[Clip, str]]) -> None:
    """Write path,label,split,group; the file appears when it is whole."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "split", "group"])
        for clip, name in rows:
            writer.writerow([name, manifest.classes[clip.label] if clip.label >= 0 else "", clip.split, clip.group])
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write_bad(out: Path, bad: Iterable[BadFile]) -> None:
    with (out / BAD_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows(sorted(bad))


def _copy_annotations(manifest: Manifest, config: DataConfig, out: Path) -> None:
    """Keep lists and texts that lie in the old set, at most one folder deep, as they are, in a folder of their own."""
    root = Path(config.root).expanduser()
    files = [root] if root.is_file() else [*root.glob("*"), *root.glob("*/*")]
    for file in files:
        if file.suffix.lower() in _ANNOTATIONS and file.is_file():
            copy = out / "annotations" / (file.name if root.is_file() else file.relative_to(root))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def _pack(out: Path, manifest: Manifest, good: list[tuple[Clip, Job]], shard_bytes: int, quiet: bool) -> None:
    """Pack the clips of each split, shuffled, into its shards; then write index.csv, and remove the loose files."""
    for file in out.glob("*.tar"):  # of a packing that was killed
        file.unlink()
    order = np.random.default_rng(0).permutation(len(good)).tolist()
    rows: list[tuple[Clip, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar:
        task = bar.add_task("packing", total=len(good))
        for split in sorted({clip.split for clip, _ in good}):
            members = [good[place] for place in order if good[place][0].split == split]
            first = 0
            for shard, some in enumerate(_portions(members, shard_bytes)):
                name = f"{split or 'clips'}-{shard:06d}.tar"
                rows += zip([clip for clip, _ in some], _write_shard(out / name, manifest, some, first), strict=True)
                first += len(some)
                bar.advance(task, len(some))
    _write_table(out / INDEX_FILE, manifest, sorted(rows, key=lambda row: row[1]))
    shutil.rmtree(out / LOOSE)


def _portions(members: list[tuple[Clip, Job]], shard_bytes: int) -> Iterator[list[tuple[Clip, Job]]]:
    """Parts of about `shard_bytes`, in order."""
    some: list[tuple[Clip, Job]] = []
    size = 0
    for clip, job in members:
        some.append((clip, job))
        size += Path(job.target).stat().st_size
        if size >= shard_bytes:
            yield some
            some, size = [], 0
    if some:
        yield some


def _write_shard(path: Path, manifest: Manifest, members: list[tuple[Clip, Job]], first: int) -> list[str]:
    """Write one shard, which appears when it is whole.

    Returns:
        The paths of its clips, from its folder on; see `lean3d.data.shards`.
    """
    unfinished = path.with_name(f".{path.name}.part")
    paths = []
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, (clip, job) in enumerate(members, first):
                label = manifest.classes[clip.label] if clip.label >= 0 else None
                facts = {"path": job.name, "label": label, "cls": clip.label, "split": clip.split, "group": clip.group}
                content = Path(job.target).read_bytes()
                offset = _add(archive, f"{number:08d}.mp4", content)
                _add(archive, f"{number:08d}.json", json.dumps(facts, ensure_ascii=False).encode())
                paths.append(Member(path.name, offset, len(content), Path(job.name).as_posix()).path)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return paths


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file, and tell where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    start = archive.offset
    archive.addfile(info, io.BytesIO(content))
    return start + tarfile.BLOCKSIZE  # USTAR: a header is one block


def _packed_before(out: Path, manifest: Manifest) -> Prepared:
    """A set of shards that is complete: once packed, the loose files are gone."""
    with (out / INDEX_FILE).open(newline="", encoding="utf-8") as file:
        files = sum(1 for _ in csv.reader(file)) - 1
    with (out / BAD_FILE).open(newline="", encoding="utf-8") as file:
        bad = tuple(BadFile(*row) for row in list(csv.reader(file))[1:])
    if files + len(bad) != len(manifest.clips):
        raise ConfigError(
            f"{out} is complete with {files} clips, and {manifest.source} has {len(manifest.clips)} by now; name a new "
            f"folder"
        )
    size = sum(file.stat().st_size for file in out.glob("*.tar"))
    good = {clip.path for clip in manifest.clips} - {file.path for file in bad}
    shutil.rmtree(out / LOOSE, ignore_errors=True)  # where a kill came just before it
    return Prepared(out, out / INDEX_FILE, files, files, bad, sum(map(_size, good)), size)
