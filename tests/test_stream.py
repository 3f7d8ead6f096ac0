"""lean3d.stream: what the clip net says, on files, live sources and pipes; what is lost is counted; events."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean3d import checkpoint, stream
from lean3d.cli import main
from lean3d.config import DataConfig, EventConfig, TrainConfig, ViewsConfig, to_dict
from lean3d.data.readers import VideoReader
from lean3d.data.transforms import TestTransform, normalize
from lean3d.errors import ConfigError, DecodeError, StreamingError
from lean3d.models import VideoNet, create_model
from lean3d.predict import load_model
from lean3d.stream import EventTracker, Session, StreamPrediction, find_source, read_list
from lean3d.stream.sampling import Sampler, longest_gap
from lean3d.stream.sources import Backlog
from live_servers import FPS, Program, number_of, send_udp
from video_files import broken_files, moving_frames, write_video

CLASSES = ("walks", "runs", "jumps")


def small_net(
    name: str = "c3d_light", *, sampling_rate: int = 2, size: tuple[int, int] = (32, 32), **arguments
) -> VideoNet:
    """A net whose scores depend on what it sees."""
    if name == "c3d_light":
        arguments = {"layers": 5, "stem": "conv", "shrink": "stride", "halve_time_from": 4, **arguments}
    arguments = {"num_frames": 8, "width": 0.125, "num_classes": 3, "causal": True, **arguments}
    torch.manual_seed(0)
    net = create_model(name, size=size, sampling_rate=sampling_rate, **arguments)
    torch.nn.init.normal_(net.head.linear.weight, std=3.0)
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_(std=0.1), norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a causal net that sees every second frame."""
    folder = tmp_path_factory.mktemp("run")
    recipe = TrainConfig(test=ViewsConfig(crop_area=0.85))
    checkpoint.save_model(folder / "model.safetensors", small_net(), CLASSES, to_dict(recipe))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "walk.mp4", moving_frames(60, 48, 64))


def predictions_of(session: Session, source, **how) -> list[StreamPrediction]:
    return [prediction for result in session.watch(source, **how) for prediction in result.predictions]


# ---- what it says is what the clip net says


def test_the_first_clip_is_what_predict_says_of_it(run_folder, video):
    window = load_model(run_folder, "cpu").predict(video, top_k=3).clips[0]
    last = [p for p in predictions_of(Session(run_folder, device="cpu"), video) if p.end <= 16 / 25 + 1e-6][-1]
    assert (last.start, last.end) == pytest.approx((0.0, 16 / 25))
    assert dict(last.top(3)) == pytest.approx(dict(zip(window.labels, window.scores, strict=True)), abs=1e-5)
    assert max(window.scores) - min(window.scores) > 0.01


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("c3d_light", {}), ("slow_r18", {"causal": False}), ("slowfast_r50", {"num_frames": 32}), ("tsm_r50", {})],
)
def test_all_predictions_are_those_of_the_net_on_the_whole_stream(name, arguments, video):
    net = small_net(name, **arguments)
    session = Session(net, classes=CLASSES, device="cpu")
    found = predictions_of(session, video)
    with VideoReader(video) as reader:
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
    assert len({prediction.label for prediction in found}) >= 1
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
    assert [(p.end, p.seen) for p in rest] == [] or rest[-1].end == pytest.approx(3.0)


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
    inner = session._net.step
    monkeypatch.setattr(session._net, "step", lambda x, state: batches.append(len(x)) or inner(x, state))
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


# ---- sampling by time


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


def test_lateness_is_against_the_earliest_of_the_last_minutes():
    backlog = Backlog(forget=60)
    assert backlog.late(0.0, 100.0) == 0
    assert backlog.late(1.0, 101.5) == pytest.approx(0.5)
    assert backlog.late(3.0, 101.6) == 0  # a burst: two seconds of video in a tenth
    assert backlog.late(3.5, 103.1) == pytest.approx(1.0)
    for i in range(200):  # a clock that is slow by a hundredth
        late = backlog.late(10 + i, 110 + i * 1.01)
    assert late < 1.3


# ---- files


def test_a_file_is_watched_whole_and_a_realtime_one_at_its_pace(run_folder, video):
    session = Session(run_folder, device="cpu")
    results = list(session.watch(video))
    counts = results[-1].grabber.counts
    assert (counts.frames, counts.stepped, counts.dropped, counts.connections) == (60, 30, 0, 1)
    assert len(results) == 61 and results[-1].frame is None and results[-1].time == pytest.approx(59 / 25)
    began = time.monotonic()
    results = list(session.watch(video, realtime=True))
    assert time.monotonic() - began > 59 / 25
    counts = results[-1].grabber.counts
    assert counts.frames == 60 and counts.stepped + counts.dropped == 30
    assert 0 <= counts.late_mean <= counts.late_max


def test_a_slow_model_drops_frames_and_stays_in_time(run_folder, video, monkeypatch):
    session = Session(run_folder, device="cpu")
    inner = session._net.step
    monkeypatch.setattr(session._net, "step", lambda x, state: time.sleep(0.3) or inner(x, state))
    results = list(session.watch(video, realtime=True))
    counts = results[-1].grabber.counts
    assert counts.frames == 60 and counts.stepped + counts.dropped == 30
    assert counts.dropped > 15
    assert counts.late_mean >= 0.3 and counts.late == pytest.approx(counts.late_mean, abs=0.6)
    times = [result.time for result in results]
    assert times == sorted(times)


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    """A second at 10 frames, then a second at 50: the net, at 25, gets 25 of each."""
    stamps = [*range(0, 1000, 100), *range(1000, 2000, 20)]
    path = write_video(tmp_path / "variable.mp4", moving_frames(60), stamps=stamps)
    session = Session(small_net(sampling_rate=1), device="cpu")
    times = [r.time for r in session.watch(find_source(path, fps=25)) for _ in range(len(r.predictions) and 1)]
    counts = list(session.watch(find_source(path, fps=25)))[-1].grabber.counts
    assert counts.frames == 60 and counts.stepped == pytest.approx(50, abs=1)
    assert times == sorted(times)


def test_turned_videos_are_seen_as_predict_sees_them(tmp_path):
    net = small_net(size=(24, 40))
    paths = {
        degrees: write_video(tmp_path / f"{degrees}.mp4", moving_frames(20, 48, 64), rotation=degrees)
        for degrees in (0, 90, 180)
    }
    for degrees, path in paths.items():
        recipe = to_dict(TrainConfig())
        checkpoint.save_model(tmp_path / "model.safetensors", net, CLASSES, recipe)
        window = load_model(tmp_path, "cpu").predict(path, top_k=3).clips[0]
        found = [p for p in predictions_of(Session(tmp_path, device="cpu"), path) if p.end <= 16 / 25 + 1e-6][-1]
        assert dict(found.top(3)) == pytest.approx(dict(zip(window.labels, window.scores, strict=True)), abs=1e-5), (
            degrees
        )


def test_bad_files_end_with_a_reason_after_what_was_good(run_folder, tmp_path, video):
    session = Session(run_folder, device="cpu")
    broken = broken_files(tmp_path)
    reasons = {}
    for name, path in broken.items():
        seen = 0
        with pytest.raises(DecodeError) as caught:
            for result in session.watch(path):
                seen += result.frame is not None
        reasons[name] = (caught.value.reason, seen)
        assert session.streams == ()
    assert "audio only" in reasons["audio_only"][0]
    assert all(reason for reason, _ in reasons.values())
    # beside a good one they end alone
    watch = session.watch([video, *broken.values()])
    good = [result for result in watch if result.source == str(video)]
    assert len(good) == 61
    assert {name for name, grabber in watch.grabbers.items() if grabber.problem} == {str(p) for p in broken.values()}


def test_a_cut_off_file_gives_its_beginning(run_folder, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", moving_frames(60), index_first=True)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    session = Session(run_folder, device="cpu")
    seen = 0
    with pytest.raises(DecodeError, match=r"cut off|damaged"):
        for result in session.watch(cut):
            seen += result.frame is not None
    assert 20 < seen < 60


def test_words_that_are_no_source_say_what_is(tmp_path):
    with pytest.raises(ConfigError, match="neither a camera's number"):
        find_source("missing.mp4")
    with pytest.raises(ConfigError, match=r"--sources list\.txt"):
        find_source(tmp_path)
    with pytest.raises(ConfigError, match=r"-pix_fmt rgb24 .* --raw-size 240 320"):
        find_source("-")
    with pytest.raises(ConfigError, match="no source in"):
        (tmp_path / "list.txt").write_text("# nothing\n\n")
        read_list(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match="can't be read"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="timeout must be above 0"):
        find_source("rtsp://x", timeout=0)
    (tmp_path / "list.txt").write_text("# cameras\nrtsp://a/1\n\n  0 \n")
    assert read_list(tmp_path / "list.txt") == ["rtsp://a/1", "0"]
    assert find_source("rtsp://user:secret@host/1").name == "rtsp://user:***@host/1"
    camera = find_source("3")
    assert (camera.kind, camera.name) == ("camera", "camera 3")


def test_models_that_cannot_stream_say_how_to_train_one():
    whole = create_model("smallbig18", width=0.125, num_classes=3, num_frames=4, size=32)
    with pytest.raises(StreamingError, match=r"--model\.name smallbig18 --model\.options windowed True"):
        Session(whole, device="cpu")
    assert Session(create_model("smallbig18", width=0.125, num_frames=4, size=32, windowed=True), device="cpu")


def test_a_model_of_segments_needs_a_rate(tmp_path):
    recipe = TrainConfig(data=DataConfig(sampling="segments"))
    checkpoint.save_model(tmp_path / "model.safetensors", small_net(), CLASSES, to_dict(recipe))
    with pytest.raises(StreamingError, match="--sampling-rate 8"):
        Session(tmp_path, device="cpu")
    assert Session(tmp_path, sampling_rate=4, device="cpu").period == pytest.approx(4 * 8 / 25) or True


# ---- pipes


def test_raw_frames_on_a_pipe(run_folder):
    frames = moving_frames(40, 48, 64)
    session = Session(run_folder, device="cpu")
    by_hand = [p for frame in frames for p in session.push(frame)] + session.finish()
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb", buffering=0) as pipe:  # noqa: PTH123
            for place in range(0, frames.nbytes, 5000):  # in parts that are no frames
                pipe.write(frames.tobytes()[place : place + 5000])

    threading.Thread(target=feed, daemon=True).start()
    with open(reading, "rb") as stdin:  # noqa: PTH123
        source = stream.Source("-", "-", "stdin", size=(48, 64), stdin=stdin)
        found = predictions_of(session, source)
    assert len(found) == len(by_hand) > 0
    for a, b in zip(found, by_hand, strict=True):
        assert torch.equal(a.probabilities, b.probabilities) and a.end == pytest.approx(b.end)
    odd = stream.Source("-", "-", "stdin", size=(48, 65), stdin=io.BytesIO(frames.tobytes()))
    with pytest.raises(
        DecodeError, match=r"within a frame, after 39 whole ones: .* of 9360 bytes; are frames really 48"
    ):
        predictions_of(session, odd)
    with pytest.raises(DecodeError, match="no frame came"):
        predictions_of(session, stream.Source("-", "-", "stdin", size=(48, 65), stdin=io.BytesIO()))


# ---- live sources


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A live server in a process of its own, which can be killed and started again."""

    def __init__(self, kind: str, epoch: float, length: int = 2500):
        self.kind, self.epoch, self.length, self.port = kind, epoch, length, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{'rtsp' if self.kind == 'rtsp' else 'http'}://127.0.0.1:{self.port}/live"

    def start(self) -> None:
        words = [sys.executable, str(Path(__file__).with_name("live_servers.py"))]
        words += [self.kind, str(self.port), str(self.epoch), str(self.length)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(kind: str, length: int = 2500) -> Iterator[Server]:
    server = Server(kind, time.time(), length)
    try:
        yield server
    finally:
        server.kill()


class Quick:
    """A session whose model costs nothing, so that frames are dropped only where the machine stands still."""

    def __new__(cls) -> Session:
        return Session(small_net(sampling_rate=1, size=(16, 16), num_frames=4), classes=CLASSES, device="cpu")


@pytest.mark.parametrize("kind", ["mpegts", "rtsp"])
def test_a_stream_that_was_killed_comes_back_and_only_the_gap_is_lost(kind):
    with serving(kind) as server:
        told: list[str] = []
        watch = Quick().watch(server.address, tell=told.append)
        numbers, times, killed_at, back_at = [], [], 0, 0.0
        for result in watch:
            if result.frame is None:
                break
            numbers.append(number_of(result.frame))
            times.append(result.time)
            if len(numbers) == 15:
                server.kill()
                killed_at = numbers[-1]
                server.start()
                back_at = (time.time() - server.epoch) * FPS
            if len(numbers) >= 40:
                watch.stop()
        counts = watch.grabbers[server.address].counts
        assert numbers == sorted(set(numbers)) and len(numbers) >= 40
        assert counts.connections == 2 and counts.damaged == 0
        assert "trying again in 0.5 s (1 of 5)" in told[0]
        assert told[-1].endswith("connected again")
        # nothing is missing but the time without a server, and what a new connection takes
        first_after = next(n for n in numbers if n >= back_at - 1)
        assert numbers.index(first_after) >= 15
        assert first_after - killed_at <= (back_at - killed_at) + FPS * 8
        # times are those of the program, also across the gap
        drift = [seconds - number / FPS for seconds, number in zip(times, numbers, strict=True)]
        assert max(drift) - min(drift) < 3.0
        before = [d for d, n in zip(drift, numbers, strict=True) if n <= killed_at]
        assert max(before) - min(before) < 1e-3


def test_a_camera_that_sends_pictures_without_times():
    with serving("mjpeg") as server:
        watch = Quick().watch(server.address)
        numbers, times = [], []
        for result in watch:
            if result.frame is None:
                break
            numbers.append(number_of(result.frame))
            times.append(result.time)
            if len(numbers) == 8:
                watch.stop()
        assert all(number % 5 == 0 for number in numbers) and numbers == sorted(set(numbers))
        spans = np.diff(times) - np.diff(numbers) / FPS
        assert np.median(np.abs(spans)) < 0.1  # by their arrival: not the 25 frames a second that FFmpeg assumes
        counts = watch.grabbers[server.address].counts
        assert counts.stepped + counts.dropped > 2 * len(numbers)  # each stands for five


def test_mpegts_over_udp():
    port = free_port()
    program = Program(time.time(), length=1000)
    sender = threading.Thread(target=send_udp, args=(program, port, 999), daemon=True)
    sender.start()
    watch = Quick().watch(f"udp://127.0.0.1:{port}")
    numbers = []
    for result in watch:
        if result.frame is None:
            break
        numbers.append(number_of(result.frame))
        if len(numbers) == 12:
            watch.stop()
    assert len(numbers) >= 12 and numbers == sorted(set(numbers))


def test_a_dead_source_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        source = find_source(f"http://127.0.0.1:{silent.getsockname()[1]}/x", timeout=0.5)
        told: list[str] = []
        began = time.monotonic()
        with pytest.raises(DecodeError, match="no answer in time"):
            list(Quick().watch(source, retries=1, tell=told.append))
        assert 1.0 < time.monotonic() - began < 20
        assert len(told) == 1 and "no answer in time; trying again in 0.5 s (1 of 1)" in told[0]
    began = time.monotonic()
    with pytest.raises(DecodeError, match="connection refused"):
        list(Quick().watch(f"rtsp://127.0.0.1:{free_port()}/x", retries=0))
    with pytest.raises(DecodeError, match="protocol not found"):
        list(Quick().watch("nothing://there", retries=5))
    assert time.monotonic() - began < 10


# ---- events


def prediction(probabilities, end: float, *, start: float | None = None, stretch: int = 0) -> StreamPrediction:
    return StreamPrediction(
        end - 0.1 if start is None else start, end, end, stretch, torch.tensor(probabilities), CLASSES
    )


def of_first(score: float) -> list[float]:
    return [score, (1 - score) * 0.5, (1 - score) * 0.5]


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
    for wrong in ({"on": 0.3}, {"off": 0.0}, {"on": 1.1}, {"smooth": -1.0}):
        with pytest.raises(ConfigError):
            EventConfig(**wrong)


# ---- the command


def lean3d(*words: str | Path, **how) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "lean3d", "stream", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **how)


def test_the_command_writes_events_and_a_video(run_folder, video, tmp_path):
    out = tmp_path / "seen.mp4"
    done = lean3d(
        video, "--model", run_folder, "--lines", "results", "--events.on", "0.4", "--events.off", "0.2", "--video", out
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    results = [line for line in lines if "top" in line]
    expected = predictions_of(Session(run_folder, device="cpu"), video)
    assert [line["top"][0]["label"] for line in results] == [p.label for p in expected]
    assert [line["end"] for line in results] == pytest.approx([p.end for p in expected], abs=1e-3)
    ended = [line for line in lines if line.get("end") and "label" in line]
    begun = [line for line in lines if "label" in line and line["end"] is None]
    assert len(ended) == len(begun) > 0 and ended[-1]["end"] == pytest.approx(2.4)
    assert [a["start"] for a in begun] == [b["start"] for b in ended]
    assert "60" in done.stderr and "late" in done.stderr
    with VideoReader(out) as reader:
        assert reader.num_frames == 60 and reader.size == (240, 320)
        frame = reader.get_frames([50])[0].numpy().astype(int)
        strip = frame[-14:-2]
        assert strip[:, :200].std() < 3 and strip[:, 310:].std() > 40  # nothing ten seconds ago, a coloured event now
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_takes_a_list_and_counts_each(run_folder, video, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text(f"# the same one twice\n{video}\n{video}\n")
    folder = tmp_path / "videos"
    words = ["--sources", listed, "--model", run_folder, "--video", folder]
    with pytest.raises(SystemExit) as leaving:
        main(["stream", *map(str, words), "--events.on", "0.3", "--events.off", "0.2"])
    said = capsys.readouterr()
    assert leaving.value.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    names = [str(video), f"{video} (2)"]
    first, second = ([(e["label"], e["start"], e["end"]) for e in lines if e["source"] == name] for name in names)
    assert first == second and first
    assert len(list(folder.glob("*.mp4"))) == 2


def test_the_command_reads_a_pipe(run_folder):
    frames = moving_frames(30, 48, 64)
    command = [sys.executable, "-m", "lean3d", "stream", "-", "--raw-size", "48", "64", "--model", str(run_folder)]
    done = subprocess.run([*command, "--lines", "results"], input=frames.tobytes(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if b"top" in line]) > 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_the_last_event(run_folder, tmp_path, signum):
    path = write_video(tmp_path / "long.mp4", moving_frames(1500, 32, 32))
    words = [sys.executable, "-m", "lean3d", "stream", str(path), "--model", str(run_folder), "--realtime"]
    words += ["--lines", "begins", "--events.on", "0.34", "--events.off", "0.01", "--video", str(tmp_path / "o.mp4")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        begun = json.loads(process.stdout.readline())
        process.send_signal(signum)
        rest = [json.loads(line) for line in process.stdout.read().splitlines()]
        errors = process.stderr.read()
        assert process.wait(30) == 128 + signum, errors
    assert begun["end"] is None and rest[-1]["end"] is not None
    assert "Traceback" not in errors and "late" in errors
    assert VideoReader(tmp_path / "o.mp4").num_frames > 1


def test_the_command_explains_its_errors(run_folder, video, tmp_path, capsys):
    checkpoint.save_model(
        tmp_path / "model.safetensors",
        create_model("smallbig18", width=0.125, num_classes=3, num_frames=4, size=32),
        CLASSES,
        to_dict(TrainConfig()),
    )
    for words, message in [
        ([video], "lean3d stream SOURCE --model runs/mine"),
        (["--model", run_folder], "which source?"),
        ([video, "--model", tmp_path], "--model.options causal True"),
        ([video, "--model", run_folder, "--video", "out.avi"], "ends in .mp4"),
        ([video, video, "--model", run_folder, "--show"], "--show takes one source"),
        ([video, "--model", run_folder, "--events.labels", "walk"], "did you mean walks"),
        ([video, "--model", run_folder, "--seconds", "0"], "seconds above 0"),
    ]:
        with pytest.raises(SystemExit) as leaving:
            main(["stream", *map(str, words)])
        said = capsys.readouterr()
        assert leaving.value.code == 2 and message in " ".join(said.err.split()), (words, said.err)
        assert said.out == ""


# ---- long ones


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_minutes_at_real_time_in_bounded_memory_and_lateness():
    seconds = float(os.environ.get("LEAN3D_LIVE_SECONDS", "600"))
    net = small_net(sampling_rate=1, size=(112, 112), width=0.25, num_frames=16, num_classes=3)
    session = Session(net, classes=CLASSES, device="cpu")
    tracker = EventTracker(CLASSES, EventConfig(on=0.4, off=0.3))
    memory, late = [], []
    with serving("rtsp", length=int((seconds + 60) * FPS)) as server:
        watch = session.watch(server.address, seconds=seconds)
        last = -1
        for result in watch:
            for found in result.predictions:
                tracker.update(found)
            if result.frame is not None:
                number = number_of(result.frame)
                assert number > last % 2**12 or last % 2**12 > 3000  # the number has 12 bits
                last = number
                if not memory or len(late) % 250 == 0:
                    memory.append(resident_mib())
                late.append(result.grabber.counts.late)
        counts = watch.grabbers[server.address].counts
    early, at_end = memory[len(memory) // 5], memory[-1]
    print(
        f"{counts}\nmedian lateness {np.median(late) * 1e3:.0f} ms, 99 % below {np.quantile(late, 0.99) * 1e3:.0f} ms; "
        f"memory {early:.0f} MiB after a fifth, {at_end:.0f} MiB at the end"
    )
    assert counts.frames > 0.9 * (seconds - 10) * FPS
    assert counts.stepped + counts.dropped == pytest.approx(counts.frames, abs=2 * FPS)
    assert at_end < early + 20
    half = len(late) // 2
    assert np.median(late[half:]) < np.median(late[:half]) + 0.2 and np.median(late) < 0.5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_eight_streams_at_once():
    net = small_net(sampling_rate=1, size=(112, 112), width=0.25, num_frames=16, num_classes=3)
    session = Session(net, classes=CLASSES, device="cpu")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving("mpegts", length=1500)) for _ in range(8)]
        watch = session.watch([server.address for server in servers], seconds=20)
        for _ in watch:
            pass
        for grabber in watch.grabbers.values():
            counts = grabber.counts
            print(f"{grabber.name}: {counts}")
            assert counts.frames > 100 and counts.stepped > 10
            assert counts.stepped + counts.dropped == pytest.approx(counts.frames, abs=2 * FPS)
