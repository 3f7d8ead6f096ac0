"""A thread for each source, which holds its newest frame ready; the latest wins, and what nobody took is counted.

    source --connect--> frames --Sampler--> [one place] --take--> the net
              ^                                 |
              +-- broken off: wait 0.5, 1, 2, 4 ... seconds, try again, up to a limit

A live source overwrites the place: nothing is ever queued. A file waits until its frame was taken: nothing is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import av

from lean3d.errors import DecodeError
from lean3d.stream.sampling import Sampler, longest_gap
from lean3d.stream.sources import Backlog, NoVideoError, Source, Timed

FIRST_WAIT = 0.5
"""Seconds before the first new try; each further one waits twice as long."""

LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""

JUMP = 5.0
"""A live source's clock that runs back, or ahead by more than this, in seconds, has been set anew."""


@dataclass(frozen=True)
class Grabbed:
    """A frame that waits for the net, or was taken.

    Attributes:
        frame: As decoded.
        time: Seconds since the source's first frame; over a lost connection the wall clock goes on.
        due: When it should have been there at the latest, as `time.monotonic` counts: lateness starts here.
        repeats: How often the net gets it; 0 where it is only shown.
        fresh: Whether the stream begins anew with it.
    """

    frame: av.VideoFrame
    time: float
    due: float
    repeats: int
    fresh: bool


@dataclass
class Counts:
    """What became of a source's frames. Lateness is from when a frame could be there until its result was.

    Attributes:
        frames: That came.
        stepped: That the net got; a frame that stands for two counts twice.
        dropped: That the net should have got, but a newer one was there first.
        damaged: Frames and packets that could not be decoded.
        left_out: Packets that were not decoded, because decoding was late.
        connections: How often it was connected.
        late: Seconds, of the last frame that was stepped.
        late_mean: Of all.
        late_max: Of all.
    """

    frames: int = 0
    stepped: int = 0
    dropped: int = 0
    damaged: int = 0
    left_out: int = 0
    connections: int = 0
    late: float = 0.0
    late_mean: float = 0.0
    late_max: float = 0.0

    def add_late(self, seconds: float, frames: int) -> None:
        """Count frames that were stepped so late."""
        self.stepped += frames
        self.late = seconds
        self.late_mean += (seconds - self.late_mean) * frames / self.stepped
        self.late_max = max(self.late_max, seconds)


class Grabber:
    """One source, in a thread of its own.

    Args:
        source: Where frames come from.
        name: Its name, where several sources have the same.
        sampling_rate: Distance of the net's frames, in frames of the source.
        clip_frames: Frames in the net's clip, for `longest_gap`.
        bell: Is notified when there is something to take; several grabbers share one.
        realtime: Give a file's frames at their times, as a camera would.
        retries: How often a live source is tried again, in a row, before it is given up.
        tell: Is told of connections that broke off or came back.

    Attributes:
        counts: What became of its frames so far.
        fps: Frames per second of the source; None before it is connected.
        duration: Seconds in all, where that is known.
        live: Whether the latest frame wins; None before it is connected.
        began: Wall-clock time of a live source's `time` 0; None for files, and before it is connected.
        problem: Why it is not connected, or ended; None while all is well.
        ended: Whether nothing more will come.
    """

    def __init__(
        self,
        source: Source,
        name: str | None = None,
        *,
        sampling_rate: int,
        clip_frames: int,
        bell: threading.Condition,
        realtime: bool = False,
        retries: int = 5,
        tell: Callable[[str], None] | None = None,
    ):
        self.source, self.name = source, name or source.name
        self.counts = Counts()
        self.fps: float | None = None
        self.duration: float | None = None
        self.live: bool | None = None
        self.began: datetime.datetime | None = None
        self.problem: DecodeError | None = None
        self.ended = False
        self._sampling_rate, self._clip_frames, self._bell = sampling_rate, clip_frames, bell
        self._realtime, self._retries, self._tell = realtime, retries, tell or (lambda text: None)
        self._place: Grabbed | None = None
        self._stop = threading.Event()
        self._zero: float | None = None  # monotonic clock at time 0
        self._sampler: Sampler | None = None
        self._thread = threading.Thread(target=self._run, name=f"grabber {self.name}", daemon=True)

    def start(self) -> Grabber:
        """Begin."""
        self._thread.start()
        return self

    def take(self) -> Grabbed | None:
        """The newest frame that nobody has taken, if there is one. Call it with the bell held."""
        grabbed, self._place = self._place, None
        if grabbed is not None:
            self._bell.notify_all()
        return grabbed

    @property
    def waiting(self) -> bool:
        """Whether there is a frame to take."""
        return self._place is not None

    def close(self, patience: float = 1.0) -> None:
        """Ask the thread to end, and wait a little; one that waits for a dead source ends with its timeout."""
        self._stop.set()
        with self._bell:
            self._bell.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)

    # ---- in the thread

    def _run(self) -> None:
        try:
            self._connect_and_read()
        except DecodeError as error:
            self.problem = error
        except Exception as error:  # the thread's end must be seen, whatever it was
            self.problem = DecodeError(self.name, f"{type(error).__name__}: {error}")
        finally:
            with self._bell:
                self.ended = True
                self._bell.notify_all()

    def _connect_and_read(self) -> None:
        failures = 0
        while not self._stop.is_set():
            frames_before = self.counts.frames
            try:
                with contextlib.closing(self.source.connect()) as connection:
                    self._begin(connection)
                    self._read(connection)
                if not self.live or self._stop.is_set():
                    return
                raise DecodeError(self.name, "the connection ended")
            except DecodeError as error:
                ends = self.source.kind in ("file", "stdin") or self.live is False
                failures = 1 if self.counts.frames > frames_before else failures + 1
                if ends or isinstance(error, NoVideoError) or failures > self._retries:
                    raise
                self.problem = error
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            self._tell(
                f"{self.name}: {self.problem.reason}; trying again in {wait:g} s ({failures} of {self._retries})"
            )
            self._stop.wait(wait)

    def _begin(self, connection: Timed) -> None:
        self.fps, self.duration, self.live = connection.fps, connection.duration, connection.live
        self.counts.connections += 1
        if self._sampler is None or self._sampler.fps != connection.fps:
            gap = longest_gap(self._clip_frames, self._sampling_rate, connection.fps)
            self._sampler = Sampler(connection.fps, self._sampling_rate, gap)

    def _read(self, connection: Timed) -> None:
        latest_wins = connection.live or self._realtime
        damaged, left_out = self.counts.damaged, self.counts.left_out
        backlog, last, offset = Backlog(), 0.0, None
        for frame, stamp in connection.frames():
            if self._stop.is_set():
                return
            now = time.monotonic()
            if self._zero is None:
                self._zero = now
                self.began = datetime.datetime.now(datetime.UTC) if connection.live else None
            if self.problem is not None:
                self.problem = None
                self._tell(f"{self.name}: connected again")
            self.counts.frames += 1
            self.counts.damaged = damaged + connection.damaged
            self.counts.left_out = left_out + connection.left_out
            if not connection.live:
                assert stamp is not None
                seconds, due = stamp, now
                if self._realtime and self.source.kind == "file":
                    due = self._zero + stamp
                    if self._stop.wait(max(0.0, due - now)):
                        return
            elif stamp is None:
                seconds, due = now - self._zero, now
            else:
                if offset is None or not 0 <= stamp + offset - last <= JUMP:
                    offset = max(now - self._zero, last) - stamp
                    backlog = Backlog()
                seconds = stamp + offset
                due = now - backlog.late(stamp, now)
            last = seconds
            assert self._sampler is not None
            repeats, fresh = self._sampler.take(seconds)
            if repeats or not latest_wins:
                self._offer(Grabbed(frame, seconds, due, repeats, fresh), latest_wins)

    def _offer(self, grabbed: Grabbed, latest_wins: bool) -> None:
        with self._bell:
            if not latest_wins:
                self._bell.wait_for(lambda: self._place is None or self._stop.is_set())
            elif self._place is not None:
                self.counts.dropped += self._place.repeats
                if self._place.fresh:
                    grabbed = Grabbed(grabbed.frame, grabbed.time, grabbed.due, 1, True)
            self._place = grabbed
            self._bell.notify_all()


def wait_for_frames(grabbers: Iterable[Grabber], bell: threading.Condition, timeout: float) -> dict[str, Grabbed]:
    """The frames that are there, by their sources' names; waits a while for the first. Call it without the bell."""
    grabbers = list(grabbers)
    with bell:
        bell.wait_for(lambda: any(g.waiting for g in grabbers) or all(g.ended for g in grabbers), timeout)
        return {g.name: grabbed for g in grabbers if (grabbed := g.take()) is not None}
