"""Where frames come from: files, cameras, addresses, standard input.

    find_source("rtsp://camera/1") -> Source --connect()--> Connection: fps, then (frame, seconds) one after another

A source that ends by itself (a file, standard input) is read whole. One that goes on by itself (a camera, an address
without a length) is `live`: it waits for nobody, and it may be connected again when it breaks off.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import av
import numpy as np

from lean3d.data.readers.base import FORMATS, Scaler
from lean3d.data.readers.table import is_cut_off
from lean3d.data.readers.video import orientation
from lean3d.errors import ConfigError, DecodeError

DEFAULT_FPS = 25.0
"""Frames per second of a source that doesn't tell."""

PLAUSIBLE_FPS = (0.1, 480.0)
"""Cameras that don't know their rate tell that of their clock, 90000."""

CLOCKLESS = frozenset({"mpjpeg", "mjpeg", "image2pipe", "jpeg_pipe", "png_pipe"})
"""Formats whose frames carry no time: that of their arrival counts."""

MAX_LATE = 1.0
"""Seconds that decoding may lag behind a live source before it leaves packets out."""

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}


class Timed(Protocol):
    """Something that gives frames with their times."""

    fps: float
    """Frames per second, as the source tells it, else `DEFAULT_FPS`."""
    duration: float | None
    """Seconds in all, where that is known."""
    live: bool
    """Whether it goes on by itself, whether frames are taken or not."""
    damaged: int
    """Frames and packets of a live source that could not be decoded."""
    left_out: int
    """Packets of a live source that were not decoded, because decoding was late."""

    def frames(self) -> Iterator[tuple[av.VideoFrame, float | None]]:
        """Frames, each with its seconds since some beginning, or None where the time of its arrival counts."""
        ...

    def close(self) -> None:
        """Give it back; harmless when done twice."""
        ...


@dataclass(frozen=True)
class Source:
    """A place that frames come from; nothing is opened before `connect`.

    Attributes:
        name: For people, without passwords.
        address: What PyAV opens.
        kind: "file", "camera", "address" or "stdin".
        timeout: Seconds after which a source that says nothing counts as broken off.
        size: Height and width of raw frames on standard input.
        fps: Frames per second, where the user knows better than the source.
        channels: 3 for raw frames in RGB, 1 for grey ones.
        stdin: Where raw frames are read.
    """

    name: str
    address: str
    kind: str
    timeout: float = 5.0
    size: tuple[int, int] | None = None
    fps: float | None = None
    channels: int = 3
    stdin: IO[bytes] | None = None

    def connect(self) -> Timed:
        """Open it.

        Raises:
            DecodeError: It can't be opened, or has no video.
        """
        if self.kind == "stdin":
            assert self.size is not None
            return RawFrames(self.stdin or sys.stdin.buffer, self.size, self.fps or DEFAULT_FPS, self.channels)
        return Connection(self)


def find_source(
    text: str | int | Path,
    *,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    channels: int = 3,
    timeout: float = 5.0,
) -> Source:
    """What a user's words for a source mean.

    Args:
        text: A file; a camera's number (0 is the first); an address that FFmpeg knows, as rtsp://, http://, udp://;
            or "-", raw frames on standard input.
        size: Height and width of raw frames.
        fps: Frames per second, where the source is wrong about it or can't tell.
        channels: Of raw frames: 3, RGB, or 1, grey.
        timeout: Seconds after which a camera or address that says nothing counts as broken off.

    Raises:
        ConfigError: It is none of these, or raw frames have no size.
    """
    words = str(text)
    if fps is not None and not PLAUSIBLE_FPS[0] <= fps <= PLAUSIBLE_FPS[1]:
        raise ConfigError(f"fps must be from {PLAUSIBLE_FPS[0]:g} to {PLAUSIBLE_FPS[1]:g}, got {fps}")
    if not timeout > 0:
        raise ConfigError(f"timeout must be above 0 seconds, got {timeout}")
    if words == "-":
        if size is None or min(size) < 1:
            raise ConfigError(
                "raw frames on standard input need their height and width, for example: "
                "ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 -s 320x240 - | lean3d stream - --raw-size 240 320 ..."
            )
        return Source("-", "-", "stdin", timeout, size, fps, channels)
    if camera := re.fullmatch(r"(?:/dev/video)?(\d+)", words):
        place = next((p for system, (_, p) in _CAMERAS.items() if sys.platform.startswith(system)), None)
        if place is None:
            raise ConfigError(
                f"cameras by number work on Linux and macOS, not on {sys.platform}: stream the camera with ffmpeg to "
                "udp://127.0.0.1:5000 and give lean3d that address"
            )
        return Source(f"camera {camera[1]}", place.format(camera[1]), "camera", timeout, None, fps)
    if re.match(r"[a-z][a-z0-9+.-]+://", words, re.IGNORECASE):
        return Source(_without_password(words), words, "address", timeout, None, fps)
    path = Path(words)
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, and a stream is one source: give its files, or a list of them with --sources list.txt"
        )
    if not path.exists():
        raise ConfigError(
            f"{words!r} is no source: there is no such file, and it is neither a camera's number (0), nor an address "
            "(rtsp://, http://, udp://), nor - for raw frames on standard input"
        )
    return Source(words, words, "file", timeout, None, fps)


def read_list(path: str | Path) -> list[str]:
    """The sources in a text file: one a line; empty lines and those that begin with # don't count.

    Raises:
        ConfigError: There is none, or the file can't be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of sources {path} can't be read: {error}") from error
    sources = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not sources:
        raise ConfigError(f"there is no source in {path}: write one a line, as rtsp://camera/1")
    return sources


class Connection:
    """An open file, camera or address; made by `Source.connect`.

    A file is decoded strictly: damage is an error. Of a live source damaged frames are left out and counted, and where
    decoding lags behind, packets are left out up to the next keyframe, so that lateness doesn't pile up.

    Raises:
        DecodeError: It can't be opened, or has no video.
    """

    def __init__(self, source: Source):
        self.name, self._kind = source.name, source.kind
        self.damaged = self.left_out = 0
        self._path = Path(source.address) if source.kind == "file" else None
        with self._errors():
            self._container = self._open(source)
        try:
            self._find_video(source)
        except BaseException:
            self.close()
            raise

    def _open(self, source: Source) -> av.container.InputContainer:
        options: dict[str, str] = {}
        if source.kind == "file":
            # "file:" because a name with a colon would be taken for a protocol
            return av.open(f"file:{source.address}", metadata_errors="ignore")
        kind = None
        if source.kind == "camera":
            kind = next(name for system, (name, _) in _CAMERAS.items() if sys.platform.startswith(system))
            options = {"framerate": f"{source.fps:g}"} if source.fps else {}
            if sys.platform == "linux" and not Path(source.address).exists():
                there = ", ".join(sorted(map(str, Path("/dev").glob("video[0-9]*")))) or "none"
                raise DecodeError(self.name, f"there is no {source.address}; cameras here: {there}")
        scheme = source.address.partition(":")[0].lower()
        if scheme in ("rtsp", "rtsps"):
            options = {"rtsp_flags": "prefer_tcp"}  # UDP loses packets, and firewalls stop it
        elif scheme == "udp":
            options = {"overrun_nonfatal": "1", "fifo_size": "50000"}
        options |= {"fflags": "nobuffer", "analyzeduration": "2000000"}
        timeout = (source.timeout, source.timeout)
        return av.open(source.address, format=kind, options=options, timeout=timeout, metadata_errors="ignore")

    def _find_video(self, source: Source) -> None:
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & covers]
        if not streams:
            audio = " (audio only)" if self._container.streams.audio else ""
            raise NoVideoError(self.name, f"no video stream{audio}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise NoVideoError(self.name, "no decoder for its codec")
        context.thread_type, context.thread_count = "NONE", 1  # threads would hold frames back
        length = self._stream.duration
        if length is not None:
            self.duration = float(length * (self._stream.time_base or 0)) or None
        else:
            total = self._container.duration
            self.duration = total / av.time_base if total and total > 0 else None
        self.live = self._kind == "camera" or (self._kind == "address" and self.duration is None)
        if not self.live:
            context.options = {"err_detect": "explode"}
        told = float(self._stream.guessed_rate or self._stream.average_rate or 0)
        known = PLAUSIBLE_FPS[0] <= told <= PLAUSIBLE_FPS[1] and not self._clockless
        self.fps = source.fps or (told if known else DEFAULT_FPS)

    @property
    def _clockless(self) -> bool:
        return not CLOCKLESS.isdisjoint(self._container.format.name.split(","))

    def frames(self) -> Iterator[tuple[av.VideoFrame, float | None]]:
        """See `Timed.frames`."""
        timed = not self._clockless or not self.live
        first: float | None = None
        count = 0
        with self._errors():
            for frame in self._decoded():
                seconds = frame.time if timed else None
                if seconds is None and not self.live:
                    seconds = count / self.fps
                if seconds is not None:
                    first = seconds if first is None else first
                    seconds -= first
                count += 1
                yield frame, seconds
            if self._path is not None and is_cut_off(self._path):
                raise DecodeError(self.name, "the file is cut off")
            if not count:
                raise DecodeError(self.name, "no frames in the video stream")

    def _decoded(self) -> Iterator[av.VideoFrame]:
        backlog = Backlog()
        waits_for_key = False
        for packet in self._container.demux(self._stream):
            if not self.live:
                if packet.is_corrupt:
                    raise DecodeError(self.name, "the file is damaged or cut off")
                yield from self._strictly(packet)
                continue
            if packet.dts is not None and packet.time_base is not None and not self._clockless:
                late = backlog.late(float(packet.dts * packet.time_base), time.monotonic())
                waits_for_key |= late > MAX_LATE
                if waits_for_key and not (packet.is_keyframe and late < MAX_LATE / 2):
                    self.left_out += 1
                    continue
                waits_for_key = False
            try:
                decoded = packet.decode()
            except (av.FFmpegError, ValueError):
                self.damaged += 1
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    self.damaged += 1
                else:
                    yield frame

    def _strictly(self, packet: av.Packet) -> Iterator[av.VideoFrame]:
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(self.name, "a frame is damaged")
            yield frame

    def close(self) -> None:
        """See `Timed.close`."""
        container = getattr(self, "_container", None)
        if container is not None:
            container.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever goes wrong within is a DecodeError with a reason for people."""
        try:
            yield
        except DecodeError:
            raise
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            kind = NoVideoError if isinstance(error, HOPELESS) else DecodeError
            raise kind(self.name, _reason(error)) from error


HOPELESS = (av.error.ProtocolNotFoundError, av.error.DecoderNotFoundError, av.error.DemuxerNotFoundError)
"""Errors that trying again doesn't mend."""


class NoVideoError(DecodeError):
    """There is something, but no video, or nothing that FFmpeg understands: trying again doesn't help."""


class Backlog:
    """How late packets come: against the earliest one, measured by its own clock, of the last minute or two.

    A network's burst sets a new earliest; clocks that drift apart are forgiven, since it is forgotten in time.
    """

    def __init__(self, forget: float = 60.0):
        self._forget = forget
        self._since: float | None = None
        self._least = self._before = float("inf")

    def late(self, stamp: float, now: float) -> float:
        """Seconds that something of this stamp, which comes now, is later than the earliest one was."""
        if self._since is None or now - self._since > self._forget:
            self._since, self._before, self._least = now, self._least, float("inf")
        offset = now - stamp
        self._least = min(self._least, offset)
        return offset - min(self._least, self._before)


class RawFrames:
    """Raw frames from a pipe: uint8 pixels, row by row, RGB or grey, nothing between frames.

    Args:
        stream: The pipe.
        size: Height and width.
        fps: Frames per second.
        channels: 3 for RGB, 1 for grey.
    """

    live = False
    duration: float | None = None
    damaged = left_out = 0

    def __init__(self, stream: IO[bytes], size: tuple[int, int], fps: float, channels: int):
        self._stream, self._size, self.fps, self._channels = stream, size, fps, channels

    def frames(self) -> Iterator[tuple[av.VideoFrame, float | None]]:
        """See `Timed.frames`; a frame's time is its number by `fps`.

        Raises:
            DecodeError: The pipe ends within a frame, or gave none.
        """
        height, width = self._size
        length = height * width * self._channels
        count = 0
        while chunk := self._read(length):
            if len(chunk) < length:
                raise DecodeError(
                    "-",
                    f"standard input ends within a frame, after {count} whole ones: {len(chunk)} of {length} bytes; "
                    f"are frames really {height} high and {width} wide, with {self._channels} bytes a pixel?",
                )
            pixels = np.frombuffer(chunk, np.uint8).reshape(height, width, self._channels)
            yield frame_of(pixels), count / self.fps
            count += 1
        if not count:
            raise DecodeError("-", "no frame came on standard input")

    def _read(self, length: int) -> bytes:
        """So many bytes, or those that there are before the end; a pipe gives them in parts."""
        parts = []
        while length and (part := self._stream.read(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Nothing to give back."""


def frame_of(pixels: np.ndarray) -> av.VideoFrame:
    """A frame of PyAV's from uint8 pixels (H, W, C), C = 3 (RGB) or 1 (grey).

    Raises:
        ConfigError: Another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in FORMATS or 0 in pixels.shape:
        raise ConfigError(
            f"a frame must be uint8 (H, W, C) with C = 3 (RGB) or 1 (grey), got {pixels.dtype} {pixels.shape}"
        )
    channels = pixels.shape[-1]
    pixels = np.ascontiguousarray(pixels)
    return av.VideoFrame.from_ndarray(pixels[..., 0] if channels == 1 else pixels, format=FORMATS[channels])


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown, turned as its display matrix says."""
    turned = orientation(frame)[0]
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def shown_pixels(frame: av.VideoFrame, scaler: Scaler, size: tuple[int, int], channels: int) -> np.ndarray:
    """A frame as it is shown, in another size: uint8 (H, W, C), with its own memory.

    Args:
        frame: As decoded.
        scaler: Reused from frame to frame.
        size: Height and width.
        channels: 3 for RGB, 1 for grey.
    """
    turned, mirrored, upside_down = orientation(frame)
    stored = (size[1], size[0]) if turned else size
    pixels = scaler(frame, *stored, channels)
    if turned:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1].copy()


def _without_password(address: str) -> str:
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", address)


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    if isinstance(error, av.error.InvalidDataError):
        return "not a video, or damaged"
    return (getattr(error, "strerror", None) or str(error)).lower()
