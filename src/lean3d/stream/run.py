"""The verb `stream`: sources in, events out as JSON lines, until they end or somebody stops it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lean3d.config import EventConfig
from lean3d.data.drawing import check_name
from lean3d.errors import ConfigError, DecodeError
from lean3d.stream.events import Event, EventTracker
from lean3d.stream.grabber import Grabber
from lean3d.stream.overlay import Overlay, Recorder, Window, file_name
from lean3d.stream.session import Result, Session, StreamPrediction, Watch
from lean3d.stream.sources import DEFAULT_FPS, Source

Lines = Literal["events", "begins", "results"]


@dataclass
class Summary:
    """What came of it.

    Attributes:
        events: How many there were.
        grabbers: One for each source, by its name, with its counts.
        signal: The signal that ended it; None where the sources did.
    """

    events: int = 0
    grabbers: dict[str, Grabber] = field(default_factory=dict)
    signal: int | None = None


def run(
    session: Session,
    sources: Sequence[Source],
    *,
    events: EventConfig | None = None,
    lines: Lines = "events",
    realtime: bool = False,
    retries: int = 5,
    seconds: float | None = None,
    video: str | Path | None = None,
    show: bool = False,
    write: Callable[[str], None] = print,
    console: Console | None = None,
) -> Summary:
    """Watch sources and write down what happens, until they end. Ctrl-C, or SIGTERM, ends it with the last events.

    Args:
        session: The model.
        sources: See `find_source`.
        events: When scores are an event.
        lines: "events": a line for each, when it is over. "begins": one more when it begins, without an end.
            "results": one more for each prediction.
        realtime: Take files as if they were live: at their own pace, the latest frame wins.
        retries: How often in a row a live source is tried again before it is given up.
        seconds: Stop after so long.
        video: Where to write the frames with scores and timeline on them: an mp4 file, of several sources a folder.
        show: Show them on the screen; one source only.
        write: Gets each line.
        console: Where to tell what happens; default: stderr.

    Returns:
        Counts of what came, what was dropped, how late it was.

    Raises:
        DecodeError: No source could be watched to its end.
        ConfigError: A setting makes no sense, or there is no screen.
    """
    config = events or EventConfig()
    EventTracker(session.classes, config)  # refuses unknown labels before anything is opened
    console = console or Console(stderr=True, highlight=False)
    if show and len(sources) > 1:
        raise ConfigError(f"--show takes one source, got {len(sources)}: write their videos with --video FOLDER")
    if video is not None and len(sources) == 1:
        check_name(Path(video), sources[0].address)
    window = Window(sources[0].name) if show else None
    tell = None if console.is_terminal else lambda text: console.print(text, style="yellow", soft_wrap=True)
    watch = session.watch(sources, realtime=realtime, retries=retries, seconds=seconds, tell=tell)
    summary = Summary(grabbers=watch.grabbers)
    channels: dict[str, _Channel] = {}
    times: dict[str, float] = {}
    failure: DecodeError | None = None

    def status() -> Table:
        return _table(watch.grabbers, times, {name: channel.tracker for name, channel in channels.items()})

    try:
        with (
            _stop_by_signal(watch, summary),
            Live(get_renderable=status, console=console, transient=True, auto_refresh=console.is_terminal),
        ):
            for result in watch:
                name = result.source
                if name not in channels:
                    path = None if video is None else Path(video) / file_name(name) if len(sources) > 1 else Path(video)
                    channels[name] = _Channel(session, result.grabber, config, path, window)
                times[name] = result.time
                for line in channels[name].lines(result, lines):
                    write(line)
                if window is not None and window.closed:
                    watch.stop()
    except DecodeError as error:
        failure = error
    finally:
        for channel in channels.values():
            channel.close()
        if window is not None:
            window.close()
    summary.events = sum(channel.events for channel in channels.values())
    console.print(_table(watch.grabbers, times, {}))
    if failure is not None:
        raise failure
    return summary


class _Channel:
    """One source's events, and the picture of them."""

    def __init__(
        self, session: Session, grabber: Grabber, config: EventConfig, video: Path | None, window: Window | None
    ):
        self.tracker = EventTracker(session.classes, config, grabber.name, grabber.began)
        self.events = 0
        self._announced: float | None = None  # the start of the event whose beginning was told
        self._window = window
        self._overlay = Overlay(session.model.input_spec.region) if video or window else None
        self._recorder = Recorder(video, grabber.fps or DEFAULT_FPS) if video else None

    def lines(self, result: Result, kind: Lines) -> Iterator[str]:
        """What there is to tell about a result."""
        ended: list[Event] = []
        for prediction in result.predictions:
            over = self.tracker.update(prediction)
            yield from (event.to_json() for event in over)
            ended += over
            current = self.tracker.current
            if kind != "events" and current is not None and current.start != self._announced:
                self._announced = current.start
                yield current.to_json()
            if kind == "results":
                yield _to_json(result.source, prediction)
        if result.frame is None:
            over = self.tracker.finish()
            yield from (event.to_json() for event in over)
            ended += over
        self.events += len(ended)
        if self._overlay is not None and result.frame is not None:
            pixels = self._overlay.draw(result.frame, self.tracker, ended, result.time)
            if self._recorder is not None:
                self._recorder.write(pixels, result.time)
            if self._window is not None:
                self._window.show(pixels)

    def close(self) -> None:
        """Finish the video."""
        if self._recorder is not None:
            self._recorder.close()


@contextlib.contextmanager
def _stop_by_signal(watch: Watch, summary: Summary) -> Iterator[None]:
    """While it is entered, the first SIGINT or SIGTERM ends the watch in good order, a second one at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if summary.signal is not None:
            raise KeyboardInterrupt
        summary.signal = signum
        watch.stop()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _to_json(source: str, prediction: StreamPrediction) -> str:
    return json.dumps(
        {
            "source": source,
            "start": round(prediction.start, 3),
            "end": round(prediction.end, 3),
            "seen": round(prediction.seen, 3),
            "top": [{"label": label, "score": round(score, 4)} for label, score in prediction.top(5)],
        },
        ensure_ascii=False,
    )


def _table(grabbers: dict[str, Grabber], times: dict[str, float], trackers: dict[str, EventTracker]) -> Table:
    """What became of each source's frames so far; with what is seen now, where there are trackers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold", max_width=40)
    for title in ("seconds", "frames", "in net", "dropped", "late", "worst"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for name, grabber in grabbers.items():
        counts = grabber.counts
        seconds = f"{times.get(name, 0.0):.1f}" + (f"/{grabber.duration:.1f}" if grabber.duration else "")
        numbers = (counts.frames, counts.stepped, counts.dropped)
        late = (f"{counts.late_mean * 1e3:.0f} ms", f"{counts.late_max * 1e3:.0f} ms")
        tracker = trackers.get(name)
        notes = []
        if grabber.problem is not None:
            notes.append(Text(grabber.problem.reason, style="red"))
        elif tracker is not None and tracker.smoothed is not None:
            best = int(tracker.smoothed.argmax())
            style = "bold green" if tracker.current else "dim"
            notes.append(Text(f"{tracker.classes[best]} {tracker.smoothed[best]:.2f}", style=style))
        if counts.connections > 1:
            notes.append(Text(f"{counts.connections} connections"))
        if counts.damaged + counts.left_out:
            notes.append(Text(f"{counts.damaged} damaged, {counts.left_out} not decoded"))
        table.add_row(Text(name), seconds, *map(str, numbers), *late, Text(", ").join(notes))
    return table
