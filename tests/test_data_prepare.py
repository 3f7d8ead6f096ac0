"""`lean3d data prepare`: the new set has the old one's clips, frame by frame, and a kill loses one file at most."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest

from lean3d.cli import main
from lean3d.config import DataConfig
from lean3d.data.drawing import ON_EVERY_CPU
from lean3d.data.manifest import read_manifest
from lean3d.data.readers import open_video
from lean3d.data.shards import member_of
from lean3d.data_tools import prepare
from lean3d.errors import BackendError, ConfigError, DataError
from test_data_check import write_set
from video_files import broken_files, moving_frames, write_video

COMMAND = [sys.executable, "-m", "lean3d", "data", "prepare"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Containers, codecs, rates, a turned video, a variable rate, a folder of pictures, two names for one stem."""
    root = tmp_path_factory.mktemp("mixed") / "clips"
    for name in ("train/jumps", "train/waves", "val/jumps", "val/waves"):
        (root / name).mkdir(parents=True)
    stamps = [int(40 * i + 13 * (i % 3 == 0)) for i in range(16)]
    train = root / "train"
    write_video(train / "jumps" / "phone.mkv", moving_frames(16, 64, 96, seed=1), stamps=stamps)
    write_video(train / "jumps" / "turned.mp4", moving_frames(14, 64, 96, seed=2), rotation=90, audio=True)
    write_video(train / "jumps" / "ntsc.mp4", moving_frames(20, 64, 96, seed=3), fps=30)
    write_video(train / "waves" / "old.avi", moving_frames(12, 49, 65, seed=4), codec="mpeg4")
    write_video(train / "waves" / "same.mp4", moving_frames(12, 64, 96, seed=5))
    write_video(train / "waves" / "same.webm", moving_frames(12, 64, 96, seed=6), codec="libvpx-vp9")
    write_video(root / "val" / "jumps" / "small.mp4", moving_frames(12, 24, 32, seed=7))
    pictures = root / "val" / "waves" / "pictures"
    pictures.mkdir()
    from PIL import Image

    for number, frame in enumerate(moving_frames(9, 64, 96, seed=8)):
        Image.fromarray(frame).save(pictures / f"{number:05d}.png")
    (root / "README.md").write_text("whose clips these are")
    return root


@pytest.fixture(scope="module")
def prepared(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, prepare.Prepared]:
    out = tmp_path_factory.mktemp("out") / "new"
    return out, prepare.run(DataConfig(root=str(mixed)), out, short_side=48, gop=4, workers=2, quiet=True)


def test_every_clip_keeps_its_frames_times_label_and_split(mixed, prepared):
    out, done = prepared
    assert (done.files, done.kept, done.bad, done.root) == (8, 0, (), out)
    old, new = (read_manifest(DataConfig(root=str(root))) for root in (mixed, out))
    assert new.source == str(out / "clips.csv") and new.classes == old.classes
    facts = [
        {Path(c.path).relative_to(root).as_posix(): (c.label, c.split) for c in manifest.clips}
        for root, manifest in ((mixed, old), (out, new))
    ]
    renamed = {"train/waves/same.mp4": "train/waves/same.mp4.mp4", "train/waves/same.webm": "train/waves/same.webm.mp4"}
    names = {name: renamed.get(name, str(Path(name).with_suffix(".mp4"))) for name in facts[0]}
    assert {names[name]: fact for name, fact in facts[0].items()} == facts[1]
    for source, target in names.items():
        with open_video(mixed / source, "{:05d}.png") as before, open_video(out / target) as after:
            assert after.num_frames == before.num_frames, source
            assert np.allclose(after.timestamps, before.timestamps, rtol=0, atol=1e-9), source
            height, width = before.size
            assert after.size == ((height, width) if min(height, width) < 48 else tuple(
                max(2, round(side * 48 / min(height, width) / 2) * 2) for side in (height, width)
            )), source  # fmt: skip
            wanted = before.get_frames(range(before.num_frames), size=after.size).float()
            error = (after.get_frames(range(after.num_frames)).float() - wanted).square().mean()
            others = (after.get_frames(range(after.num_frames)).roll(1, 0).float() - wanted).square().mean()
            assert error < 160 and others > 4 * error, source  # 26 dB: edges of coloured squares that move


def test_keyframes_are_as_many_as_asked_and_sound_is_gone(prepared):
    out, _ = prepared
    with av.open(str(out / "train" / "jumps" / "ntsc.mp4")) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert sum(keys) >= 5 and max(np.diff(np.flatnonzero(keys))) <= 4
        assert container.streams.video[0].codec_context.name == "h264"
    with av.open(str(out / "train" / "jumps" / "turned.mp4")) as container:
        assert not container.streams.audio


def test_the_file_is_the_same_whatever_the_processor_can_do(tmp_path, monkeypatch):
    written = []
    write_video(tmp_path / "clip.mp4", moving_frames(24, 50, 66, seed=4))
    for name in ("as-it-is.mp4", "without-vectors.mp4"):
        with open_video(tmp_path / "clip.mp4") as reader:
            prepare._encode(reader, tmp_path / name, 48, 12, "h264", 30)
        written.append((tmp_path / name).read_bytes())
        monkeypatch.setitem(ON_EVERY_CPU, "x264-params", f"{ON_EVERY_CPU['x264-params']}:asm=0")
    assert written[0] == written[1]


def test_annotations_are_kept_and_the_old_set_is_untouched(mixed, prepared):
    out, _ = prepared
    assert (out / "annotations" / "README.md").read_text() == "whose clips these are"
    assert sorted(path.name for path in mixed.rglob("*") if path.is_file() and path.suffix != ".png") == sorted(
        ["phone.mkv", "turned.mp4", "ntsc.mp4", "old.avi", "same.mp4", "same.webm", "small.mp4", "README.md"]
    )


def test_a_second_run_has_nothing_to_do_but_what_changed(tmp_path):
    root, out = write_set(tmp_path / "clips", train=2), tmp_path / "new"
    config = DataConfig(root=str(root))
    assert prepare.run(config, out, workers=1, quiet=True).kept == 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    write_video(root / "train" / "waves" / "1.mp4", moving_frames(9, seed=55))
    (out / "val" / "waves" / "0.mp4").write_bytes(b"cut")
    assert prepare.run(config, out, workers=1, quiet=True).kept == 4
    changed = {path.relative_to(out).as_posix() for path, when in times.items() if path.stat().st_mtime_ns != when}
    assert changed == {"train/waves/1.mp4", "val/waves/0.mp4"}
    with open_video(out / "train" / "waves" / "1.mp4") as video:
        assert video.num_frames == 9


def test_bad_files_are_counted_listed_and_left_out(tmp_path, capsys):
    root, out = write_set(tmp_path / "clips", train=2), tmp_path / "new"
    shutil.copy(broken_files(tmp_path / "broken")["truncated"], root / "train" / "waves" / "cut.mp4")
    with pytest.raises(SystemExit) as leaving:
        main(["data", "prepare", str(root), str(out), "--workers", "1"])
    assert leaving.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "6 clips" in said and "1 bad" in said and f"lean3d train {out}" in said
    assert [row["reason"] for row in csv.DictReader((out / "bad_files.csv").open())] == ["the file is cut off"]
    assert len(read_manifest(DataConfig(root=str(out))).clips) == 6


def test_killed_it_goes_on_with_the_next_file(tmp_path):
    root, out = write_set(tmp_path / "clips", train=5, val=1), tmp_path / "new"
    process = subprocess.Popen([*COMMAND, root, out, "--workers", "1"], stdout=subprocess.DEVNULL)
    journal = out / "prepared.csv"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "clips.csv").exists()
    with journal.open("a") as file:
        file.write("train/waves/3.mp4,99")  # a line that was cut off
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*.mp4")}
    done = prepare.run(DataConfig(root=str(root)), out, workers=2, quiet=True)
    assert done.files == 12 and 2 <= done.kept < 12
    unchanged = [path for path, when in finished.items() if path.stat().st_mtime_ns == when]
    assert len(unchanged) >= done.kept and not list(out.rglob("*.part"))
    assert len(read_manifest(DataConfig(root=str(out))).clips) == 12


def test_shards_hold_clips_labels_and_splits(tmp_path):
    root, out = write_set(tmp_path / "clips", train=6, val=2), tmp_path / "new"
    done = prepare.run(DataConfig(root=str(root)), out, shards=True, shard_mb=0.01, workers=2, quiet=True)
    assert done.root == out / "index.csv" and done.files == 16
    shards = sorted(path.name for path in out.glob("*.tar"))
    assert len(shards) >= 4 and {name.split("-")[0] for name in shards} == {"train", "val"}
    assert not (out / ".clips").exists()
    inside = {}
    for name in shards:
        with tarfile.open(out / name) as archive:
            members = archive.getmembers()
            for clip, facts in zip(members[::2], members[1::2], strict=True):
                assert clip.name.split(".")[0] == facts.name.split(".")[0]
                told = json.load(archive.extractfile(facts))
                path = f"{name}/{clip.offset_data}+{clip.size}/{told['path']}"
                inside[path] = [told["label"], told["split"], told["group"]]
    rows = {row[0]: row[1:] for row in list(csv.reader((out / "index.csv").open()))[1:]}
    assert rows == inside and len(rows) == 16
    again = prepare.run(DataConfig(root=str(root)), out, shards=True, shard_mb=0.01, quiet=True)
    assert again.kept == 16 and again.bytes_after == sum((out / name).stat().st_size for name in shards)
    write_video(root / "train" / "waves" / "new.mp4", moving_frames(9, seed=55))
    with pytest.raises(ConfigError, match=r"is complete with 16 clips, and .* has 17 by now"):
        prepare.run(DataConfig(root=str(root)), out, shards=True, shard_mb=0.01, quiet=True)


def test_paths_into_shards():
    member = member_of("s3://bucket/a.b/train-000003.tar/1536+20480/jumps/00 12.mp4")
    assert member == ("s3://bucket/a.b/train-000003.tar", 1536, 20480, "jumps/00 12.mp4")
    assert member_of(member.path) == member
    assert member_of("/clips/train-000003.tar") is None and member_of("/clips/a.tar/b.mp4") is None


def test_a_full_disk_stops_it_with_a_clear_error(tmp_path):
    """No file may grow beyond a limit, which gives an error as a full disk does."""
    config, out = DataConfig(root=str(write_set(tmp_path / "clips", train=1))), tmp_path / "new"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match=r"mp4 can't be written: File too large"):
            prepare.run(config, out, workers=1, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.rglob("*.mp4*"))
    assert prepare.run(config, out, workers=1, quiet=True).files == 4


def test_mjpeg_has_keyframes_only(tmp_path):
    root, out = write_set(tmp_path / "clips", train=1), tmp_path / "new"
    prepare.run(DataConfig(root=str(root)), out, codec="mjpeg", workers=1, quiet=True)
    with av.open(str(out / "train" / "waves" / "0.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
    name = "train/waves/0.mp4"
    with open_video(root / name) as old, open_video(out / name) as new:
        assert (old.get_frames(range(12)).float() - new.get_frames(range(12)).float()).abs().mean() < 4


def test_wrong_words_are_refused(tmp_path, monkeypatch):
    root = write_set(tmp_path / "clips", train=1)
    config = DataConfig(root=str(root))
    for settings, words in (
        ({"short_side": 8}, "short_side must be at least 16, got 8"),
        ({"gop": 0}, "gop must be at least 1"),
        ({"shard_mb": 0}, "shard_mb and seconds must be above 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            prepare.run(config, tmp_path / "new", quiet=True, **settings)
    with pytest.raises(ConfigError, match="holds the clips themselves"):
        prepare.run(config, root, quiet=True)
    with pytest.raises(ConfigError, match="which would then hold every clip twice"):
        prepare.run(config, root / "new", quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty"):
        prepare.run(config, tmp_path / "full", quiet=True)
    prepare.run(config, tmp_path / "new", workers=1, quiet=True)
    with pytest.raises(ConfigError, match=r"begun with gop 12 \(now 6\)"):
        prepare.run(config, tmp_path / "new", gop=6, quiet=True)
    monkeypatch.setattr(prepare, "ENCODERS", {"h264": ("no-such", "yuv420p")})
    with pytest.raises(BackendError, match="no encoder no-such; type --codec mjpeg"):
        prepare.run(config, tmp_path / "other", quiet=True)


def test_nothing_but_bad_files_is_an_error(tmp_path):
    folder = tmp_path / "clips" / "train"
    for name in ("jumps", "waves"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.mp4").write_text("not a video")
    with pytest.raises(DataError, match="none of 2 clips could be decoded; the first is"):
        prepare.run(DataConfig(root=str(folder.parent)), tmp_path / "new", workers=1, quiet=True)
    assert (tmp_path / "new" / "bad_files.csv").is_file()
