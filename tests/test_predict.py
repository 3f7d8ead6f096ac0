"""predict.py: windows cover a long video, bad files are named, and what is written can be read."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lean3d import checkpoint, predict
from lean3d.checkpoint import Checkpoint
from lean3d.config import DataConfig, InputSpec, ModelConfig, TrainConfig, to_dict
from lean3d.data.readers import VideoReader
from lean3d.errors import ConfigError, DataError, DecodeError
from lean3d.models import create_model
from lean3d.predict import Prediction, Predictions, Predictor, VideoPrediction, find_videos, load_model, write_annotated
from video_files import broken_files, moving_frames, write_video

CLASSES = ("dark", "middle", "bright")


class Brightness(torch.nn.Module):
    """A model that sees how bright a clip is, and keeps count of the clips that it sees at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = InputSpec(num_frames=4, sampling_rate=2, size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
        self.seen: list[int] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        assert clips.shape[1:] == (3, 4, 16, 16)
        self.seen.append(len(clips))
        level = clips.mean((1, 2, 3, 4))[:, None]
        return -50 * (level - torch.tensor([0.1, 0.5, 0.9])).abs()


def predictor(sampling: str = "dense") -> Predictor:
    recipe = TrainConfig(data=DataConfig(sampling=sampling))  # type: ignore[arg-type]
    return Predictor(Checkpoint(Brightness(), CLASSES, recipe, {}, Path("model.safetensors")), device="cpu")


def steps(*levels: int, length: int = 10, height: int = 32, width: int = 32) -> np.ndarray:
    """Frames (T, H, W, 3) that are plainly of one level after the other."""
    return (
        np.repeat(np.array(levels, np.uint8), length)[:, None, None, None]
        .repeat(height, 1)
        .repeat(width, 2)
        .repeat(3, 3)
    )


def test_a_compiled_model_says_the_same(video, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAN3D_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = create_model("c2d_r18", width=0.125, num_classes=3, num_frames=4, size=32)
    torch.nn.init.normal_(model.head.linear.weight)
    checkpoint.save_model(tmp_path / "model.safetensors", model, CLASSES, to_dict(TrainConfig()))
    plain, fast = load_model(tmp_path, "cpu").predict(video), load_model(tmp_path, fast=True).predict(video)
    assert len(fast.clips) == len(plain.clips) > 2
    for a, b in zip(fast.clips, plain.clips, strict=True):
        assert a.labels == b.labels
        assert a.scores == pytest.approx(b.scores, abs=1e-4)
    assert list((tmp_path / "cache").glob("*.json"))
    with pytest.raises(ConfigError, match="fast is for CPUs, got device cuda"):
        load_model(tmp_path, "cuda", fast=True)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long file: dark for two seconds, middle for one, bright for the last 0.4."""
    folder = tmp_path_factory.mktemp("videos")
    return write_video(folder / "day.mp4", np.concatenate([steps(25, 25, 128, length=25), steps(230, length=10)]))


def test_windows_cover_a_long_video_up_to_its_end(video):
    found = predictor().predict(video)
    assert found.path == str(video)
    spans = [(clip.start, clip.end) for clip in found.clips]
    assert spans[0][0] == 0 and spans[-1][1] == pytest.approx(85 / 25)
    for (start, end), (next_start, _) in itertools.pairwise(spans):
        assert start < next_start <= end + 1e-6, "no part of the video is left out"
        assert end - start == pytest.approx(7 / 25), "4 frames, 2 apart, span 7"
    assert [found.clips[i].labels[0] for i in (0, 8, -1)] == ["dark", "middle", "bright"]
    assert found.overall.labels[0] == "dark" and (found.overall.start, found.overall.end) == (0, pytest.approx(85 / 25))


def test_the_whole_video_is_the_mean_of_its_windows(video):
    found = predictor().predict(video, top_k=3)
    for label, score in zip(found.overall.labels, found.overall.scores, strict=True):
        scores = [clip.scores[clip.labels.index(label)] for clip in found.clips]
        assert score == pytest.approx(np.mean(scores), abs=1e-6)
    assert sum(found.overall.scores) == pytest.approx(1)
    assert list(found.overall.scores) == sorted(found.overall.scores, reverse=True)


def test_windows_may_overlap_and_each_is_as_if_it_were_alone(video):
    model = predictor()
    every, third = model.predict(video, stride=1), model.predict(video, stride=3)
    assert len(every.clips) == 79 and max(model.model.seen) <= 8, "few windows are in memory at a time"
    assert third.clips == every.clips[::3]
    frames = VideoReader(video).get_frames(range(85))
    for start, clip in enumerate(predictor().predict(frames, stride=1).clips):
        alone = predictor().predict(frames[start : start + 7])
        assert (clip.labels, clip.scores) == (alone.overall.labels, pytest.approx(alone.overall.scores, abs=1e-6))


def test_progress_is_told(video):
    told = []
    predictor().predict(video, progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 13), (13, 13)]


def test_frames_from_memory_and_short_videos():
    frames = steps(230, length=2)
    for source in (frames, torch.from_numpy(frames)):
        found = predictor().predict(source, top_k=9, fps=10)
        assert found.path == "array" and len(found.clips) == 1
        assert found.overall.labels[0] == "bright" and len(found.overall.labels) == 3
        assert found.clips[0].end == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="uint8"):
        predictor().predict(frames / 255)


def test_a_model_of_segments_sees_the_whole_video_at_once(video):
    found = predictor("segments").predict(video)
    assert len(found.clips) == 1 and found.clips[0].labels[0] == "dark"
    assert found.clips[0].end > 2.8, "the last segment's middle"
    with pytest.raises(ConfigError, match="stride"):
        predictor("segments").predict(video, stride=4)


def test_folders_of_pictures_are_videos(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i, picture in enumerate(steps(128, length=9)):
        Image.fromarray(picture).save(folder / f"{i + 1:05d}.png")
    assert find_videos(folder) == [folder]
    assert predictor().predict(folder).overall.labels[0] == "middle"


def test_numbers_that_make_no_sense_are_refused(video):
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        predictor().predict(video, top_k=0)
    with pytest.raises(ConfigError, match="stride must be at least 1, got 0"):
        predictor().predict(video, stride=0)


def test_a_folder_of_videos_is_refused_with_what_to_type(video):
    with pytest.raises(ConfigError, match=r"folder of 1 videos.*find_videos"):
        predictor().predict(video.parent)


def test_every_kind_of_bad_file_is_a_clear_error(tmp_path):
    for kind, path in broken_files(tmp_path).items():
        with pytest.raises(DecodeError) as caught:
            predictor().predict(path)
        assert str(path) in str(caught.value) and caught.value.reason, kind


def test_predictions_go_through_json_unchanged(video):
    found = predictor().predict(video)
    again = VideoPrediction.from_json(found.to_json())
    assert again == found
    both = Predictions((found, dataclasses.replace(found, path="ünï.mp4")))
    written = json.loads(both.to_json())
    assert [entry["path"] for entry in written["videos"]] == [str(video), "ünï.mp4"]
    assert written["bad_files"] == []


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = create_model("c3d_light", num_classes=3, num_frames=4, sampling_rate=2, width=0.125, size=32)
    checkpoint.save_model(folder / "model.safetensors", model, CLASSES, to_dict(TrainConfig(model=ModelConfig())))
    return folder


def test_a_model_is_loaded_from_a_run(video, run_folder):
    model = load_model(run_folder)
    assert model.classes == CLASSES
    found = model.predict(video)
    assert set(found.overall.labels) == set(CLASSES) and found == load_model(run_folder).predict(video)


def test_a_folder_is_predicted_to_its_end_and_bad_files_are_named(run_folder, tmp_path):
    broken = broken_files(tmp_path / "in" / "broken")
    for name in ("a.mp4", "deep/er/b.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "in" / name, moving_frames(20))
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "cover.jpg")
    (tmp_path / "in" / "notes.txt").write_text("not a video by its name")
    (tmp_path / "in" / ".hidden.mp4").write_bytes(b"")
    found = predict.run(run_folder, tmp_path / "in", video=tmp_path / "out", quiet=True, device="cpu")
    assert [Path(v.path).relative_to(tmp_path / "in").as_posix() for v in found.videos] == ["a.mp4", "deep/er/b.mp4"]
    assert {file.path for file in found.bad_files} == {str(path) for path in broken.values()}
    out = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.mp4"))
    assert out == ["a.mp4", "deep/er/b.mp4"]
    text = render(found)
    assert "6 could not be decoded" in text and "zero_byte.mp4" in text and "a.mp4" in text


def test_one_bad_file_and_an_empty_folder_are_errors(run_folder, tmp_path):
    with pytest.raises(DecodeError, match=r"missing\.mp4"):
        predict.run(run_folder, tmp_path / "missing.mp4", quiet=True)
    with pytest.raises(DataError, match="no video in"):
        predict.run(run_folder, tmp_path, quiet=True)


def render(found: Predictions) -> str:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


def test_the_table_names_the_video_and_its_windows(video):
    text = render(Predictions((predictor().predict(video),)))
    assert "day.mp4" in text and "whole video" in text and "0.00 - 0.28" in text and "bright" in text


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_the_annotated_video_shows_the_frames_and_the_scores_at_their_times(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {codec})
    stamps = [0, 40, 80, 200, 240, 280, 320, 500, 540, 580]
    source = write_video(tmp_path / "odd.mkv", steps(25, 230, length=5, height=46, width=70), stamps=stamps)
    found = VideoPrediction(
        str(source),
        Prediction(("dark", "bright"), (0.5, 0.5), 0.0, 0.6),
        (
            Prediction(("dark", "bright"), (0.9, 0.1), 0.0, 0.24),
            Prediction(("a name that is much too long for a video as small as this one", "$"), (0.6, 0.4), 0.24, 0.6),
        ),
    )
    out = tmp_path / "new" / "out.mp4"
    write_annotated(source, found, out)
    reader = VideoReader(out)
    assert reader.timestamps == pytest.approx([stamp / 1000 for stamp in stamps], abs=1e-3)
    height, width = reader.size
    assert height % 2 == width % 2 == 0 and width >= 280, "a small video is enlarged"
    frames = reader.get_frames(range(10)).float()
    above = frames[:, : height // 2].mean((1, 2, 3))
    assert above[:5].mean() == pytest.approx(25, abs=6) and above[5:].mean() == pytest.approx(230, abs=6)
    blue = frames[0, -height // 9 :, :, 2] - frames[0, -height // 9 :, :, 0] > 40  # the bars
    rows = blue.float().mean(1)
    assert rows.max() == pytest.approx(0.9, abs=0.15) and blue[-4].float().mean() == pytest.approx(0.1, abs=0.08)
    assert (frames[1] - frames[0]).abs().mean() < 3 < (frames[6] - frames[4])[-height // 9 :].abs().mean()
    assert [path.name for path in out.parent.iterdir()] == ["out.mp4"]


def test_the_annotated_video_shows_the_region_that_a_model_looks_at(tmp_path):
    source = write_video(tmp_path / "dark.mkv", steps(25, 25, length=2, height=240, width=320))
    found = VideoPrediction(str(source), Prediction((), (), 0.0, 0.1), (Prediction((), (), 0.0, 0.1),))
    for name, region in (("whole", (0.0, 0.0, 1.0, 1.0)), ("part", (0.25, 0.25, 0.75, 0.5))):
        write_annotated(source, found, tmp_path / f"{name}.mp4", region=region)
        with VideoReader(tmp_path / f"{name}.mp4") as reader:
            bright = reader.get_frames([0])[0].float().mean(-1) > 140
        rows, columns = bright[:, 100:200].all(1).nonzero().ravel(), bright[70:110].all(0).nonzero().ravel()
        if name == "whole":
            assert not bright.any()
        else:
            assert rows.tolist() == pytest.approx([60, 120], abs=1)
            assert columns.tolist() == pytest.approx([80, 239], abs=1)


def test_an_annotated_video_is_whole_or_not_there(video, tmp_path):
    found = predictor().predict(video)
    broken = broken_files(tmp_path / "broken")["broken_middle"]
    with pytest.raises(DecodeError):
        write_annotated(broken, found, tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == [tmp_path / "broken"]
    for wrong in (tmp_path / "out.avi", video):
        with pytest.raises(ConfigError, match=r"another file that ends in \.mp4"):
            write_annotated(video, found, wrong)
    assert video.stat().st_size > 0
