"""lean3d.stream.events: two thresholds, averaging, gaps."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean3d.config import EventConfig
from lean3d.errors import ConfigError
from lean3d.stream import EventTracker
from stream_parts import CLASSES, of_first, prediction


def test_events_have_two_thresholds():
    tracker = EventTracker(CLASSES, EventConfig(on=0.6, off=0.4, smooth=0), source="door")
    scores = [0.1, 0.5, 0.7, 0.5, 0.7, 0.45, 0.35, 0.5, 0.1]
    events = [e for i, score in enumerate(scores) for e in tracker.update(prediction(of_first(score), 0.1 * (i + 1)))]
    assert len(events) == 1 and tracker.current is None
    event = events[0]
    assert (event.source, event.label) == ("door", "walks")
    assert (event.start, event.end) == pytest.approx((0.25, 0.65))
    assert event.score == pytest.approx(np.mean([0.7, 0.5, 0.7, 0.45]))
    assert json.loads(event.to_json()) == {
        "source": "door",
        "label": "walks",
        "start": 0.25,
        "end": 0.65,
        "score": round(event.score, 4),
        "started": None,
        "ended": None,
    }


def test_an_event_that_goes_on_ends_with_the_stream_or_at_a_gap():
    tracker = EventTracker(CLASSES, EventConfig(smooth=0))
    assert tracker.update(prediction(of_first(0.9), 1.0)) == []
    assert tracker.current is not None and tracker.current.end is None
    assert json.loads(tracker.current.to_json())["end"] is None
    ended = tracker.update(prediction(of_first(0.9), 9.0, stretch=1))
    (event,) = ended
    assert (event.start, event.end) == pytest.approx((0.95, 1.0))
    (event,) = tracker.finish()
    assert (event.start, event.end) == pytest.approx((8.95, 9.0))
    assert tracker.finish() == []


def test_averaging_does_not_move_events():
    """A class that is there from 2 to 4 s is an event from 2 to 4 s, however long scores are averaged."""
    for window in (0.1, 0.8):
        for smooth in (0.0, 0.5, 1.0):
            tracker = EventTracker(CLASSES, EventConfig(on=0.5, off=0.5, smooth=smooth))
            events = []
            for i in range(1, 80):
                end = i / 10
                frames = np.arange(max(0.0, end - window), end - 1e-9, 0.1) + 0.05
                share = float(np.mean([2 < t < 4 for t in frames]))
                events += tracker.update(prediction([share, 1 - share, 0.0], end, start=max(0.0, end - window)))
            events += tracker.finish()
            walk = next(e for e in events if e.label == "walks")
            assert (walk.start, walk.end) == pytest.approx((2.0, 4.0), abs=0.11), (window, smooth)


def test_what_lags_is_set_back():
    """Scores of a class that is there from 2 to 4 s come three tenths of a second late."""
    tracker = EventTracker(CLASSES, EventConfig(on=0.5, off=0.5, smooth=0, lag=0.3))
    events = []
    for i in range(1, 80):
        seen = 2 < i / 10 - 0.35 < 4
        events += tracker.update(prediction(of_first(0.9 if seen else 0.1), i / 10))
    (event,) = [e for e in events + tracker.finish() if e.label == "walks"]
    assert (event.start, event.end) == pytest.approx((2.0, 4.0), abs=0.051)
    early = EventTracker(CLASSES, EventConfig(smooth=0, lag=5.0))
    early.update(prediction(of_first(0.9), 0.2))
    assert early.finish()[0].start == 0.0


def test_scores_are_averaged_over_an_eighth_of_what_they_are_about():
    tracker = EventTracker(CLASSES)
    for i in range(30):
        tracker.update(prediction(of_first(i / 30), 2 + i / 10, start=i / 10))
    assert tracker.smoothed is not None
    assert float(tracker.smoothed[0]) == pytest.approx(np.mean([27, 28, 29]) / 30, abs=1e-6)  # a quarter of a second


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.floats(0.01, 1)] * 3), min_size=1, max_size=80),
    on=st.floats(0.2, 1.0),
    share=st.floats(0.1, 1.0),
    smooth=st.sampled_from([0.0, 0.3]),
    least=st.sampled_from([0.0, 0.25]),
)
def test_what_holds_of_all_events(rows, on, share, smooth, least):
    config = EventConfig(on=on, off=on * share, smooth=smooth, min_seconds=least)
    tracker = EventTracker(CLASSES, config)
    events, smoothed, middles = [], [], []
    for i, row in enumerate(rows):
        probabilities = np.array(row, np.float32) / sum(row)
        events += tracker.update(prediction(probabilities.tolist(), 0.1 * (i + 1)))
        assert tracker.smoothed is not None
        smoothed.append(tracker.smoothed.numpy().copy())
        recent = min(i, max(0, round(smooth / 0.1) - 1))
        middles.append((0.1 * (i - recent) + 0.1 * (i + 1)) / 2)
        expected = np.mean([np.array(r, np.float32) / sum(r) for r in rows[i - recent : i + 1]], axis=0)
        assert smoothed[-1] == pytest.approx(expected, abs=1e-5)
    events += tracker.finish()
    for event in events:
        column = CLASSES.index(event.label)
        inside = [
            s[column] for s, m in zip(smoothed, middles, strict=True) if event.start - 1e-6 <= m < event.end - 1e-6
        ]
        assert inside[0] >= config.on - 1e-6 and min(inside) >= config.off - 1e-6
        assert event.end - event.start >= least
        assert config.off - 1e-6 <= event.score <= 1
    for a, b in itertools.pairwise(events):
        assert a.end <= b.start + 1e-9
    if least == 0:  # nothing that is on is outside of all events
        for scores, middle in zip(smoothed, middles, strict=True):
            if scores.max() >= config.on + 1e-6:
                assert any(e.start - 1e-6 <= middle <= e.end + 1e-6 for e in events)


def test_only_some_classes_make_events():
    tracker = EventTracker(CLASSES, EventConfig(labels=("runs",), smooth=0))
    for i in range(5):
        assert tracker.update(prediction([0.9, 0.05, 0.05], 0.1 * (i + 1))) == []
    tracker.update(prediction([0.1, 0.8, 0.1], 0.6))
    assert [e.label for e in tracker.finish()] == ["runs"]
    with pytest.raises(ConfigError, match="no class 'run': did you mean runs"):
        EventTracker(CLASSES, EventConfig(labels=("run",)))
    for wrong in ({"on": 0.2}, {"off": 0.0}, {"on": 1.1}, {"smooth": -1.0}, {"lag": -0.1}):
        with pytest.raises(ConfigError):
            EventConfig(**wrong)
