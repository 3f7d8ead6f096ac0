"""Which frames of a source the net gets: those that its sampling rate asks for, by time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lean3d.errors import ConfigError


class Take(NamedTuple):
    """What becomes of a frame."""

    repeats: int
    """How often the net gets it: 0 where none is due, more than 1 where frames are further apart than the net's."""
    fresh: bool
    """Whether the stream begins with it, or begins anew after a gap in time."""


@dataclass
class Sampler:
    """Frames as they come, with their times -> frames as the net wants them, `interval` seconds apart.

    ```
    Sampler(fps=25, sampling_rate=2)               a source of 25 fps: every second frame, as in training
    ms     0    40    80   120   160   200
    net    x           x           x

    Sampler(fps=25, sampling_rate=1)               a source of 10 fps: each frame stands for those that are not there
    ms     0         100        200
    net    x        xxx          xx
    ```

    Times may be off by half a frame before that changes what is taken. After a gap longer than `max_gap`, as when a
    connection was lost, the stream begins anew.

    Args:
        fps: Frames per second of a video that `sampling_rate` counts frames of.
        sampling_rate: Distance of the net's frames, in such frames.
        max_gap: Seconds; see `longest_gap`.

    Raises:
        ConfigError: `fps` is not positive or `sampling_rate` below 1.
    """

    fps: float
    sampling_rate: int
    max_gap: float
    _start: float = 0.0
    _place: int = -1  # of the last frame that was due, in intervals since the start

    def __post_init__(self) -> None:
        if not (self.fps > 0 and math.isfinite(self.fps)) or self.sampling_rate < 1:
            raise ConfigError(
                f"fps must be positive and sampling_rate at least 1, got {self.fps} and {self.sampling_rate}"
            )

    @property
    def interval(self) -> float:
        """Seconds between two frames of the net's."""
        return self.sampling_rate / self.fps

    def take(self, time: float) -> Take:
        """How often the net gets the frame of this time (seconds, on any clock that doesn't run backwards)."""
        gap = time - (self._start + max(self._place, 0) * self.interval)
        if self._place < 0 or gap > max(self.max_gap, 2 * self.interval):
            self._start, self._place = time, 0
            return Take(1, True)
        place = math.floor((time - self._start) / self.interval + 0.5 / self.sampling_rate)
        repeats = max(0, place - self._place)
        self._place += repeats
        return Take(repeats, False)

    def state(self) -> dict[str, Any]:
        """Everything that it knows, as plain numbers; `Sampler(**state)` goes on from there."""
        return dict(vars(self))


def longest_gap(num_frames: int, sampling_rate: int, fps: float) -> float:
    """Seconds without a frame over which a stream goes on: the model's clip, and at least one second."""
    return max(1.0, num_frames * sampling_rate / fps)
