"""data/dataset.py: a clip follows from its key alone, and bad files are replaced, named and counted."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean3d.config import WHOLE_FRAME, AugmentConfig, DataConfig, InputSpec, ViewsConfig
from lean3d.data import dataset
from lean3d.data.dataset import (
    BadFile,
    BadFileLog,
    ClipTable,
    TestClips,
    TrainClips,
    appearance_of_batch,
    decode_size,
)
from lean3d.data.manifest import Clip
from lean3d.data.readers import VideoReader
from lean3d.data.transforms import TrainTransform, _looked_at
from lean3d.errors import ConfigError, DataError, TooManyBadFilesError
from video_files import broken_files, moving_frames, write_video

SPEC = InputSpec(num_frames=8, sampling_rate=2, size=(16, 24))
CLASSES = ("dark", "bright")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, ...]:
    """Eight real files of 24 frames, four of each class."""
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for i in range(8):
        path = folder / f"ünï {i}.mp4"
        write_video(path, moving_frames(24, 32, 48, seed=i) // 4 + (20 if i < 4 else 150))
        made.append(Clip(str(path), i // 4, "train", ""))
    return tuple(made)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One bad file of each kind."""
    return {kind: str(path) for kind, path in broken_files(tmp_path_factory.mktemp("broken")).items()}


def train_clips(clips, seed=0, **data) -> TrainClips:
    return TrainClips(clips, CLASSES, DataConfig(**data), SPEC, AugmentConfig(), seed)


def test_a_training_clip_has_the_models_shape_and_its_label(clips):
    for sampling in ("dense", "segments"):
        data = train_clips(clips, sampling=sampling)
        for index in (0, 5):
            sample = data[3, index]
            assert sample.clip.dtype == torch.uint8 and sample.clip.shape == (3, 8, 16, 24)
            assert (sample.label, sample.index, sample.bad) == (index // 4, index, ())
            assert (sample.clip.float().mean() > 100) == (sample.label == 1)


def test_a_clip_follows_from_seed_epoch_and_index_alone(clips):
    data, again, other = train_clips(clips), train_clips(clips), train_clips(clips, seed=1)
    first = data[0, 2].clip
    for key in [(1, 2), (0, 3), (7, 7)]:
        data[key]
    torch.manual_seed(123)
    assert torch.equal(first, data[0, 2].clip)
    assert torch.equal(first, again[0, 2].clip)
    assert torch.equal(first, pickle.loads(pickle.dumps(data))[0, 2].clip), "also in a process that was spawned"
    assert not torch.equal(first, data[1, 2].clip)
    assert not torch.equal(first, other[0, 2].clip)


def test_looks_may_come_later_and_are_the_same(clips):
    """What a GPU does to a batch is what the loader's processes do without one."""
    augment = AugmentConfig(color_jitter=0.4, rand_augment=3, rand_augment_magnitude=9, erasing=0.5)
    whole, placed = (TrainClips(clips, CLASSES, DataConfig(), SPEC, augment, 4, whole=w) for w in (True, False))
    for epoch in range(3):
        right = torch.stack([whole[epoch, index].clip for index in range(8)])
        samples = [placed[epoch, index] for index in range(8)]
        plain = torch.stack([sample.clip for sample in samples])
        indices = torch.tensor([sample.index for sample in samples])
        kept = plain.clone()
        assert torch.equal(appearance_of_batch(plain, indices, placed.transform.appearance, 4, epoch), right)
        assert torch.equal(plain, kept) and not torch.equal(plain, right)
    assert appearance_of_batch(plain[:0], indices[:0], placed.transform.appearance, 4, 0).shape == (0, *plain.shape[1:])


def test_jitter_in_time_shows_other_frames_and_no_jitter_the_same(clips):
    def frames(**augment) -> torch.Tensor:
        still = AugmentConfig(crop="center", flip="off", color_jitter=0.0, **augment)
        data = TrainClips(clips, CLASSES, DataConfig(), SPEC, still, 0)
        return torch.stack([data[epoch, 3].clip for epoch in range(6)])

    plain = frames()
    assert torch.equal(frames(speed=0.0, time_shift=0.0), plain)
    assert not torch.equal(frames(speed=0.5), plain)
    assert not torch.equal(frames(time_shift=0.3), plain)
    with pytest.raises(ConfigError, match=r"speed must be at least 0, got -0\.5"):
        frames(speed=-0.5)


def test_grey_clips_have_one_channel(clips):
    spec = InputSpec(8, 2, (16, 24), channels=1, mean=(0.5,), std=(0.25,))
    assert TrainClips(clips, CLASSES, DataConfig(), spec, AugmentConfig(), 0)[0, 0].clip.shape == (1, 8, 16, 24)


def test_unlabelled_clips_are_left_out_of_training(clips):
    mixed = (Clip("unlabelled.mp4", -1, "train", ""), *clips)
    data = train_clips(mixed)
    assert len(data) == 8 and data[0, 0].bad == ()
    with pytest.raises(DataError, match="no labelled clip"):
        train_clips(mixed[:1])


@pytest.mark.parametrize("kind", ["zero_byte", "text", "audio_only", "truncated", "moov_less", "broken_middle"])
def test_every_kind_of_bad_file_is_named_and_replaced_by_its_class(kind, clips, broken):
    path = broken[kind]
    long = InputSpec(num_frames=24, sampling_rate=1, size=(16, 24))  # so that it meets damage in the middle
    data = TrainClips((Clip(path, 1, "train", ""), *clips), CLASSES, DataConfig(), long, AugmentConfig(), seed=0)
    shown = set()
    for epoch in range(8):
        sample = data[epoch, 0]
        assert [file.path for file in sample.bad] == [path]
        assert sample.bad[0].reason and "\n" not in sample.bad[0].reason
        assert sample.clip is not None and sample.label == 1
        shown.add(sample.index)
    assert len(shown) > 1 and shown <= {5, 6, 7, 8}, "the replacement is drawn among the good clips of the class"


def test_what_replaces_a_bad_file_does_not_depend_on_what_is_remembered(clips, broken):
    bad = [Clip(broken[kind], 0, "train", "") for kind in ("text", "zero_byte", "truncated")]
    fresh, experienced = train_clips((*bad, *clips[2:])), train_clips((*bad, *clips[2:]))
    for key in [(5, 0), (6, 1), (7, 2)]:
        experienced[key]
    for epoch in range(3):
        one, other = fresh[epoch, 0], experienced[epoch, 0]
        assert torch.equal(one.clip, other.clip) and one[1:] == other[1:]


def test_a_file_that_does_not_open_is_read_once_and_reported_every_time(clips, broken, monkeypatch):
    bad = broken["zero_byte"]
    opened = []

    def counting(path, template, **settings):
        opened.append(path)
        return VideoReader(path)

    monkeypatch.setattr(dataset, "open_video", counting)
    data = train_clips((Clip(bad, 0, "train", ""), *clips))
    assert [len(data[epoch, 0].bad) for epoch in range(4)] == [1, 1, 1, 1]
    assert opened.count(bad) == 1


def test_another_class_steps_in_where_a_class_has_no_good_clip_left(clips, broken):
    bad = [Clip(broken[kind], 0, "train", "") for kind in ("text", "zero_byte")]
    sample = train_clips((*bad, *clips[4:]))[0, 0]
    assert {file.path for file in sample.bad} == {clip.path for clip in bad}
    assert sample.label == 1 and sample.index >= 2


def test_a_place_stays_empty_where_every_file_is_bad(broken):
    kinds = ("text", "zero_byte", "audio_only")
    sample = train_clips([Clip(broken[kind], 0, "train", "") for kind in kinds])[0, 1]
    assert sample.clip is None
    assert sample.bad[0].path == broken["zero_byte"]
    assert sorted(file.path for file in sample.bad) == sorted(broken[kind] for kind in kinds), "each was tried once"


def test_test_views_are_clips_times_crops(clips):
    data = TestClips(clips, DataConfig(), SPEC, ViewsConfig(num_clips=2, num_crops=3))
    sample = data[6]
    assert sample.clip.shape == (6, 3, 8, 16, 24) == data.shape
    assert (sample.label, sample.index, sample.bad) == (1, 6, ())
    assert torch.equal(sample.clip, data[6].clip)
    assert not torch.equal(sample.clip[0], sample.clip[3]), "clips are from different times"


def test_a_bad_test_video_gives_no_clip(clips, broken):
    path = broken["audio_only"]
    data = TestClips((*clips, Clip(path, -1, "test", "")), DataConfig(), SPEC, ViewsConfig())
    for _ in range(2):
        sample = data[8]
        assert sample.clip is None and sample.label == -1
        assert sample.bad[0].path == path and "audio" in sample.bad[0].reason


def test_the_table_gives_back_what_it_was_given():
    clips = [Clip(f"päth/{'x' * i}\udcff.mp4", i - 1, "train", "") for i in range(5)]
    table = pickle.loads(pickle.dumps(ClipTable(clips)))
    assert len(table) == 5
    assert [(table.path(i), table.label(i)) for i in range(5)] == [(clip.path, clip.label) for clip in clips]


sides = st.integers(8, 2000)


@settings(max_examples=300, deadline=None)
@given(
    frame=st.tuples(sides, sides),
    target=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    region=st.sampled_from([WHOLE_FRAME, (0.25, 0.3, 0.75, 0.8), (0.0, 0.0, 1.0, 0.4)]),
    crop=st.sampled_from(["multi_scale", "random_resized", "random", "center"]),
    area=st.floats(0.1, 1.0),
    aspect=st.tuples(st.floats(0.5, 1.0), st.floats(1.0, 2.0)),
    seed=st.integers(0, 100),
)
def test_what_the_decoder_shrinks_no_crop_enlarges(frame, target, region, crop, area, aspect, seed):
    augment = AugmentConfig(crop=crop, area=(area, 1.0), aspect=aspect)
    spec = InputSpec(size=target, region=region)
    size = decode_size(frame, spec, augment)
    if size is None:
        return
    assert size[0] <= frame[0] and size[1] <= frame[1]
    assert abs(size[0] / frame[0] * frame[1] - size[1]) <= frame[1] / frame[0] + 1, "the frame keeps its shape"
    draw = TrainTransform(augment, spec, CLASSES)._draw_box
    seen = _looked_at(torch.empty(1, *size, 1), region).shape[1:3]
    _, _, height, width = draw(*seen, torch.Generator().manual_seed(seed))
    assert height >= target[0] - 1 and width >= target[1] - 1  # a pixel for rounding


def test_a_large_video_is_decoded_small_and_a_small_one_as_it_is():
    assert decode_size((1080, 1920), InputSpec(size=(112, 112))) == (112, 200)
    assert decode_size((1920, 1080), InputSpec(size=(112, 112))) == (200, 112)
    assert decode_size((120, 160), InputSpec(size=(112, 112))) is None
    multi_scale = AugmentConfig(crop="multi_scale", scales=(1.0, 0.5))
    assert decode_size((1080, 1920), InputSpec(size=(112, 112)), multi_scale) == (224, 399)
    middle = InputSpec(size=(112, 112), region=(0.25, 0.25, 0.75, 0.75))
    assert decode_size((1080, 1920), middle) == (224, 399)


def test_the_log_counts_files_and_stops_at_the_share(tmp_path):
    log = BadFileLog(num_files=40, max_share=0.05)
    log.add([BadFile("b.mp4", "the file is empty"), BadFile("a.mp4", 'odd, "quoted"')])
    log.add([BadFile("b.mp4", "the file is empty")])
    assert len(log) == 2
    log.write_csv(tmp_path / "bad_files.csv")
    with Path(tmp_path / "bad_files.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "reason", "count"],
            ["a.mp4", 'odd, "quoted"', "1"],
            ["b.mp4", "the file is empty", "2"],
        ]
    with pytest.raises(TooManyBadFilesError, match=r"3 of 40 files .* share of 5%.*--data.max-bad-share 0\.1$"):
        log.add([BadFile("c.mp4", "no video stream (audio only)")])


def test_a_file_is_opened_once_and_checked_once(clips, monkeypatch):
    opened, read = [], dataset.open_video
    monkeypatch.setattr(dataset, "open_video", lambda *args, **kw: opened.append(read(*args, **kw)) or opened[-1])
    data, unchecked = train_clips(clips[:1]), train_clips(clips[:1], check_files=False)
    checks, whole = [], VideoReader.check
    monkeypatch.setattr(VideoReader, "check", lambda reader: checks.append(reader.path) or whole(reader))
    for epoch in range(3):
        assert torch.equal(data[epoch, 0].clip, unchecked[epoch, 0].clip)
    assert len(opened) == 6 and checks == [clips[0].path]


def test_kept_frames_are_the_decoded_ones_and_no_file_is_opened_again(clips, monkeypatch):
    height, width = decode_size((32, 48), SPEC, AugmentConfig()) or (32, 48)
    video = 24 * height * width * 3  # bytes of one
    plain, kept = train_clips(clips), train_clips(clips, cache_gb=3.5 * video / 1e9)
    opened: list[str] = []
    open_video = dataset.open_video

    def counted(path, *args, **more):
        opened.append(path)
        return open_video(path, *args, **more)

    monkeypatch.setattr(dataset, "open_video", counted)
    for epoch in range(3):
        for index in range(len(clips)):
            wanted = plain[epoch, index]
            opened.clear()
            found = kept[epoch, index]
            assert torch.equal(found.clip, wanted.clip) and found.label == wanted.label
            assert bool(opened) == (epoch == 0 or index >= 3), "three videos fit"
    views = ViewsConfig(num_clips=2, num_crops=3)
    tests = [TestClips(clips, DataConfig(cache_gb=gb), SPEC, views) for gb in (0.0, 1.0)]
    for _ in range(2):
        assert all(torch.equal(tests[0][i].clip, tests[1][i].clip) for i in range(len(clips)))
    opened.clear()
    assert tests[1][0].clip is not None and not opened


def test_damage_outside_the_drawn_clip_is_found_too(clips, tmp_path):
    path = tmp_path / "late.mp4"
    write_video(path, moving_frames(240, 32, 48), options={"g": "12"}, index_first=True)
    content = bytearray(path.read_bytes())
    content[-len(content) // 20 : -len(content) // 40] = bytes(len(content) // 20 - len(content) // 40)
    path.write_bytes(content)
    damaged = Clip(str(path), 0, "train", "")
    touched = train_clips([damaged, *clips], check_files=False)
    assert any(touched[epoch, 0].bad == () for epoch in range(5)), "most clips are drawn before the damage"
    whole = train_clips([damaged, *clips])
    assert all(whole[epoch, 0].bad[0].path == str(path) for epoch in range(5))
    views = TestClips([damaged], DataConfig(), SPEC, ViewsConfig())
    assert views[0].clip is None and views[0].bad
