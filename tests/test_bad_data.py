"""A training on data in which files are broken in every way, or take forever, ends, and names them."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lean3d.config import AugmentConfig, DataConfig, InputSpec
from lean3d.data.loader import train_loader
from lean3d.data.manifest import Clip
from lean3d.engine import fit
from test_loader import megabytes, worker_ids
from tiny_runs import CLASSES, tiny_config, write_clips
from video_files import broken_files, moving_frames, write_video


def broken_in_twelve_ways(folder: Path) -> dict[str, Path]:
    """One file of each kind, by the kind's name."""
    files = broken_files(folder)
    rng = np.random.default_rng(0)

    def damaged(name: str, ending: str, codec: str, harm) -> None:
        path = write_video(folder / f"{name}.{ending}", moving_frames(40), codec=codec)
        path.write_bytes(harm(path.read_bytes()))
        files[name] = path

    def zeroed(data: bytes) -> bytes:
        start, end = len(data) * 65 // 100, len(data) * 75 // 100
        return data[:start] + bytes(end - start) + data[end:]

    damaged("matroska_cut", "mkv", "libx264", lambda data: data[: len(data) // 2])
    damaged("webm_zeroed", "webm", "libvpx-vp9", zeroed)
    damaged("avi_cut", "avi", "mpeg4", lambda data: data[: len(data) // 2])
    damaged("first_half_missing", "mp4", "libx264", lambda data: data[len(data) // 2 :])
    for name, content in [("zeros", bytes(5000)), ("noise", rng.bytes(5000))]:
        files[name] = folder / f"{name}.mp4"
        files[name].write_bytes(content)
    assert len(files) == 12
    return files


def endless(folder: Path) -> Path:
    """A video of 120,000 frames that can be counted only by decoding them all: seconds on any machine."""
    part = write_video(folder / "part.h264", moving_frames(12, 192, 192), options={"bf": "0"})
    path = folder / "endless.mp4"
    path.write_bytes(part.read_bytes() * 10_000)
    part.unlink()
    return path


def test_five_percent_broken_in_twelve_ways(tmp_path):
    root = write_clips(tmp_path / "data", train=6, val=2)
    broken = broken_in_twelve_ways(tmp_path / "broken")
    for label, name in enumerate(CLASSES):
        folder = root / "train" / name
        good = sorted(folder.iterdir())
        for number in range(108):
            os.link(good[number % 6], folder / f"more{number:03d}.mp4")
        for path in list(broken.values())[6 * label : 6 * label + 6]:
            os.link(path, folder / path.name)
    config = tiny_config(root, tmp_path / "run", optim_epochs=1, optim_batch_size=16, data_num_workers=2)
    result = fit(config)
    assert result.metrics["bad_files"] == 12
    with (result.run / "bad_files.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name for row in rows} == {path.name for path in broken.values()}
    assert all(row["reason"] and int(row["count"]) >= 1 for row in rows)


def test_a_file_that_takes_forever_is_a_bad_file(tmp_path):
    clips = [Clip(str(endless(tmp_path)), 0, "train", "")]
    for i in range(7):
        path = write_video(tmp_path / f"{i}.mp4", moving_frames(12, 32, 48, seed=i))
        clips.append(Clip(str(path), i % 2, "train", ""))
    data = DataConfig(num_workers=2, decode_seconds=1.5)
    spec = InputSpec(num_frames=4, sampling_rate=2, size=(16, 24))
    loader = train_loader(clips, CLASSES, data, spec, AugmentConfig(), batch_size=4, seed=0)
    for epoch in range(2):  # the second time it is known
        batches = list(loader.batches(epoch))
        assert [len(batch.clips) for batch in batches] == [4, 4]
        bad = {(Path(file.path).name, file.reason) for batch in batches for file in batch.bad}
        assert bad == {("endless.mp4", "takes longer than 1.5 seconds")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_memory_is_flat_over_twenty_epochs(tmp_path):
    """Of two workers and the trainer, on 240 files of several kinds, 5 % of them broken."""
    kinds = [("libx264", "mp4", "yuv420p"), ("mpeg4", "avi", "yuv420p"), ("mjpeg", "avi", "yuvj420p")]
    made = []
    for i in range(20):
        codec, ending, pix_fmt = kinds[i % 3]
        made.append(write_video(tmp_path / f"{i}.{ending}", moving_frames(24, 64, 96, i), codec=codec, pix_fmt=pix_fmt))
    made += list(broken_files(tmp_path / "broken").values())[:1]
    clips = []
    for i in range(240):
        path = made[i % 21]
        os.link(path, linked := tmp_path / f"link{i}{path.suffix}")
        clips.append(Clip(str(linked), i % 2, "train", ""))
    spec = InputSpec(num_frames=8, sampling_rate=2, size=(48, 72))
    others = set(worker_ids())
    loader = train_loader(clips, CLASSES, DataConfig(num_workers=2), spec, AugmentConfig(), batch_size=16, seed=0)
    sizes = []
    for epoch in range(22):
        for batch in loader.batches(epoch):
            assert batch.clips.dtype == torch.uint8
        workers = sorted(set(worker_ids()) - others)
        sizes.append([megabytes("self")[0], *(size for worker in workers for size in megabytes(worker))])
    for first, last in zip(sizes[1], sizes[21], strict=True):
        assert last - first < 8, f"grew by {last - first:.1f} MB in twenty epochs: {sizes}"
