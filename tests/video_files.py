"""Real encoded videos for tests, good and broken."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving_frames(num_frames: int = 20, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3): a smooth picture that moves, with a bright square whose place tells the frame's number."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 200, (height // 8 + 2, width // 8 + 2, 3))
    picture = np.repeat(np.repeat(coarse, 8, 0), 8, 1)[:height, :width].astype(np.uint8)
    frames = np.stack([np.roll(picture, 2 * i, axis=1) for i in range(num_frames)])
    for i in range(num_frames):
        left = (3 * i) % max(width - 12, 1)
        frames[i, 4:16, left : left + 12] = 255
    return frames


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    stamps: Sequence[int] | None = None,
    audio: bool = False,
    rotation: int = 0,
    index_first: bool = False,
) -> Path:
    """Encode frames, uint8 (T, H, W, 3), into the container of the file's ending.

    Args:
        path: The file to write.
        frames: The pictures.
        fps: Frames per second.
        codec: An encoder of PyAV.
        pix_fmt: The pixel format that is stored.
        options: Options of the encoder.
        stamps: Milliseconds of each frame, for a variable frame rate.
        audio: Whether a silent sound stream lies beside the pictures.
        rotation: Degrees, counterclockwise, by which a player turns the pictures.
        index_first: Whether an mp4 has its index before the pictures, so that it opens even when cut off.
    """
    path = Path(path)
    quiet = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12", "svtav1-params": "rc=0"}}
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={**quiet.get(codec, {}), **(options or {})})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            _add_silence(container, seconds=len(frames) / fps)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _add_silence(container: av.container.OutputContainer, seconds: float) -> None:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    for start in range(0, max(int(seconds * 16000), 1024), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def decode_all(path: str | Path) -> np.ndarray:
    """Every frame of a video, uint8 (T, H, W, 3), by PyAV alone, as stored (not turned)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def broken_files(folder: str | Path) -> dict[str, Path]:
    """One file of each kind that can't be decoded, by the kind's name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    good = write_video(folder / "good.mp4", moving_frames(60), index_first=True)
    plain = write_video(folder / "plain.mp4", moving_frames(30))
    whole, tail_index = good.read_bytes(), plain.read_bytes()
    good.unlink()
    plain.unlink()
    middle = bytearray(whole)
    start, end = len(whole) * 6 // 10, len(whole) * 8 // 10  # past the index and the first keyframe
    middle[start:end] = bytes(end - start)
    contents = {
        "truncated": whole[: len(whole) * 2 // 3],
        "zero_byte": b"",
        "text": b"This is not a video.\n" * 50,
        "broken_middle": bytes(middle),
        "moov_less": tail_index[: tail_index.index(b"moov") - 4],
    }
    files = {}
    for kind, content in contents.items():
        files[kind] = folder / f"{kind}.mp4"
        files[kind].write_bytes(content)
    files["audio_only"] = folder / "audio_only.mp4"
    with av.open(str(files["audio_only"]), "w") as container:
        _add_silence(container, seconds=1)
    return files


def set_matrix(path: str | Path, matrix: Sequence[int]) -> None:
    """Write the four numbers a, b, c, d of the display matrix into an mp4's first track."""
    data = bytearray(Path(path).read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 20] = struct.pack(">5i", a, b, 0, c, d)
    Path(path).write_bytes(data)
