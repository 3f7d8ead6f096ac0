"""TorchCodec as the decoder: the same frames as PyAV's, and an error that says what to do where it is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lean3d.data.readers import VideoReader, open_video
from lean3d.errors import BackendError, ConfigError, DecodeError, MissingDependencyError
from video_files import broken_files, decode_all, moving_frames, write_video

try:
    import torchcodec  # noqa: F401

    MISSING = ""
except (ImportError, RuntimeError, OSError) as error:
    MISSING = str(error).splitlines()[0]
needed = pytest.mark.skipif(bool(MISSING), reason=f"torchcodec can't be loaded: {MISSING}")

KINDS = {
    "h264": ("libx264", "mp4", "yuv420p", {"bf": "3", "g": "12"}),
    "open_gop": ("libx264", "mkv", "yuv420p", {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}),
    "vp9": ("libvpx-vp9", "webm", "yuv420p", {"g": "10", "cpu-used": "8"}),
    "mjpeg": ("mjpeg", "avi", "yuvj420p", {}),
    "mpeg4": ("mpeg4", "avi", "yuv420p", {"g": "6"}),
}


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_of_pyav(tmp_path, kind):
    codec, ending, pix_fmt, options = KINDS[kind]
    path = write_video(tmp_path / f"a.{ending}", moving_frames(40), codec=codec, pix_fmt=pix_fmt, options=options)
    full = decode_all(path)
    with open_video(path, decoder="torchcodec") as video:
        assert video.decoder == ("pyav" if kind == "mpeg4" else "torchcodec")
        assert (video.num_frames, video.size) == (40, (48, 64))
        for indices in (range(40), [39, 0, 7, 7, 21], [5]):
            assert np.array_equal(video.get_frames(indices).numpy(), full[list(indices)])
        with VideoReader(path) as other:
            for size, channels in [((24, 32), 3), ((24, 32), 1), (None, 1)]:
                one, two = (v.get_frames([30, 2], size=size, channels=channels).float() for v in (video, other))
                assert one.shape == two.shape and (one - two).abs().mean() < 5
        assert video.get_frames([]).shape == (0, 48, 64, 3)
        with pytest.raises(ConfigError, match="frames 0 to 39"):
            video.get_frames([40])


@needed
def test_variable_rates_and_turned_videos(tmp_path):
    stamps = [0, 10, 50, 60, 260, 300, 310, 900, 1000, 1005]
    path = write_video(tmp_path / "vfr.mkv", moving_frames(10), stamps=stamps, options={"bf": "2"})
    with open_video(path, decoder="torchcodec") as video:
        assert video.decoder == "torchcodec"
        assert np.array_equal(video.get_frames([9, 3, 4]).numpy(), decode_all(path)[[9, 3, 4]])
    turned = write_video(tmp_path / "turned.mp4", moving_frames(4), rotation=90)
    with open_video(turned, decoder="torchcodec") as video:
        assert video.decoder == "pyav"
        assert np.array_equal(video.get_frames([2])[0].numpy(), np.rot90(decode_all(turned)[2]))


@needed
def test_bad_files_are_decode_errors(tmp_path):
    for path in broken_files(tmp_path).values():
        with pytest.raises(DecodeError), open_video(path, decoder="torchcodec") as video:
            video.get_frames(range(video.num_frames))
            video.check()


def test_where_it_is_missing_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(3))
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(MissingDependencyError, match=r"lean3d\[torchcodec\]"):
        open_video(path, decoder="torchcodec")


def test_where_it_does_not_load_the_error_says_why(tmp_path, monkeypatch):
    folder = tmp_path / "torchcodec"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec\\nmore')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackendError, match=r"\(Could not load libtorchcodec\).*apt install ffmpeg.*--data.decoder pyav"
    ):
        open_video(write_video(tmp_path / "a.mp4", moving_frames(3)), decoder="torchcodec")
