"""evaluate.py: accuracies counted by hand, views averaged, parts joined, and a test that can be repeated."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lean3d import checkpoint, evaluate
from lean3d.config import DataConfig, InputSpec, ModelConfig, TrainConfig, ViewsConfig, to_dict
from lean3d.data.dataset import BadFile, BadFileLog
from lean3d.data.loader import Batch
from lean3d.errors import ConfigError, DataError, TooManyBadFilesError, TrainingError
from lean3d.evaluate import Scores, collect_scores, draw_confusion, results_from_scores
from lean3d.models import create_model
from lean3d.report import write_report
from video_files import broken_files, moving_frames, write_video

CLASSES = ("a", "b", "c")


class Table(torch.nn.Module):
    """A model that looks its logits up in a table, by the value of a clip's pixels."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.input_spec = InputSpec(num_frames=1, size=(2, 2), channels=1, mean=(0.0,), std=(1.0,))
        self.logits = logits
        self.frozen = torch.nn.BatchNorm3d(1).eval()
        self.seen: list[int] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(len(clips))
        return self.logits[(clips[:, 0, 0, 0, 0] * 255).round().long()]


def batch(values: list[list[int]], labels: list[int], first: int = 0, bad: tuple[BadFile, ...] = ()) -> Batch:
    """Videos whose views have these pixels."""
    views = torch.tensor(values, dtype=torch.uint8)[..., None, None, None, None].expand(-1, -1, 1, 1, 2, 2)
    return Batch(views, torch.tensor(labels), torch.arange(first, first + len(labels)), bad)


def test_accuracies_equal_those_counted_by_hand():
    probabilities = torch.tensor(
        [
            [0.7, 0.2, 0.1],  # a, right
            [0.6, 0.3, 0.1],  # a, right
            [0.1, 0.5, 0.4],  # a, wrong: b
            [0.2, 0.3, 0.5],  # a, wrong: c
            [0.1, 0.8, 0.1],  # b, right
            [0.9, 0.0, 0.1],  # not labelled: no part in anything
        ]
    )
    scores = Scores(torch.arange(6), torch.tensor([0, 0, 0, 0, 1, -1]), probabilities, (BadFile("x.mp4", "empty"),))
    results = results_from_scores(scores, CLASSES)
    assert results.top1 == pytest.approx(3 / 5)
    assert results.per_class == (0.5, 1.0, None)
    assert results.mean_class_accuracy == pytest.approx(0.75), "over the classes that have a video"
    assert results.confusion.tolist() == [[2, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert results.loss == pytest.approx(-np.log([0.7, 0.6, 0.1, 0.2, 0.8]).mean())
    assert results.num_videos == 5 and results.top5 is None
    assert results.metrics()["bad_files"] == 1 and "top5" not in results.metrics()
    assert str(results) == "top-1 0.6000, mean class 0.7500, 5 videos; 1 could not be decoded"


def test_top_5_counts_the_five_highest():
    ranks = torch.arange(7, 0, -1.0).softmax(0)  # class 0 first, class 6 last
    scores = Scores(torch.arange(4), torch.tensor([0, 4, 5, 6]), ranks.expand(4, 7))
    results = results_from_scores(scores, [f"class {i}" for i in range(7)])
    assert (results.top1, results.top5) == (0.25, 0.5)


def test_the_views_of_a_video_are_averaged_as_probabilities():
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    model = Table(logits)
    scores = collect_scores(model, [batch([[0, 1], [1, 1], [2, 1]], [0, 1, 2])], 3)
    softmax = logits.softmax(1)
    expected = torch.stack([(softmax[a] + softmax[b]) / 2 for a, b in [(0, 1), (1, 1), (2, 1)]])
    torch.testing.assert_close(scores.probabilities, expected)


def test_many_views_go_through_the_model_in_parts():
    model = Table(torch.eye(3))
    scores = collect_scores(model, [batch([[0] * 30, [1] * 30], [0, 1])], 3, clips_at_once=16)
    assert model.seen == [16, 16, 16, 12]
    assert scores.probabilities.argmax(1).tolist() == [0, 1]


def test_modules_are_left_in_the_modes_they_came_in():
    model = Table(torch.eye(3)).train()
    model.frozen.eval()
    evaluate.evaluate(model, [batch([[0]], [0])], CLASSES)
    assert model.training and not model.frozen.training


def test_batches_without_a_good_file_and_parts_without_a_video_are_harmless():
    bad = BadFile("x.mp4", "empty")
    model = Table(torch.eye(3))
    nothing = batch([[0]], [0])
    nothing = Batch(nothing.clips[:0], nothing.labels[:0], nothing.indices[:0], (bad,))
    full = collect_scores(model, [nothing, batch([[1]], [1], first=4)], 3)
    assert full.indices.tolist() == [4] and full.bad == (bad,)
    merged = Scores.merge([collect_scores(model, [], 3), full])
    assert torch.equal(merged.probabilities, full.probabilities)
    with pytest.raises(DataError, match="nothing to count: of 1 videos 1 can't be decoded"):
        results_from_scores(collect_scores(model, [nothing], 3), CLASSES)


def test_the_parts_of_several_processes_give_the_result_of_one():
    generator = torch.Generator().manual_seed(0)
    whole = Scores(
        torch.arange(7),
        torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        torch.rand(7, 3, generator=generator).softmax(1),
        (BadFile("x.mp4", "empty"),),
    )
    parts = [Scores(*(tensor[r::2] for tensor in (whole.indices, whole.labels, whole.probabilities)), whole.bad)
             for r in range(2)]  # fmt: skip
    repeated = Scores(whole.indices[:2], whole.labels[:2], whole.probabilities[:2])
    merged = Scores.merge([parts[1], parts[0], repeated])
    assert torch.equal(merged.indices, whole.indices) and torch.equal(merged.labels, whole.labels)
    assert torch.equal(merged.probabilities, whole.probabilities)
    assert merged.bad == whole.bad
    assert results_from_scores(merged, CLASSES).metrics() == results_from_scores(whole, CLASSES).metrics()


def test_an_ensemble_is_the_mean_of_the_scores_of_videos_that_all_have():
    first = Scores(
        torch.tensor([0, 1, 3]),
        torch.tensor([0, 1, 2]),
        torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.0, 0.4, 0.6]]),
    )
    second = Scores(
        torch.tensor([3, 2, 1]),
        torch.tensor([2, 0, 1]),
        torch.tensor([[0.2, 0.6, 0.2], [1.0, 0.0, 0.0], [0.1, 0.9, 0.0]]),
        (BadFile("0.mp4", "empty"),),
    )
    mean = Scores.average([first, second])
    assert mean.indices.tolist() == [1, 3] and mean.labels.tolist() == [1, 2]
    torch.testing.assert_close(mean.probabilities, torch.tensor([[0.3, 0.6, 0.1], [0.1, 0.5, 0.4]]))
    assert mean.bad == second.bad
    assert results_from_scores(mean, CLASSES).top1 == 0.5


def test_scores_that_are_not_numbers_are_an_error():
    with pytest.raises(TrainingError, match="not finite"):
        evaluate.evaluate(Table(torch.tensor([[float("nan"), 0.0, 0.0]])), [batch([[0]], [0])], CLASSES)


def test_too_many_bad_files_stop_a_test_at_once():
    bad = [batch([[0]], [0], first=i, bad=(BadFile(f"{i}.mp4", "empty"),)) for i in range(3)]
    model = Table(torch.eye(3))
    with pytest.raises(TooManyBadFilesError, match="1 of 10 files"):
        collect_scores(model, bad, 3, bad_files=BadFileLog(10, 0.05))
    assert model.seen == []


@pytest.mark.parametrize("count", [2, 20, 200])
def test_the_picture_of_the_confusions_has_room_for_every_class(count, tmp_path):
    confusion = torch.eye(count, dtype=torch.int64) * 7
    confusion[0, 1] = 3
    draw_confusion(tmp_path / "confusion.png", confusion, [f"a class with $a long name {i}" for i in range(count)])
    picture = np.asarray(Image.open(tmp_path / "confusion.png").convert("L"))
    assert picture.std() > 5, "not a plain sheet"
    assert 400 < picture.shape[0] < 4000 and 400 < picture.shape[1] < 4000


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in two splits; one file of the test split can't be decoded."""
    root = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 2), ("test", 3)):
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                write_video(root / split / label / f"{i}.mp4", moving_frames(12, 40, 48, seed=i))
    broken_files(root / "bad")["zero_byte"].rename(root / "test" / "b" / "zero.mp4")
    for file in (root / "bad").iterdir():
        file.unlink()
    (root / "bad").rmdir()
    return root


@pytest.fixture(scope="module")
def run_folder(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = create_model("c3d_light", num_classes=4, num_frames=4, sampling_rate=2, width=0.125, size=32)
    recipe = TrainConfig(
        model=ModelConfig(name="c3d_light", num_frames=4, width=0.125),
        data=DataConfig(root=str(videos), max_bad_share=0.2, num_workers=0),
        test=ViewsConfig(num_clips=2, num_crops=1),
    )
    checkpoint.save_model(folder / "model.safetensors", model, ("c", "b", "a", "never seen"), to_dict(recipe))
    return folder


def test_eval_writes_down_all_that_repeats_it(videos, run_folder, tmp_path):
    results = evaluate.run(run_folder, out=tmp_path, quiet=True, device="cpu", command="lean3d eval run")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["metrics"] == results.metrics() and written["metrics"]["videos"] == 9
    assert written["command"] == "lean3d eval run"
    file = run_folder / "model.safetensors"
    assert written["checkpoint"]["path"] == str(file)
    assert written["checkpoint"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert written["checkpoint"]["model"]["name"] == "c3d_light"
    assert written["data"]["split"] == "test" and written["data"]["config"]["root"] == str(videos)
    assert len(written["data"]["digest"]) == 64
    assert written["views"] == {"num_clips": 2, "num_crops": 1, "crop_area": 1.0}
    assert {"lean3d", "python", "torch", "av"} <= set(written["versions"])
    assert written["bad_files"] == [{"path": str(videos / "test/b/zero.mp4"), "reason": "the file is empty"}]
    assert len(written["videos"]) == 9
    for video in written["videos"]:
        assert Path(video["path"]).parent.name == video["label"], "labels go by name: the model has another order"
        scores = [entry["score"] for entry in video["top"]]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-4)
    hits = sum(video["top"][0]["label"] == video["label"] for video in written["videos"])
    assert written["metrics"]["top1"] == pytest.approx(hits / 9)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert (tmp_path / "per_class.csv").read_text().splitlines()[0] == "class,videos,accuracy"
    assert evaluate.run(run_folder, out=tmp_path, quiet=True, device="cpu").metrics() == results.metrics()


def test_eval_of_a_compiled_model_gives_the_same_scores(videos, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAN3D_CACHE", str(tmp_path / "cache"))
    plain = evaluate.run(run_folder, out=tmp_path / "plain", quiet=True, device="cpu")
    fast = evaluate.run(run_folder, out=tmp_path / "fast", quiet=True, fast=True)
    torch.testing.assert_close(fast.scores.probabilities, plain.scores.probabilities, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "fast/results.json").read_text())["fast"] is True
    assert list((tmp_path / "cache").glob("*.json"))
    with pytest.raises(ConfigError, match="fast computes in fp32, got precision bf16"):
        evaluate.run(run_folder, out=tmp_path, quiet=True, fast=True, precision="bf16")


def test_eval_takes_other_data_splits_and_views(videos, run_folder, tmp_path):
    options = {"out": tmp_path, "quiet": True, "device": "cpu"}
    train = evaluate.run(run_folder, split="train", views=ViewsConfig(1, 3), **options)
    assert len(train.scores.indices) < 9 and not train.bad
    flat = evaluate.run(run_folder, data={"root": str(videos / "test")}, split="all", **options)
    assert flat.num_videos == 9
    assert json.loads((tmp_path / "results.json").read_text())["data"]["config"]["root"] == str(videos / "test")
    with pytest.raises(ConfigError, match=r"data\.rot.*root"):
        evaluate.run(run_folder, data={"rot": "x"}, **options)
    with pytest.raises(TooManyBadFilesError, match="1 of 10 files"):
        evaluate.run(run_folder, data={"max_bad_share": 0.01}, **options)


def test_eval_refuses_classes_that_the_model_does_not_know(run_folder, tmp_path):
    for label in ("a", "unknown"):
        (tmp_path / "data" / label).mkdir(parents=True)
        write_video(tmp_path / "data" / label / "1.mp4", moving_frames(8, 40, 48))
    with pytest.raises(DataError, match="no class unknown"):
        evaluate.run(run_folder, data={"root": str(tmp_path / "data")}, split="all", out=tmp_path, quiet=True)


@pytest.fixture(scope="module")
def other_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another net for longer and larger clips, whose classes come in another order."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    model = create_model("c2d_r18", num_classes=4, num_frames=6, sampling_rate=1, width=0.125, size=40)
    return checkpoint.save_model(folder / "model.safetensors", model, ("a", "b", "never seen", "c"), {})


def test_an_ensemble_averages_checkpoints_with_clips_of_their_own(run_folder, other_run, tmp_path):
    options = {"out": tmp_path, "quiet": True, "device": "cpu"}
    first = evaluate.run(run_folder, **options)
    data = json.loads((tmp_path / "results.json").read_text())["data"]["config"]
    second = evaluate.run(other_run, data=data, views=ViewsConfig(2, 1), **options)
    both = evaluate.run(run_folder, [other_run], **options)
    columns = [second.classes.index(name) for name in first.classes]
    expected = (first.scores.probabilities + second.scores.probabilities[:, columns]) / 2
    torch.testing.assert_close(both.scores.probabilities, expected)
    assert both.num_videos == 9 and both.bad == first.bad
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["metrics"] == both.metrics()
    assert [member["path"] for member in written["ensemble"]] == [
        str(run_folder / "model.safetensors"),
        str(other_run),
    ]
    assert [member["model"]["arguments"]["num_frames"] for member in written["ensemble"]] == [4, 6]
    own = [member["metrics"]["top1"] for member in written["ensemble"]]
    assert own == [pytest.approx(first.top1), pytest.approx(second.top1)]
    page = write_report(tmp_path).read_text()
    assert "c3d_light (width 0.125) + c2d_r18 (width 0.125)" in page
    assert all(member["sha256"][:16] in page for member in written["ensemble"])


def test_results_of_an_ensemble_leave_those_of_its_first_model_alone(run_folder, other_run):
    evaluate.run(run_folder, [other_run], quiet=True, device="cpu")
    assert (run_folder / "ensemble" / "results.json").is_file() and not (run_folder / "results.json").exists()


def test_an_ensemble_of_other_classes_is_refused(run_folder, tmp_path):
    model = create_model("c2d_r18", num_classes=2, num_frames=4, width=0.125, size=32)
    file = checkpoint.save_model(tmp_path / "other.safetensors", model, ("a", "dog"), {})
    with pytest.raises(ConfigError, match=r"same classes.*other\.safetensors lacks c, b, never seen and has dog"):
        evaluate.run(run_folder, [file], quiet=True, out=tmp_path)
