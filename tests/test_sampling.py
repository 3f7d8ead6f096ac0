"""Which frames make a clip: properties that hold for every length, and the drawings of the docstrings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean3d.data.sampling import (
    clip_span,
    dense_indices,
    jittered_indices,
    segment_indices,
    view_indices,
    window_indices,
)
from lean3d.errors import ConfigError

lengths = st.integers(1, 400)
counts = st.integers(1, 40)
rates = st.integers(1, 9)
seeds = st.none() | st.integers(0, 2**31)


def generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def check_clips(indices: torch.Tensor, length: int) -> None:
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert indices.max() < length
    assert (indices.diff(dim=-1) >= 0).all()


@settings(deadline=None)
@given(lengths, counts, rates, seeds)
def test_dense_is_in_range_and_evenly_spaced(length, num_frames, rate, seed):
    indices = dense_indices(length, num_frames, rate, generator(seed))
    check_clips(indices, length)
    assert indices.shape == (num_frames,)
    if length >= clip_span(num_frames, rate):
        assert (indices.diff() == rate).all()
    else:
        assert torch.equal(indices, (torch.arange(num_frames) * rate).clamp(max=length - 1))
    assert torch.equal(indices, dense_indices(length, num_frames, rate, generator(seed)))


@given(lengths, counts, rates)
def test_dense_without_generator_is_the_middle(length, num_frames, rate):
    indices = dense_indices(length, num_frames, rate)
    before, after = int(indices[0]), length - 1 - int(indices[-1])
    if length >= clip_span(num_frames, rate):
        assert after - before in (0, 1)
    else:
        assert (before, after) == (0, 0)


def test_dense_reaches_every_start():
    source = torch.Generator().manual_seed(0)
    starts = {int(dense_indices(15, 4, 3, source)[0]) for _ in range(200)}
    assert starts == set(range(6))


@settings(deadline=None)
@given(lengths, counts, rates, st.integers(0, 2**31), st.floats(0, 2), st.floats(0, 0.5))
def test_jittered_clips_stay_near_the_dense_one(length, num_frames, rate, seed, speed, time_shift):
    def drawn(**jitter) -> torch.Tensor:
        return jittered_indices(length, num_frames, rate, generator(seed), **jitter)

    dense = dense_indices(length, num_frames, rate, generator(seed))
    assert torch.equal(drawn(), dense)
    found = drawn(speed=speed, time_shift=time_shift)
    check_clips(found, length)
    assert torch.equal(found, drawn(speed=speed, time_shift=time_shift))
    shifted = drawn(time_shift=time_shift)
    start = int(dense[0]) + torch.arange(num_frames) * rate  # unclamped: what was held may be seen after a shift
    assert (shifted - start.clamp(0, length - 1)).abs().max() <= time_shift * num_frames * rate + 0.5
    steps = found.unique().diff().float()
    if len(steps) > 2:  # the first and the last may be cut off by the video's ends
        assert (steps[1:-1] <= rate * (1 + speed) + 1).all()


def test_jitter_reaches_both_sides_and_both_speeds():
    source = generator(0)
    clips = [jittered_indices(100, 11, 4, source, speed=0.5) for _ in range(300)]
    spans = [int(clip[-1] - clip[0]) for clip in clips]
    assert min(spans) in (26, 27, 28) and max(spans) in (59, 60, 61)  # of 40
    assert 0.4 < sum(span < 40 for span in spans) / len(spans) < 0.6
    shifts = [int(jittered_indices(41, 11, 4, source, time_shift=0.1)[5]) - 20 for _ in range(300)]
    assert (min(shifts), max(shifts)) == (-4, 4)


@settings(deadline=None)
@given(lengths, counts, seeds)
def test_segments_have_one_frame_each(length, segments, seed):
    indices = segment_indices(length, segments, generator(seed))
    check_clips(indices, length)
    for i, index in enumerate(indices.tolist()):
        first, end = i * length // segments, (i + 1) * length // segments
        assert first <= index < max(end, first + 1)
    assert torch.equal(indices, segment_indices(length, segments, generator(seed)))


def test_segments_are_random_within_their_part():
    source = torch.Generator().manual_seed(0)
    drawn = torch.stack([segment_indices(12, 4, source) for _ in range(100)])
    assert [sorted(set(column.tolist())) for column in drawn.T] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@settings(deadline=None)
@given(lengths, counts, rates, st.integers(1, 12), st.sampled_from(["dense", "segments"]))
def test_views_cover_the_video_evenly(length, num_frames, rate, num_clips, sampling):
    views = view_indices(length, num_frames, rate, num_clips, sampling)
    check_clips(views, length)
    assert views.shape == (num_clips, num_frames)
    starts = views[:, 0]
    gaps = starts.diff()
    assert (gaps >= 0).all()
    if num_clips > 2:
        assert gaps.max() - gaps.min() <= 2  # each end of a gap is rounded
    if sampling == "dense" and num_clips > 1:
        assert starts[0] == 0
        if length >= clip_span(num_frames, rate):
            assert views[-1, -1] == length - 1


@given(lengths, counts, rates)
def test_one_view_is_the_middle(length, num_frames, rate):
    assert torch.equal(view_indices(length, num_frames, rate, 1)[0], dense_indices(length, num_frames, rate))
    segments = view_indices(length, num_frames, rate, 1, "segments")[0]
    assert torch.equal(segments, segment_indices(length, num_frames))


@settings(deadline=None)
@given(lengths, counts, rates, st.integers(1, 50))
def test_windows_cover_everything(length, num_frames, rate, stride):
    windows = window_indices(length, num_frames, rate, stride)
    check_clips(windows, length)
    assert windows[0, 0] == 0
    span = clip_span(num_frames, rate)
    if length < span:
        assert len(windows) == 1
        return
    assert windows[-1, -1] == length - 1
    starts = windows[:, 0]
    assert (starts.diff() > 0).all()
    assert (starts.diff() <= stride).all()
    assert (starts[:-1] % stride == 0).all()
    if stride <= span:
        covered = {frame for start in starts.tolist() for frame in range(start, start + span)}
        assert covered == set(range(length))


def test_the_drawings():
    assert dense_indices(15, 4, 3).tolist() == [2, 5, 8, 11]
    assert dense_indices(6, 4, 3).tolist() == [0, 3, 5, 5]
    assert segment_indices(12, 4).tolist() == [1, 4, 7, 10]
    assert segment_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert view_indices(14, 4, 2, 3).tolist() == [[0, 2, 4, 6], [4, 6, 8, 10], [7, 9, 11, 13]]
    assert view_indices(12, 3, 1, 2, "segments").tolist() == [[1, 5, 9], [3, 7, 11]]
    assert window_indices(12, 3, 2, 4).tolist() == [[0, 2, 4], [4, 6, 8], [7, 9, 11]]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: dense_indices(0, 4, 1), "num_video_frames must be at least 1, got 0"),
        (lambda: segment_indices(5, 0), "num_segments must be at least 1, got 0"),
        (lambda: view_indices(5, 4, 1, 0), "num_clips must be at least 1, got 0"),
        (lambda: window_indices(5, 4, 1, 0), "stride must be at least 1, got 0"),
        (lambda: view_indices(5, 4, 1, 2, "random"), '"dense" or "segments"'),
    ],
)
def test_wrong_numbers_are_named(call, what):
    with pytest.raises(ConfigError, match=what):
        call()
