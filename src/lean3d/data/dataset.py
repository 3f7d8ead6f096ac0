"""Labelled clips as PyTorch data sets: a list of files, and a rule that turns one of them into a tensor.

A training clip follows from `(seed, epoch, index)` alone, whichever worker, process or batch it is made in:

    (epoch, index) -> file -> reader -> frame indices -> frames -> crop, flip, colours -> uint8 (C, T, h, w)
                       ^                                    |
                       +------ another clip instead <-------+ can't be decoded: reported in `Sample.bad`
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lean3d.config import AugmentConfig, DataConfig, InputSpec, ViewsConfig
from lean3d.data.manifest import Clip
from lean3d.data.readers import Reader, open_video
from lean3d.data.sampling import jittered_indices, segment_indices, view_indices
from lean3d.data.shards import ShardCache
from lean3d.data.transforms import Appearance, TestTransform, TrainTransform
from lean3d.errors import DataError, DecodeError, TooManyBadFilesError

MAX_TRIES = 10
"""Clips that are tried for one place in a training batch before it is given up."""


class BadFile(NamedTuple):
    """A file that could not be decoded, and why in a short phrase."""

    path: str
    reason: str


class Sample(NamedTuple):
    """What a data set gives for one key.

    Attributes:
        clip: Training: uint8 (C, T, h, w), or None where no file in a row of `MAX_TRIES` could be decoded. Test: uint8
            (V, C, T, h, w), or None where the file is bad.
        label: The class, after a flip that exchanges labels; -1 where there is none.
        index: The place in the data set of the clip that is really shown.
        bad: The files that failed on the way.
    """

    clip: torch.Tensor | None
    label: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody calls here
    bad: tuple[BadFile, ...]


class ClipTable:
    """Paths and labels of many clips in three arrays.

    A list of Python objects would be copied, page by page, into every forked loader process, because reading an object
    writes its reference count; arrays stay shared.
    """

    def __init__(self, clips: Sequence[Clip]):
        names = [clip.path.encode("utf-8", "surrogateescape") for clip in clips]
        self.labels = np.array([clip.label for clip in clips], dtype=np.int64)
        self._ends = np.cumsum([0] + [len(name) for name in names], dtype=np.int64)
        self._text = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The file of clip `index`."""
        text = self._text[self._ends[index] : self._ends[index + 1]]
        return text.tobytes().decode("utf-8", "surrogateescape")

    def label(self, index: int) -> int:
        """The class of clip `index`, -1 where it has none."""
        return int(self.labels[index])


class TrainClips(Dataset[Sample]):
    """Random clips to train on, indexed by a key `(epoch, index)`.

    A file that can't be decoded is reported and another clip takes its place: one of the same class while there are
    untried ones, else any. Verdicts on files are remembered, so that each file is checked once per process; what
    takes a bad one's place does not depend on that memory.

    Args:
        clips: Clips of one split. Unlabelled ones (label -1) are left out, so indices count the labelled ones.
        classes: Names of all classes, for the flip that knows about labels.
        data: Sampling and the frames' name template.
        spec: The clip that the model wants.
        augment: What happens to a clip.
        seed: The run's seed, at least 0.
        whole: Whether clips get their appearance here; else `appearance_of_batch` gives it to them, on a GPU.

    Raises:
        DataError: No clip has a label.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        classes: Sequence[str],
        data: DataConfig,
        spec: InputSpec,
        augment: AugmentConfig,
        seed: int,
        *,
        whole: bool = True,
    ):
        self.table = ClipTable([clip for clip in clips if clip.label >= 0])
        if not len(self.table):
            raise DataError(f"there is no labelled clip to train on ({len(clips)} without a label)")
        self.data = data
        self.spec = spec
        self.augment = augment
        self.seed = seed
        self.whole = whole
        self.transform = TrainTransform(augment, spec, tuple(classes))
        self._opener = _Opener(data)
        self.shards = self._opener.shards

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, T, h, w) of every sample's clip."""
        return (self.spec.channels, self.spec.num_frames, *self.spec.size)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        bad: list[BadFile] = []
        tried: list[int] = []
        for attempt in range(min(MAX_TRIES, len(self))):
            # A generator of its own for each attempt: how much a failed one drew must not matter.
            generator = _generator(self.seed, epoch, index, attempt)
            now = index if attempt == 0 else self._replacement(index, tried, generator)
            try:
                clip, label = self._load(epoch, now, generator)
            except DecodeError as error:
                bad.append(BadFile(self.table.path(now), error.reason))
                tried.append(now)
            else:
                return Sample(clip, label, now, tuple(bad))
        return Sample(None, -1, index, tuple(bad))

    def _load(self, epoch: int, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        spec = self.spec

        def choose(num_video_frames: int) -> torch.Tensor:
            if self.data.sampling == "segments":
                return segment_indices(num_video_frames, spec.num_frames, generator)
            return jittered_indices(
                num_video_frames,
                spec.num_frames,
                spec.sampling_rate,
                generator,
                speed=self.augment.speed,
                time_shift=self.augment.time_shift,
            )

        pixels = self._opener.frames(
            self.table.path(index), choose, lambda size: decode_size(size, spec, self.augment), spec.channels
        )
        clip, label = self.transform.place(pixels, self.table.label(index), generator)
        if self.whole:
            clip = self.transform.appearance(clip, appearance_generator(self.seed, epoch, index))
        return clip, label

    def _replacement(self, index: int, tried: list[int], generator: torch.Generator) -> int:
        """An untried clip, of the same class as clip `index` where there is one."""
        pool = np.setdiff1d(np.flatnonzero(self.table.labels == self.table.labels[index]), tried)
        if not len(pool):
            pool = np.setdiff1d(np.arange(len(self)), tried)
        return int(pool[int(torch.randint(len(pool), (), generator=generator))])


class TestClips(Dataset[Sample]):
    """The views of every video, nothing random, indexed by the video's place.

    A bad file gives a `Sample` without a clip; it is not replaced, since a test counts each video once. Unlabelled
    videos are kept: they get scores, but no part in any accuracy.

    Args:
        clips: The videos of one split.
        data: Sampling and the frames' name template.
        spec: The clip that the model wants.
        views: num_clips x num_crops = V views of each video.
    """

    __test__ = False  # its name looks like a test case's to pytest

    def __init__(self, clips: Sequence[Clip], data: DataConfig, spec: InputSpec, views: ViewsConfig):
        self.table = ClipTable(clips)
        self.data = data
        self.spec = spec
        self.views = views
        self.transform = TestTransform(spec, views.num_crops, views.crop_area)
        self._opener = _Opener(data)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, C, T, h, w) of every sample's clip."""
        spec = self.spec
        return (self.views.num_clips * self.views.num_crops, spec.channels, spec.num_frames, *spec.size)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.table.path(index), self.table.label(index)
        try:
            return Sample(self._load(path), label, index, ())
        except DecodeError as error:
            return Sample(None, label, index, (BadFile(path, error.reason),))

    def _load(self, path: str) -> torch.Tensor:
        spec, views = self.spec, self.views

        def choose(num_video_frames: int) -> torch.Tensor:
            return view_indices(
                num_video_frames, spec.num_frames, spec.sampling_rate, views.num_clips, self.data.sampling
            ).flatten()

        pixels = self._opener.frames(
            path, choose, lambda size: decode_size(size, spec, crop_area=views.crop_area), spec.channels
        )
        clips = pixels.unflatten(0, (views.num_clips, spec.num_frames))  # (num_clips, T, H, W, C)
        return torch.cat([self.transform(clip) for clip in clips])


class _Opener:
    """Opens files and remembers, within its process, which are bad, which were found whole, and frames of some."""

    def __init__(self, data: DataConfig):
        self.data = data
        self.shards = ShardCache(data.shard_cache, data.shard_cache_gb)
        self._verdicts: dict[int, str | None] = {}  # by the path's hash: paths themselves would take much memory
        self._kept: dict[int, torch.Tensor] = {}
        self._room = data.cache_gb * 1e9
        """Bytes that may still be kept. What is kept stays: an epoch asks once for each file, none is likelier."""

    def frames(
        self,
        path: str,
        choose: Callable[[int], torch.Tensor],
        shrink: Callable[[tuple[int, int]], tuple[int, int] | None],
        channels: int,
    ) -> torch.Tensor:
        """Frames of a file, decoded, or kept from the last time.

        Args:
            path: The file.
            choose: From the video's length to the numbers of the frames that are wanted, int64 (T,).
            shrink: From the video's height and width to the size of the frames (None: as they are); for one file it
                is always the same.
            channels: 3 or 1.

        Returns:
            uint8 (T, H, W, C).
        """
        kept = self._kept.get(hash(path))
        if kept is not None:
            return kept[choose(len(kept))]
        with self.open(path) as reader:
            indices, size = choose(reader.num_frames), shrink(reader.size)
            room = math.prod((reader.num_frames, *(size or reader.size), channels))
            if room > self._room:
                return reader.get_frames(indices.tolist(), size=size, channels=channels)
            # A copy, since the reader's memory may come from a larger video and would stay as large.
            kept = reader.get_frames(range(reader.num_frames), size=size, channels=channels).clone()
        self._kept[hash(path)] = kept
        self._room -= room
        return kept[indices]

    def open(self, path: str) -> Reader:
        """The reader of a file, which is decoded whole the first time if `DataConfig.check_files` is set."""
        key = hash(path)
        verdict = self._verdicts.get(key)
        if verdict is not None:
            raise DecodeError(path, verdict)
        try:
            reader = open_video(
                path,
                self.data.frame_template,
                decoder=self.data.decoder,
                seconds=self.data.decode_seconds,
                shards=self.shards,
            )
            if self.data.check_files and key not in self._verdicts:
                reader.check()  # closes the reader where it fails
        except DecodeError as error:
            self._verdicts[key] = error.reason
            raise
        self._verdicts[key] = None
        return reader


class BadFileLog:
    """Counts the files that could not be decoded and stops a run in which they are too many.

    Args:
        num_files: Files in the data set.
        max_share: The share of them that may be bad (`DataConfig.max_bad_share`).
    """

    def __init__(self, num_files: int, max_share: float):
        self.num_files = num_files
        self.max_share = max_share
        self.files: dict[str, tuple[str, int]] = {}
        """From each bad path to its reason and how often it was met."""

    def __len__(self) -> int:
        """Different files that are bad."""
        return len(self.files)

    def add(self, bad: Iterable[BadFile]) -> None:
        """Count the bad files of a batch.

        Raises:
            TooManyBadFilesError: More than `max_share` of the files are bad by now.
        """
        for path, reason in bad:
            self.files[path] = (reason, self.files.get(path, ("", 0))[1] + 1)
        if len(self) > self.max_share * self.num_files:
            path, (reason, _) = next(iter(self.files.items()))
            raise TooManyBadFilesError(
                f"{len(self)} of {self.num_files} files can't be decoded, more than the allowed share of "
                f"{self.max_share:.0%}; the first is {path}: {reason}. Mend or remove them, or allow more with "
                f"--data.max-bad-share {min(1.0, math.ceil(len(self) / self.num_files * 20) / 20):g}"
            )

    def write_csv(self, path: str | Path) -> None:
        """Write `path,reason,count`, one row a file, sorted by path."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "reason", "count"])
            writer.writerows([name, *self.files[name]] for name in sorted(self.files))


def decode_size(
    frame: tuple[int, int], spec: InputSpec, augment: AugmentConfig | None = None, *, crop_area: float = 1.0
) -> tuple[int, int] | None:
    """The size at which the decoder should hand over frames, so that no pixel is made that the crop throws away.

    The frame keeps its shape and shrinks until the smallest crop that can be drawn is as large as the model's input:
    no crop enlarges what the decoder shrank, and a large video costs little more than a small one.

    >>> decode_size((1080, 1920), InputSpec(size=(112, 112)))
    (112, 200)

    Args:
        frame: Height and width of the video.
        spec: Has the size of the model's input, and the region of the frame that it shows.
        augment: The training's crops; None: a test's.
        crop_area: Area of a test's crops, relative to the largest boxes of the input's shape.

    Returns:
        Height and width, or None (as they are) where shrinking would save little.
    """
    left, top, right, bottom = spec.region
    height = (bottom - top) * frame[0] / spec.size[0]  # of the region, in inputs, not in pixels
    width = (right - left) * frame[1] / spec.size[1]
    smallest = min(height, width) * math.sqrt(crop_area)
    if augment is not None and augment.crop == "multi_scale":
        smallest *= min(augment.scales)
    elif augment is not None and augment.crop == "random_resized":
        side = math.sqrt(min(augment.area) * height * width)
        narrow, wide = min(*augment.aspect, 1.0), max(*augment.aspect, 1.0)
        smallest = min(side / math.sqrt(wide), side * math.sqrt(narrow), height * narrow, width / wide)
    if smallest < 1.25:
        return None
    return math.ceil(frame[0] / smallest - 1e-6), math.ceil(frame[1] / smallest - 1e-6)


def appearance_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """What decides how a clip looks in an epoch, wherever that is done.

    Args:
        seed: The run's.
        epoch: From 0.
        index: The clip's place in the data set.
    """
    return _generator(seed, epoch, index, MAX_TRIES)  # attempts have smaller numbers


def appearance_of_batch(
    clips: torch.Tensor, indices: torch.Tensor, appearance: Appearance, seed: int, epoch: int
) -> torch.Tensor:
    """Give clips, which come from a `TrainClips` without them, their looks.

    Args:
        clips: uint8 (N, C, T, h, w), on any device.
        indices: int64 (N,), their places in the data set.
        appearance: As in the data set.
        seed: The run's.
        epoch: From 0.

    Returns:
        uint8 (N, C, T, h, w): what a whole `TrainClips` gives.
    """
    pairs = zip(clips, indices.tolist(), strict=True)
    changed = [appearance(clip, appearance_generator(seed, epoch, index)) for clip, index in pairs]
    return torch.stack(changed) if changed else clips


def _generator(*words: int) -> torch.Generator:
    """A generator that follows from these numbers; neighbours are unrelated to each other."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
