"""`lean3d data check`: what is wrong with a data set is found, and a script is told."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lean3d.cli import main
from lean3d.config import DataConfig
from lean3d.data.manifest import read_manifest
from lean3d.data_tools import check
from lean3d.errors import ConfigError, DataError
from video_files import broken_files, moving_frames, write_video


def write_set(root: Path, classes: tuple[str, ...] = ("jumps", "waves"), train: int = 3, val: int = 1) -> Path:
    """A healthy set: small videos, no two of them equal."""
    for label, name in enumerate(classes):
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                frames = moving_frames(12, seed=number + 100 * label + 1000 * (split == "val"))
                write_video(root / split / name / f"{number}.mp4", frames, options={"g": "6"})
    return root


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, check.Health]:
    """A set with one of everything, and what was found."""
    root = write_set(tmp_path_factory.mktemp("ill") / "clips", ("moves left", "stays", "waves"))
    train, val = root / "train", root / "val"
    broken = broken_files(root.parent / "broken")
    shutil.copy(broken["truncated"], train / "waves" / "cut.mp4")
    (train / "waves" / "empty.mp4").write_bytes(b"")
    shutil.copy(train / "stays" / "0.mp4", val / "stays" / "again.mp4")  # a leak
    shutil.copy(train / "stays" / "1.mp4", train / "waves" / "other.mp4")  # two labels
    shutil.copy(train / "stays" / "2.mp4", train / "stays" / "twice.mp4")
    write_video(train / "waves" / "slow.mp4", moving_frames(60, seed=7), options={"g": "60"})
    moved = moving_frames(24, seed=77, height=96, width=128)
    write_video(train / "stays" / "large.mp4", moved)
    write_video(val / "stays" / "small.avi", moved[:, ::2, ::2], codec="mpeg4")  # a leak that no hash tells
    stamps = [int(40 * i + 15 * (i % 3 == 0)) for i in range(12)]
    write_video(train / "waves" / "phone.mp4", moving_frames(12, seed=8), stamps=stamps)
    (val / "jumps").mkdir()
    write_video(val / "jumps" / "0.mp4", moving_frames(12, seed=9))
    (root / "groups.csv").write_text("name,group\ntrain/waves/0.mp4,film 1\nval/waves/0.mp4,film 1\n")
    return root, check.examine(DataConfig(root=str(root), groups="groups.csv"), workers=2)


def test_everything_that_is_wrong_is_found_and_nothing_else(ill):
    root, health = ill

    def local(files: tuple[str, ...]) -> list[str]:
        return [str(Path(file).relative_to(root)) for file in files]

    found = {
        finding.kind: [(local(files), note) for files, note in zip(finding.cases, finding.notes, strict=True)]
        for finding in health.findings
    }
    assert found["bad files"] == [
        (["train/waves/cut.mp4"], "the file is cut off"),
        (["train/waves/empty.mp4"], "the file is empty"),
    ]
    assert found["copies in two splits"] == [(["train/stays/0.mp4", "val/stays/again.mp4"], "train and val")]
    ((files, note),) = found["near copies in two splits"]
    assert files == ["train/stays/large.mp4", "val/stays/small.avi"] and note.startswith("train and val, alike to 0.9")
    assert found["copies with two labels"] == [(["train/stays/1.mp4", "train/waves/other.mp4"], "stays and waves")]
    assert found["copies"] == [(["train/stays/2.mp4", "train/stays/twice.mp4"], "2 files")]
    assert found["a group in two splits"] == [(["train/waves/0.mp4", "val/waves/0.mp4"], "film 1: train and val")]
    assert found["classes without training clips"] == [([], "jumps")]
    assert found["left and right"] == [([], "moves left")]
    assert [files for files, _ in found["variable frame rate"]] == [["train/waves/phone.mp4"]]
    assert found["far-apart keyframes"] == [(["train/waves/slow.mp4"], "60 frames")]
    assert len(found) == 10 and not health.healthy
    problems = [finding.problem for finding in health.findings]
    assert problems == sorted(problems, reverse=True) and sum(problems) == 6


def test_the_manifest_lists_every_file_and_trains_on_the_good_ones(ill, tmp_path):
    root, health = ill
    health.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open(encoding="utf-8")))
    assert len(rows) == 22 == health.totals()["files"]
    by_name = {str(Path(row["path"]).relative_to(root)): row for row in rows}
    slow = by_name["train/waves/slow.mp4"]
    assert [slow[k] for k in ("label", "split", "codec", "width", "height", "num_frames", "keyframe_interval")] == [
        *("waves", "train", "h264", "64", "48", "60", "60"),
    ]
    assert slow["duration"] == "2.4" and slow["fps"] == "25" and int(slow["size_bytes"]) > 1000
    assert by_name["train/waves/phone.mp4"]["variable_rate"] == "yes" and slow["variable_rate"] == "no"
    assert by_name["train/waves/cut.mp4"]["reason"] == "the file is cut off"
    good = DataConfig(root=str(tmp_path / "manifest.csv"), where={"ok": "yes"})
    found = {clip.path for clip in check.read_clips(good).clips}
    assert found == {row["path"] for row in rows if row["ok"] == "yes"} and len(found) == 20


def test_a_rare_class_is_named():
    classes = ("common", "rare")
    clips = [check.Clip(f"/c/{i}.mp4", 0, "train") for i in range(20)] + [check.Clip("/c/r.mp4", 1, "train")]
    facts = [check.Inspection(clip.path, True, None, content_hash=clip.path) for clip in clips]
    (finding,) = check.find(check.Manifest(classes, tuple(clips), "/c"), facts)
    assert finding.kind == "unequal classes" and finding.notes == ("rare: 1 clips, the largest class has 20",)
    assert not finding.problem


def test_pairs_of_left_and_right_are_no_finding():
    assert check._one_sided(("turn left", "turn Right", "wave")) == []
    assert check._one_sided(("turn left", "turn right", "left hand")) == ["left hand"]
    assert check._one_sided(()) == []


class Page(HTMLParser):
    """Sources of pictures and links, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data + " "


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(leaving.value.code or 0), " ".join((said.out + said.err).split())


def test_the_command_tells_a_script_and_writes_a_page_that_needs_no_other_file(ill, tmp_path, capsys):
    root, _ = ill
    out = tmp_path / "out"
    status, said = call(capsys, "data", "check", root, "--out", out, "--data.groups", "groups.csv", "--workers", "2")
    assert status == 1 and "problem: bad files: 2" in said and "not healthy" in said
    assert f"page {out / 'index.html'}" in said
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert len(page.sources) >= 10 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    words = " ".join(page.text.split())
    for text in ("Bad files: 2 (problem)", "train/waves/cut.mp4", "moves left", "film 1: train and val", "h264"):
        assert text in words, text
    kept = json.loads((out / "check.json").read_text(encoding="utf-8"))
    assert kept["healthy"] is False and kept["totals"]["bad"] == 2


def test_a_healthy_set_is_healthy(tmp_path, capsys):
    root = write_set(tmp_path / "clips")
    status, said = call(capsys, "data", "check", root, "--out", tmp_path / "out", "--json")
    assert status == 0
    content = json.loads(said)
    assert content["healthy"] and content["findings"] == []
    assert content["labels"][0] == {"class": "jumps", "train": 3, "val": 1, "test": 0}
    assert len(read_manifest(DataConfig(root=str(tmp_path / "out" / "manifest.csv"))).clips) == 8


def test_videos_without_labels_will_do(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", moving_frames(8))
    status, said = call(capsys, "data", "check", tmp_path, "--out", tmp_path / "out")
    assert status == 0 and "1 files, 0 bad" in said and "class" not in said


def test_the_limits_reach_the_child_processes(tmp_path, monkeypatch, capsys):
    """What they do there is tested in test_isolate.py."""
    given = {}

    def inspect_many(paths, workers, **settings):
        given.update(settings, workers=workers)
        return (check.Inspection(path, False, "takes longer than 1.5 seconds") for path in paths)

    monkeypatch.setattr(check, "inspect_many", inspect_many)
    root, words = write_set(tmp_path / "clips"), ("--seconds", "1.5", "--memory", "0.5", "--workers", "3")
    status, said = call(capsys, "data", "check", root, "--out", tmp_path / "out", *words)
    assert status == 1 and "problem: bad files: 8" in said
    assert given == {"workers": 3, "seconds": 1.5, "memory": 2**29, "frame_template": "{:05d}.jpg"}


def test_wrong_words_are_refused(tmp_path, capsys):
    with pytest.raises(DataError, match="no labelled clips"):
        check.examine(DataConfig(root=str(tmp_path)))
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        check.examine(DataConfig(root=str(tmp_path)), workers=0)
    status, said = call(capsys, "data", "check", tmp_path / "nowhere")
    assert status == 2 and re.search("does not exist", said)
    status, _ = call(capsys, "data", "chekc", tmp_path)
    assert status == 2


def test_thumbnails_are_the_videos(ill):
    import io

    from PIL import Image

    root, health = ill
    path = str(root / "train" / "stays" / "0.mp4")
    picture = np.asarray(Image.open(io.BytesIO(health.thumbnails[path])).convert("RGB")).astype(float)
    assert picture.shape == (48, 64, 3)
    assert np.abs(picture - moving_frames(12, seed=100)[6]).mean() < 12
