"""Which frames of a video make a clip: pure functions of (length, settings, generator).

Every function returns frame indices as int64 tensors that never leave the video and never run backwards. With a
`torch.Generator` the choice is random and follows from the generator alone; without one it is the middle.

One rule holds for a video that is shorter than the clip (fewer frames than `clip_span`): the clip starts at the first
frame and the last frame is held. Sampling by segments repeats frames in order instead.
"""

from __future__ import annotations

from typing import Literal

import torch

from lean3d.errors import ConfigError


def clip_span(num_frames: int, sampling_rate: int) -> int:
    """Frames of the video from a dense clip's first to its last one, both counted: (T - 1) * sampling_rate + 1."""
    return (num_frames - 1) * sampling_rate + 1


def dense_indices(
    num_video_frames: int, num_frames: int, sampling_rate: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """`num_frames` frames, `sampling_rate` apart, from a random place (without a generator: the middle).

    ```
    dense_indices(15, 4, 3)                        the start is free where the span of 10 fits: 0 to 5
    video  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    clip         x        x        x        x             [2, 5, 8, 11]

    dense_indices(6, 4, 3)                         shorter than the span: from the start, the last frame is held
    video  0  1  2  3  4  5
    clip   x        x     xx                              [0, 3, 5, 5]
    ```

    Args:
        num_video_frames: Frames in the video, at least 1.
        num_frames: Frames in the clip (T), at least 1.
        sampling_rate: Distance between two frames of the clip, in frames of the video, at least 1.
        generator: Source of the random start; None takes the middle.

    Returns:
        int64 (T,), each in [0, num_video_frames).

    Raises:
        ConfigError: A number is below 1.
    """
    _at_least_one(num_video_frames=num_video_frames, num_frames=num_frames, sampling_rate=sampling_rate)
    room = max(num_video_frames - clip_span(num_frames, sampling_rate), 0)
    start = room // 2 if generator is None else int(torch.randint(room + 1, (), generator=generator))
    return _dense_from(torch.tensor(start), num_video_frames, num_frames, sampling_rate)


def jittered_indices(
    num_video_frames: int,
    num_frames: int,
    sampling_rate: int,
    generator: torch.Generator,
    *,
    speed: float = 0.0,
    time_shift: float = 0.0,
) -> torch.Tensor:
    """A random dense clip at another speed and a little earlier or later; beyond the video its end frames are held.

    ```
    dense_indices(9, 5, 2)                         a clip as long as the video has one place
    video  0  1  2  3  4  5  6  7  8
    clip   x     x     x     x     x                      [0, 2, 4, 6, 8]
                                                   time_shift 0.1: up to 1 frame (of 10) to either side
    clip   x  x     x     x     x                         [0, 1, 3, 5, 7]
                                                   speed 0.5: up to 1.5 times slower or faster, about the middle
    clip      x  x     x     x  x                         [1, 3, 4, 5, 7]
    ```

    Args:
        num_video_frames: Frames in the video, at least 1.
        num_frames: Frames in the clip (T), at least 1.
        sampling_rate: Distance between two frames of the clip, in frames of the video, at least 1.
        generator: Source of every random choice.
        speed: The clip's speed is drawn from 1 / (1 + speed) to 1 + speed, evenly in its logarithm.
        time_shift: It lies up to this share of its length earlier or later.

    Returns:
        int64 (T,), each in [0, num_video_frames), never running backwards; with speed and time_shift 0 what
        `dense_indices` gives.

    Raises:
        ConfigError: A whole number is below 1.
    """
    clip = dense_indices(num_video_frames, num_frames, sampling_rate, generator)
    if not speed and not time_shift:
        return clip
    factor, shift = (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1).tolist()
    middle = int(clip[0]) + (num_frames - 1) * sampling_rate / 2 + shift * time_shift * num_frames * sampling_rate
    steps = (torch.arange(num_frames, dtype=torch.float64) - (num_frames - 1) / 2) * sampling_rate
    places = middle + steps * (1 + speed) ** factor
    return places.round().long().clamp(0, num_video_frames - 1)


def segment_indices(num_video_frames: int, num_segments: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """One frame from each of `num_segments` equal parts of the video (TSN): random within the part, or its middle.

    ```
    segment_indices(12, 4)                         parts of 3 frames
    video  0  1  2 |3  4  5 |6  7  8 |9 10 11
    clip      x        x        x        x                [1, 4, 7, 10]

    segment_indices(3, 6)                          fewer frames than parts: frames repeat, in order
    video  0       |1       |2
    clip   xx       xx       xx                           [0, 0, 1, 1, 2, 2]
    ```

    Args:
        num_video_frames: Frames in the video, at least 1.
        num_segments: Parts, and so frames in the clip (T), at least 1.
        generator: Source of the random places; None takes the middles.

    Returns:
        int64 (T,), each in [0, num_video_frames).

    Raises:
        ConfigError: A number is below 1.
    """
    _at_least_one(num_video_frames=num_video_frames, num_segments=num_segments)
    if generator is None:
        place = torch.full((num_segments,), 0.5, dtype=torch.float64)
    else:
        place = torch.rand(num_segments, generator=generator, dtype=torch.float64)
    return _within_segments(place, num_video_frames)


def view_indices(
    num_video_frames: int,
    num_frames: int,
    sampling_rate: int,
    num_clips: int,
    sampling: Literal["dense", "segments"] = "dense",
) -> torch.Tensor:
    """The clips of a test: `num_clips` of them, spread evenly over the whole video. One clip is the middle.

    ```
    view_indices(14, 4, 2, num_clips=3)            dense: the first starts at the start, the last ends at the end
    video  0  1  2  3  4  5  6  7  8  9 10 11 12 13
    clip 1 x     x     x     x                            [0, 2,  4,  6]
    clip 2             x     x     x     x                [4, 6,  8, 10]    (rounded from 3.5)
    clip 3                      x     x     x     x       [7, 9, 11, 13]

    view_indices(12, 3, 1, num_clips=2, sampling="segments")     each clip at another place within the segments
    video  0  1  2  3 |4  5  6  7 |8  9 10 11
    clip 1    x           x           x                   [1, 5,  9]
    clip 2          x           x           x             [3, 7, 11]
    ```

    Args:
        num_video_frames: Frames in the video, at least 1.
        num_frames: Frames in a clip (T), at least 1.
        sampling_rate: Distance between two frames of a dense clip; segments don't use it.
        num_clips: Clips (V), at least 1. Clips of a short video are equal to each other.
        sampling: As in training.

    Returns:
        int64 (V, T), each in [0, num_video_frames).

    Raises:
        ConfigError: A number is below 1, or `sampling` is unknown.
    """
    _at_least_one(
        num_video_frames=num_video_frames, num_frames=num_frames, sampling_rate=sampling_rate, num_clips=num_clips
    )
    if sampling == "segments":
        place = (torch.arange(num_clips, dtype=torch.float64) + 0.5) / num_clips
        return _within_segments(place[:, None].expand(num_clips, num_frames), num_video_frames)
    if sampling != "dense":
        raise ConfigError(f'sampling must be "dense" or "segments", got {sampling!r}')
    if num_clips == 1:
        return dense_indices(num_video_frames, num_frames, sampling_rate)[None]
    room = max(num_video_frames - clip_span(num_frames, sampling_rate), 0)
    starts = torch.linspace(0, room, num_clips, dtype=torch.float64).round().long()
    return _dense_from(starts, num_video_frames, num_frames, sampling_rate)


def window_indices(num_video_frames: int, num_frames: int, sampling_rate: int, stride: int) -> torch.Tensor:
    """Dense clips that slide over a long video, one every `stride` frames, and one more that ends at its end.

    ```
    window_indices(12, 3, 2, stride=4)
    video   0  1  2  3  4  5  6  7  8  9 10 11
    window  x     x     x
                        x     x     x
                                 x     x     x            [[0, 2, 4], [4, 6, 8], [7, 9, 11]]
    ```

    Args:
        num_video_frames: Frames in the video, at least 1. A video shorter than the clip has one window.
        num_frames: Frames in a window (T), at least 1.
        sampling_rate: Distance between two frames of a window, at least 1.
        stride: Frames of the video from one window's start to the next, at least 1. No part of the video is left out
            while it is at most the span `(num_frames - 1) * sampling_rate + 1`.

    Returns:
        int64 (num_windows, T), each in [0, num_video_frames), starts strictly increasing.

    Raises:
        ConfigError: A number is below 1.
    """
    _at_least_one(num_video_frames=num_video_frames, num_frames=num_frames, sampling_rate=sampling_rate, stride=stride)
    room = max(num_video_frames - clip_span(num_frames, sampling_rate), 0)
    starts = torch.arange(0, room + 1, stride)
    if int(starts[-1]) < room:
        starts = torch.cat([starts, torch.tensor([room])])
    return _dense_from(starts, num_video_frames, num_frames, sampling_rate)


def _dense_from(starts: torch.Tensor, num_video_frames: int, num_frames: int, sampling_rate: int) -> torch.Tensor:
    """The clips that begin at `starts` (...,), as (..., T); what lies beyond the end becomes the last frame."""
    steps = torch.arange(num_frames) * sampling_rate
    return (starts[..., None] + steps).clamp(max=num_video_frames - 1)


def _within_segments(place: torch.Tensor, num_video_frames: int) -> torch.Tensor:
    """The frame at `place` (..., T) in [0, 1) of each of T segments; a segment holds at least one frame."""
    segments = place.shape[-1]
    edges = torch.arange(segments + 1) * num_video_frames // segments
    first, length = edges[:-1], edges.diff().clamp(min=1)
    return first + (place * length).long()


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
