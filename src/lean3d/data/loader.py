"""From data sets to batches: worker processes, the order of an epoch, and each rank's part of a batch.

A training batch has a place (epoch, step) and nothing else decides what is in it, so a run can go on at any step:

    epoch e   permutation of all clips, from (seed, e)
    step  k   permutation[k*B : (k+1)*B]              the batch over all ranks
    rank  r   permutation[k*B : (k+1)*B][r::world]    what this process loads

Clips in shards are not permuted freely, or each batch would open as many shards as it has clips. Their shards are
permuted, and the clips within each; the row that this makes is cut into B lanes of equal length, and each place in a
batch goes along its own lane. So a process has B / world shards in hand at a time, other processes have others, and
what is in a batch still depends on nothing but its place:

    row       shard 4          shard 0          shard 7          shard 2 ...
    lanes     |0 1 2 3 4 5 6 7 8|0 1 2 3 4 5 6 7 8|0 1 2 ...                   step k takes the k-th of each lane
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from lean3d.config import AugmentConfig, DataConfig, InputSpec, ViewsConfig
from lean3d.data.dataset import BadFile, Sample, TestClips, TrainClips
from lean3d.data.manifest import Clip
from lean3d.data.shards import ShardCache, is_address, shards_of
from lean3d.errors import ConfigError, DataError, TooManyBadFilesError

AHEAD = 16
"""Batches ahead of the loader's processes for which shards are fetched from an object store."""

TEST_BATCH_BYTES = 64 * 2**20
"""Pixels in one test batch; videos with many views come in smaller batches."""


class Batch(NamedTuple):
    """Clips that were loaded together.

    Attributes:
        clips: Training: uint8 (N, C, T, h, w). Test: uint8 (N, V, C, T, h, w); N may be 0 where every file was bad.
        labels: int64 (N,), -1 where there is none.
        indices: int64 (N,), places in the data set.
        bad: The files that failed.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    bad: tuple[BadFile, ...]


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """The keys `(epoch, index)` of each batch of this rank. The last clips that don't fill a batch are dropped.

    Args:
        num_clips: Labelled clips in the data set.
        batch_size: Clips in a batch over all ranks.
        seed: The run's seed, at least 0.
        rank: This process, in [0, world).
        world: Processes.
        shards: int64 (num_clips,), the number of each clip's shard; None: clips are files of their own.
        coming: Is told the indices of each batch of this rank `AHEAD` batches before it is due.

    Raises:
        ConfigError: There are fewer clips than a batch has, the ranks' parts would differ in size, or the seed is
            negative.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        shards: np.ndarray | None = None,
        coming: Callable[[np.ndarray], None] | None = None,
    ):
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"the batch size must be a positive multiple of the number of processes ({world}), got {batch_size}; "
                f"try --optim.batch-size {max(1, batch_size // world) * world}"
            )
        if seed < 0:
            raise ConfigError(f"the seed must be at least 0, got {seed}; try --run.seed {-seed}")
        if num_clips < batch_size:
            raise ConfigError(
                f"the training split has {num_clips} labelled clips, less than one batch of {batch_size}; "
                f"try --optim.batch-size {max(1, num_clips // 2 // world) * world} or more clips"
            )
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.shards = shards
        self.coming = coming
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_clips // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches(self.epoch, self.start)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The batches of `epoch` from step `start` on."""
        order = self._order(epoch)

        def mine(step: int) -> np.ndarray:
            return order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]

        due = start  # the first batch that was not announced yet
        for step in range(start, len(self)):
            while self.coming is not None and due < min(step + AHEAD + 1, len(self)):
                self.coming(mine(due))
                due += 1
            yield [(epoch, int(index)) for index in mine(step)]

    def _order(self, epoch: int) -> np.ndarray:
        """The clips of an epoch, batch after batch."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.num_clips)
        if self.shards is None:
            return order
        place = random.permutation(int(self.shards.max()) + 1)  # of each shard in the row
        row = order[np.argsort(place[self.shards[order]], kind="stable")]
        return row[: len(self) * self.batch_size].reshape(self.batch_size, len(self)).T.ravel()


class TrainLoader(DataLoader[Sample]):
    """A `DataLoader` of training batches that starts at any place; made by `train_loader`. Its length is an epoch's."""

    batch_sampler: TrainSampler

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on. To begin a pass ends one that was left in the middle.

        Raises:
            TooManyBadFilesError: A place in a batch stays empty, since a row of clips could not be decoded.
        """
        sampler = self.batch_sampler
        sampler.epoch, sampler.start = epoch, start
        batch: Batch
        for batch in self:  # type: ignore[assignment]
            # Not raised where it is found out: an error from a worker brings its traceback along as text.
            if len(batch.clips) < sampler.batch_size // sampler.world:
                path, reason = batch.bad[0]
                raise TooManyBadFilesError(
                    f"{len(set(batch.bad))} files that were tried for one batch can't be decoded; the first is "
                    f"{path}: {reason}. Look at some of the files with a video player, or, where clips are folders of "
                    "pictures, at --data.frame-template"
                )
            yield batch


def train_loader(
    clips: Sequence[Clip],
    classes: Sequence[str],
    data: DataConfig,
    spec: InputSpec,
    augment: AugmentConfig,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    whole: bool = True,
) -> TrainLoader:
    """Batches to train on.

    Args:
        clips: The training split; unlabelled clips are left out.
        classes: Names of all classes.
        data: Sampling, frame template, `num_workers`.
        spec: The clip that the model wants.
        augment: What happens to a clip.
        batch_size: Clips in a batch over all ranks.
        seed: The run's seed.
        rank: This process.
        world: Processes.
        pin_memory: Put batches where a GPU fetches them faster.
        whole: Whether clips get their appearance in the loader, see `TrainClips`.

    Returns:
        A loader whose `batches(epoch, start)` gives `Batch`es of `batch_size // world` clips. Its processes live as
        long as it does.

    Raises:
        ConfigError: See `TrainSampler`.
        DataError: No clip has a label.
    """
    dataset = TrainClips(clips, classes, data, spec, augment, seed, whole=whole)
    packed = shards_of(dataset.table.path(index) for index in range(len(dataset)))
    coming = _Fetch(dataset.shards, *packed) if packed and any(map(is_address, packed[1])) else None
    sampler = TrainSampler(
        len(dataset), batch_size, seed, rank, world, shards=packed[0] if packed else None, coming=coming
    )
    return TrainLoader(
        dataset, batch_sampler=sampler, collate_fn=_Collate(dataset.shape), **_workers(data.num_workers, pin_memory)
    )


def test_loader(
    clips: Sequence[Clip],
    data: DataConfig,
    spec: InputSpec,
    views: ViewsConfig,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """Every video once, in order, with all its views; rank r has videos r, r + world, ...

    Args:
        clips: The split to test on.
        data: Sampling, frame template, `num_workers`.
        spec: The clip that the model wants.
        views: num_clips x num_crops = V views of each video.
        batch_size: Largest number of videos in a batch; it is less where they have many views.
        rank: This process.
        world: Processes.
        pin_memory: Put batches where a GPU fetches them faster.

    Returns:
        A loader of `Batch`es with clips (N, V, C, T, h, w).

    Raises:
        DataError: There is no clip.
    """
    if not clips:
        raise DataError("there is no video to test on: the split is empty")
    dataset = TestClips(clips, data, spec, views)
    fits = max(1, TEST_BATCH_BYTES // int(np.prod(dataset.shape)))
    return DataLoader(
        dataset,
        batch_size=min(batch_size, fits),
        sampler=range(rank, len(dataset), world),
        collate_fn=_Collate(dataset.shape),
        **_workers(data.num_workers, pin_memory),
    )


test_loader.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's to pytest


class _Fetch:
    """Begins to fetch the shards of batches to come; called in the main process."""

    def __init__(self, cache: ShardCache, numbers: np.ndarray, names: Sequence[str]):
        self.cache = cache
        self.numbers = numbers
        self.names = names
        self._before: set[int] = set()

    def __call__(self, indices: np.ndarray) -> None:
        now = set(self.numbers[indices].tolist())
        self.cache.prefetch([self.names[number] for number in sorted(now - self._before)])
        self._before = now


class _Collate:
    """Joins samples and leaves bad files out; a class, so that it can be sent to a spawned process."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, samples: list[Sample]) -> Batch:
        clips = [sample.clip for sample in samples if sample.clip is not None]
        good = [sample for sample in samples if sample.clip is not None]
        return Batch(
            # In a worker it joins them in the memory that it shares with the trainer. Joined in its heap and copied
            # there by the sending thread, batches left gaps behind that others did not fit into: fifty batches' worth.
            default_collate(clips) if clips else torch.empty(0, *self.shape, dtype=torch.uint8),
            torch.tensor([sample.label for sample in good], dtype=torch.int64),
            torch.tensor([sample.index for sample in good], dtype=torch.int64),
            tuple(file for sample in samples for file in sample.bad),
        )


def _workers(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """The `DataLoader`'s arguments that say who does the work."""
    # The loader draws a number from its generator for each pass. With its own one, the main process's random state
    # does not depend on how often a pass was begun, so a resumed training draws the same dropout.
    settings: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory, "generator": torch.Generator()}
    if num_workers:
        # Forking takes 0.1 s where a fresh interpreter takes 2 s to import torch, and needs no `__main__` guard in a
        # user's script. It is safe here: workers run torch on one thread, and never touch a GPU.
        context = "fork" if sys.platform == "linux" else None
        settings |= {
            "persistent_workers": True,
            "worker_init_fn": _init_worker,
            "multiprocessing_context": context,
        }
    return settings


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # The collector writes into every object that it looks at. Those from before the fork it must leave alone, or all
    # their memory, which processes share, would be copied.
    gc.freeze()
    # Ctrl-C reaches every process of a terminal; the trainer alone decides what to do and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
