"""Which frames a video file has, in which packets they lie, and from which packets decoding can start."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lean3d.errors import DecodeError

# In these containers each packet of these codecs is one shown picture with its own time stamp, so that packets tell
# the frames without decoding. Elsewhere (AVI's packed B-frames, VP8's hidden frames, raw streams) only decoding does.
TELLING_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
TELLING_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "mjpeg", "ffv1", "prores"})

INTRA_CODECS = frozenset({"mjpeg", "prores", "ffvhuff", "huffyuv", "png", "dnxhd"})
"""Codecs whose frames never refer to each other, so that unwanted packets are left out, and any container tells."""

MAX_FRAMES = 2**22
"""Frames in a file, at most: 38 hours at 30 a second. A few bytes of a damaged file can claim billions."""

CACHE_BYTES = 64 * 2**20
"""Memory that remembered tables take in a process; those of 10 s clips take 5 kB each."""

NONE = np.iinfo(np.int64).min
"""Stands in arrays for a time stamp or a place in the file that is not known."""


@dataclass(eq=False)
class FrameTable:
    """What one pass over a file's packets tells, made without decoding where the packets tell.

    ```
    packets, as in the file   I0 P3 B1 B2 P6 B4 B5 I9 B7 B8       numbers 0 to 9, each with its time stamp
    frames, as shown          I0 B1 B2 P3 B4 B5 P6 B7 B8 I9       pts[i] and packet[i]: where frame i lies
    keyframes                 I0                   I9             decoding of frame i can start at the last one whose
                                                                  time stamp is not after the frame's
    ```
    """

    by_pts: bool
    """Whether packets tell the frames. If not, all was decoded, and frames are counted from the file's start."""
    pts: np.ndarray
    """int64 (num_frames,): time stamps in ticks, increasing."""
    packet: np.ndarray
    """int64 (num_frames,): the number of each frame's packet; empty where packets don't tell."""
    keys: np.ndarray
    """int64 (num_keys, 4): number, pts, dts and place in the file of the packets that decoding can start from."""
    num_keyframes: int
    """Keyframes that there are, whether or not decoding can start from them."""
    time_base: Fraction
    """Seconds in a tick."""
    rate: float
    """Frames per second, as the container says."""
    look: tuple[tuple[int, int], tuple[bool, bool, bool]] | None = field(default=None)
    """Height and width as shown, and how to get there: (turned, mirrored, upside down); None until a frame is seen."""
    whole: bool = field(default=False)
    """Whether all of the file was decoded once without an error."""

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def seconds(self) -> np.ndarray:
        """float64 (num_frames,): seconds from the first frame."""
        return (self.pts - self.pts[0]) * self.time_base.numerator / self.time_base.denominator

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, roughly."""
        return 1024 + self.pts.nbytes + self.packet.nbytes + self.keys.nbytes


class TableCache:
    """The tables of files that were opened before, by what identifies a file: another one of that name has its own.

    A pass over the packets of a ten-second clip takes 1 to 2 ms where decoding a clip takes 10 to 40, and it reads
    the whole file. Tables are kept in memory alone: reading one from the disk would take as long as half of that pass.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self._limit = limit
        self._tables: OrderedDict[tuple[int | str, ...], FrameTable] = OrderedDict()
        self._bytes = 0

    @staticmethod
    def key(path: Path, content: bytes | None = None) -> tuple[int | str, ...]:
        """What identifies the file that lies at `path` now, or one whose bytes are in memory."""
        if content is not None:
            return str(path), len(content), zlib.crc32(content)
        status = path.stat()
        return str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def get(self, key: tuple[int | str, ...]) -> FrameTable | None:
        """The table of a file, if it is known."""
        table = self._tables.get(key)
        if table is not None:
            self._tables.move_to_end(key)
        return table

    def put(self, key: tuple[int | str, ...], table: FrameTable) -> None:
        """Remember a table; those that were not used for longest are forgotten when memory is short."""
        if key not in self._tables:
            self._bytes += table.num_bytes
        self._tables[key] = table
        while self._bytes > self._limit:
            self._bytes -= self._tables.popitem(last=False)[1].num_bytes


def read_table(
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: Iterable[av.Packet],
    rate: float,
) -> FrameTable:
    """The table of a file that was opened just now; without frames where packets don't tell, so that they are counted.

    Raises:
        DecodeError: The container says that something is damaged or missing, or there are too many frames.
    """
    facts: list[tuple[int, ...]] = []
    for packet in packets:
        if packet.is_corrupt:
            raise DecodeError(path, "the file is damaged or cut off")
        if len(facts) > MAX_FRAMES:
            raise DecodeError(path, f"more than {MAX_FRAMES} frames; cut it into shorter files")
        facts.append(
            (
                NONE if packet.pts is None else packet.pts,
                NONE if packet.dts is None else packet.dts,
                NONE if packet.pos is None else packet.pos,
                packet.is_keyframe,
                packet.is_discard,
                packet.size,
            )
        )
    facts.pop()  # the last packet is empty: it ends the decoding
    all_facts = np.array(facts, np.int64).reshape(-1, 6)
    pts, dts, pos, key, discard, size = all_facts.T
    time_base = stream.time_base or Fraction(1, av.time_base)
    _check_end(path, stream, np.sort(pts[pts != NONE]), time_base, rate)
    codec = stream.codec_context.codec.canonical_name
    tells = codec in INTRA_CODECS or (
        codec in TELLING_CODECS and not TELLING_CONTAINERS.isdisjoint(container.format.name.split(","))
    )
    by_pts = bool(
        tells
        and len(pts)
        and pts.min() != NONE
        and len(np.unique(pts)) == len(pts)
        and size.all()
        and key[0]  # what comes before the first keyframe, in file or in time, may never be shown
        and pts.min() == pts[0]
    )
    num_keyframes = int(key.sum())
    if not by_pts:
        nothing = np.empty(0, np.int64)
        return FrameTable(False, nothing, nothing, np.empty((0, 4), np.int64), num_keyframes, time_base, rate)
    shown = np.flatnonzero(discard == 0)
    shown = shown[np.argsort(pts[shown])]
    numbers = np.flatnonzero(key)
    keys = np.stack([numbers, pts[numbers], dts[numbers], pos[numbers]], axis=1)
    return FrameTable(True, pts[shown], shown, keys, num_keyframes, time_base, rate)


def _check_end(path: str, stream: av.VideoStream, stamps: np.ndarray, time_base: Fraction, rate: float) -> None:
    """Matroska reads on over a damaged part and loses frames without a word; its tags know how long it was."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None or not len(stamps):
        return
    told = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    longest = int(np.diff(stamps).max(initial=0))
    if told > float((int(stamps[-1]) + 3 * longest) * time_base) + 3 / rate:
        raise DecodeError(path, "the file is damaged: frames are missing at the end")


def is_cut_off(path: Path, content: bytes | None = None) -> bool:
    """Whether the container says that the file should be longer: MP4's boxes, Matroska's segment, AVI's RIFF chunk."""
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[:4] == b"RIFF":
            return struct.unpack("<I", head[4:8])[0] + 8 > length
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_end(head + file.read(4096)) > length
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return False
        start = 0
        while start + 8 <= length:
            file.seek(start)
            size, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            size = large if size == 1 else size or length - start
            if start + size > length:
                return kind in (b"mdat", b"moov", b"moof")  # others may be rubbish behind the end
            start += max(size, 8)
    return False


def _matroska_end(head: bytes) -> int:
    """Where the segment of a Matroska file ends, in bytes; 0 where the file does not say (RFC 8794, 4 and 6)."""

    def size_at(place: int) -> tuple[int, int]:
        length = 9 - head[place].bit_length()
        value = int.from_bytes(head[place : place + length], "big") & ((1 << 7 * length) - 1)
        return value, place + length

    size, place = size_at(4)
    place += size
    if head[place : place + 4] != b"\x18\x53\x80\x67" or not head[place + 4 : place + 12]:
        return 0
    size, start = size_at(place + 4)
    unknown = (1 << 7 * (start - place - 4)) - 1
    return 0 if size == unknown else start + size
