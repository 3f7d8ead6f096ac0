"""Predictions -> events: what happened, from when to when.

    score   .1  .2  .5  .7  .9  .8  .5  .7  .5  .3  .1
    on .6                on                               an event begins at `on` ...
    off .4                                      off       ... and ends below `off`
                         [    one event         )

Two thresholds keep an event whole whose score trembles about one of them (hysteresis, as in Schmitt's trigger).
"""

from __future__ import annotations

import datetime
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lean3d.config import EventConfig
from lean3d.errors import ConfigError, did_you_mean
from lean3d.stream.session import StreamPrediction


@dataclass(frozen=True)
class Event:
    """Something that happened on a stream.

    Attributes:
        source: The source's name.
        label: The class.
        start, end: Seconds since the source's first frame; `end` is None while it goes on.
        score: Mean of the smoothed scores so far, in [0, 1].
        started, ended: The same on the wall clock, where that is known.
    """

    source: str
    label: str
    start: float
    end: float | None
    score: float
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {
                "source": self.source,
                "label": self.label,
                "start": round(self.start, 3),
                "end": None if self.end is None else round(self.end, 3),
                "score": round(self.score, 4),
                "started": _iso(self.started),
                "ended": _iso(self.ended),
            },
            ensure_ascii=False,
        )


class EventTracker:
    """Finds the events of one stream; at each time there is at most one.

    A prediction is about a span of frames, and so are several that are averaged. The middle of that span stands for it:
    an event begins at the middle of the first one that is `on` and ends at that of the first one that is `off`, so that
    averaging, which blurs events, does not move them. What a score sees beyond its span does: features of a causal
    model look back. `config.lag` takes that off.

    Args:
        classes: Names of the K classes.
        config: The thresholds.
        source: Goes into the events.
        began: Wall-clock time of second 0, where that is known.

    Attributes:
        smoothed: The mean of the latest predictions' probabilities, float32 (K,); None before the first.
        current: The event that goes on, `end` None; None where there is none, or it is too short as yet.

    Raises:
        ConfigError: A class in `config.labels` is unknown.
    """

    def __init__(
        self,
        classes: Sequence[str],
        config: EventConfig | None = None,
        source: str = "",
        began: datetime.datetime | None = None,
    ):
        self.config = config or EventConfig()
        for label in self.config.labels:
            if label not in classes:
                raise ConfigError(f"the model has no class {label!r}: {did_you_mean(label, classes)}")
        self.classes, self.source, self.began = tuple(classes), source, began
        self._wanted = torch.tensor([name in (self.config.labels or classes) for name in classes])
        self.smoothed: torch.Tensor | None = None
        self._recent: deque[StreamPrediction] = deque()
        self._open: int | None = None
        self._start = self._now = self._sum = 0.0
        self._count = 0

    @property
    def current(self) -> Event | None:
        """See the class."""
        if self._open is None or self._now - self._start < self.config.min_seconds:
            return None
        return self._event(None)

    def update(self, prediction: StreamPrediction) -> list[Event]:
        """The next prediction: the event that ends with it, if one does.

        Where the stream began anew, what went on before has ended with what was seen of it.
        """
        recent = self._recent
        if recent and recent[-1].stretch != prediction.stretch:
            return [*self.finish(), *self.update(prediction)]
        recent.append(prediction)
        smooth = (prediction.end - prediction.start) / 8 if self.config.smooth is None else self.config.smooth
        while len(recent) > 1 and prediction.end - recent[0].end >= smooth - 1e-6:
            recent.popleft()
        self.smoothed = torch.stack([p.probabilities for p in recent]).mean(0)
        self._now = max(0.0, (recent[0].start + prediction.end) / 2 - self.config.lag)
        ended: list[Event] = []
        if self._open is not None and self.smoothed[self._open] < self.config.off:
            ended = self._close(self._now)
        if self._open is None:
            best = int(self.smoothed.where(self._wanted, -1.0).argmax())
            if self.smoothed[best] >= self.config.on:
                self._open, self._start, self._sum, self._count = best, self._now, 0.0, 0
        if self._open is not None:
            self._sum += float(self.smoothed[self._open])
            self._count += 1
        return ended

    def finish(self, end: float | None = None) -> list[Event]:
        """The stream ends: the event that still goes on, if one does.

        Args:
            end: Second of the stream's end; default: that of the last prediction's span.
        """
        if end is None:
            end = self._recent[-1].end if self._recent else 0.0
        ended = self._close(max(end, self._now)) if self._open is not None else []
        self._recent.clear()
        self.smoothed = None
        return ended

    def _close(self, end: float) -> list[Event]:
        event = self._event(end)
        self._open = None
        return [event] if end - event.start >= self.config.min_seconds else []

    def _event(self, end: float | None) -> Event:
        assert self._open is not None
        return Event(
            self.source,
            self.classes[self._open],
            self._start,
            end,
            self._sum / self._count,
            self._clock(self._start),
            None if end is None else self._clock(end),
        )

    def _clock(self, seconds: float) -> datetime.datetime | None:
        return None if self.began is None else self.began + datetime.timedelta(seconds=seconds)


def _iso(time: datetime.datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")
