"""Predicting: what is to be seen in a new video, over all of it and in each part.

    file, folder of pictures, array -> reader -> windows that slide over it -> model -> softmax -> top k
                                       [  window 1  ]
                                                     [  window 2  ]
                                                          [  window 3  ]   the last one ends at the video's end

A long video is read once, from start to end, and only some windows are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lean3d import checkpoint as checkpoints
from lean3d import fast as compiler
from lean3d.config import WHOLE_FRAME, DataConfig, Region
from lean3d.data.annotations import find_videos
from lean3d.data.dataset import BadFile, decode_size
from lean3d.data.drawing import VideoWriter, check_name, draw_region, draw_scores, drawn_size, score_bars
from lean3d.data.readers import ArrayReader, Reader, open_video
from lean3d.data.sampling import clip_span, view_indices, window_indices
from lean3d.data.transforms import TestTransform, normalize
from lean3d.errors import ConfigError, DataError, DecodeError

WINDOWS_AT_ONCE = 8
"""Windows that are in memory, and in one pass through the model, at a time."""

Frames = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a span of video.

    Attributes:
        labels: Names of the classes, best first.
        scores: Their probabilities in [0, 1].
        start: Where the span begins, in seconds.
        end: Where it ends, in seconds.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    start: float
    end: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Prediction:
        """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
        return cls(tuple(values["labels"]), tuple(values["scores"]), values["start"], values["end"])


@dataclass(frozen=True)
class VideoPrediction:
    """What a model says about one video.

    Attributes:
        path: The file; "array" for frames from memory.
        overall: For the whole video, from the mean of the windows' probabilities.
        clips: For each window, in order of time.
    """

    path: str
    overall: Prediction
    clips: tuple[Prediction, ...]

    def to_json(self, indent: int | None = 2) -> str:
        """As JSON text, which `from_json` reads back exactly."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> VideoPrediction:
        """The prediction in a JSON text that `to_json` wrote."""
        values = json.loads(text)
        clips = tuple(Prediction.from_dict(clip) for clip in values["clips"])
        return cls(values["path"], Prediction.from_dict(values["overall"]), clips)

    def table(self) -> Table:
        """The whole video's classes, then the best class of each window, for a terminal."""
        table = Table("seconds", "class", "score", title=self.path, title_justify="left")
        for label, score in zip(self.overall.labels, self.overall.scores, strict=True):
            table.add_row("whole video", label, f"{score:.3f}")
        if len(self.clips) > 1:
            table.add_section()
            for clip in self.clips:
                table.add_row(f"{clip.start:.2f} - {clip.end:.2f}", clip.labels[0], f"{clip.scores[0]:.3f}")
        return table


@dataclass(frozen=True)
class Predictions:
    """What a model says about the videos of a folder, or about one file.

    Attributes:
        videos: One for each video that could be decoded, in order of their paths.
        bad_files: The others.
    """

    videos: tuple[VideoPrediction, ...]
    bad_files: tuple[BadFile, ...] = ()

    def to_json(self, indent: int | None = 2) -> str:
        """As JSON text: an object with the lists `videos` and `bad_files`."""
        content = {
            "videos": [asdict(video) for video in self.videos],
            "bad_files": [file._asdict() for file in self.bad_files],
        }
        return json.dumps(content, indent=indent, ensure_ascii=False)

    def table(self) -> Table:
        """One row a video with its best class, and the bad files at the end, for a terminal."""
        if len(self.videos) == 1 and not self.bad_files:
            return self.videos[0].table()
        table = Table("video", "class", "score", caption_justify="left")
        for video in self.videos:
            table.add_row(video.path, video.overall.labels[0], f"{video.overall.scores[0]:.3f}")
        if self.bad_files:
            table.caption = f"{len(self.bad_files)} could not be decoded:"
            for path, reason in self.bad_files:
                table.caption += f"\n{path}: {reason}"
        return table


class Predictor:
    """A model that is ready for new videos; made by `load_model`.

    Args:
        checkpoint: What `checkpoint.load` gave.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto".
        fast: Compile the model for this machine's CPU when the first clip comes, see `lean3d.fast.compile`.

    Raises:
        ConfigError: `fast` on another device.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, device: str = "auto", *, fast: bool = False):
        self.device = compiler.device(device) if fast else checkpoints.device(device)
        self.model = checkpoint.model.eval().to(self.device)
        self._compiled = compiler.compile(self.model, quiet=True) if fast else None
        self.spec = checkpoint.model.input_spec
        self.classes = checkpoint.classes
        data = checkpoint.recipe.data if checkpoint.recipe else DataConfig()
        self.crop_area = checkpoint.recipe.test.crop_area if checkpoint.recipe else 1.0
        self.sampling = data.sampling
        self.frame_template = data.frame_template

    def predict(
        self,
        source: str | Path | Frames,
        *,
        top_k: int = 5,
        stride: int | None = None,
        fps: float = 25.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> VideoPrediction:
        """Say what is to be seen in one video.

        A model that was trained with one frame from each part of a video (`sampling="segments"`) sees the whole video
        as one window.

        Args:
            source: A video file, a folder of pictures, or uint8 frames (T, H, W, C) as an array or tensor.
            top_k: Classes to name, at most; at least 1.
            stride: Frames of the video from one window's start to the next; default: a window's length, so that
                windows touch and don't overlap.
            fps: Frames per second of an array.
            progress: Is told how many windows are done, and how many there are.

        Returns:
            The classes of the whole video and of each window.

        Raises:
            DecodeError: The file can't be decoded.
            ConfigError: `top_k` or `stride` is below 1, or the frames have another shape or type.
        """
        if top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}")
        with self._open(source, fps) as reader:
            windows = self._windows(reader.num_frames, stride)
            times, frame = reader.timestamps, 1 / reader.fps
            total = torch.zeros(len(self.classes), dtype=torch.float64)
            clips: list[Prediction] = []
            for chunk, probabilities in self._scores(reader, windows):
                total += probabilities.sum(0)
                for indices, row in zip(chunk.tolist(), probabilities, strict=True):
                    clips.append(self._best(row, top_k, times[indices[0]], times[indices[-1]] + frame))
                if progress is not None:
                    progress(len(clips), len(windows))
            overall = self._best(total / len(windows), top_k, 0.0, times[-1] + frame)
            return VideoPrediction(reader.path, overall, tuple(clips))

    def _open(self, source: str | Path | Frames, fps: float) -> Reader:
        if not isinstance(source, str | Path):
            return ArrayReader(source, fps)
        path = Path(source)
        if path.is_dir() and (videos := find_videos(path)) and videos != [path]:
            raise ConfigError(
                f"{path} is a folder of {len(videos)} videos and predict takes one; "
                f'try [model.predict(file) for file in lean3d.predict.find_videos("{path}")]'
            )
        return open_video(path, self.frame_template)

    def _windows(self, num_video_frames: int, stride: int | None) -> torch.Tensor:
        """The frames of each window, int64 (num_windows, T)."""
        spec = self.spec
        if self.sampling == "segments":
            if stride is not None:
                raise ConfigError("stride does not fit: this model sees the whole video as one window (segments)")
            return view_indices(num_video_frames, spec.num_frames, spec.sampling_rate, 1, "segments")
        span = clip_span(spec.num_frames, spec.sampling_rate)
        return window_indices(num_video_frames, spec.num_frames, spec.sampling_rate, span if stride is None else stride)

    @torch.inference_mode()
    def _scores(self, reader: Reader, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some windows (n, T) at a time, and their probabilities, float64 (n, K)."""
        crop = TestTransform(self.spec, crop_area=self.crop_area)
        size = decode_size(reader.size, self.spec, crop_area=self.crop_area)
        ready: dict[int, torch.Tensor] = {}  # frames (C, h, w) that a later window may need again
        for chunk in windows.split(WINDOWS_AT_ONCE):
            wanted = chunk.unique().tolist()
            ready = {index: frame for index, frame in ready.items() if index >= wanted[0]}
            if missing := [index for index in wanted if index not in ready]:
                pixels = reader.get_frames(missing, size=size, channels=self.spec.channels)
                ready |= zip(missing, crop(pixels)[0].unbind(1), strict=True)
            clips = torch.stack([torch.stack([ready[i] for i in window], dim=1) for window in chunk.tolist()])
            inputs = normalize(clips.to(self.device), self.spec)
            if self._compiled is None:
                logits = self.model(inputs)
            else:  # one by one: what one clip needs of memory stays in the cache
                logits = torch.cat([self._compiled(clip) for clip in inputs.split(1)])
            yield chunk, logits.float().softmax(-1).double().cpu()

    def _best(self, probabilities: torch.Tensor, top_k: int, start: float, end: float) -> Prediction:
        scores, places = probabilities.topk(min(top_k, len(self.classes)))
        return Prediction(tuple(self.classes[i] for i in places.tolist()), tuple(scores.tolist()), start, end)


def load_model(path: str | Path, device: str = "auto", *, fast: bool = False) -> Predictor:
    """A trained model, ready to predict: ``lean3d.load_model("runs/mine").predict("clip.mp4")``.

    Args:
        path: A `.safetensors` file of lean3d, or a run folder.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto".
        fast: Compile the model for this machine's CPU when the first clip comes, see `lean3d.fast.compile`.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
        ConfigError: `fast` on another device than a CPU.
    """
    return Predictor(checkpoints.load(path), device, fast=fast)


def run(
    checkpoint: str | Path,
    path: str | Path,
    *,
    top_k: int = 5,
    stride: int | None = None,
    device: str = "auto",
    fast: bool = False,
    video: str | Path | None = None,
    quiet: bool = False,
) -> Predictions:
    """Predict a file, or every video in a folder.

    Args:
        checkpoint: A `.safetensors` file of lean3d, or a run folder.
        path: A video file, a folder of pictures, or a folder with videos anywhere in it.
        top_k: Classes to name.
        stride: See `Predictor.predict`.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto".
        fast: As in `load_model`.
        video: Where to write the video with its classes drawn on: an mp4 file for a file, a folder for a folder.
        quiet: No progress bar.

    Returns:
        One prediction a video. In a folder, files that can't be decoded are named and the others go on.

    Raises:
        DecodeError: The file can't be decoded.
        DataError: The folder has no videos.
        CheckpointError: The checkpoint is missing or damaged.
    """
    path = Path(path)
    predictor = load_model(checkpoint, device, fast=fast)
    many = path.is_dir() and find_videos(path) != [path]
    files = find_videos(path) if many else [path]
    if not files:
        raise DataError(f"there is no video in {path}")
    videos: list[VideoPrediction] = []
    bad: list[BadFile] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar:
        task = bar.add_task("videos" if many else "windows", total=len(files) if many else None)
        for file in files:
            try:
                watch = None if many else lambda done, total: bar.update(task, completed=done, total=total)
                found = predictor.predict(file, top_k=top_k, stride=stride, progress=watch)
                if video is not None:
                    out = Path(video) / file.relative_to(path).with_suffix(".mp4") if many else Path(video)
                    write_annotated(file, found, out, predictor.frame_template, predictor.spec.region)
            except DecodeError as error:
                if not many:
                    raise
                bad.append(BadFile(str(file), error.reason))
            else:
                videos.append(found)
            if many:
                bar.advance(task)
    return Predictions(tuple(videos), tuple(bad))


def write_annotated(
    video: str | Path,
    prediction: VideoPrediction,
    out: str | Path,
    frame_template: str = "{:05d}.jpg",
    region: Region = WHOLE_FRAME,
) -> None:
    """Write a video as mp4 with the best classes of each moment and their scores drawn on; without its sound.

    Frames keep their times. A small video is enlarged so that text is readable. Where windows overlap, a frame shows
    the window whose middle is nearest.

    Args:
        video: The file, or the folder of pictures.
        prediction: What `Predictor.predict` said about it.
        out: The mp4 file; its folder is made where it is missing.
        frame_template: How pictures in a folder are named.
        region: What the model looks at (its `input_spec.region`); a line is drawn around it.

    Raises:
        DecodeError: The video can't be decoded; then no file is left behind.
        ConfigError: `out` is no mp4 file, or is the video itself.
    """
    out = Path(out)
    check_name(out, video)
    with open_video(video, frame_template) as reader:
        times, size = reader.timestamps, drawn_size(reader.size)
        middles = torch.tensor([(clip.start + clip.end) / 2 for clip in prediction.clips])
        captions: dict[int, np.ndarray] = {}
        with VideoWriter(out, size, reader.fps) as writer:
            for first in range(0, len(times), 8):
                numbers = range(first, min(first + 8, len(times)))
                frames = reader.get_frames(numbers, size=size).numpy()
                for number, pixels in zip(numbers, frames, strict=True):
                    shown = int((middles - times[number]).abs().argmin())
                    if shown not in captions:
                        clip = prediction.clips[shown]
                        captions = {shown: score_bars(clip.labels[:3], clip.scores[:3], *size)}
                    draw_region(pixels, region)
                    draw_scores(pixels, captions[shown])
                    writer.write(pixels, times[number])
