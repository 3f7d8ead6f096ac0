"""Video files, through PyAV: exact frame counts, any frame by its number, and only wanted frames converted."""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData

from lean3d.data.readers.base import ClosesItself, Scaler, places_of
from lean3d.errors import DecodeError

# In these containers each packet of these codecs is one shown picture with its own time stamp, so that packets tell
# the frames without decoding. Elsewhere (AVI's packed B-frames, VP8's hidden frames, raw streams) only decoding does.
TELLING_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
TELLING_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "mjpeg", "ffv1", "prores"})


@dataclass(frozen=True)
class _Start:
    """A packet from which decoding can begin."""

    number: int = 0
    """Its place among the video's packets."""
    pts: int = 0
    dts: int | None = None
    pos: int | None = None


class VideoReader(ClosesItself):
    """A video file.

    Frame i is the i-th that a full decode shows. Frames of a variable rate keep their own time stamps; pictures are
    turned and mirrored as the file's display matrix says; a change of resolution within the file is scaled to the
    first frame's size. Pixels are taken as stored: a sample aspect ratio does not stretch them.

    Decoding is strict: damage is an error and never a smaller number of frames or a patched picture. A reader sees only
    what it decodes for the frames asked for; `check` looks at all of the file.

    Args:
        path: The file.

    Raises:
        DecodeError: Not a video, no frames, or the file is cut off.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._scaler = Scaler()
        self._container: av.container.InputContainer | None = None
        self._frames: Iterator[tuple[int, av.VideoFrame]] = iter(())
        self._last: tuple[int, av.VideoFrame] | None = None
        self._look: tuple[tuple[int, int], tuple[bool, bool, bool]] | None = None
        with self._errors("not a video file"):
            if Path(path).stat().st_size == 0:
                raise DecodeError(path, "the file is empty")
            if _is_cut_off(Path(path)):
                raise DecodeError(path, "the file is cut off")
            self._open()
        with self._errors():
            self._read_table()
        if not self.num_frames:
            raise DecodeError(path, "no frames in the video stream")

    @property
    def num_frames(self) -> int:
        return len(self._pts)

    @property
    def timestamps(self) -> tuple[float, ...]:
        return tuple(float((pts - self._pts[0]) * self._time_base) for pts in self._pts)

    @property
    def fps(self) -> float:
        length = float((self._pts[-1] - self._pts[0]) * self._time_base)
        return (self.num_frames - 1) / length if length > 0 else self._rate

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
        out = np.empty((len(indices), height, width, channels), np.uint8)
        for index, rows in places.items():
            frame = self._frame(index)
            stored = (width, height) if turned else (height, width)
            pixels = self._scaler(frame, *stored, channels)
            if turned:
                pixels = pixels.swapaxes(0, 1)
            out[rows] = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        return torch.from_numpy(out)

    def check(self) -> None:
        """See `Reader.check`."""
        if not self._by_pts:
            return  # counting the frames was decoding them all
        with self._errors():
            self._go_to(self._starts[0])
            decoded = sum(1 for _ in self._frames)
            if decoded < self.num_frames:
                raise DecodeError(self.path, f"only {decoded} of {self.num_frames} frames can be decoded")

    def close(self) -> None:
        """See `Reader.close`."""
        self._frames = iter(())
        self._last = None
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> av.container.InputContainer:
        """Open the file anew, at its first packet."""
        self.close()
        # "file:" because a name with a colon would be taken for a protocol
        container = self._container = av.open(f"file:{self.path}", metadata_errors="ignore")
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            audio = " (audio only)" if container.streams.audio else ""
            raise DecodeError(self.path, f"no video stream{audio}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise DecodeError(self.path, "no decoder for its codec")
        context.thread_type, context.thread_count = "NONE", 1  # a loader has a process for each core already
        context.options = {"err_detect": "explode"}  # an error, where the decoder would patch the picture
        self._time_base = self._stream.time_base or av.time_base
        self._rate = float(self._stream.guessed_rate or self._stream.average_rate or 25)
        self.codec = context.codec.canonical_name
        self.pixel_format = context.pix_fmt
        self.has_audio = bool(container.streams.audio)
        return container

    def _read_table(self) -> None:
        """Find out which frames there are and where decoding can start: from the packets if they tell."""
        assert self._container is not None
        facts = []
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise DecodeError(self.path, "the file is damaged or cut off")
            facts.append((packet.pts, packet.dts, packet.pos, packet.is_keyframe, packet.is_discard, packet.size))
        facts.pop()  # the last packet is empty: it ends the decoding
        self.num_keyframes = sum(key for _, _, _, key, *_ in facts)
        stamps = [pts for pts, *_ in facts if pts is not None]
        self._check_end(stamps)
        self._by_pts = (
            not TELLING_CONTAINERS.isdisjoint(self._container.format.name.split(","))
            and self._stream.codec_context.codec.canonical_name in TELLING_CODECS
            and len(set(stamps)) == len(facts) > 0
            and all(size for *_, size in facts)
            and facts[0][3]  # what comes before the first keyframe, in file or in time, may never be shown
            and min(stamps) == facts[0][0]
        )
        if self._by_pts:
            self._pts = sorted(pts for pts, (*_, discard, _) in zip(stamps, facts, strict=True) if not discard)
            self._index = {pts: i for i, pts in enumerate(self._pts)}
            self._starts = [
                _Start(number, pts, dts, pos)
                for number, (pts, dts, pos, key, *_) in enumerate(facts)
                if key and pts is not None
            ]
            self._emitted = self.num_frames  # nothing more comes from here
        else:
            self._count_frames()

    def _check_end(self, stamps: list[int]) -> None:
        """Matroska reads on over a damaged part and loses frames without a word; its tags know how long it was."""
        hours, colon, rest = self._stream.metadata.get("DURATION", "").partition(":")
        if not (stamps and colon):
            return
        minutes, _, seconds = rest.partition(":")
        told = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        inner = sorted(stamps)
        longest = max((after - before for before, after in itertools.pairwise(inner)), default=0)
        if told > float((inner[-1] + 3 * longest) * self._time_base) + 3 / self._rate:
            raise DecodeError(self.path, "the file is damaged: frames are missing at the end")

    def _count_frames(self) -> None:
        """The table by decoding all. The order of the frames is then the decoder's, whatever the stamps say."""
        self._starts = [_Start()]
        self._go_to(self._starts[0])
        stamps = [frame.pts for _, frame in self._frames]
        known = sorted({pts for pts in stamps if pts is not None})
        if len(known) < len(stamps):
            ticks = 1 / (self._rate * float(self._time_base))
            known = [round(i * ticks) for i in range(len(stamps))]
        self._pts = known

    def _shown(self) -> tuple[tuple[int, int], tuple[bool, bool, bool]]:
        """Height and width as shown, and how to get there: (turned, mirrored, upside down), from the first frame."""
        if self._look is None:
            frame = self._frame(0)
            turned, *flips = _orientation(frame)
            size = (frame.width, frame.height) if turned else (frame.height, frame.width)
            self._look = size, (turned, flips[0], flips[1])
        return self._look

    def _frame(self, index: int) -> av.VideoFrame:
        """Frame `index`, decoded from where the decoder stands or from the keyframe before, whichever is nearer."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        start = self._start_before(index)
        with self._errors():
            if self._container is None or index <= self._emitted or start.number > self._fed:
                self._go_to(start)
            frame = self._find(index)
            if frame is None and self._from.number > 0:  # a keyframe from which one can't start after all
                self._go_to(self._starts[0])
                frame = self._find(index)
            if frame is None:
                raise DecodeError(self.path, f"frame {index} of {self.num_frames} can't be decoded")
            self._last = index, frame
            return frame

    def _find(self, index: int) -> av.VideoFrame | None:
        """Decode on up to frame `index`; None if it does not come."""
        try:
            return next((frame for found, frame in self._frames if found == index), None)
        except (av.FFmpegError, DecodeError):
            if self._from.number == 0:
                raise
            return None

    def _start_before(self, index: int) -> _Start:
        """The last keyframe that is shown no later than frame `index`."""
        if not self._by_pts:
            return self._starts[0]
        place = bisect.bisect_right(self._starts, self._pts[index], key=lambda start: start.pts)
        return self._starts[max(place - 1, 0)]

    def _go_to(self, start: _Start) -> None:
        self._last = None
        self._from = start
        self._fed = start.number
        self._emitted = -1
        self._frames = self._decode(self._packets(start))

    def _packets(self, start: _Start) -> Iterator[av.Packet]:
        """Packets from `start` on: sought, and if that leads elsewhere, found by counting in the reopened file."""
        if self._container is not None and self._by_pts and start.pos is not None:
            offset = start.pts if start.dts is None else start.dts
            self._container.seek(offset, stream=self._stream)  # type: ignore[arg-type]
            for packet in (packets := self._container.demux(self._stream)):
                if (packet.pts, packet.pos) == (start.pts, start.pos):
                    return itertools.chain([packet], packets)
                if packet.pos is None or packet.pos > start.pos:
                    break
        container = self._open()
        return itertools.islice(container.demux(self._stream), start.number, None)

    def _decode(self, packets: Iterator[av.Packet]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode on, with each frame's number; frames that the table does not have are not shown."""
        count = itertools.count()
        for packet in packets:
            self._fed += 1
            if self._by_pts and packet.pts is not None and packet.pts < self._from.pts:
                continue  # shown before the keyframe where we start, and built on frames before it
            for frame in packet.decode():
                assert isinstance(frame, av.VideoFrame)
                if self._by_pts:
                    if frame.pts not in self._index:
                        continue  # cut away by an edit list
                    index = self._index[frame.pts]
                else:
                    index = next(count)
                if frame.is_corrupt:
                    raise DecodeError(self.path, f"frame {index} is damaged")
                self._emitted = max(self._emitted, index)
                yield index, frame

    @contextmanager
    def _errors(self, meaning: str = "damaged") -> Iterator[None]:
        """Whatever goes wrong within is a DecodeError, and the decoder is not used on."""
        try:
            yield
        except DecodeError:
            self.close()
            raise
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error)
            if not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                reason = f"{meaning} ({reason})"
            raise DecodeError(self.path, reason) from error


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a stored picture becomes the shown one: swap its axes, then mirror it, then turn it upside down.

    The display matrix (nine numbers; ISO/IEC 14496-12, 8.3.2) sends a stored pixel (x, y) to (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _is_cut_off(path: Path) -> bool:
    """Whether the container says that the file should be longer: MP4's boxes, Matroska's segment, AVI's RIFF chunk."""
    length = path.stat().st_size
    with path.open("rb") as file:
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
