"""A model on streams: frames in, predictions out, each frame's work done once.

    session = Session("runs/mine")
    for result in session.watch("rtsp://camera/1"):           # a source, or a list of them
        for prediction in result.predictions:
            print(result.source, prediction.end, prediction.label)

    for frame in frames:                                      # or frames of one's own, uint8 (H, W, 3)
        for prediction in session.push(frame):
            ...
    rest = session.finish()                                   # what a net that waits for the future still had to say

Every stream has a state of its own; streams that have a frame at the same time go through the model as one batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from lean3d import checkpoint as checkpoints
from lean3d import fast as compiler
from lean3d.blocks import State, map_state, stack_states, state_layout
from lean3d.config import InputSpec
from lean3d.data.dataset import decode_size
from lean3d.data.readers.base import Scaler
from lean3d.data.transforms import TestTransform, normalize
from lean3d.errors import ConfigError, StreamingError
from lean3d.models import NetStream, VideoNet
from lean3d.stream.grabber import Grabbed, Grabber, wait_for_frames
from lean3d.stream.sampling import Sampler, longest_gap
from lean3d.stream.sources import DEFAULT_FPS, Source, find_source, frame_of, shown_pixels, shown_size

FORMAT = 1
"""The number of a saved session's layout."""

Frame = np.ndarray | torch.Tensor | av.VideoFrame

Place = str | int | Path | Source


@dataclass(frozen=True)
class StreamPrediction:
    """What a model says at one moment of a stream.

    Attributes:
        start, end: The span of the stream that it is about, in seconds: the frames that the head averages over.
        seen: The end of the last frame that had come by then; later than `end` by the model's delay.
        stretch: How often the stream had begun anew by then, after gaps.
        probabilities: float32 (K,).
        classes: Names of the K classes.
    """

    start: float
    end: float
    seen: float
    stretch: int
    probabilities: torch.Tensor
    classes: tuple[str, ...]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def score(self) -> float:
        """Its probability, in [0, 1]."""
        return float(self.probabilities.max())

    def top(self, count: int) -> list[tuple[str, float]]:
        """The most probable classes with their probabilities, best first."""
        scores, places = self.probabilities.topk(min(count, len(self.classes)))
        return [(self.classes[i], score) for i, score in zip(places.tolist(), scores.tolist(), strict=True)]


@dataclass(frozen=True)
class Result:
    """What `Session.watch` gives: a frame of a source, and what came of it.

    Attributes:
        source: The source's name.
        predictions: Those that were due, oldest first; often none, with a net that strides in time.
        frame: As decoded; None at the end of a source.
        time: Seconds since the source's first frame.
        grabber: The source's state: counts, lateness, problems.
    """

    source: str
    predictions: tuple[StreamPrediction, ...]
    frame: av.VideoFrame | None
    time: float
    grabber: Grabber


@dataclass
class _Stream:
    """What a session knows of one stream, beside its state."""

    sampler: Sampler
    pushed: int = 0  # frames that came
    stretch: int = 0  # how often it began anew
    steps: int = 0  # frames that the net got since the beginning, or the last gap
    results: int = 0  # that it gave for them
    times: list[float] = field(default_factory=list)  # of the latest of them


@dataclass
class _Due:
    """A frame for the net."""

    frame: Frame
    time: float
    repeats: int
    fresh: bool


class Session:
    """A model that runs on any number of streams.

    Frames are brought to the model's size and normalised as `predict` does, and taken at its sampling rate by their
    times: of a source with a steady rate those that `predict` would take.

    Args:
        model: A run's folder, a `.safetensors` file, what `checkpoint.load` gave, or a model of the zoo.
        classes: Names of the classes, where `model` doesn't bring them; default: their numbers.
        fps: Frames per second of the streams, whose frames the model's sampling rate counts. Sources that `watch`
            opens tell their own.
        sampling_rate: Distance of the model's frames, in frames of the source; default: as in its training.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto".
        fast: Compile the model's step for this machine's CPU first, see `lean3d.fast.compile_stream`; that takes some
            seconds when it comes for the first time. States are those of sessions without it.

    Attributes:
        model: In eval mode, on `device`.
        classes: Names of the K classes.
        net: It, frame by frame; with `fast` a `FastStream`, which says what was gained.

    Raises:
        StreamingError: The model can't run frame by frame as it is; says what to type.
        ConfigError: A setting is out of range, or `fast` on another device than a CPU.
        CheckpointError: The checkpoint is missing or damaged.
    """

    def __init__(
        self,
        model: str | Path | checkpoints.Checkpoint | VideoNet,
        *,
        classes: Sequence[str] | None = None,
        fps: float = DEFAULT_FPS,
        sampling_rate: int | None = None,
        device: str = "auto",
        fast: bool = False,
    ):
        found = checkpoints.load(model) if isinstance(model, str | Path) else model
        recipe = None
        if isinstance(found, checkpoints.Checkpoint):
            net, recipe, classes = found.model, found.recipe, classes or found.classes
        else:
            net = found
        spec = net.input_spec
        self.device = compiler.device(device) if fast else checkpoints.device(device)
        self.model = net.eval().to(self.device)
        self.classes = tuple(classes or map(str, range(net.spec["arguments"]["num_classes"])))
        self.net = _stream_of(net)
        if recipe is not None and recipe.data.sampling == "segments" and sampling_rate is None:
            raise StreamingError(
                f"this model was trained on {spec.num_frames} frames spread over whole videos, so it can't tell how "
                "far apart a stream's frames should be. Say it, in frames of the source, about the length of a "
                f"training video over {spec.num_frames}: --sampling-rate 8 (in Python: sampling_rate=8)"
            )
        self.fps, self.sampling_rate = fps, sampling_rate or spec.sampling_rate
        self._sampler(fps)  # refuses settings that are out of range
        if fast:
            self.net = compiler.compile_stream(self.net)
        self._prepare = _Preparer(spec, recipe.test.crop_area if recipe else 1.0)
        self._streams: dict[str, _Stream] = {}
        self._groups: list[tuple[list[str], State]] = []  # each stream in one of them; they run as a batch

    @property
    def period(self) -> float:
        """Seconds between two predictions of a stream, at `fps`."""
        return self.net.period * self.sampling_rate / self.fps

    @property
    def delay(self) -> float:
        """Seconds of video behind a prediction's span that it had to wait for, at `fps`; 0 for causal models."""
        return self.net.delay * self.sampling_rate / self.fps

    @property
    def clip_seconds(self) -> float:
        """Seconds of video in the model's clip, at `fps`."""
        return self.model.input_spec.num_frames * self.sampling_rate / self.fps

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that have begun and not ended."""
        return tuple(self._streams)

    # ---- frames of one's own

    def begin(self, stream: str = "", *, fps: float | None = None) -> None:
        """Begin a stream, or begin it anew: what came before is forgotten.

        Args:
            stream: Its name. Streams that nobody began begin with their first frame.
            fps: Frames per second, where they are other than the session's.
        """
        sampler = self._sampler(fps or self.fps)
        self._forget(stream)
        self._streams[stream] = _Stream(sampler)
        self._groups.append(([stream], self.net.init_state()))

    def push(self, frame: Frame, seconds: float | None = None, *, stream: str = "") -> list[StreamPrediction]:
        """The next frame of a stream; see `push_all`."""
        return self.push_all({stream: frame}, None if seconds is None else {stream: seconds})[stream]

    def push_all(
        self, frames: Mapping[str, Frame], seconds: Mapping[str, float] | None = None
    ) -> dict[str, list[StreamPrediction]]:
        """The next frame of several streams, which run as one batch where they are equally far.

        A frame that the sampling rate leaves out changes nothing. One that comes late stands for those that are
        missing; after a gap longer than the model's clip, and than a second, the stream begins anew.

        Args:
            frames: For each stream uint8 (H, W, C), C = 3 (RGB) or 1 (grey), or a frame of PyAV's. Of any size.
            seconds: When each was taken, on any clock; default: 1 / fps after the one before.

        Returns:
            For each stream the predictions that are due, oldest first.

        Raises:
            ConfigError: A frame has another shape or type.
        """
        due = {}
        for name, frame in frames.items():
            if name not in self._streams:
                self.begin(name)
            stream = self._streams[name]
            at = stream.pushed / stream.sampler.fps if seconds is None else seconds[name]
            stream.pushed += 1
            due[name] = _Due(frame, at, *stream.sampler.take(at))
        return self._advance(due)

    def finish(self, stream: str = "") -> list[StreamPrediction]:
        """End a stream, and forget it: the predictions that were still to come, the last of them of all its end."""
        if stream not in self._streams:
            return []
        rest = self._flush(stream)
        self._forget(stream)
        return rest

    # ---- states

    def state(self) -> dict[str, Any]:
        """All streams as they are now, as plain values: `torch.save` writes them, `torch.load` reads them."""
        states = {name: _rows(state, [row]) for names, state in self._groups for row, name in enumerate(names)}
        return {
            "format": FORMAT,
            "model": self.model.spec["name"],
            "streams": {
                name: {**vars(stream), "sampler": stream.sampler.state(), "state": states[name]}
                for name, stream in self._streams.items()
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with the streams of a saved `state`, and no others.

        Args:
            saved: Of a session with the same model.

        Raises:
            StreamingError: It is of another model, or of another lean3d.
        """
        if saved.get("format") != FORMAT or saved.get("model") != self.model.spec["name"]:
            raise StreamingError(
                f"this state is of {saved.get('model')} in format {saved.get('format')}, the session of "
                f"{self.model.spec['name']} in format {FORMAT}"
            )
        self._streams, self._groups = {}, []
        for name, values in saved["streams"].items():
            known = {key: value for key, value in values.items() if key not in ("sampler", "state")}
            self._streams[name] = _Stream(Sampler(**values["sampler"]), **{**known, "times": list(known["times"])})
            self._groups.append(([name], map_state(lambda tensor: tensor.to(self.device), values["state"])))

    # ---- sources

    def watch(
        self,
        sources: Place | Iterable[Place],
        *,
        realtime: bool = False,
        retries: int = 5,
        seconds: float | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Watch:
        """Predictions of one or many sources, as they come: files, cameras, addresses; see `find_source`.

        A file, and standard input, is watched whole. Of a live source the latest frame wins: what comes while the model
        is busy is dropped, and counted. One that breaks off is connected again, after 0.5, 1, 2 ... seconds.

        Args:
            sources: One, or several that run side by side.
            realtime: Take files, too, as if they were live.
            retries: How often in a row a live source is tried again before it is given up.
            seconds: Stop after so long.
            tell: Is told, in a source's thread, of connections that broke off or came back.

        Returns:
            To be iterated over once.

        Raises:
            ConfigError: A source is none, or a number is out of range.
        """
        return Watch(self, sources, realtime=realtime, retries=retries, seconds=seconds, tell=tell)

    # ---- the work

    def _sampler(self, fps: float) -> Sampler:
        gap = longest_gap(self.model.input_spec.num_frames, self.sampling_rate, fps) if fps > 0 else 0.0
        return Sampler(fps, self.sampling_rate, gap)

    def _advance(self, due: Mapping[str, _Due]) -> dict[str, list[StreamPrediction]]:
        """Give frames to the net, and collect what it says."""
        pixels = {name: self._prepare(frame.frame) for name, frame in due.items() if frame.repeats}
        found: dict[str, list[StreamPrediction]] = {name: [] for name in due}
        for name, frame in due.items():
            if frame.fresh and self._streams[name].steps:
                found[name] += self._flush(name)
                self._reset(name)
        for turn in range(max((frame.repeats for frame in due.values()), default=0)):
            names = [name for name, frame in due.items() if frame.repeats > turn]
            for name in names:
                ahead = due[name].repeats - 1 - turn
                self._note(name, due[name].time - ahead * self._streams[name].sampler.interval)
            for name, logits in self._step({name: pixels[name] for name in names}):
                found[name].append(self._result(name, logits))
        return found

    def _step(self, pixels: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """One frame of each stream, uint8 (C, 1, h, w): the logits (K,) of those that have a result."""
        others: list[tuple[list[str], State]] = []
        alike: dict[Hashable, list[tuple[list[str], State]]] = {}
        for names, state in self._groups:
            rows = [row for row, name in enumerate(names) if name in pixels]
            if 0 < len(rows) < len(names):
                others.append(_part(names, state, [row for row in range(len(names)) if row not in rows]))
            elif not rows:
                others.append((names, state))
            if rows:
                part = (names, state) if len(rows) == len(names) else _part(names, state, rows)
                alike.setdefault(state_layout(part[1]) if len(self._groups) > 1 else None, []).append(part)
        self._groups = others
        for group in alike.values():
            names = [name for part, _ in group for name in part]
            state = group[0][1] if len(group) == 1 else stack_states([state for _, state in group])
            frames = torch.stack([pixels[name] for name in names]).to(self.device)
            logits, state = self.net.step(normalize(frames, self.model.input_spec), state)
            self._groups.append((names, state))
            if logits is not None:
                yield from zip(names, logits, strict=True)

    def _flush(self, name: str) -> list[StreamPrediction]:
        names, state = next(group for group in self._groups if name in group[0])
        if not self._streams[name].steps:
            return []
        rest = self.net.flush(_rows(state, [names.index(name)]) if len(names) > 1 else state)
        return [self._result(name, logits[0]) for logits in rest]

    def _forget(self, name: str) -> None:
        self._streams.pop(name, None)
        for place, (names, state) in enumerate(self._groups):
            if name in names:
                rest = [row for row, other in enumerate(names) if other != name]
                self._groups[place : place + 1] = [_part(names, state, rest)] if rest else []
                return

    def _reset(self, name: str) -> None:
        """A stream's state before its first frame; its clock goes on."""
        stream = self._streams[name]
        self._forget(name)
        self._streams[name] = _Stream(stream.sampler, stream.pushed, stream.stretch + 1)
        self._groups.append(([name], self.net.init_state()))

    def _note(self, name: str, seconds: float) -> None:
        """A frame of this time goes to the net."""
        stream, net = self._streams[name], self.net
        stream.steps += 1
        stream.times.append(seconds)
        del stream.times[: -(net.window * net.period + net.lookahead + net.period)]

    def _result(self, name: str, logits: torch.Tensor) -> StreamPrediction:
        """The next result of a stream, and what it is about; see `NetStream`."""
        stream, period = self._streams[name], self.net.period
        last = min(stream.results * period + period - 1, stream.steps - 1)
        first = max(0, stream.results * period + period - self.net.window * period)
        stream.results += 1
        gone = stream.steps - len(stream.times)
        return StreamPrediction(
            stream.times[max(0, first - gone)],
            stream.times[last - gone] + stream.sampler.interval,
            stream.times[-1] + stream.sampler.interval,
            stream.stretch,
            logits.float().softmax(-1).cpu(),
            self.classes,
        )


class Watch:
    """Sources and what a session says about them; made by `Session.watch`.

        for result in watch: ...            results as they come; ends when all sources have ended, or after `stop`

    Attributes:
        grabbers: One for each source, by its name.

    Raises:
        DecodeError: When iterated to its end: every source ended with a problem.
    """

    def __init__(
        self,
        session: Session,
        sources: Place | Iterable[Place],
        *,
        realtime: bool,
        retries: int,
        seconds: float | None,
        tell: Callable[[str], None] | None,
    ):
        if retries < 0 or (seconds is not None and not seconds > 0):
            raise ConfigError(f"retries must be at least 0 and seconds above 0, got {retries} and {seconds}")
        places = [sources] if isinstance(sources, str | int | Path | Source) else list(sources)
        if not places:
            raise ConfigError("there is no source to watch: give a file, a camera's number or an address")
        self._session, self._seconds = session, seconds
        self._bell = threading.Condition()
        self._stop = threading.Event()
        self.grabbers: dict[str, Grabber] = {}
        for place in places:
            source = (
                place if isinstance(place, Source) else find_source(place, channels=session.model.input_spec.channels)
            )
            name, number = source.name, 2
            while name in self.grabbers:
                name, number = f"{source.name} ({number})", number + 1
            self.grabbers[name] = Grabber(
                source,
                name,
                sampling_rate=session.sampling_rate,
                clip_frames=session.model.input_spec.num_frames,
                bell=self._bell,
                realtime=realtime,
                retries=retries,
                tell=tell,
            )

    def stop(self) -> None:
        """End soon: the iteration gives what models that wait for the future still have to say, and ends. Any thread
        may call it, a signal's handler too."""
        self._stop.set()

    def __iter__(self) -> Iterator[Result]:
        began = time.monotonic()
        open_ones = dict(self.grabbers)
        last = dict.fromkeys(self.grabbers, 0.0)
        for name in self.grabbers:
            self._session.finish(name)
        try:
            for grabber in self.grabbers.values():
                grabber.start()
            while open_ones:
                over = self._stop.is_set() or (self._seconds is not None and time.monotonic() - began > self._seconds)
                taken = {} if over else wait_for_frames(open_ones.values(), self._bell, 0.1)
                for result in self._results(taken):
                    last[result.source] = result.time
                    yield result
                for name, grabber in list(open_ones.items()):
                    if over or (grabber.ended and not grabber.waiting):
                        del open_ones[name]
                        rest = tuple(self._session.finish(name))
                        yield Result(name, rest, None, last[name], grabber)
        finally:
            for grabber in self.grabbers.values():
                grabber.close()
        problems = [grabber.problem for grabber in self.grabbers.values()]
        if not self._stop.is_set() and all(problems):
            assert problems[0] is not None
            raise problems[0]

    def _results(self, taken: Mapping[str, Grabbed]) -> Iterator[Result]:
        session = self._session
        for name in taken:
            if name not in session.streams:
                session.begin(name, fps=self.grabbers[name].fps)
        due = {name: _Due(grab.frame, grab.time, grab.repeats, grab.fresh) for name, grab in taken.items()}
        found = session._advance(due)
        now = time.monotonic()
        for name, grab in taken.items():
            grabber = self.grabbers[name]
            if grab.repeats:
                grabber.counts.add_late(now - grab.due, grab.repeats)
            yield Result(name, tuple(found[name]), grab.frame, grab.time, grabber)


class _Preparer:
    """A frame of any size -> the pixels that a model's test sees of it, uint8 (C, 1, h, w)."""

    def __init__(self, spec: InputSpec, crop_area: float):
        self._spec, self._crop_area = spec, crop_area
        self._crop = TestTransform(spec, crop_area=crop_area)
        self._scaler = Scaler()

    def __call__(self, frame: Frame) -> torch.Tensor:
        if isinstance(frame, torch.Tensor):
            frame = frame.cpu().numpy()
        if not isinstance(frame, av.VideoFrame):
            frame = frame_of(np.asarray(frame))
        shown = shown_size(frame)
        size = decode_size(shown, self._spec, crop_area=self._crop_area) or shown
        pixels = shown_pixels(frame, self._scaler, size, self._spec.channels)
        return self._crop(torch.from_numpy(pixels)[None])[0]


def _stream_of(net: VideoNet) -> NetStream:
    """The net frame by frame.

    Raises:
        StreamingError: Says how to train a net that can.
    """
    try:
        return net.stream()
    except StreamingError as error:
        name = net.spec["name"]
        raise StreamingError(
            f"{error}. Train it so: lean3d train ... --model.name {name} --model.options windowed True "
            "(its scores come late), or --model.options causal True (they come with the frame)"
        ) from error


def _rows(state: State, rows: Sequence[int]) -> State:
    """The state of some streams of a batch, with its own memory."""
    return map_state(lambda tensor: tensor[list(rows)], state)


def _part(names: Sequence[str], state: State, rows: Sequence[int]) -> tuple[list[str], State]:
    return [names[row] for row in rows], _rows(state, rows)
