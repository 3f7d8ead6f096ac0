"""lean3d.stream.Session: what the clip net says, frame by frame, of one stream and of many."""

from __future__ import annotations

from collections.abc import Callable

import av
import numpy as np
import pytest
import torch

from lean3d import checkpoint
from lean3d.config import DataConfig, TrainConfig, to_dict
from lean3d.data.readers import VideoReader
from lean3d.data.transforms import TestTransform, normalize
from lean3d.errors import ConfigError, StreamingError
from lean3d.models import create_model
from lean3d.predict import load_model
from lean3d.stream import Session, StreamPrediction
from stream_parts import CLASSES, predictions_of, small_net
from video_files import moving_frames


def test_the_first_clip_is_what_predict_says_of_it(stream_run, stream_video):
    window = load_model(stream_run, "cpu").predict(stream_video, top_k=3).clips[0]
    last = [p for p in predictions_of(Session(stream_run, device="cpu"), stream_video) if p.end <= 16 / 25 + 1e-6][-1]
    assert (last.start, last.end) == pytest.approx((0.0, 16 / 25))
    assert dict(last.top(3)) == pytest.approx(dict(zip(window.labels, window.scores, strict=True)), abs=1e-5)
    assert max(window.scores) - min(window.scores) > 0.01


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("c3d_light", {}), ("slow_r18", {"causal": False}), ("slowfast_r50", {"num_frames": 32}), ("tsm_r50", {})],
)
def test_all_predictions_are_those_of_the_net_on_the_whole_stream(name, arguments, stream_video):
    net = small_net(name, **arguments)
    session = Session(net, classes=CLASSES, device="cpu")
    found = predictions_of(session, stream_video)
    with VideoReader(stream_video) as reader:
        size = (36, 48) if min(net.input_spec.size) == 32 else None
        pixels = reader.get_frames(range(0, 60, 2), size=(32, 43) if size else None)
    frames = normalize(TestTransform(net.input_spec)(pixels), net.input_spec)
    stream, logits = net.stream(), []
    state = stream.init_state()
    for frame in frames.split(1, 2):
        scores, state = stream.step(frame, state)
        logits += [] if scores is None else [scores]
    logits += stream.flush(state)
    assert len(found) == len(logits) > 0
    for prediction, scores in zip(found, logits, strict=True):
        assert prediction.probabilities.numpy() == pytest.approx(scores.softmax(-1)[0].numpy(), abs=1e-5)
    assert session.streams == ()


def test_spans_are_those_of_the_heads_window():
    """Pushed by hand, every frame 0.1 s long: the net's results come every 4 frames and are about the last 8."""
    net = small_net(sampling_rate=1)
    session = Session(net, fps=10, device="cpu")
    frames = moving_frames(30, 32, 32)
    found = [prediction for frame in frames for prediction in session.push(frame)]
    period = net.stream().period
    assert period == 4 and session.period == pytest.approx(0.4) and session.delay == 0
    assert [p.end for p in found] == pytest.approx([0.4 * (i + 1) for i in range(len(found))])
    assert [p.start for p in found] == pytest.approx([max(0.0, 0.4 * (i + 1) - 0.8) for i in range(len(found))])
    assert all(p.seen == p.end for p in found)
    rest = session.finish()
    assert [(p.end, p.seen) for p in rest] == [pytest.approx((3.0, 3.0))]


def test_a_delayed_net_says_how_late_it_is():
    net = small_net("slow_r18", causal=False, sampling_rate=1, num_frames=4)
    session = Session(net, fps=10, device="cpu")
    found = [p for frame in moving_frames(20, 32, 32) for p in session.push(frame)]
    assert session.delay == pytest.approx(0.4)
    assert all(p.seen - p.end == pytest.approx(0.4) for p in found)
    rest = session.finish()
    assert [p.end for p in rest] == pytest.approx([1.7, 1.8, 1.9, 2.0])
    assert all(p.seen == pytest.approx(2.0) for p in rest)


def test_many_streams_in_one_session_say_what_each_says_alone():
    net = small_net(sampling_rate=1)
    videos = {f"camera {i}": moving_frames(20 + i, 32, 40, seed=i) for i in range(4)}
    alone = {}
    for name, frames in videos.items():
        session = Session(net, device="cpu")
        alone[name] = [p for frame in frames for p in session.push(frame)] + session.finish()
    session = Session(net, device="cpu")
    together: dict[str, list[StreamPrediction]] = {name: [] for name in videos}
    generator = np.random.default_rng(0)
    places = dict.fromkeys(videos, 0)
    while any(places[name] < len(videos[name]) for name in videos):
        chosen = [n for n in videos if places[n] < len(videos[n]) and generator.random() < 0.7]
        for name, found in session.push_all({n: videos[n][places[n]] for n in chosen}).items():
            together[name] += found
            places[name] += 1
        for name in videos:
            if places[name] == len(videos[name]):
                together[name] += session.finish(name)
    for name in videos:
        assert len(together[name]) == len(alone[name]) > 0
        for a, b in zip(together[name], alone[name], strict=True):
            assert a.probabilities.numpy() == pytest.approx(b.probabilities.numpy(), abs=1e-5)
            assert (a.start, a.end, a.seen) == (b.start, b.end, b.seen)


def test_streams_that_are_equally_far_run_as_one_batch(monkeypatch):
    net = small_net(sampling_rate=1, halve_time_from=6)
    session = Session(net, device="cpu")
    batches: list[int] = []
    inner = session.net.step
    monkeypatch.setattr(session.net, "step", lambda x, state: batches.append(len(x)) or inner(x, state))
    frames = moving_frames(60, 32, 32)
    for name in "abc":
        session.push(frames[0], stream=name)
    for frame in frames[:50]:
        session.push_all(dict.fromkeys("abc", frame))
    assert batches[:3] == [1, 1, 1] and batches[3:] == [3] * 50
    session.push_all(dict.fromkeys("abcd", frames[1]))
    assert sorted(batches[-2:]) == [1, 3]  # a young stream's buffers are not full yet ...
    for frame in frames:
        session.push_all(dict.fromkeys("abcd", frame))
    assert batches[-1] == 4  # ... and then they are


def test_a_session_survives_a_save(tmp_path):
    net = small_net()
    frames = moving_frames(50, 40, 40)
    whole = Session(net, device="cpu")
    expected = [p for frame in frames for p in whole.push_all({"a": frame, "b": frame[::-1].copy()})["b"]]
    first = Session(net, device="cpu")
    found = [p for frame in frames[:23] for p in first.push_all({"a": frame, "b": frame[::-1].copy()})["b"]]
    torch.save(first.state(), tmp_path / "state.pt")
    first.push_all({"a": frames[0], "b": frames[0]})  # the saved state is not touched
    second = Session(net, device="cpu")
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.streams == ("a", "b")
    found += [p for frame in frames[23:] for p in second.push_all({"a": frame, "b": frame[::-1].copy()})["b"]]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.start, a.end) == (b.start, b.end)
        assert a.probabilities.numpy() == pytest.approx(b.probabilities.numpy(), abs=1e-6)
    with pytest.raises(StreamingError, match="of c3d_light in format 1, the session of slow_r18"):
        Session(small_net("slow_r18"), device="cpu").restore(first.state())


def test_frames_may_be_arrays_tensors_grey_and_pyavs():
    net = small_net(in_channels=1, sampling_rate=1)
    grey = moving_frames(6, 40, 40)[..., :1]
    kinds: list[Callable] = [
        lambda f: f,
        torch.from_numpy,
        lambda f: av.VideoFrame.from_ndarray(f[..., 0], format="gray8"),
    ]
    rows = []
    for kind in kinds:
        session = Session(net, device="cpu")
        found = [p for frame in grey for p in session.push(kind(frame))]
        rows.append(torch.stack([p.probabilities for p in found]))
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    with pytest.raises(ConfigError, match=r"a frame must be uint8 \(H, W, C\).*float32"):
        Session(net, device="cpu").push(np.zeros((4, 4, 3), np.float32))


def test_a_push_after_a_gap_gives_the_old_streams_end_first():
    net = small_net("slow_r18", causal=False, sampling_rate=1, num_frames=4)
    session = Session(net, fps=10, device="cpu")
    frames = moving_frames(12, 32, 32)
    before = [p for i, frame in enumerate(frames) for p in session.push(frame, i / 10)]
    assert len(before) == 8
    after = session.push(frames[0], 60.0)
    assert [p.end for p in after] == pytest.approx([0.9, 1.0, 1.1, 1.2]) and {p.stretch for p in after} == {0}
    found = [p for i, frame in enumerate(frames[1:]) for p in session.push(frame, 60.1 + i / 10)]
    assert {p.stretch for p in found} == {1} and found[0].start == pytest.approx(60.0)
    for a, b in zip(found, before, strict=False):
        assert a.probabilities.numpy() == pytest.approx(b.probabilities.numpy(), abs=1e-6)


def test_models_that_cannot_stream_say_how_to_train_one():
    whole = create_model("smallbig18", width=0.125, num_classes=3, num_frames=4, size=32)
    with pytest.raises(StreamingError, match=r"--model\.name smallbig18 --model\.options windowed True"):
        Session(whole, device="cpu")
    windowed = create_model("smallbig18", width=0.125, num_frames=4, size=32, windowed=True)
    assert Session(windowed, device="cpu").delay > 0


def test_a_model_of_segments_needs_a_rate(tmp_path):
    recipe = TrainConfig(data=DataConfig(sampling="segments"))
    checkpoint.save_model(tmp_path / "model.safetensors", small_net(), CLASSES, to_dict(recipe))
    with pytest.raises(StreamingError, match="--sampling-rate 8"):
        Session(tmp_path, device="cpu")
    assert Session(tmp_path, sampling_rate=4, device="cpu").period == pytest.approx(4 * 4 / 25)
