"""report: one page that says what the files say, opens without a network, and shows the clips."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest

from lean3d.config import DataConfig, TrainConfig, to_dict, to_json
from lean3d.errors import CheckpointError, ConfigError
from lean3d.models import create_model
from lean3d.report import write_report
from lean3d.report.charts import line_chart, nice_ticks
from lean3d.report.clips import choose, small_mp4
from video_files import moving_frames, write_video

CLASSES = ["<left> & right", "jumps", "waves"]
SAID = {CLASSES[0]: CLASSES[1], CLASSES[1]: CLASSES[1], CLASSES[2]: CLASSES[2]}  # one class is always mistaken


def write_run(folder: Path, videos: Path, *, said: dict[str, str] = SAID, name: str = "c3d_light") -> Path:
    """A run's folder as training and test leave it, six videos of three classes; the last file is gone."""
    folder.mkdir()
    spec = create_model(name, num_classes=3, width=0.25, num_frames=4, size=32).spec
    files = [videos / f"{number}.mp4" for number in range(5)] + [videos / "gone.mp4"]
    labels = [CLASSES[number % 3] for number in range(6)]
    confusion = [[2 * (said[true] == seen) for seen in CLASSES] for true in CLASSES]
    right = sum(confusion[i][i] for i in range(3)) / 6
    results = {
        "format": 1,
        "command": "/somewhere/bin/lean3d eval runs/a",
        "date": "2026-01-01T00:00:00+00:00",
        "checkpoint": {"path": "model.safetensors", "sha256": "ab" * 32, "model": spec},
        "data": {"config": to_dict(DataConfig(root="my/clips")), "split": "test", "digest": "cd" * 32, "source": "x"},
        "views": {"num_clips": 2, "num_crops": 1},
        "precision": "fp32",
        "device": "cpu",
        "versions": {"lean3d": "0.1.0", "torch": "2"},
        "metrics": {"top1": right, "mean_class_accuracy": right, "loss": 1.0, "videos": 6, "bad_files": 1},
        "classes": CLASSES,
        "per_class": [
            {"class": c, "videos": 2, "accuracy": row[i] / 2}
            for i, (c, row) in enumerate(zip(CLASSES, confusion, strict=True))
        ],
        "confusion": confusion,
        "bad_files": [{"path": "broken.mp4", "reason": "no video stream"}],
        "videos": [
            {"path": str(path), "label": label, "top": [{"label": said[label], "score": 0.9 - i / 20}]}
            for i, (path, label) in enumerate(zip(files, labels, strict=True))
        ],
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "config.json").write_text(to_json(TrainConfig()), encoding="utf-8")
    rows = [
        {
            "kind": "epoch",
            "step": 5 * n + 5,
            "epoch": n,
            "loss": 2 / (n + 1),
            "val_loss": 2.1 / (n + 1),
            "val_top1": n / 10,
        }
        for n in range(10)
    ]
    lines = [json.dumps(row) for row in [{"kind": "step", "step": 1, "epoch": 0, "loss": 3.0}, *rows]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "ep', encoding="utf-8")
    start = {"command": "/x/bin/lean3d train my/clips", "lean3d": "0.1.0", "commit": None, "python": "3.11"}
    (folder / "environment.json").write_text(json.dumps([{**start, "packages": {"torch": "2.13"}}]), encoding="utf-8")
    (folder / "bad_files.csv").write_text("path,reason,count\nbroken.mp4,no video stream,3\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_video(folder / f"{number}.mp4", moving_frames(12, 48, 64, seed=number))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> str:
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder / "light", videos)
    other = write_run(folder / "flat", videos, said=dict.fromkeys(CLASSES, "waves"), name="c2d_r18")
    path = write_report(run, compare=[other])
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Checks that tags close, and keeps all of them with their attributes."""

    VOID = ("meta", "img", "br", "path", "circle", "polyline")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"


def text_of(page: str) -> str:
    """What one reads, without tags, with single spaces."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).strip()


def test_the_page_is_whole_and_asks_for_nothing_outside(page: str):
    tags = Tags(page)
    assert tags.open == []
    for tag, attributes in tags.seen:
        assert tag not in ("link", "iframe"), tag
        for name in ("src", "href", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page


def test_headline_has_the_accuracy_with_the_bad_files_beside_it(page: str):
    text = text_of(page)
    assert "top-1 accuracy 66.7 % 4 of 6 videos; 1 more could not be decoded" in text
    assert "bad files in training 1" in text
    assert "broken.mp4 no video stream" in text
    assert re.search(r"weights 0\.1\d+ M MACs of one clip [\d.]+ M ", text)


def test_names_of_classes_are_escaped(page: str):
    assert "<left>" not in page
    assert "&lt;left&gt; &amp; right" in page


def test_confusion_and_classes(page: str):
    text = text_of(page)
    assert "2&times; &lt;left&gt; &amp; right taken for jumps" in text
    assert re.search(r"&lt;left&gt; &amp; right 2 0\.0 % jumps \(2\)", text)
    assert text.index("2 0.0 %") < text.index("2 100.0 %")  # the hardest first


def test_gallery_plays_clips_with_words_for_who_cannot_see_them(page: str):
    players = [attributes for tag, attributes in Tags(page).seen if tag == "video"]
    assert len(players) == 5  # the sixth file is gone
    for player in players:
        assert {"autoplay", "muted", "loop", "playsinline"} <= set(player)
        assert str(player["aria-label"]).startswith("Clip of ")
        kind, content = str(player["src"]).split(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            assert sum(1 for _ in container.decode(video=0)) == 6  # 12 at 25 frames a second, thinned out
    assert "can't be shown" in page
    cards = [attributes["class"] for tag, attributes in Tags(page).seen if tag == "li" and "class" in attributes]
    assert cards == ["wrong", "wrong", "right", "right", "right", "right"]


def test_the_other_run_stands_beside_it(page: str):
    text = text_of(page)
    assert "chance, 33.3 %" in text
    assert re.search(r"c3d_light \(width 0\.25\) 66\.7 %.*c2d_r18 \(width 0\.25\) 33\.3 %", text)
    assert "c2d_r18 (width 0.25) waves 0.90, wrong" in text


def test_curves_and_how_to_repeat_it(page: str):
    charts = [attributes for tag, attributes in Tags(page).seen if tag == "svg" and "aria-label" in attributes]
    assert "training from 2 to 0.2; validation from 2.1 to 0.21" in str(charts[0]["aria-label"])
    assert "lean3d train my/clips\nlean3d eval runs/a" in page
    assert "/x/bin" not in page
    assert '"recipe": "light"'.replace('"', "&quot;") in page


def test_a_run_without_a_test_says_how_to_test_it(tmp_path: Path, videos: Path):
    run = write_run(tmp_path / "run", videos)
    (run / "results.json").unlink()
    text = text_of(write_report(run, tmp_path / "page" / "x.html").read_text(encoding="utf-8"))
    assert "best validation top-1 90.0 %" in text
    assert f"lean3d eval {run}" in text
    with pytest.raises(ConfigError, match="no test to compare"):
        write_report(write_run(tmp_path / "other", videos), compare=[run])


def test_what_is_no_run_is_refused(tmp_path: Path, videos: Path):
    with pytest.raises(CheckpointError, match="there is no run at"):
        write_report(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither metrics"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run", videos)
    (run / "results.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match=r"results\.json is damaged"):
        write_report(run)


def test_many_classes_are_a_picture_and_folded(tmp_path: Path, videos: Path):
    run = write_run(tmp_path / "run", videos)
    results = json.loads((run / "results.json").read_text())
    names = [f"class {n:02d}" for n in range(40)]
    results["classes"] = names
    results["confusion"] = [[int(i == j) for j in range(40)] for i in range(40)]
    results["per_class"] = [{"class": name, "videos": 1, "accuracy": 1.0} for name in names]
    (run / "results.json").write_text(json.dumps(results))
    (run / "confusion.png").write_bytes(b"\x89PNG")
    page = write_report(run, clips=2).read_text(encoding="utf-8")
    assert 'alt="Confusion matrix of 40 classes' in page
    assert '<table class="confusion">' not in page
    assert "The other 25 classes" in page
    assert page.count("<video") == 2


def test_choose_puts_the_surest_mistakes_first_and_keeps_half_for_right_ones():
    def video(name: str, label: str, said: str, score: float) -> dict:
        return {"path": name, "label": label, "top": [{"label": said, "score": score}]}

    wrong = [video(f"w{n}", "a", "b", n / 10) for n in range(6)]
    right = [video(f"r{n}", "ab"[n // 3], "ab"[n // 3], 0.9) for n in range(6)]
    unknown = {"path": "u", "label": None, "top": [{"label": "a", "score": 1.0}]}
    names = [v["path"] for v in choose([*right, unknown, *wrong], 6)]
    assert names == ["w5", "w4", "w3", "r0", "r3", "r1"]
    assert [v["path"] for v in choose(wrong + right[:1], 4)] == ["w5", "w4", "w3", "r0"]
    assert len(choose(right, 100)) == 6


def test_small_mp4_is_short_and_small(tmp_path: Path):
    path = write_video(tmp_path / "long.mp4", moving_frames(200, 120, 400), fps=25)
    with av.open(io.BytesIO(small_mp4(str(path), "{:05d}.jpg"))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert float(stream.average_rate) == 12.5
    assert len(frames) == 63  # 5 s
    assert frames[0].shape == (58, 192, 3)


def test_nice_ticks_hold_the_values():
    assert nice_ticks(0, 0.93) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0, 3, whole=True) == [0.0, 1.0, 2.0, 3.0]
    for low, high in ((0.0, 0.0), (2.3, 2.3), (-1.5, 1e-4), (0.0, 12345.0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and len(ticks) < 9


def test_line_chart_of_nothing_is_nothing():
    assert line_chart("loss", {"training": []}, "epochs") == ""
    assert line_chart("loss", {"training": [(1.0, 2.0)]}, "epochs").count("<polyline") == 1
