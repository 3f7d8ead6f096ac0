"""Looks at files in processes of their own, so that one that crashes, never ends or eats all memory harms nobody.

A file's bytes are a stranger's, and a decoder is a large program in C: a bad enough file ends its process or keeps it
for ever. So each file is decoded in a child process, which has limits of time and memory and is replaced when it dies:

    inspect_many(paths) --path--> child: decode all, measure, hash --Inspection--> the caller, in the order of finishing
                                    |  too slow: killed; crashed: seen by its end; too much memory: refused
                                    +--> an Inspection that says so, and a fresh child for the next file
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lean3d.data.fingerprint import Fingerprint
from lean3d.data.readers import FrameReader, Reader, VideoReader, open_video
from lean3d.errors import DecodeError

T = TypeVar("T")

START_SECONDS = 120.0
"""Longest start of a child, which is not the file's fault: a loaded machine imports PyTorch slowly."""

HASH_SIDE = 64
"""Height and width of the frames that a content hash is taken of, in pixels."""

THUMBNAIL_SIDE = 112
"""Longer side of a thumbnail, in pixels."""

_CHUNK = 64  # frames that are decoded at once, so that a long video takes no more memory than a short one


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a video file after all of it was decoded.

    Where the file is bad, whatever was found out before stays; the rest is None, 0 or False.
    """

    path: str
    """The file, or the folder of pictures."""
    ok: bool
    """Whether every frame was decoded."""
    reason: str | None
    """Why not, in a short phrase."""
    codec: str | None = None
    """FFmpeg's name of the codec, as in h264; of a folder, the pictures' ending."""
    pixel_format: str | None = None
    """FFmpeg's name of the stored pixels' layout, as in yuv420p; None for a folder."""
    width: int = 0
    """Of a frame as it is shown, in pixels."""
    height: int = 0
    """Of a frame as it is shown, in pixels."""
    num_frames: int = 0
    """Frames that there are, exactly."""
    fps: float = 0.0
    """Frames per second, on average."""
    variable_rate: bool = False
    """Whether the distances of frames in time differ by more than their rounding."""
    duration: float = 0.0
    """Seconds from the first frame's showing to the end of the last one's."""
    keyframe_interval: float = 0.0
    """Frames from one keyframe to the next, on average."""
    rotation: int = 0
    """Degrees, counterclockwise, by which a player turns the stored pictures: 0, 90, 180 or 270."""
    has_audio: bool = False
    """Whether sound lies beside the pictures."""
    size_bytes: int = 0
    """Size of the file, or of all pictures of a folder."""
    content_hash: str | None = None
    """SHA-256, hexadecimal, of all frames as shown, small and grey: copies under other names, or in another container,
    have the same one; videos that were encoded anew have not."""
    fingerprint: np.ndarray | None = None
    """int8 (2048,), of what moves (see `lean3d.data.fingerprint`): close in videos that were encoded anew; None where
    too little moves."""
    thumbnail: np.ndarray | None = None
    """The middle frame, uint8 (H, W, 3), its longer side 112 pixels at most."""


def inspect(path: str | Path, *, seconds: float = 60.0, memory: int = 2 << 30) -> Inspection:
    """Decode all of a file in a child process and tell what it is. A bad file is an answer, never an error.

    For more than one file `inspect_many` is much faster: starting a child takes seconds.

    Args:
        path: A video file, or a folder of pictures.
        seconds: Longest time that the file may take.
        memory: Bytes that decoding may need on top of a child's own (enforced by Linux).
    """
    return next(inspect_many([path], 1, seconds=seconds, memory=memory))


def inspect_many(
    paths: Iterable[str | Path],
    workers: int = 2,
    *,
    seconds: float = 60.0,
    memory: int = 2 << 30,
    frame_template: str = "{:05d}.jpg",
) -> Iterator[Inspection]:
    """Inspect many files, `workers` at a time, each in the order in which they are done.

    The children live until the end (or until the iterator is closed); one that dies is replaced.

    Args:
        paths: Files and folders of pictures; an iterator is read as the work goes on.
        workers: Child processes.
        seconds: Longest time that one file may take.
        memory: Bytes that decoding one file may need on top of a child's own (enforced by Linux).
        frame_template: How the pictures in a folder are named.
    """
    settings = {"frame_template": frame_template}
    calls = call_many("lean3d.data.isolate:look", map(str, paths), workers, seconds=seconds, memory=memory, **settings)
    with contextlib.closing(calls):
        for path, answer in calls:
            if isinstance(answer, Failure):
                answer = Inspection(path, False, answer.reason, size_bytes=_bytes_of(Path(path)))
            yield answer


@dataclass(frozen=True)
class Failure:
    """The answer for a file whose child process died or was killed."""

    reason: str
    """A short phrase that says how."""


def call_many(
    function: str, paths: Iterable[T], workers: int, *, seconds: float, memory: int, **settings: Any
) -> Generator[tuple[T, Any], None, None]:
    """Call a function for many files in child processes, `workers` at a time; answers come as they are done.

    The children live until the end (or until the generator is closed); one that dies is replaced.

    Args:
        function: Where it is, as ``"package.module:name"``; it is called as ``function(path, **settings)``.
        paths: What it is called with, one after the other: a path, or a tuple whose first item is one. An iterator is
            read as the work goes on.
        workers: Child processes.
        seconds: Longest time that one call may take.
        memory: Bytes that a call may need on top of a child's own (enforced by Linux).
        settings: Further arguments of every call.

    Yields:
        What the function was called with, and its answer, a dataclass with `ok` and `reason`, or a `Failure`.
    """
    children = [_Child(memory, function, settings) for _ in range(workers)]
    free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    for child in children:
        free.put(child)

    def call(path: T) -> tuple[T, Any]:
        child = free.get()
        try:
            return path, child.call(path, seconds)
        finally:
            free.put(child)

    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting: set[Future[tuple[T, Any]]] = set()
            for path in paths:
                waiting.add(pool.submit(call, path))
                if len(waiting) > 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.close()


class _Child:
    """A process that takes one file after the other, started when it is first needed and anew when it died."""

    def __init__(self, memory: int, function: str, settings: dict[str, Any]):
        self._settings = memory, function, settings
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def call(self, path: Any, seconds: float) -> Any:
        process = self._start()
        if process is None:
            return Failure("the inspection was stopped")
        answer, late = self._ask(process, path, seconds)
        if answer is not None:
            return answer
        end = process.wait()
        self._process = None
        return Failure(f"takes longer than {seconds:g} seconds" if late else _meaning(end))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is not None:
                return self._process
            # Not multiprocessing: that would run a user's script again, where it has no `__main__` guard.
            self._process = process = subprocess.Popen(
                [sys.executable, "-c", "from lean3d.data.isolate import _serve; _serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            )
        ready, _ = self._ask(process, self._settings, START_SECONDS)
        if ready is None and not self._closed:
            raise RuntimeError(f"a process to decode in does not start: exit status {process.wait()}")
        return process

    def _ask(self, process: subprocess.Popen[bytes], question: Any, seconds: float) -> tuple[Any, bool]:
        """The child's answer, or None if it died; and whether it was killed for being late."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout), False
        except (EOFError, OSError, pickle.UnpicklingError):
            return None, late.is_set()
        finally:
            timer.cancel()


def _meaning(status: int) -> str:
    """What the end of a child says of the file that it was looking at."""
    if status >= 0:
        return f"ends the decoder's process (exit status {status})"
    if status == -signal.SIGSEGV:
        return "crashes the decoder (segmentation fault)"
    name = signal.Signals(-status).name
    if status == -signal.SIGKILL:
        return f"its decoder was killed ({name}), as the system does where memory runs out"
    return f"crashes the decoder ({name})"


def _serve() -> None:
    """A child's life: answer each path on stdin with what the function makes of it on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then closes our stdin
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the answers
    memory, name, settings = pickle.load(sys.stdin.buffer)
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    allowed = _limit_memory(memory)
    answer: Any = "ready"
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            path = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        before = _peak()
        answer = function(path, **settings)
        # A decoder that gets no memory fails in any way it likes; what it had by then tells the true reason.
        if not answer.ok and before < (peak := _peak()) and peak > allowed - memory / 2:
            answer = replace(answer, reason=f"needs more than {memory >> 20} MB of memory ({answer.reason})")


def _limit_memory(memory: int) -> int:
    """Let this process have `memory` bytes more than it has now, and tell how many that is in all; Linux only."""
    if sys.platform != "linux":
        return sys.maxsize
    import resource

    limit = _peak() + memory
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return limit


def _peak() -> int:
    """The most bytes of addresses that this process ever had at a time; Linux only."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmPeak:")[2].split()[0]) << 10


def look(path: str | Path, frame_template: str = "{:05d}.jpg") -> Inspection:
    """Decode all of a file in this process; what `inspect` does in a child."""
    facts: dict[str, Any] = {"path": str(path), "ok": False, "reason": None, "size_bytes": _bytes_of(Path(path))}
    try:
        with open_video(path, frame_template) as video:
            _measure(video, facts)
            facts["content_hash"], facts["fingerprint"] = _content(video)
            facts["thumbnail"] = _thumbnail(video)
        facts["ok"] = True
    except DecodeError as error:
        facts["reason"] = error.reason
    except MemoryError:
        facts["reason"] = "needs too much memory"
    return Inspection(**facts)


def _measure(video: Reader, facts: dict[str, Any]) -> None:
    facts |= {"num_frames": video.num_frames, "fps": video.fps}
    facts["height"], facts["width"] = video.size
    stamps = np.asarray(video.timestamps)
    steps = np.diff(stamps)
    typical = float(np.median(steps)) if len(steps) else 1 / video.fps
    facts["duration"] = float(stamps[-1]) + typical
    # Containers round time stamps to a millisecond or more finely, so that two distances may differ by two of them.
    facts["variable_rate"] = bool(len(steps) and steps.max() - steps.min() > 0.002 + 0.1 * typical)
    if isinstance(video, VideoReader):
        facts |= {"codec": video.codec, "pixel_format": video.pixel_format, "has_audio": video.has_audio}
        facts |= {"rotation": video.rotation, "keyframe_interval": video.num_frames / max(video.num_keyframes, 1)}
    elif isinstance(video, FrameReader):
        facts |= {"codec": video.ending, "keyframe_interval": 1.0}


def _content(video: Reader) -> tuple[str, np.ndarray | None]:
    """The hash and the fingerprint of all frames."""
    digest, fingerprint = hashlib.sha256(), Fingerprint(video.num_frames)
    for start in range(0, video.num_frames, _CHUNK):
        numbers = range(start, min(start + _CHUNK, video.num_frames))
        frames = video.get_frames(numbers, size=(HASH_SIDE, HASH_SIDE), channels=1).numpy()
        digest.update(frames.tobytes())
        fingerprint.add(frames[..., 0])
    return digest.hexdigest(), fingerprint.numbers()


def _thumbnail(video: Reader) -> np.ndarray:
    height, width = video.size
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return video.get_frames([video.num_frames // 2], size=size)[0].numpy()


def _bytes_of(path: Path) -> int:
    try:
        files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0
