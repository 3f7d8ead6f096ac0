"""lean3d.stream.sampling: which frames the net gets, by their times; lateness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lean3d.errors import ConfigError
from lean3d.stream.sampling import Sampler, longest_gap
from lean3d.stream.sources import Backlog


@given(
    fps=st.floats(1, 120),
    rate=st.integers(1, 8),
    jitter=st.floats(0, 0.45),
    seed=st.integers(0, 99),
    start=st.floats(-1e3, 1e5),
)
def test_a_steady_source_gives_every_nth_frame_whatever_its_jitter(fps, rate, jitter, seed, start):
    sampler = Sampler(fps, rate, longest_gap(8, rate, fps))
    shifts = np.random.default_rng(seed).uniform(-jitter, jitter, 50)
    shifts[0] = 0
    taken = [sampler.take(start + (i + shift) / fps) for i, shift in enumerate(shifts)]
    assert [i for i, take in enumerate(taken) for _ in range(take.repeats)] == list(range(0, 50, rate))
    assert [i for i, take in enumerate(taken) if take.fresh] == [0]


@given(
    steps=st.lists(st.floats(0.001, 0.9), min_size=1, max_size=60),
    fps=st.floats(5, 60),
    rate=st.integers(1, 2),
)
def test_variable_rates_become_the_nets_rate(steps, fps, rate):
    """At each time the net has had as many frames as have been due by then, to within half a frame of the source."""
    sampler = Sampler(fps, rate, 1.5)
    times = np.cumsum([0.0, *steps])
    given_frames = 0
    for seconds in times:
        take = sampler.take(float(seconds))
        given_frames += take.repeats
        assert take.repeats >= 0 and take.fresh == (seconds == 0)
        due = seconds * fps / rate + 0.5 / rate
        assert due - 1e-6 <= given_frames <= due + 1 + 1e-6


def test_a_gap_begins_anew():
    sampler = Sampler(25, 1, 1.0)
    assert sampler.take(5.0) == (1, True)
    assert sampler.take(5.04) == (1, False)
    assert sampler.take(5.54) == (12, False) or sampler.take(5.54).repeats == 0
    assert sampler.take(7.0) == (1, True)
    assert sampler.take(7.04) == (1, False)
    copy = Sampler(**sampler.state())
    assert copy.take(7.08) == sampler.take(7.08) == (1, False)
    with pytest.raises(ConfigError, match="fps must be positive"):
        Sampler(0.0, 1, 1.0)


def test_lateness_is_against_the_earliest_of_the_last_minutes():
    backlog = Backlog(forget=60)
    assert backlog.late(0.0, 100.0) == 0
    assert backlog.late(1.0, 101.5) == pytest.approx(0.5)
    assert backlog.late(3.0, 101.6) == 0  # a burst: two seconds of video in a tenth
    assert backlog.late(3.5, 103.1) == pytest.approx(1.0)
    for i in range(200):  # a clock that is slow by a hundredth
        late = backlog.late(10 + i, 110 + i * 1.01)
    assert late < 1.3
