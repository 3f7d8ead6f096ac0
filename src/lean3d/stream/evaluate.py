"""Testing a model on streams: how soon it is right, and how well it finds events on long videos.

    each clip          begun anew, frame by frame           -> accuracy by share seen, delay to a correct decision
    clips, joined      [ walks ][ runs ][ jumps ][ runs ]   -> events -> matched by time and label: precision, recall

A decision is the most probable class of the latest prediction. Clips that have no prediction yet count as wrong.

An event is found where a predicted one has its class and overlaps it by at least a threshold of temporal intersection
over union (tIoU). Each predicted event matches at most one of the truth: the best ones, by score, choose first, and
take what they overlap most. Precision is the share of predicted events that match, recall that of the truth's that are
matched, as in temporal action detection (Caba Heilbron et al., ActivityNet, CVPR 2015). Neighbouring clips of one class
are one event.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lean3d.config import EventConfig
from lean3d.data.dataset import BadFile
from lean3d.data.manifest import Clip
from lean3d.data.readers import open_video
from lean3d.errors import DataError, DecodeError
from lean3d.stream.events import Event, EventTracker
from lean3d.stream.session import Session, StreamPrediction

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of a clip, after which accuracy is counted."""

OVERLAPS = (0.3, 0.5, 0.7)
"""Temporal intersections over unions from which an event is found."""

CLIPS_A_VIDEO = 20
"""Clips that are joined to a long video."""

AT_ONCE = 8
"""Streams that run as one batch."""

CHUNK = 32
"""Frames that are decoded at once."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a long video in which one class is to be seen."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Match:
    """Events against the truth, at one overlap.

    Attributes:
        overlap: The least temporal intersection over union.
        precision: Share of predicted events that match; 1 where none is predicted.
        recall: Share of the truth's events that are matched.
    """

    overlap: float
    precision: float
    recall: float


@dataclass(frozen=True)
class StreamResults:
    """How a model does on streams. Shares are in [0, 1], of the clips that could be decoded.

    Attributes:
        clips: How many those are.
        top1: Share that is decided correctly in the end.
        by_share: Share that is decided correctly after each of `SHARES` of the clip.
        delay: Seconds from a clip's start until its decision is correct and stays so; the mean over clips where that
            happens. None where it never does.
        share_seen: The same as a share of the clip.
        videos: Long videos, joined from clips.
        truth: Events in them.
        predicted: Events that were found there, right or wrong.
        matches: Precision and recall, for each of `OVERLAPS`.
        lag: Seconds by which found events are behind the truth, middle against middle: the median over those that
            overlap an event of their class. None where there are none. Worth setting as `EventConfig.lag`, beside what
            that was.
        bad: Files that could not be decoded.
    """

    clips: int
    top1: float
    by_share: dict[float, float]
    delay: float | None
    share_seen: float | None
    videos: int
    truth: int
    predicted: int
    matches: tuple[Match, ...]
    lag: float | None
    bad: tuple[BadFile, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            **asdict(self),
            "by_share": {f"{share:g}": value for share, value in self.by_share.items()},
            "bad": [file._asdict() for file in self.bad],
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column(justify="right", style="bold")
        table.add_row("clips", str(self.clips))
        table.add_row("bad files", str(len(self.bad)))
        for share, value in self.by_share.items():
            table.add_row(f"accuracy after {share:.0%} of the clip", f"{value:.4f}")
        if self.delay is not None and self.share_seen is not None:
            late = f"{self.delay:.2f} s ({self.share_seen:.0%} of the clip)"
            table.add_row("mean delay to a correct decision", late)
        table.add_row("long videos, events in them, found", f"{self.videos}, {self.truth}, {self.predicted}")
        for match in self.matches:
            numbers = f"{match.precision:.3f}, {match.recall:.3f}"
            table.add_row(f"events: precision, recall at tIoU {match.overlap:g}", numbers)
        if self.lag is not None:
            table.add_row("events are behind the truth by", f"{self.lag:.2f} s")
        return table


def evaluate(
    session: Session,
    clips: Sequence[Clip],
    *,
    frame_template: str = "{:05d}.jpg",
    events: EventConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StreamResults:
    """Test a model on streams.

    Args:
        session: The model.
        clips: Labelled ones, by the session's classes; others are left out.
        frame_template: How pictures in a folder are named.
        events: When scores are an event.
        seed: Of the order in which clips are joined.
        progress: Is told how many clips are done, and how many there are; each counts twice.

    Raises:
        DataError: There is no labelled clip that can be decoded.
    """
    labelled = [clip for clip in clips if clip.label >= 0]
    total, done = 2 * len(labelled), 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    singles = [_Tape(session, [clip], frame_template, tell) for clip in labelled]
    _play(session, singles)
    seen = [tape for tape in singles if not tape.bad]
    bad = tuple(file for tape in singles for file in tape.bad)
    if not seen:
        raise DataError(f"there is nothing to count: {len(bad)} clips can't be decoded and no other has a label")
    whole = [tape.clips[0] for tape in seen]
    random.Random(seed).shuffle(whole)
    videos = [
        _Tape(session, whole[first : first + CLIPS_A_VIDEO], frame_template, tell)
        for first in range(0, len(whole), CLIPS_A_VIDEO)
    ]
    _play(session, videos)
    found = [_events_of(session, tape, events) for tape in videos]
    truth = [_merged(tape.segments) for tape in videos]
    delays = [(delay, delay / tape.length) for tape in seen if (delay := _delay(tape)) is not None]
    return StreamResults(
        clips=len(seen),
        top1=sum(_decision(tape, 1.0) == tape.segments[0].label for tape in seen) / len(seen),
        by_share={s: sum(_decision(tape, s) == tape.segments[0].label for tape in seen) / len(seen) for s in SHARES},
        delay=sum(delay for delay, _ in delays) / len(delays) if delays else None,
        share_seen=sum(share for _, share in delays) / len(delays) if delays else None,
        videos=len(videos),
        truth=sum(map(len, truth)),
        predicted=sum(map(len, found)),
        matches=tuple(match_events(found, truth, overlap) for overlap in OVERLAPS),
        lag=_lag(found, truth),
        bad=bad,
    )


def match_events(found: Sequence[Sequence[Event]], truth: Sequence[Sequence[Segment]], overlap: float) -> Match:
    """Precision and recall of predicted events; see the module.

    Args:
        found: For each video the predicted ones.
        truth: For each video the true ones.
        overlap: Least temporal intersection over union of a match, above 0.
    """
    hits = 0
    for events, segments in zip(found, truth, strict=True):
        free = list(segments)
        for event in sorted(events, key=lambda event: event.score, reverse=True):
            fitting = [(_overlap(event, s), place) for place, s in enumerate(free) if s.label == event.label]
            best, place = max(fitting, default=(0.0, -1))
            if best >= overlap:
                hits += 1
                del free[place]
    predicted, true = sum(map(len, found)), sum(map(len, truth))
    return Match(overlap, hits / predicted if predicted else 1.0, hits / true if true else 1.0)


def write(results: StreamResults, path: str | Path, about: dict[str, Any]) -> Path:
    """Write the results, and what is needed to repeat them, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, **about, "metrics": results.to_dict()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


@dataclass
class _Tape:
    """Clips, one after another, as one stream; and what the model said about it."""

    session: Session
    clips: list[Clip]
    frame_template: str
    tell: Callable[[], None]
    segments: list[Segment] = field(default_factory=list)
    predictions: list[StreamPrediction] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    length: float = 0.0
    fps: float | None = None

    def frames(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Frames, uint8 (H, W, C), with their seconds."""
        for clip in self.clips:
            start = self.length
            try:
                with open_video(clip.path, self.frame_template) as reader:
                    times = reader.timestamps
                    self.fps = self.fps or reader.fps
                    for first in range(0, len(times), CHUNK):
                        numbers = range(first, min(first + CHUNK, len(times)))
                        channels = self.session.model.input_spec.channels
                        frames = reader.get_frames(numbers, channels=channels)
                        for number, frame in zip(numbers, frames, strict=True):
                            yield frame, start + times[number]
                            self.length = start + times[number] + 1 / reader.fps
            except DecodeError as error:
                self.bad.append(BadFile(clip.path, error.reason))
            if self.length > start:
                self.segments.append(Segment(self.session.classes[clip.label], start, self.length))
            self.tell()


def _play(session: Session, tapes: Sequence[_Tape]) -> None:
    """Run tapes through the model, some at a time as a batch, each as a stream that begins anew."""
    waiting = list(enumerate(tapes))[::-1]
    running: dict[str, tuple[_Tape, Iterator[tuple[torch.Tensor, float]]]] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, tape = waiting.pop()
            running[f"tape {number}"] = tape, tape.frames()
        now = {name: next(frames, None) for name, (_, frames) in running.items()}
        for name in [name for name, frame in now.items() if frame is None]:
            running.pop(name)[0].predictions += session.finish(name)
        due = {name: frame for name, frame in now.items() if frame is not None}
        for name in due:
            if name not in session.streams:
                session.begin(name, fps=running[name][0].fps)
        frames, seconds = {n: f for n, (f, _) in due.items()}, {n: s for n, (_, s) in due.items()}
        for name, found in session.push_all(frames, seconds).items():
            running[name][0].predictions += found


def _decision(tape: _Tape, share: float) -> str | None:
    """The most probable class once so much of the clip was seen."""
    known = [p for p in tape.predictions if p.seen <= share * tape.length + 1e-6 or share == 1.0]
    return known[-1].label if known else None


def _delay(tape: _Tape) -> float | None:
    """Seconds until the decision is correct and stays so."""
    label, since = tape.segments[0].label, None
    for prediction in reversed(tape.predictions):
        if prediction.label != label:
            break
        since = prediction.seen
    return since


def _events_of(session: Session, tape: _Tape, config: EventConfig | None) -> list[Event]:
    tracker = EventTracker(session.classes, config)
    found = [event for prediction in tape.predictions for event in tracker.update(prediction)]
    return found + tracker.finish()


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one class as one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].label == segment.label:
            merged[-1] = Segment(segment.label, merged[-1].start, segment.end)
        else:
            merged.append(segment)
    return merged


def _lag(found: Sequence[Sequence[Event]], truth: Sequence[Sequence[Segment]]) -> float | None:
    """Seconds from the middle of the truth's events to that of the found ones that overlap them most."""
    lags = []
    for events, segments in zip(found, truth, strict=True):
        for event in events:
            fitting = [(_overlap(event, s), s.start, s.end) for s in segments if s.label == event.label]
            best, start, end = max(fitting, default=(0.0, 0.0, 0.0))
            if best > 0 and event.end is not None:
                lags.append((event.start + event.end - start - end) / 2)
    return statistics.median(lags) if lags else None


def _overlap(event: Event, segment: Segment) -> float:
    """Temporal intersection over union."""
    assert event.end is not None
    inside = min(event.end, segment.end) - max(event.start, segment.start)
    return max(0.0, inside) / (max(event.end, segment.end) - min(event.start, segment.start))
