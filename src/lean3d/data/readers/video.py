"""Video files, through PyAV: exact frame counts, any frame by its number, and no more decoded than that takes."""

from __future__ import annotations

import io
import itertools
import math
import stat
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData

from lean3d.data.readers.av1 import Av1References
from lean3d.data.readers.base import MEMORY, ClosesItself, Scaler, places_of
from lean3d.data.readers.table import INTRA_CODECS, NONE, FrameTable, TableCache, is_cut_off, read_table
from lean3d.errors import DecodeError

MAX_PIXELS = 2**26
"""Pixels of a frame, at most: 8192 x 8192. A few bytes of a damaged file can claim pictures that fill the memory."""

NEAR_PACKETS = 16
"""Packets that are read and dropped where seeking past them would take longer."""

# Of these codecs a frame can be marked as one that no other is built on, in a way that the decoder knows and that has
# no exceptions (H.264: nal_ref_idc is 0). HEVC's mark has one: temporal layers above may refer to the frame.
MARKS_UNREFERENCED = frozenset({"h264"})

_TABLES = TableCache()


@dataclass
class _Run:
    """Wanted frames that are decoded in one go: from a keyframe on, up to packet `last`."""

    row: int
    """The keyframe's row in `FrameTable.keys`."""
    last: int
    wanted: dict[int, int] = field(default_factory=dict)
    """From a frame's time stamp to its number."""


class VideoReader(ClosesItself):
    """A video file.

    Frame i is the i-th that a full decode shows. Frames of a variable rate keep their own time stamps; pictures are
    turned and mirrored as the file's display matrix says; a change of resolution within the file is scaled to the
    first frame's size. Pixels are taken as stored: a sample aspect ratio does not stretch them.

    Of a sparse clip no more is decoded than it is built on: from the nearest keyframe before, without frames that
    nothing refers to (H.264, AV1), up to the last wanted one.

    ```
    frames 2, 10 and 14 of   I0 P3 B1 B2 P6 B4 B5 B7 ...  I9 P12 B10 B11 P15 B13 B14 P18 B16 ...
    decoded                  I0 P3    B2                  I9 P12 B10     P15     B14
    ```

    Decoding is strict: damage is an error and never a smaller number of frames or a patched picture. A reader sees only
    what it decodes for the frames asked for; `check` looks at all of the file.

    Args:
        path: The file.
        seconds: Longest time that opening it, or one call, may take.
        content: All of the file, where its bytes are in memory already; `path` is then only its name.

    Raises:
        DecodeError: Not a video, no frames, the file is cut off, frames of more than 8192 x 8192 pixels; or it takes
            too long.
    """

    def __init__(self, path: str | Path, seconds: float = math.inf, content: bytes | None = None):
        self.path = str(path)
        self._content = content
        self._seconds = seconds
        self._scaler = Scaler()
        self._container: av.container.InputContainer | None = None
        self._reads_on = False  # whether a call went on where the one before had ended
        with self._errors("not a video file"):
            if content is None:
                _check_file(Path(path))
            key = _TABLES.key(Path(path), content)
            table = _TABLES.get(key)
            if table is None and is_cut_off(Path(path), content):
                raise DecodeError(path, "the file is cut off")
            self._open()
        if table is None:
            with self._errors():
                table = self._read_table()
            _TABLES.put(key, table)
        self._table = table

    @property
    def num_frames(self) -> int:
        return len(self._table)

    @property
    def num_keyframes(self) -> int:
        """Frames that are decoded without any other."""
        return self._table.num_keyframes

    @property
    def timestamps(self) -> tuple[float, ...]:
        return tuple(self._table.seconds.tolist())

    @property
    def time_base(self) -> Fraction:
        """The unit of time of the file's time stamps, in seconds: each is a multiple of it."""
        return self._table.time_base

    @property
    def fps(self) -> float:
        length = float(self._table.seconds[-1])
        return (self.num_frames - 1) / length if length > 0 else self._table.rate

    @property
    def size(self) -> tuple[int, int]:
        return self._shown()[0]

    @property
    def rotation(self) -> int:
        """Degrees, counterclockwise, by which the stored pictures are turned to be shown: 0, 90, 180 or 270."""
        turned, mirrored, upside_down = self._shown()[1]
        if turned:
            return 90 if upside_down else 270
        return 180 if mirrored and upside_down else 0

    def get_frames(
        self, indices: Sequence[int] | torch.Tensor, *, size: tuple[int, int] | None = None, channels: int = 3
    ) -> torch.Tensor:
        """See `Reader.get_frames`."""
        places = places_of(indices, self.num_frames, size, channels)
        own, (turned, mirrored, upside_down) = self._shown()
        height, width = size or own
        stored = (width, height) if turned else (height, width)
        with self._errors():
            out = MEMORY.empty(len(indices), height, width, channels)
            for index, frame in self._decode(list(places)):
                pixels = self._scaler(frame, *stored, channels)
                if turned:
                    pixels = pixels.swapaxes(0, 1)
                if mirrored or upside_down:
                    pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
                for row in places[index]:
                    out[row] = pixels
        return torch.from_numpy(out)

    def check(self) -> None:
        """See `Reader.check`."""
        if self._table.whole:
            return
        with self._errors():
            self._to_start()
            decoded = sum(1 for _ in self._frames)
            if decoded < self.num_frames:
                raise DecodeError(self.path, f"only {decoded} of {self.num_frames} frames can be decoded")
        self._table.whole = True

    def close(self) -> None:
        """See `Reader.close`."""
        self._packets: Iterator[av.Packet] = iter(())
        self._frames: Iterator[tuple[int, av.VideoFrame]] = iter(())
        self._counted = sys.maxsize
        """The number of the last frame that came out of `_frames`; none does until they begin."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        """Open the file anew, at its first packet."""
        self.close()
        # "file:" because a name with a colon would be taken for a protocol
        limits = {"max_pixels": str(MAX_PIXELS)}
        timeout = None if math.isinf(self._seconds) else self._seconds
        source: Any = f"file:{self.path}" if self._content is None else io.BytesIO(self._content)
        container = av.open(source, "r", metadata_errors="ignore", options=limits, timeout=timeout)
        self._container = container
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            audio = " (audio only)" if container.streams.audio else ""
            raise DecodeError(self.path, f"no video stream{audio}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise DecodeError(self.path, "no decoder for its codec")
        if context.width * context.height > MAX_PIXELS:
            raise DecodeError(self.path, f"frames of {context.width} x {context.height} pixels are too large")
        context.thread_type, context.thread_count = "NONE", 1  # a loader has a process for each core already
        context.options = {"err_detect": "explode", **limits}  # an error, where the decoder would patch the picture
        self._context = context
        self.codec = context.codec.canonical_name
        self.pixel_format = context.pix_fmt
        self.has_audio = bool(container.streams.audio)
        self._packets = container.demux(self._stream)
        self._next = 0
        """The number of the packet that is read next."""
        self._start_pts = NONE
        """The time stamp of the keyframe where decoding began."""
        self._inside: set[int] = set()
        """Time stamps of the frames that went into the decoder and have not come out yet."""
        self._last_pts = sys.maxsize
        """The time stamp of the last frame that was asked for."""
        self._ended = False
        """Whether the decoder was told that nothing follows, and so can't go on."""

    def _read_table(self) -> FrameTable:
        """The file's table: from the packets if they tell, else by decoding all."""
        rate = float(self._stream.guessed_rate or self._stream.average_rate or 25)
        assert self._container is not None
        self._table = table = read_table(self.path, self._container, self._stream, self._in_time(self._packets), rate)
        self._next = sys.maxsize
        if not table.by_pts:
            self._to_start()
            stamps = [frame.pts for _, frame in self._frames]
            known = sorted({pts for pts in stamps if pts is not None})
            if len(known) < len(stamps):
                ticks = 1 / (rate * float(table.time_base))
                known = [round(i * ticks) for i in range(len(stamps))]
            # The order of the frames is the decoder's, whatever the stamps say.
            table.pts, table.whole = np.array(known, np.int64), True
        if not len(table):
            raise DecodeError(self.path, "no frames in the video stream")
        return table

    def _shown(self) -> tuple[tuple[int, int], tuple[bool, bool, bool]]:
        """Height and width as shown, and how to get there: (turned, mirrored, upside down), from the first frame."""
        if self._table.look is None:
            with self._errors():
                ((_, frame),) = self._decode([0])
            self._last_pts = sys.maxsize  # nobody asked for it
            turned, *flips = orientation(frame)
            size = (frame.width, frame.height) if turned else (frame.height, frame.width)
            self._table.look = size, (turned, flips[0], flips[1])
        return self._table.look

    # Where packets tell the frames

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames of these numbers, which increase, each with its number; not always in that order."""
        if not self._table.by_pts:
            yield from self._count_to(indices)
            return
        runs = self._runs(indices)
        if runs:
            # Such a caller will go on like that: from now on the decoder is left where it can.
            begins = int(self._table.keys[runs[0].row, 0])
            self._reads_on |= min(runs[0].wanted) > self._last_pts and begins < self._next
            self._last_pts = max(runs[-1].wanted)
        for run in runs:
            missing = dict(run.wanted)
            try:
                for pts, frame in self._decode_run(run, missing, may_end=run is not runs[-1] or not self._reads_on):
                    yield missing.pop(pts), frame
            except (av.FFmpegError, DecodeError):
                if not missing:
                    raise
            if missing:  # a keyframe from which one can't start after all: from the file's start, leaving nothing out
                self._to_start()
                yield from self._count_to(sorted(missing.values()))
                self._ended = True

    def _runs(self, indices: list[int]) -> list[_Run]:
        """The wanted frames, together as long as to start from the next one's keyframe would not save anything."""
        table = self._table
        pts = table.pts[indices]
        rows = np.maximum(np.searchsorted(table.keys[:, 1], pts, side="right") - 1, 0)
        near = NEAR_PACKETS if self.codec in INTRA_CODECS else 1
        columns = pts, table.packet[indices], rows, table.keys[rows, 0]
        runs: list[_Run] = []
        for index, stamp, packet, row, start in zip(indices, *(column.tolist() for column in columns), strict=True):
            if not runs or start > runs[-1].last + near:
                runs.append(_Run(row, packet))
            runs[-1].last = max(runs[-1].last, packet)
            runs[-1].wanted[stamp] = index
        return runs

    def _goes_on(self, run: _Run) -> bool:
        """Whether what was fed so far leads on to all frames of a run, and their keyframe is not further on."""
        if self._container is None or self._next == 0 or self._table.keys[run.row, 0] > self._next:
            return False
        packets = self._table.packet[list(run.wanted.values())].tolist()
        return all(number >= self._next or pts in self._inside for pts, number in zip(run.wanted, packets, strict=True))

    def _decode_run(self, run: _Run, missing: dict[int, int], may_end: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames that are missing, which the caller takes out of it, until none is or no more can come."""
        if self._ended or not self._goes_on(run):
            self._go_to(run.row)
        context = self._context
        context.skip_frame = "DEFAULT"
        sparse = len(missing) < run.last - self._next  # else there is nothing to leave out
        intra = self.codec in INTRA_CODECS
        marks = self.codec in MARKS_UNREFERENCED and sparse
        av1 = self._av1 if self.codec == "av1" and sparse else None
        beyond = math.inf if may_end else max(run.wanted)  # what the next call may ask for
        while missing and not self._ended:
            packet = None  # tells the decoder that nothing follows: it hands over all frames without decoding on
            if self._next <= run.last or not may_end:
                self._check_time()
                packet = next(self._packets, None)
                self._next += 1
            if packet is None or not packet.size:
                self._ended = True
            else:
                pts = NONE if packet.pts is None else packet.pts
                wanted = pts in missing or pts > beyond
                if pts < self._start_pts or (intra and not wanted):
                    continue  # shown before the keyframe where we start, and built on frames before it; or of no use
                if av1 is not None:
                    needed = av1.needed(bytes(packet))  # asked always: it follows the stream's headers
                    if not wanted and needed is None:
                        continue
                    if not wanted and needed is not None and len(needed) < packet.size:
                        packet = av.Packet(needed)
                if marks:
                    context.skip_frame = "DEFAULT" if wanted else "NONREF"
                if wanted:
                    self._inside.add(pts)
            for frame in context.decode(packet):
                assert isinstance(frame, av.VideoFrame)
                if frame.is_corrupt:
                    raise DecodeError(self.path, "a frame is damaged")
                if frame.pts is not None:
                    self._inside.discard(frame.pts)
                if frame.pts in missing:
                    yield frame.pts, frame

    def _go_to(self, row: int) -> None:
        """Put the decoder before a keyframe: by reading on, by seeking, or by counting packets in the reopened file."""
        number, pts, dts, pos = self._table.keys[row].tolist()
        if self._container is None:
            self._open()
        elif self._next <= number <= self._next + NEAR_PACKETS:
            self._context.flush_buffers()
        elif not self._seek(number, pts, dts, pos):
            self._open()
        for _ in range(number - self._next):
            self._check_time()
            next(self._packets)
        self._next = number
        self._start_pts = pts
        self._inside = set()
        self._av1 = Av1References()
        self._ended = False

    def _seek(self, number: int, pts: int, dts: int, pos: int) -> bool:
        """Whether seeking leads to this packet, which then is the next one."""
        if pos == NONE or self._container is None:
            return False
        self._container.seek(pts if dts == NONE else dts, stream=self._stream)
        self._packets = self._container.demux(self._stream)
        for packet in self._packets:
            self._check_time()
            if (packet.pts, packet.pos) == (pts, pos):
                self._packets = itertools.chain([packet], self._packets)
                self._next = number
                return True
            if packet.pos is None or packet.pos > pos:
                break
        return False

    # Where they don't, or don't lead to a frame

    def _to_start(self) -> None:
        if self._container is None or self._next > 0 or self._ended:
            self._open()
        self._frames = self._decode_all()
        self._counted = -1

    def _decode_all(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Every frame of the file with its number; frames that the table does not have are not shown."""
        table = self._table
        self._context.skip_frame = "DEFAULT"
        count = itertools.count()
        for packet in self._in_time(self._packets):
            self._next += 1
            for frame in self._context.decode(packet):
                assert isinstance(frame, av.VideoFrame)
                if table.by_pts:
                    index = int(np.searchsorted(table.pts, NONE if frame.pts is None else frame.pts))
                    if index == len(table) or table.pts[index] != frame.pts:
                        continue  # cut away by an edit list
                else:
                    index = next(count)
                if frame.is_corrupt:
                    raise DecodeError(self.path, f"frame {index} is damaged")
                self._counted = max(self._counted, index)
                yield index, frame
        self._ended = True

    def _count_to(self, indices: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode on, or from the start, up to the frames of these numbers."""
        missing = set(indices)
        if not missing:
            return
        if self._container is None or min(missing) <= self._counted:
            self._to_start()
        for index, frame in self._frames:
            if index in missing:
                missing.remove(index)
                yield index, frame
            if not missing:
                return
        raise DecodeError(self.path, f"frame {min(missing)} of {self.num_frames} can't be decoded")

    # Limits and errors

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise DecodeError(self.path, self._too_slow)

    def _in_time(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            self._check_time()
            yield packet

    @property
    def _too_slow(self) -> str:
        return f"takes longer than {self._seconds:g} seconds"

    @contextmanager
    def _errors(self, meaning: str = "damaged") -> Iterator[None]:
        """Whatever goes wrong within, or takes too long, is a DecodeError, and the decoder is not used on."""
        self._deadline = time.monotonic() + self._seconds
        try:
            yield
        except DecodeError:
            self.close()
            raise
        except MemoryError as error:
            self.close()
            raise DecodeError(self.path, "needs too much memory") from error
        except (av.FFmpegError, OSError, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error)
            if time.monotonic() > self._deadline:
                reason = self._too_slow
            elif not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                reason = f"{meaning} ({reason})"
            raise DecodeError(self.path, reason) from error


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError(path, "not a regular file")  # one would wait for ever at the end of a pipe
    if status.st_size == 0:
        raise DecodeError(path, "the file is empty")


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a stored picture becomes the shown one: swap its axes, then mirror it, then turn it upside down.

    The display matrix (nine numbers; ISO/IEC 14496-12, 8.3.2) sends a stored pixel (x, y) to (a x + c y, b x + d y).

    Returns:
        (turned, mirrored, upside down); all False for a frame without a matrix.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
