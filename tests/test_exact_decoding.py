"""Any frames, in any order and over any number of calls, are those of a full linear decode.

Each file here has 64 frames with their numbers burnt into the pixels. Hypothesis draws lists of frames and looks for
one where a reader that seeks, skips and stops early gives something else than plain PyAV that decodes from the start.
"""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lean3d.data.readers import open_video
from video_files import decode_all, moving_frames, write_video

COUNT = 64
UNEVEN = np.cumsum([0, *np.random.default_rng(0).integers(3, 120, COUNT - 1)]).tolist()

PYRAMID = "bframes=7:b-adapt=0:b-pyramid=2:ref=4"
OPEN = "open-gop=1:keyint=9:bframes=3:scenecut=0"
HIDDEN = {"g": "16", "cpu-used": "8", "lag-in-frames": "12", "auto-alt-ref": "1"}  # with frames that are never shown

# codec, ending, what else `write_video` is told
KINDS = {
    "h264": ("libx264", "mp4", {}),
    "h264_short_gop": ("libx264", "mp4", {"options": {"g": "5"}}),
    "h264_no_b": ("libx264", "mp4", {"options": {"bf": "0", "g": "20"}}),
    "h264_pyramid": ("libx264", "mp4", {"options": {"g": "24", "x264-params": PYRAMID}}),
    "h264_open_gop": ("libx264", "mkv", {"options": {"x264-params": OPEN}}),
    "h264_open_gop_mp4": ("libx264", "mp4", {"options": {"x264-params": OPEN}}),
    "h264_refreshed": ("libx264", "mp4", {"options": {"x264-params": "intra-refresh=1:keyint=16:bframes=2"}}),
    "h264_interlaced": ("libx264", "mp4", {"options": {"x264-params": "interlaced=1:keyint=12:bframes=2"}}),
    "h264_uneven": ("libx264", "mkv", {"stamps": UNEVEN, "options": {"g": "12", "bf": "3"}}),
    "h264_uneven_mp4": ("libx264", "mp4", {"stamps": UNEVEN, "options": {"g": "12", "bf": "3"}}),
    "h264_late": ("libx264", "mkv", {"stamps": [7000 + 40 * i for i in range(COUNT)], "options": {"g": "12"}}),
    "h264_rotated": ("libx264", "mp4", {"rotation": 90, "options": {"g": "12"}}),
    "h264_sound": ("libx264", "mp4", {"audio": True, "options": {"g": "12"}}),
    "h264_ts": ("libx264", "ts", {"options": {"g": "12"}}),
    "h264_raw": ("libx264", "h264", {"options": {"g": "12", "bf": "2"}}),
    "h264_avi": ("libx264", "avi", {"options": {"g": "12", "bf": "2"}}),
    "hevc": ("libx265", "mp4", {"options": {"g": "16"}}),
    "hevc_layers": ("libx265", "mkv", {"options": {"x265-params": "log-level=none:temporal-layers=1:keyint=20"}}),
    "vp9": ("libvpx-vp9", "webm", {"options": HIDDEN}),
    "av1": ("libsvtav1", "mkv", {"options": {"g": "24", "preset": "8", "crf": "15"}}),
    "av1_mp4": ("libsvtav1", "mp4", {"options": {"g": "200", "preset": "8", "crf": "15"}}),
    "mjpeg_avi": ("mjpeg", "avi", {"pix_fmt": "yuvj420p"}),
    "mjpeg_uneven": ("mjpeg", "mkv", {"pix_fmt": "yuvj420p", "stamps": UNEVEN}),
    "mpeg4_avi": ("mpeg4", "avi", {"options": {"bf": "2", "g": "12"}}),
}  # fmt: skip


def numbered_frames(count: int = COUNT) -> np.ndarray:
    """Moving pictures, with the bits of each frame's number as eight white or black squares along the lower edge."""
    frames = moving_frames(count, 64, 64)
    for number, frame in enumerate(frames):
        for bit in range(8):
            frame[48:64, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return frames


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers that are burnt into frames."""
    bits = frames[:, 52:60, :, 1].reshape(len(frames), 8, 8, 8).mean((1, 3)) > 127
    return (bits * 2 ** np.arange(8)).sum(1).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    """Encodes a kind of file when it is first asked for: its path, and a full decode of it as it is shown."""
    folder = tmp_path_factory.mktemp("exact")
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def get(kind: str) -> tuple[Path, np.ndarray]:
        if kind not in made:
            codec, ending, settings = KINDS[kind]
            try:
                av.codec.Codec(codec, "w")
            except av.FFmpegError:
                pytest.skip(f"PyAV has no encoder {codec}")
            path = write_video(folder / f"{kind}.{ending}", numbered_frames(), codec=codec, **settings)
            full = decode_all(path)
            made[kind] = path, np.rot90(full, axes=(1, 2)) if settings.get("rotation") else full
        return made[kind]

    return get


def calls(count: int):
    """One to three lists of frames: random ones, or sampled clips that may follow each other."""
    any_frames = st.lists(st.integers(0, count - 1), min_size=1, max_size=6)
    clip = st.builds(
        lambda start, step, length: [min(start + step * i, count - 1) for i in range(length)],
        st.integers(0, count - 1),
        st.sampled_from([1, 2, 8]),
        st.integers(1, 8),
    )
    return st.lists(any_frames | clip, min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_any_calls_give_the_frames_of_a_full_decode(files, kind):
    path, full = files(kind)
    assert len(full) == COUNT
    if kind != "h264_rotated":
        assert numbers_in(full) == list(range(COUNT)), "the numbers survive encoding, so that they prove something"

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls(COUNT))
    def check(lists: list[list[int]]) -> None:
        with open_video(path) as video:
            assert video.num_frames == COUNT
            for indices in lists:
                assert np.array_equal(video.get_frames(indices).numpy(), full[indices])

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_calls(files, kind):
    path, full = files(kind)

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls(COUNT))
    def check(lists: list[list[int]]) -> None:
        with open_video(path) as video:
            for indices in lists:
                assert np.array_equal(video.get_frames(indices).numpy(), full[indices])

    check()


@pytest.mark.parametrize("options", [{"bf": "0", "g": "12"}, {"bf": "3", "g": "16"}])
@pytest.mark.parametrize("cut", [1, 5, 17])
def test_an_edit_list_that_starts_anywhere(tmp_path, options, cut):
    path = write_video(tmp_path / "cut.mp4", numbered_frames(), options=options)
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].duration // COUNT
    first = struct.unpack(">i", data[start + 4 : start + 8])[0]
    data[start + 4 : start + 8] = struct.pack(">i", first + cut * ticks)
    path.write_bytes(data)
    full = decode_all(path)
    with open_video(path) as video:
        assert video.num_frames == len(full)
        for indices in (range(len(full)), [len(full) - 1, 0], range(3, 40, 8)):
            assert np.array_equal(video.get_frames(indices).numpy(), full[list(indices)])


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "negative_cts_offsets", "negative_cts_offsets+faststart"]
)
def test_negative_first_stamps_and_fragments(tmp_path, flags):
    path = tmp_path / "a.mp4"
    plain = write_video(tmp_path / "plain.mp4", numbered_frames(), options={"bf": "3", "g": "12"})
    with av.open(str(plain)) as old, av.open(str(path), "w", options={"movflags": flags, "use_editlist": "0"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    full = decode_all(path)
    assert numbers_in(full) == list(range(COUNT))
    with open_video(path) as video:
        assert video.num_frames == COUNT and video.timestamps[0] == 0
        for indices in ([63, 0, 31], range(2, 59, 8)):
            assert numbers_in(video.get_frames(indices).numpy()) == list(indices)
            assert np.array_equal(video.get_frames(indices).numpy(), full[list(indices)])
