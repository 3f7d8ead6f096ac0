"""data/loader.py: what is in a batch follows from its place, whoever loads it; memory stays where it is."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from lean3d.config import AugmentConfig, DataConfig, InputSpec, ViewsConfig
from lean3d.data import loader as loaders
from lean3d.data.loader import Batch, TrainSampler
from lean3d.data.manifest import Clip
from lean3d.errors import ConfigError, DataError, TooManyBadFilesError
from video_files import broken_files, moving_frames, write_video

SPEC = InputSpec(num_frames=4, sampling_rate=2, size=(16, 24))
CLASSES = ("dark", "bright")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, ...]:
    """Eleven real files and two bad ones."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [write_video(folder / f"{i}.mp4", moving_frames(12, 32, 48, seed=i)) for i in range(11)]
    broken = broken_files(folder / "broken")
    paths += [broken["text"], broken["zero_byte"]]
    return tuple(Clip(str(path), i % 2, "train", "") for i, path in enumerate(paths))


def train_loader(clips, num_workers=0, batch_size=4, **settings) -> loaders.TrainLoader:
    return loaders.train_loader(
        clips, CLASSES, DataConfig(num_workers=num_workers), SPEC, AugmentConfig(), batch_size=batch_size, seed=3,
        **settings,
    )  # fmt: skip


def equal(one: Batch, other: Batch) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    return same and tuple(one.bad) == tuple(other.bad)


def test_an_epoch_has_every_clip_once_in_an_order_of_its_own():
    sampler = TrainSampler(num_clips=10, batch_size=3, seed=0)
    epochs = [[key for batch in sampler.batches(epoch) for key in batch] for epoch in range(2)]
    assert len(sampler) == 3
    for epoch, keys in enumerate(epochs):
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys}) == len(keys) == 9, "the last batch, which is not full, is dropped"
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert list(sampler.batches(1, start=2)) == list(sampler.batches(1))[2:]
    assert list(TrainSampler(10, 3, seed=1).batches(0)) != list(sampler.batches(0))


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_parts_are_the_batch_of_one_process(world):
    alone = TrainSampler(50, 12, seed=5)
    ranks = [TrainSampler(50, 12, seed=5, rank=rank, world=world) for rank in range(world)]
    for whole, *parts in zip(alone.batches(4), *(rank.batches(4) for rank in ranks), strict=True):
        assert {len(part) for part in parts} == {12 // world}
        assert sorted(key for part in parts for key in part) == sorted(whole)


def test_a_batch_that_can_not_be_is_refused_with_what_to_type():
    with pytest.raises(ConfigError, match=r"7 labelled clips.*one batch of 16.*--optim.batch-size 3"):
        TrainSampler(7, 16, seed=0)
    with pytest.raises(ConfigError, match=r"multiple of the number of processes \(2\), got 5.*--optim.batch-size 4"):
        TrainSampler(70, 5, seed=0, world=2)
    with pytest.raises(ConfigError, match="seed must be at least 0, got -3"):
        TrainSampler(70, 5, seed=-3)


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_start(clips):
    whole = [list(train_loader(clips).batches(epoch)) for epoch in range(2)]
    assert any(batch.bad for epoch in whole for batch in epoch), "bad files are part of what must be the same"
    for batch in whole[0]:
        assert batch.clips.shape == (4, 3, 4, 16, 24) and batch.clips.dtype == torch.uint8
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
    workers = train_loader(clips, num_workers=2)
    assert len(workers) == 3
    for epoch in range(2):
        batches = list(workers.batches(epoch))
        assert len(batches) == 3
        assert all(equal(one, other) for one, other in zip(whole[epoch], batches, strict=True))
    abandoned = workers.batches(0)
    next(abandoned)  # a pass that is left in the middle, with batches under way
    for start, fresh in [(1, workers), (2, train_loader(clips, num_workers=2)), (3, workers)]:
        rest = list(fresh.batches(1, start))
        assert all(equal(one, other) for one, other in zip(whole[1][start:], rest, strict=True))


def test_the_ranks_load_the_clips_of_one_process(clips):
    alone = next(train_loader(clips).batches(0))
    parts = [next(train_loader(clips, rank=rank, world=2).batches(0)) for rank in range(2)]
    joined = torch.stack([part.clips for part in parts], dim=1).flatten(0, 1)  # rank r has [r::2]
    assert torch.equal(joined, alone.clips)


def test_loading_leaves_the_main_process_random_state_alone(clips):
    state = torch.get_rng_state()
    for workers in (0, 2):
        next(train_loader(clips, workers).batches(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_bad_file_is_a_counted_skip(workers, clips, tmp_path):
    bad = broken_files(tmp_path).values()
    assert len(bad) >= 5
    mixed = (*clips[:11], *(Clip(str(path), 0, "train", "") for path in bad))
    whole = InputSpec(num_frames=24, sampling_rate=1, size=(16, 24))  # so that it meets damage in the middle
    loader = loaders.train_loader(
        mixed, CLASSES, DataConfig(num_workers=workers), whole, AugmentConfig(), batch_size=len(mixed), seed=0
    )
    (batch,) = loader.batches(0)
    assert {file.path for file in batch.bad} == {str(path) for path in bad}
    assert batch.clips.shape[0] == len(mixed), "every place in the batch is filled"
    assert set(batch.indices.tolist()) <= set(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_files_ends_the_training_with_a_reason(workers, clips):
    with pytest.raises(TooManyBadFilesError, match=r"^2 files .* can't be decoded; the first is .*\.mp4: "):
        list(train_loader(clips[11:], workers, batch_size=2).batches(0))


def test_a_test_has_every_video_once_in_order_and_leaves_bad_ones_out(clips):
    views = ViewsConfig(num_clips=2, num_crops=3)
    for workers in (0, 2):
        loader = loaders.test_loader(clips, DataConfig(num_workers=workers), SPEC, views, batch_size=5)
        for _ in range(2):  # and the same again
            batches = list(loader)
            assert [len(batch.clips) for batch in batches] == [5, 5, 1]
            assert batches[0].clips.shape == (5, 6, 3, 4, 16, 24)
            assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(11))
            assert torch.cat([batch.labels for batch in batches]).tolist() == [i % 2 for i in range(11)]
            assert [Path(file.path).stem for batch in batches for file in batch.bad] == ["text", "zero_byte"]


def test_a_batch_of_bad_files_alone_is_empty(clips):
    (batch,) = loaders.test_loader(clips[11:], DataConfig(num_workers=0), SPEC, ViewsConfig())
    assert batch.clips.shape == (0, 1, 3, 4, 16, 24) and len(batch.labels) == 0 and len(batch.bad) == 2


def test_the_ranks_of_a_test_share_the_videos(clips):
    parts = [
        [i for batch in loaders.test_loader(clips[:11], DataConfig(num_workers=0), SPEC, ViewsConfig(), rank=r, world=3)
         for i in batch.indices.tolist()]
        for r in range(3)
    ]  # fmt: skip
    assert parts == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


def test_many_views_make_small_batches(clips, monkeypatch):
    monkeypatch.setattr(loaders, "TEST_BATCH_BYTES", 3 * 6 * 3 * 4 * 16 * 24)
    loader = loaders.test_loader(clips, DataConfig(num_workers=0), SPEC, ViewsConfig(2, 3), batch_size=16)
    assert loader.batch_size == 3
    with pytest.raises(DataError, match="empty"):
        loaders.test_loader((), DataConfig(), SPEC, ViewsConfig())


def test_ctrl_c_is_left_to_the_trainer(clips):
    loader = train_loader(clips[:11], num_workers=2, batch_size=1)
    others = set(worker_ids())
    batches = loader.batches(0)
    next(batches)  # of the first process
    next(batches)  # of the second: before that it may not have begun to ignore the signal
    for process in set(worker_ids()) - others:
        os.kill(process, signal.SIGINT)
    assert len(list(batches)) == 9


def worker_ids() -> list[int]:
    import multiprocessing

    return [process.pid for process in multiprocessing.active_children() if process.pid]


def megabytes(process: int | str) -> tuple[float, float]:
    """Resident memory of a process, and the part that it shares with no other, to which pages copied on write add."""
    fields = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {name: int(size) / 1024 for name, size, *_ in fields}
    return sizes["Rss:"], sizes["Private_Dirty:"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_memory_does_not_grow_over_ten_epochs(clips):
    others = set(worker_ids())
    large = InputSpec(num_frames=4, sampling_rate=2, size=(64, 96))  # 74 kB a clip: to keep them would show
    loader = loaders.train_loader(
        clips * 10, CLASSES, DataConfig(num_workers=2), large, AugmentConfig(), batch_size=13, seed=0
    )
    sizes = []
    for epoch in range(12):
        for batch in loader.batches(epoch):
            assert batch.clips.shape[0] == 13
        workers = sorted(set(worker_ids()) - others)
        assert len(workers) == 2
        # The main process's own part falls and rises with what its workers share with it: only the whole counts.
        sizes.append([megabytes("self")[0], *(size for worker in workers for size in megabytes(worker))])
    for first, last in zip(sizes[1], sizes[11], strict=True):  # the first two epochs fill pools and caches
        assert last - first < 8, f"grew by {last - first:.1f} MB in ten epochs (all clips kept: over 50): {sizes}"
