"""Readers, against plain PyAV's full decode of real encoded files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lean3d.data.readers import ArrayReader, FrameReader, VideoReader, open_video
from lean3d.data.readers import video as video_module
from lean3d.data.readers.base import FrameMemory
from lean3d.data.readers.table import TableCache
from lean3d.errors import ConfigError, DecodeError
from video_files import broken_files, decode_all, moving_frames, set_matrix, write_video

# codec, ending, pixel format, options of the encoder
KINDS = {
    "h264_b_frames": ("libx264", "mp4", "yuv420p", {"bf": "3", "g": "12"}),
    "h264_open_gop": ("libx264", "mkv", "yuv420p", {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}),
    "h264_10_bit": ("libx264", "mp4", "yuv420p10le", {"g": "5"}),
    "h264_444": ("libx264", "mkv", "yuv444p", {}),
    "h264_ts": ("libx264", "ts", "yuv420p", {"g": "7"}),
    "hevc": ("libx265", "mp4", "yuv420p", {"g": "8"}),
    "hevc_10_bit": ("libx265", "mkv", "yuv420p10le", {}),
    "mpeg4_avi": ("mpeg4", "avi", "yuv420p", {"g": "6"}),
    "mpeg4_avi_b_frames": ("mpeg4", "avi", "yuv420p", {"bf": "2", "g": "9"}),
    "mpeg2": ("mpeg2video", "mpg", "yuv420p", {"bf": "2"}),
    "vp8": ("libvpx", "webm", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", "webm", "yuv420p", {"g": "10", "cpu-used": "8", "lag-in-frames": "10"}),
    "av1": ("libsvtav1", "mkv", "yuv420p", {"g": "8"}),
    "mjpeg": ("mjpeg", "avi", "yuvj420p", {}),
    "grey": ("ffv1", "mkv", "gray", {}),
    "alpha": ("qtrle", "mov", "argb", {}),
    "gif": ("gif", "gif", "bgr8", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_frames_equals_a_full_decode(folder, kind):
    codec, ending, pix_fmt, options = KINDS[kind]
    try:
        av.codec.Codec(codec, "w")
    except av.FFmpegError:
        pytest.skip(f"PyAV has no encoder {codec}")
    path = write_video(folder / f"{kind}.{ending}", moving_frames(24), codec=codec, pix_fmt=pix_fmt, options=options)
    full = decode_all(path)
    with open_video(path) as video:
        assert video.num_frames == len(full) == len(video.timestamps)
        assert video.size == full.shape[1:3]
        assert np.array_equal(video.get_frames(range(len(full))).numpy(), full)
        rng = np.random.default_rng(0)
        for count in (1, 1, 1, 5, 12):
            indices = rng.integers(0, len(full), count).tolist()
            assert np.array_equal(video.get_frames(indices).numpy(), full[indices])
        video.check()


@pytest.mark.parametrize("size", [(31, 33), (49, 64), (48, 65), (2, 2)])
def test_odd_sizes(tmp_path, size):
    frames = moving_frames(6, 64, 80)[:, : size[0], : size[1]]
    path = write_video(tmp_path / "odd.mp4", np.ascontiguousarray(frames), pix_fmt="yuv444p")
    with open_video(path) as video:
        assert video.size == size
        assert np.array_equal(video.get_frames([5, 0]).numpy(), decode_all(path)[[5, 0]])
        assert video.get_frames([1], size=(17, 19), channels=1).shape == (1, 17, 19, 1)


def test_variable_frame_rate_keeps_its_time_stamps(tmp_path):
    stamps = [0, 10, 50, 60, 260, 300, 310, 900, 1000, 1005]
    path = write_video(tmp_path / "vfr.mkv", moving_frames(len(stamps)), stamps=stamps, options={"bf": "2"})
    with open_video(path) as video:
        assert video.timestamps == pytest.approx([ms / 1000 for ms in stamps])
        assert video.fps == pytest.approx(9 / 1.005)
        assert np.array_equal(video.get_frames([7, 3]).numpy(), decode_all(path)[[7, 3]])


def test_time_stamps_count_from_the_first_frame(tmp_path):
    path = write_video(tmp_path / "late.mkv", moving_frames(5), stamps=[5000, 5040, 5080, 5120, 5160])
    with open_video(path) as video:
        assert video.timestamps[0] == 0
        assert video.fps == pytest.approx(25)


def test_equal_time_stamps_are_counted_at_the_frame_rate(tmp_path):
    path = write_video(tmp_path / "all_zero.mp4", moving_frames(9), options={"bf": "0"})
    data = bytearray(path.read_bytes())
    stts = data.index(b"stts")  # one run of equal durations: make the duration 0, as cheap re-encoders do
    data[stts + 16 : stts + 20] = struct.pack(">I", 0)
    path.write_bytes(data)
    with open_video(path) as video:
        assert video.num_frames == 9
        assert all(after > before for before, after in zip(video.timestamps, video.timestamps[1:], strict=False))
        assert np.array_equal(video.get_frames([8, 2]).numpy(), decode_all(path)[[8, 2]])


def test_frames_cut_away_by_an_edit_list_do_not_count(tmp_path):
    path = write_video(tmp_path / "cut.mp4", moving_frames(24), options={"bf": "0", "g": "12"})
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12  # duration in movie time, start in media time
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].duration // 24
    data[start + 4 : start + 8] = struct.pack(">i", struct.unpack(">i", data[start + 4 : start + 8])[0] + 5 * ticks)
    path.write_bytes(data)
    full = decode_all(path)
    assert len(full) < 24
    with open_video(path) as video:
        assert video.num_frames == len(full)
        assert np.array_equal(video.get_frames(range(len(full))).numpy(), full)
        assert np.array_equal(video.get_frames([0]).numpy(), full[:1])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path, degrees):
    path = write_video(tmp_path / "turned.mp4", moving_frames(4), rotation=degrees)
    shown = np.rot90(decode_all(path), degrees // 90, axes=(1, 2))
    with open_video(path) as video:
        assert video.size == shown.shape[1:3]
        assert np.array_equal(video.get_frames([0, 3]).numpy(), shown[[0, 3]])
        height, width = (24, 32) if degrees == 180 else (32, 24)
        small = video.get_frames([2], size=(height, width)).float()
        by_area = torch.nn.functional.avg_pool2d(torch.tensor(shown[2].copy()).permute(2, 0, 1).float(), 2)
        assert (small[0].permute(2, 0, 1) - by_area).abs().mean() < 4


def test_mirrored_display_matrix(tmp_path):
    path = write_video(tmp_path / "mirrored.mp4", moving_frames(3))
    set_matrix(path, (-1, 0, 0, 1))
    with open_video(path) as video:
        assert np.array_equal(video.get_frames([1]).numpy(), decode_all(path)[[1], :, ::-1])


def test_change_of_resolution_is_scaled_to_the_first_size(tmp_path):
    path = tmp_path / "two.h264"
    parts = [
        write_video(tmp_path / f"{i}.h264", moving_frames(6, *size), options={"bf": "0"})
        for i, size in enumerate([(48, 64), (96, 128)])
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_video(path) as video:
        assert (video.num_frames, video.size) == (12, (48, 64))
        frames = video.get_frames([0, 11])
    assert frames.shape == (2, 48, 64, 3)
    big = torch.tensor(decode_all(parts[1])[5]).permute(2, 0, 1).float()
    assert (frames[1].permute(2, 0, 1) - torch.nn.functional.avg_pool2d(big, 2)).abs().mean() < 4


def test_scaling_averages_and_grey_is_luma(tmp_path):
    path = write_video(tmp_path / "s.mp4", moving_frames(3), options={"crf": "1"})
    full = torch.tensor(decode_all(path)[2]).permute(2, 0, 1).float()
    with open_video(path) as video:
        small = video.get_frames([2], size=(12, 16))[0].permute(2, 0, 1).float()
        grey = video.get_frames([2], channels=1)[0, ..., 0].float()
    assert (small - torch.nn.functional.avg_pool2d(full, 4)).abs().mean() < 5
    assert (grey - (full * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)).abs().mean() < 3


def test_full_range_is_not_stretched(tmp_path):
    frames = np.full((2, 32, 32, 3), 250, np.uint8)
    path = write_video(tmp_path / "full.mkv", frames, codec="mjpeg", pix_fmt="yuvj420p")
    with open_video(path) as video:
        assert (video.get_frames([0]).int() - 250).abs().max() <= 2
        assert (video.get_frames([0], channels=1).int() - 250).abs().max() <= 2


def test_sound_beside_the_pictures_and_a_name_with_a_colon(tmp_path):
    path = write_video(tmp_path / "a: 50%d.mp4", moving_frames(5), audio=True)
    with open_video(path) as video:
        assert np.array_equal(video.get_frames(range(5)).numpy(), decode_all(path))


class Counting:
    """Stands before a decoder and counts the packets that it is given, and those that it may skip."""

    def __init__(self, context):
        self.context, self.fed, self.skips = context, 0, 0

    def __getattr__(self, name):
        return getattr(self.context, name)

    def __setattr__(self, name, value):
        if name == "skip_frame":
            self.context.skip_frame = value
        self.__dict__[name] = value

    def decode(self, packet):
        if packet is not None and packet.size:
            self.fed += 1
            self.skips += self.context.skip_frame == "NONREF"
        return self.context.decode(packet)


def fed_for(path: Path, indices: list[int]) -> tuple[int, int]:
    """Packets that go into the decoder for these frames, and how many of them it may skip; the frames are right."""
    with VideoReader(path) as video:
        assert video.size
        counting = video._context = Counting(video._context)
        video._ended = True
        assert np.array_equal(video.get_frames(indices).numpy(), decode_all(path)[indices])
    return counting.fed, counting.skips


def test_sparse_frames_skip_the_parts_between_keyframes(tmp_path):
    options = {"g": "10", "bf": "2", "sc_threshold": "0"}
    path = write_video(tmp_path / "long.mp4", moving_frames(120), options=options)
    fed, skips = fed_for(path, [0, 60, 119])
    assert fed <= 12, "two keyframes alone, and the whole of the last group"
    assert skips >= 7
    assert fed_for(path, list(range(120))) == (120, 0)


def test_nothing_is_decoded_beyond_the_last_wanted_frame(tmp_path):
    path = write_video(tmp_path / "long.mp4", moving_frames(120), options={"bf": "0"})
    assert fed_for(path, [3, 40])[0] == 41


def test_of_pictures_that_stand_alone_only_the_wanted_ones_are_decoded(tmp_path):
    path = write_video(tmp_path / "alone.avi", moving_frames(120), codec="mjpeg", pix_fmt="yuvj420p")
    assert fed_for(path, [7, 40, 41, 110])[0] == 4


def test_frames_of_av1_that_nothing_refers_to_are_left_out(tmp_path):
    try:
        path = write_video(tmp_path / "long.mkv", moving_frames(65), codec="libsvtav1")
    except av.FFmpegError:
        pytest.skip("PyAV has no encoder libsvtav1")
    assert fed_for(path, [0, 64])[0] < 50
    assert fed_for(path, list(range(65)))[0] == 65


def test_calls_that_read_on_decode_each_packet_once(tmp_path):
    path = write_video(tmp_path / "long.mp4", moving_frames(160), options={"bf": "3", "g": "100"})
    full = decode_all(path)
    with VideoReader(path) as video:
        assert video.size
        counting = video._context = Counting(video._context)
        for start in range(0, 160, 16):
            frames = range(start, start + 16)
            assert np.array_equal(video.get_frames(frames).numpy(), full[start : start + 16])
    assert counting.fed <= 160 + 16 + 8, "once, but for the second call, which can't know yet"


def test_a_file_is_looked_through_once_until_it_changes(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(12))
    passes = []
    read = video_module.read_table
    monkeypatch.setattr(video_module, "read_table", lambda *args: passes.append(1) or read(*args))
    for _ in range(3):
        with VideoReader(path) as video:
            assert (video.num_frames, len(video.get_frames([11]))) == (12, 1)
    assert len(passes) == 1
    write_video(path, moving_frames(7, 32, 32))
    with VideoReader(path) as video:
        assert (video.num_frames, video.size) == (7, (32, 32))
    assert len(passes) == 2


def test_a_file_that_was_counted_before_needs_no_counting(tmp_path):
    path = write_video(tmp_path / "a.avi", moving_frames(12), codec="mpeg4", options={"bf": "2"})
    full = decode_all(path)
    for _ in range(2):
        with VideoReader(path) as video:
            assert video.num_frames == 12
            assert np.array_equal(video.get_frames([11, 4]).numpy(), full[[11, 4]])


def test_memory_of_frames_is_used_again_when_nobody_has_it():
    memory = FrameMemory(limit=3 * 2**20)
    first = memory.empty(4, 512, 512)
    place, first[:] = first.ctypes.data, 7
    tensor = torch.from_numpy(first)
    del first
    other = memory.empty(4, 512, 512)
    other[:] = 9
    assert tensor.eq(7).all(), "a tensor still has it"
    view = tensor[1:].numpy()
    del tensor
    third = memory.empty(4, 512, 512)
    assert third.ctypes.data not in (place, other.ctypes.data), "so does a view"
    del view
    again = memory.empty(3, 512, 512)
    assert again.ctypes.data == place and again.shape == (3, 512, 512)
    assert memory.empty(2, 2, 2).nbytes == 8
    several = [memory.empty(4, 512, 512) for _ in range(6)]
    del several
    assert sum(block.nbytes for block in memory._free.values()) <= 3 * 2**20


def test_the_memory_of_tables_is_bounded(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(12))
    with VideoReader(path) as video:
        table = video._table
    cache = TableCache(limit=3 * table.num_bytes)
    for i in range(5):
        cache.put((i,), table)
        assert cache.get((0,)) is (table if i < 3 else cache.get((0,)))
    assert [cache.get((i,)) is table for i in range(5)].count(True) == 3


def test_limits_of_time_and_pixels(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(12))
    with pytest.raises(DecodeError, match="takes longer than 0 seconds"):
        VideoReader(path, seconds=0)
    with VideoReader(path, seconds=100) as video:
        video._seconds = 0
        with pytest.raises(DecodeError, match="takes longer than 0 seconds"):
            video.get_frames([3])
    monkeypatch.setattr(video_module, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(DecodeError):
        VideoReader(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match="not a regular file"):
        open_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero_byte", "the file is empty"),
        ("truncated", "cut off"),
        ("text", "not a video file"),
        ("audio_only", r"no video stream \(audio only\)"),
        ("moov_less", "not a video file"),
        ("broken_middle", "damaged"),
    ],
)
def test_broken_files_say_why(broken, kind, reason):
    with pytest.raises(DecodeError, match=reason) as caught, open_video(broken[kind]) as video:
        video.get_frames(range(video.num_frames))
    assert caught.value.path == str(broken[kind])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return broken_files(tmp_path_factory.mktemp("broken"))


def test_check_sees_damage_that_the_wanted_frames_do_not_touch(broken):
    with open_video(broken["broken_middle"]) as video:
        assert len(video.get_frames([0])) == 1
        with pytest.raises(DecodeError, match="damaged"):
            video.check()
        assert len(video.get_frames([0, 1])) == 2  # and what was good still is


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mkv"), ("libvpx-vp9", "webm"), ("mpeg4", "avi")])
@pytest.mark.parametrize("harm", ["cut", "zeros"])
def test_damage_is_never_a_shorter_video(folder, codec, ending, harm):
    path = write_video(folder / f"{harm}_{codec}.{ending}", moving_frames(40), codec=codec)
    data = bytearray(path.read_bytes())
    start, end = len(data) * 65 // 100, len(data) * 75 // 100
    data[start:] = b"" if harm == "cut" else bytes(end - start) + data[end:]
    path.write_bytes(data)
    with pytest.raises(DecodeError), open_video(path) as video:
        video.check()


def test_missing_file_and_folder_without_pictures(tmp_path):
    with pytest.raises(DecodeError, match="No such file"):
        open_video(tmp_path / "none.mp4")
    with pytest.raises(DecodeError, match="no pictures"):
        open_video(tmp_path)


def test_arguments_are_checked(tmp_path):
    with open_video(write_video(tmp_path / "a.mp4", moving_frames(5))) as video:
        for index in (5, -1):
            with pytest.raises(ConfigError, match="frames 0 to 4"):
                video.get_frames([index])
        with pytest.raises(ConfigError, match="channels"):
            video.get_frames([0], channels=4)
        with pytest.raises(ConfigError, match="size"):
            video.get_frames([0], size=(0, 10))
        assert video.get_frames([]).shape == (0, 48, 64, 3)
        assert video.get_frames(torch.tensor([1, 1])).shape == (2, 48, 64, 3)
        video.close()
        assert video.get_frames([4]).shape == (1, 48, 64, 3)  # reopened where needed


def test_every_shared_media_file(shared):
    files = sorted(p for p in (shared / "media").iterdir() if p.suffix != ".md")
    assert files
    for path in files:
        full = decode_all(path)
        with open_video(path) as video:
            assert (video.num_frames, video.size) == (len(full), full.shape[1:3]), path
            last = len(full) - 1
            picked = [last, 0, last // 2, last // 3, last]
            assert np.array_equal(video.get_frames(picked).numpy(), full[picked]), path


def test_some_clips_of_each_shared_set(shared):
    files = sorted((shared / "data").rglob("*.mp4"))[::150]
    assert files
    for path in files:
        full = decode_all(path)
        with open_video(path) as video:
            assert np.array_equal(video.get_frames([len(full) - 1, 0]).numpy(), full[[-1, 0]]), path


# Folders of pictures


def save_pictures(folder: Path, names: list[str], size: tuple[int, int] = (20, 30)) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), 10 * i, np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "template"),
    [
        ([f"{i:05d}.png" for i in range(12)], "{:05d}.png"),
        ([f"{i:05d}.png" for i in range(1, 13)], "{:05d}.png"),
        ([f"{i}.png" for i in range(1, 13)], "{:05d}.png"),
        ([f"img_{i:03d}.png" for i in range(0, 60, 5)], "img_{:03d}.png"),
        ([f"frame{i}.png" for i in range(1, 13)], "{:05d}.jpg"),  # fits no template, but is plain
    ],
)
def test_folder_of_frames(tmp_path, names, template):
    save_pictures(tmp_path / "clip", names)
    (tmp_path / "clip" / "notes.txt").write_text("no picture")
    with open_video(tmp_path / "clip", template) as video:
        assert isinstance(video, FrameReader)
        assert (video.num_frames, video.size) == (12, (20, 30))
        assert video.get_frames([11, 0, 2])[:, 0, 0, 0].tolist() == [110, 0, 20]
        assert video.get_frames([3], size=(5, 7), channels=1).shape == (1, 5, 7, 1)
        assert len(video.timestamps) == 12
        video.check()


def test_pictures_of_other_sizes_and_kinds_fit_the_first(tmp_path):
    save_pictures(tmp_path, ["1.png"])
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(tmp_path / "2.png")
    Image.fromarray(np.full((10, 10, 4), 99, np.uint8)).save(tmp_path / "3.png")
    with FrameReader(tmp_path, "{}.png") as video:
        frames = video.get_frames([0, 1, 2])
    assert frames.shape == (3, 20, 30, 3)
    assert frames[1:, 9, 9, 1].tolist() == [77, 99]


def test_broken_folders_say_why(tmp_path):
    with pytest.raises(DecodeError, match=r"between 00002\.png and 00004\.png"):
        FrameReader(
            save_pictures(tmp_path / "hole", ["00001.png", "00002.png", "00004.png", "00005.png"]), "{:05d}.png"
        )
    with pytest.raises(DecodeError, match="no picture fits"):
        FrameReader(save_pictures(tmp_path / "mixed", ["a_1.png", "b_1.png"]))
    bad = save_pictures(tmp_path / "bad", ["00001.png", "00002.png", "00003.png"])
    (bad / "00002.png").write_text("no picture")
    whole = (bad / "00003.png").read_bytes()
    (bad / "00003.png").write_bytes(whole[: len(whole) // 2])
    video = FrameReader(bad, "{:05d}.png")
    assert len(video.get_frames([0])) == 1
    with pytest.raises(DecodeError, match=r"00002\.png: not a picture"):
        video.check()
    with pytest.raises(DecodeError, match=r"00003\.png"):
        video.get_frames([2])
    (bad / "00001.png").unlink()
    with pytest.raises(DecodeError, match=r"00001\.png"):
        video.get_frames([0])


@pytest.mark.parametrize("template", ["frame.jpg", "{:05d}_{:05d}.jpg", "{name}.jpg", "{:05d"])
def test_a_template_has_one_number(tmp_path, template):
    with pytest.raises(ConfigError, match="one number"):
        FrameReader(tmp_path, template)


# Arrays


def test_array_reader():
    frames = moving_frames(6)
    with ArrayReader(frames, fps=10) as video:
        assert (video.num_frames, video.size, video.fps) == (6, (48, 64), 10)
        assert video.timestamps[5] == pytest.approx(0.5)
        assert np.array_equal(video.get_frames([5, 0, 5]).numpy(), frames[[5, 0, 5]])
        assert video.get_frames([1], size=(24, 32), channels=1).shape == (1, 24, 32, 1)
    grey = ArrayReader(torch.tensor(frames[..., :1]))
    assert np.array_equal(grey.get_frames([2], channels=1).numpy(), frames[[2]][..., :1])
    assert np.array_equal(grey.get_frames([2]).numpy(), frames[[2]][..., [0, 0, 0]])


@pytest.mark.parametrize(
    ("frames", "cure"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"\* 255"),
        (np.zeros((4, 8, 8, 3), np.int64), r"astype\('uint8'\)"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"transpose\(0, 2, 3, 1\)"),
        (np.zeros((3, 4, 8, 8), np.uint8), r"transpose\(1, 2, 3, 0\)"),
        (np.zeros((4, 8, 8), np.uint8), r"frames\[..., None\]"),
        (np.zeros((4, 8, 8, 4), np.uint8), "alpha"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one frame"),
        (np.zeros((8,), np.uint8), "must be"),
    ],
)
def test_array_reader_says_how_to_convert(frames, cure):
    with pytest.raises(ConfigError, match=cure):
        ArrayReader(frames)
