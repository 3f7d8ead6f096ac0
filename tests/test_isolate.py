"""data/isolate.py: what a file is, and that no file harms the process that asks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lean3d.data.isolate import inspect, inspect_many, look
from video_files import broken_files, moving_frames, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolate")
    return write_video(folder / "good.mp4", moving_frames(24), options={"g": "8", "sc_threshold": "0"}, rotation=90)


def test_everything_about_a_video(video):
    seen = look(video)
    assert (seen.ok, seen.reason, seen.codec, seen.pixel_format) == (True, None, "h264", "yuv420p")
    assert (seen.width, seen.height, seen.rotation) == (48, 64, 90)
    assert (seen.num_frames, seen.fps, seen.variable_rate) == (24, pytest.approx(25), False)
    assert (seen.duration, seen.keyframe_interval) == (pytest.approx(24 / 25), 8)
    assert (seen.has_audio, seen.size_bytes) == (False, video.stat().st_size)
    assert seen.thumbnail.shape == (64, 48, 3) and seen.thumbnail.dtype == np.uint8


def test_variable_rate_sound_and_rounded_stamps(tmp_path):
    stamps = [0, 40, 80, 200, 240]
    seen = look(write_video(tmp_path / "vfr.mkv", moving_frames(5), stamps=stamps, audio=True))
    assert seen.variable_rate and seen.has_audio
    thirds = [0, 33, 67, 100, 133]  # 30 frames a second, in milliseconds
    assert not look(write_video(tmp_path / "cfr.mkv", moving_frames(5), stamps=thirds)).variable_rate


def test_copies_have_the_same_content_whatever_holds_them(tmp_path, video):
    plain = write_video(tmp_path / "plain.mp4", moving_frames(24))
    other = write_video(tmp_path / "other.mp4", moving_frames(24, seed=1))
    renamed = shutil.copy(plain, tmp_path / "renamed.mp4")
    remuxed = tmp_path / "remuxed.mkv"
    with av.open(str(plain)) as old, av.open(str(remuxed), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    hashes = [look(path).content_hash for path in (plain, renamed, remuxed, other)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_a_folder_of_pictures(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((20, 300, 3), 10 * i, np.uint8)).save(tmp_path / f"{i:05d}.png")
    seen = look(tmp_path, "{:05d}.png")
    assert (seen.ok, seen.codec, seen.num_frames, seen.width, seen.height) == (True, "png", 3, 300, 20)
    assert seen.thumbnail.shape == (7, 112, 3) and seen.keyframe_interval == 1
    assert seen.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


FAULTS = """
import os, signal, sys
if sys.argv[0] == "-c":  # only in a child, not in pytest's own processes
    import lean3d.data.isolate as isolate
    look = isolate.look
    def faulty(path, frame_template):
        if "segfault" in path:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "aborts" in path:
            os.abort()
        if "endless" in path:
            while True:
                pass
        if "eats" in path:
            list(bytearray(1 << 30) for _ in range(100))
        if "prints" in path:
            os.write(1, b"noise that is no answer")
        return look(path, frame_template)
    isolate.look = faulty
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_what_harms_a_process_is_told_and_harms_no_other_file(tmp_path, video, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["segfault", "good", "endless", "aborts", "prints", "last"]
    paths = [Path(shutil.copy(video, tmp_path / f"{name}.mp4")) for name in names]
    seen = {Path(found.path).stem: found for found in inspect_many(paths, workers=2, seconds=4)}
    assert set(seen) == set(names)
    assert seen["segfault"].reason == "crashes the decoder (segmentation fault)"
    assert seen["aborts"].reason == "crashes the decoder (SIGABRT)"
    assert seen["endless"].reason == "takes longer than 4 seconds"
    assert all(seen[name].ok and seen[name].num_frames == 24 for name in ("good", "prints", "last"))
    assert not any(seen[name].ok for name in ("segfault", "aborts", "endless"))
    assert seen["endless"].size_bytes > 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_memory_limit_refuses_a_large_picture(tmp_path):
    large = write_video(tmp_path / "large.mp4", np.zeros((2, 2160, 3840, 3), np.uint8))
    with_little = inspect(large, memory=16 << 20)
    assert not with_little.ok and with_little.reason.startswith("needs more than 16 MB of memory")
    assert inspect(large, memory=1 << 30).ok


def test_bad_files_and_names(tmp_path, video):
    files = broken_files(tmp_path / "broken")
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\n.mp4"))
    shutil.copy(video, odd)
    seen = {found.path: found for found in inspect_many(iter([*files.values(), odd, tmp_path / "none.mp4"]), workers=1)}
    assert [path for path, found in seen.items() if found.ok] == [str(odd)]
    assert seen[str(tmp_path / "none.mp4")].reason == "No such file or directory"
    middle = seen[str(files["broken_middle"])]
    assert middle.reason.startswith("damaged") and middle.num_frames == 60, "what is known of a bad file is told"


def test_leaving_in_the_middle_ends_the_children(video):
    found = inspect_many([video] * 50, workers=1)
    assert next(found).ok
    found.close()
    with pytest.raises(StopIteration):
        next(found)
