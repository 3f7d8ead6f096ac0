"""lean3d.stream on files and pipes: whole or at their own pace, damaged ones, words that are no source."""

from __future__ import annotations

import io
import os
import sys
import threading
import time

import pytest
import torch

from lean3d import checkpoint, stream
from lean3d.config import TrainConfig, to_dict
from lean3d.errors import ConfigError, DecodeError
from lean3d.predict import load_model
from lean3d.stream import Session, find_source, read_list
from stream_parts import CLASSES, predictions_of, small_net
from video_files import broken_files, moving_frames, write_video


def test_a_file_is_watched_whole_and_a_realtime_one_at_its_pace(stream_run, stream_video):
    session = Session(stream_run, device="cpu")
    results = list(session.watch(stream_video))
    counts = results[-1].grabber.counts
    assert (counts.frames, counts.stepped, counts.dropped, counts.connections) == (60, 30, 0, 1)
    assert len(results) == 61 and results[-1].frame is None and results[-1].time == pytest.approx(59 / 25)
    began = time.monotonic()
    results = list(session.watch(stream_video, realtime=True))
    assert time.monotonic() - began > 59 / 25
    counts = results[-1].grabber.counts
    assert counts.frames == 60 and counts.stepped + counts.dropped == 30
    assert 0 <= counts.late_mean <= counts.late_max


def test_a_slow_model_drops_frames_and_stays_in_time(stream_run, stream_video, monkeypatch):
    session = Session(stream_run, device="cpu")
    inner = session.net.step
    monkeypatch.setattr(session.net, "step", lambda x, state: time.sleep(0.3) or inner(x, state))
    results = list(session.watch(stream_video, realtime=True))
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


def test_bad_files_end_with_a_reason_after_what_was_good(stream_run, tmp_path, stream_video):
    session = Session(stream_run, device="cpu")
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
    watch = session.watch([stream_video, *broken.values()])
    good = [result for result in watch if result.source == str(stream_video)]
    assert len(good) == 61
    assert {name for name, grabber in watch.grabbers.items() if grabber.problem} == {str(p) for p in broken.values()}


def test_a_cut_off_file_gives_its_beginning(stream_run, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", moving_frames(60), index_first=True)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    session = Session(stream_run, device="cpu")
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


def test_raw_frames_on_a_pipe(stream_run):
    frames = moving_frames(40, 48, 64)
    session = Session(stream_run, device="cpu")
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


@pytest.mark.skipif(sys.platform != "linux", reason="cameras are files on Linux alone")
def test_a_camera_that_is_not_there_says_which_are():
    with pytest.raises(DecodeError, match=r"there is no /dev/video98; cameras here: (none|/dev/video\d)"):
        find_source("98").connect()
