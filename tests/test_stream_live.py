"""lean3d.stream on live sources: what is lost is the gap, and is counted; long ones with -m slow."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lean3d.config import EventConfig
from lean3d.errors import DecodeError
from lean3d.stream import EventTracker, Session, find_source
from live_servers import FPS, Program, number_of, send_udp
from stream_parts import CLASSES, Quick, free_port, serving, small_net


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
