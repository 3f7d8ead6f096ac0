"""The motion set: real videos, the same for the same seed, with nothing but motion in them."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest

from lean3d.data import synthetic
from lean3d.data.synthetic import MOTION_CLASSES, draw_motion_clip, make_motion_set
from lean3d.data.transforms import flip_labels
from lean3d.errors import ConfigError


def read(path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_set_on_disk(tmp_path):
    seen = []
    small = {"clips_per_class": 2, "test_clips_per_class": 1, "size": 48, "num_frames": 20, "seed": 5}
    root = make_motion_set(tmp_path / "set", **small, workers=2, progress=lambda *counts: seen.append(counts))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.mp4"))
    expected = [f"train/{c}/{i:05d}.mp4" for c in MOTION_CLASSES for i in range(2)]
    assert names == sorted(expected + [f"test/{c}/00000.mp4" for c in MOTION_CLASSES])
    assert not list(root.rglob("*.part"))
    assert seen == [(done, 30) for done in range(31)]
    for split, index in (("train", 1), ("test", 0)):
        frames = read(root / split / "grows" / f"{index:05d}.mp4")
        drawn = draw_motion_clip("grows", split=split, index=index, size=48, num_frames=20, seed=5)
        assert frames.shape == drawn.shape == (20, 48, 48, 3)
        assert np.abs(frames.astype(int) - drawn).mean() < 6, "the file shows what was drawn"

    kept, removed = root / names[0], root / names[-1]
    before = {path: path.read_bytes() for path in root.rglob("*.mp4")}
    age = kept.stat().st_mtime_ns
    removed.unlink()
    make_motion_set(root, **small, workers=1)
    assert kept.stat().st_mtime_ns == age, "what is there stays"
    assert {path: path.read_bytes() for path in root.rglob("*.mp4")} == before, "what was missing comes back the same"

    with pytest.raises(ConfigError, match="no motion set of these settings"):
        make_motion_set(root, **{**small, "seed": 6})
    with pytest.raises(ConfigError, match="holds more than the set"):
        make_motion_set(root, **{**small, "clips_per_class": 1})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("hello")
    with pytest.raises(ConfigError, match="not empty"):
        make_motion_set(tmp_path / "notes", **small)


def test_a_clip_is_the_same_file_whatever_the_processor_can_do(tmp_path, monkeypatch):
    small = {"clips_per_class": 1, "test_clips_per_class": 1, "size": 48, "num_frames": 16, "workers": 1}
    make_motion_set(tmp_path / "as-it-is", **small)
    for options in synthetic._QUALITY["libx264"].values():
        monkeypatch.setitem(options, "x264-params", f"{options['x264-params']}:asm=0")
    make_motion_set(tmp_path / "without-vectors", **small)
    files, others = (
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.mp4"))]
        for name in ("as-it-is", "without-vectors")
    )
    assert len(files) == 20 and files == others


def test_without_h264_the_set_is_mpeg4(tmp_path, monkeypatch):
    real = av.codec.Codec

    def without(name: str, mode: str):
        if name == "libx264":
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", without)
    frames = draw_motion_clip("turns-left", num_frames=16)
    synthetic._encode(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert np.abs(read(tmp_path / "a.mp4").astype(int) - frames).mean() < 6


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda root: make_motion_set(root, clips_per_class=-1), "clips must be at least 0"),
        (lambda root: make_motion_set(root, size=47), "size must be even"),
        (lambda root: draw_motion_clip("move-left"), "did you mean moves-left"),
        (lambda root: draw_motion_clip("grows", num_frames=8), "num_frames at least 16"),
        (lambda root: draw_motion_clip("grows", split="val"), "train or test"),
        (lambda root: draw_motion_clip("grows", difficulty="distractin"), "did you mean distracting"),
        (lambda root: make_motion_set(root, difficulty="hard"), "no difficulty is named 'hard'"),
    ],
)
def test_wrong_arguments_are_named(call, what, tmp_path):
    with pytest.raises(ConfigError, match=what):
        call(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_frames_follow_from_the_seed():
    first = draw_motion_clip("moves-up", index=3, seed=1)
    assert np.array_equal(first, draw_motion_clip("moves-up", index=3, seed=1))
    others = [{"index": 4, "seed": 1}, {"index": 3, "seed": 2}, {"index": 3, "seed": 1, "split": "test"}]
    for other in others:
        assert not np.array_equal(first, draw_motion_clip("moves-up", **other))


def test_a_flip_is_known_by_the_names():
    after = flip_labels(MOTION_CLASSES, {})
    assert after is not None
    exchanged = {MOTION_CLASSES[a]: MOTION_CLASSES[b] for a, b in enumerate(after) if a != b}
    assert exchanged == {
        "moves-left": "moves-right",
        "moves-right": "moves-left",
        "turns-left": "turns-right",
        "turns-right": "turns-left",
    }


PAIRS = [("moves-left", "moves-right"), ("moves-up", "moves-down"), ("turns-left", "turns-right"), ("grows", "shrinks")]
PAIRS += [("flash-then-hide", "hide-then-flash")]
PLAYED_BACKWARDS = dict(PAIRS) | {b: a for a, b in PAIRS}


def shape_of(frames: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centre (across, down) and area of the shape in each frame; NaN where it hides or the light flashes."""
    grey = frames.astype(float).mean(3)
    plain = np.abs(grey.mean((1, 2)) - np.median(grey.mean((1, 2)))) < 25
    background = np.median(grey[plain], 0)
    difference = np.where(plain[:, None, None], np.abs(grey - background), 0) > 25
    area = difference.sum((1, 2)).astype(float)
    area[area < 20] = np.nan
    ys, xs = np.mgrid[: frames.shape[1], : frames.shape[2]]
    return (difference * xs).sum((1, 2)) / area, (difference * ys).sum((1, 2)) / area, area


@pytest.mark.parametrize(
    ("name", "which", "sign"),
    [("moves-left", 0, -1), ("moves-right", 0, 1), ("moves-up", 1, -1), ("moves-down", 1, 1)],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_class_says_which_way_the_shape_goes(name, which, sign, split):
    for index in range(3):
        course = shape_of(draw_motion_clip(name, split=split, index=index))[which]
        early, late = np.nanmean(course[:5]), np.nanmean(course[-5:])
        assert sign * (late - early) > 4
    ends = [shape_of(draw_motion_clip("flash-then-hide", split=split, index=i))[which] for i in range(8)]
    assert abs(np.mean([np.nanmean(c[-5:]) - np.nanmean(c[:5]) for c in ends])) < 9, "elsewhere it comes back"


def test_events_come_in_the_order_of_the_name():
    random = np.random.default_rng(0)
    for order in ("fh", "hf", ""):
        for _ in range(50):
            events = synthetic._events(random, 32, order)
            assert len(events) == 32
            assert events.count("f") == events.count("h") == 6 * len(order) // 2
            short = "".join(a for a, b in zip(events, f"{events[1:]} ", strict=True) if a != b).replace(".", "")
            assert short == order


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_turn_to_the_left_is_counter_clockwise(split, monkeypatch):
    angles: list[float] = []
    real = synthetic._moved
    monkeypatch.setattr(synthetic, "_moved", lambda o, p, angle, r: angles.append(angle) or real(o, p, angle, r))
    draw_motion_clip("turns-right", split=split)
    assert np.all(np.diff(angles) >= 0)
    square = np.array([[1.0, 0.0]])
    before, after = real(square, np.zeros(2), 0.0, 1.0), real(square, np.zeros(2), 0.1, 1.0)
    assert after[0, 1] > before[0, 1], "from the right side downwards: clockwise, for y points down"


def probe(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, float]:
    """A ridge regression's accuracy on the test clips: among all classes, and between the two of the true pair."""
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-3
    train, test = ((features[split] - mean) / std for split in ("train", "test"))
    kernel = train @ train.T
    targets = np.eye(10)[labels["train"]] - 0.1
    weights = np.linalg.solve(kernel + 0.3 * np.trace(kernel) / len(train) * np.eye(len(train)), targets)
    scores, truth = test @ train.T @ weights, labels["test"]
    rows, other = np.arange(len(truth)), np.array([MOTION_CLASSES.index(PLAYED_BACKWARDS[c]) for c in MOTION_CLASSES])
    in_pair = scores[rows, truth] > scores[rows, other[truth]]
    return float((scores.argmax(1) == truth).mean()), float(in_pair.mean())


def test_only_the_order_of_frames_tells_the_two_of_a_pair_apart():
    """A linear look at a bag of frames guesses between them; the same features of each quarter in order don't."""
    bags: dict[str, np.ndarray] = {}
    orders: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for split, number in (("train", 40), ("test", 15)):
        bag, order, label = [], [], []
        for k, name in enumerate(MOTION_CLASSES):
            for index in range(number):
                frames = draw_motion_clip(name, split=split, index=index, size=32, num_frames=16)
                grey = frames.astype(np.float32).mean(3)
                away = np.abs(grey - np.median(grey, (0, 1, 2)))
                maps = away.reshape(16, 8, 4, 8, 4).mean((2, 4)).reshape(16, 64)
                whole = np.array([grey.mean((1, 2)), grey.std((1, 2))]).T
                maps = np.concatenate([maps, whole], 1)
                bag.append(np.concatenate([maps.mean(0), maps.std(0), (maps**2).mean(0)]))
                order.append(np.concatenate([part.mean(0) for part in np.array_split(maps, 4)]))
                label.append(k)
        bags[split], orders[split], labels[split] = np.array(bag), np.array(order), np.array(label)
    (bag_top1, bag_pair), (order_top1, order_pair) = probe(bags, labels), probe(orders, labels)
    assert bag_top1 < 0.45 and abs(bag_pair - 0.5) < 0.12
    assert order_top1 > bag_top1 + 0.1 and order_pair > 0.75


def test_one_way_and_there_and_back_visit_the_same_values_but_for_their_reach():
    courses = [synthetic._course(np.random.default_rng(i), 32) for i in range(300)]
    there_and_back = np.concatenate(courses)
    one_way = -np.cos(np.pi * (np.arange(32) + 0.5) / 32)
    shares = np.linspace(0.05, 0.95, 10)
    assert np.allclose(np.quantile(there_and_back, shares), np.quantile(one_way, shares), atol=0.06)


@pytest.mark.parametrize("split", ["train", "test"])
def test_shape_and_mark_stand_out(split):
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(200):
        background, shape, mark = (c @ luma for c in synthetic._colours(np.random.default_rng(seed), split, 32))
        assert abs(shape - background.mean()) > 25
        assert abs(mark - shape) > 50


def test_the_record_names_the_settings(tmp_path):
    empty = {"clips_per_class": 0, "test_clips_per_class": 0, "seed": 9}
    record = make_motion_set(tmp_path, **empty) / "motion_set.json"
    settings = json.loads(record.read_text())
    assert settings["seed"] == 9 and settings["difficulty"] == "plain"
    make_motion_set(tmp_path, **empty)
    with pytest.raises(ConfigError, match="no motion set of these settings"):
        make_motion_set(tmp_path, **empty, difficulty="degraded")
    record.write_text(json.dumps(settings | {"format": settings["format"] - 1}))
    with pytest.raises(ConfigError, match="no motion set of these settings"):
        make_motion_set(tmp_path, **empty)  # a set from before, of other pictures


@pytest.mark.parametrize("split", ["train", "test"])
def test_difficulties_add_to_the_same_motion(split):
    """Distractors lie behind the shape and move; a degraded clip is the distracting one with noise and flicker."""
    for index in range(3):
        plain, distracting, degraded = (
            draw_motion_clip("moves-left", split=split, index=index, difficulty=d).astype(int)
            for d in synthetic.DIFFICULTIES
        )
        changed = np.abs(distracting - plain).max(3) > 20
        assert 0.01 < changed.mean() < 0.2
        assert (changed[0] & ~changed[-1]).any() and (changed[-1] & ~changed[0]).any(), "they move"
        noise = degraded - distracting
        inner = (distracting > 60) & (distracting < 195)  # where nothing is clipped
        frame_means = np.array([noise[t][inner[t]].mean() for t in range(16)])
        assert 0.8 * synthetic._NOISE < np.mean([noise[t][inner[t]].std() for t in range(16)]) < 1.4 * synthetic._NOISE
        assert frame_means.std() > 3, "the light flickers"


def test_a_degraded_file_is_compressed_hard(tmp_path):
    small = {"clips_per_class": 1, "test_clips_per_class": 0, "workers": 1, "size": 48}
    for difficulty in ("plain", "degraded"):
        make_motion_set(tmp_path / difficulty, **small, difficulty=difficulty)
    drawn = draw_motion_clip("grows", size=48, difficulty="degraded")
    shown = read(tmp_path / "degraded" / "train" / "grows" / "00000.mp4")
    assert np.abs(shown.astype(int) - drawn).mean() > 6, "the file does not keep the noise"
    plain = read(tmp_path / "plain" / "train" / "grows" / "00000.mp4")
    assert np.abs(plain.astype(int) - draw_motion_clip("grows", size=48)).mean() < 6
