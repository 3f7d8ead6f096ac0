"""Training from shards: each clip exactly once an epoch, whoever reads it, from this machine or an object store."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lean3d.cli import main
from lean3d.config import AugmentConfig, DataConfig, InputSpec
from lean3d.data import shards
from lean3d.data.dataset import TrainClips
from lean3d.data.loader import TrainSampler, train_loader
from lean3d.data.manifest import read_manifest
from lean3d.data.readers import open_video
from lean3d.data_tools import prepare
from lean3d.engine import fit
from lean3d.errors import DecodeError, MissingDependencyError
from test_data_check import write_set
from tiny_runs import tiny_config

SPEC = InputSpec(num_frames=4, sampling_rate=1, size=(32, 32))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same clips as files and in shards: 24 to train on, in some five shards, 4 to validate."""
    folder = tmp_path_factory.mktemp("sets")
    root, packed, loose = write_set(folder / "clips", train=12, val=2), folder / "packed", folder / "loose"
    prepare.run(DataConfig(root=str(root)), packed, shards=True, shard_mb=0.015, workers=2, quiet=True)
    assert 4 <= len(list(packed.glob("train-*.tar"))) <= 8
    for clip in read_manifest(DataConfig(root=str(packed))).clips:
        member = shards.member_of(clip.path)
        (loose / member.name).parent.mkdir(parents=True, exist_ok=True)
        (loose / member.name).write_bytes(shards.ShardCache().read(member))
    return loose, packed


def loader(root: Path | str, *, rank: int = 0, world: int = 1, batch_size: int = 4, workers: int = 0, **data):
    config = DataConfig(root=str(root), num_workers=workers, **data)
    manifest = read_manifest(config)
    return train_loader(
        manifest.select("train"), manifest.classes, config, SPEC, AugmentConfig(),
        batch_size=batch_size, seed=3, rank=rank, world=world,
    )  # fmt: skip


def test_a_clip_in_a_shard_is_the_file_that_was_packed(sets):
    loose, packed = sets
    files, members = (read_manifest(DataConfig(root=str(root))) for root in (loose, packed))
    assert members.classes == files.classes
    named = {shards.member_of(clip.path).name: clip for clip in members.clips}
    assert sorted(named) == sorted(Path(clip.path).relative_to(loose).as_posix() for clip in files.clips)
    for clip in files.clips[::7]:
        packed_clip = named[Path(clip.path).relative_to(loose).as_posix()]
        assert (packed_clip.label, packed_clip.split) == (clip.label, clip.split)
        with open_video(packed_clip.path) as one, open_video(clip.path) as other:
            one.check()
            assert one.timestamps == other.timestamps
            assert torch.equal(one.get_frames([3, 0, 11]), other.get_frames([3, 0, 11]))


def test_webdataset_reads_the_same_shards(sets):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed (extra scale)")
    _, packed = sets
    names = sorted(str(path) for path in packed.glob("*.tar"))
    samples = list(wds.WebDataset(names, shardshuffle=False))
    told = {facts["path"]: facts for facts in (json.loads(sample["json"]) for sample in samples)}
    clips = read_manifest(DataConfig(root=str(packed))).clips
    assert len(samples) == len(told) == len(clips) == 28
    for clip in clips:
        assert told[shards.member_of(clip.path).name]["cls"] == clip.label


@pytest.mark.parametrize(("world", "batch_size"), [(1, 5), (2, 6), (4, 8)])
def test_order_of_an_epoch(world, batch_size):
    """Each clip at most once, only the rest of the division is left out; and few shards in hand."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.integers(0, 20, 1000))
    ranks = [TrainSampler(1000, batch_size, 7, rank, world, shards=numbers) for rank in range(world)]
    orders = {}
    for epoch in (0, 1):
        parts = [list(sampler.batches(epoch)) for sampler in ranks]
        seen = [index for part in parts for batch in part for _, index in batch]
        assert len(seen) == len(set(seen)) == 1000 // batch_size * batch_size
        orders[epoch] = seen
        for part in parts:
            changes = sum(
                numbers[a[1]] != numbers[b[1]]
                for batch, after in itertools.pairwise(part)
                for a, b in zip(batch, after, strict=True)
            )
            assert changes <= 20 + batch_size  # a lane opens a shard, reads all of it in its lane, opens the next
        for sampler, part in zip(ranks, parts, strict=True):
            assert list(sampler.batches(epoch, 11)) == part[11:]
    assert orders[0] != orders[1]
    one = [index for batch in TrainSampler(1000, batch_size, 7, shards=numbers).batches(0) for _, index in batch]
    steps = zip(*(sampler.batches(0) for sampler in ranks), strict=True)
    together = [index for step in steps for row in zip(*step, strict=True) for _, index in row]
    assert together == one, "the order does not depend on the number of processes"


def test_batches_from_shards_are_the_clips_of_the_same_keys(sets):
    _, packed = sets
    config = DataConfig(root=str(packed))
    manifest = read_manifest(config)
    clips = TrainClips(manifest.select("train"), manifest.classes, config, SPEC, AugmentConfig(), 3)
    seen = []
    for batch in loader(packed).batches(1):
        for clip, label, index in zip(*batch[:3], strict=True):
            sample = clips[1, int(index)]
            assert torch.equal(clip, sample.clip) and int(label) == sample.label
            seen.append(int(index))
    assert sorted(seen) == list(range(24))


NODE = """
import json, sys
import torch.distributed as dist
from test_shards import loader

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mine = loader(sys.argv[1], rank=rank, world=world, workers=2)
seen = {}
for epoch, start in ((0, 0), (1, 0), (1, 3)):
    batches = [(b.indices.tolist(), b.clips.long().sum().item(), b.labels.tolist()) for b in mine.batches(epoch, start)]
    seen[f"{epoch} from {start}"] = batches
everyones = [None] * world
dist.all_gather_object(everyones, seen)
if rank == 0:
    json.dump(everyones, open(sys.argv[2], "w"))
dist.destroy_process_group()
"""


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_nodes_of_two_loader_processes_see_each_clip_exactly_once(sets, tmp_path):
    """Two machines as their processes see them: they meet over TCP, and each has two loader workers."""
    _, packed = sets
    out = tmp_path / "seen.json"
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, str(packed), str(out)],
            env={**os.environ, **world, **path, "RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        said, _ = node.communicate(timeout=200)
        assert node.returncode == 0, said
    ranks = json.loads(out.read_text())
    assert len(ranks) == 2
    for epoch in ("0 from 0", "1 from 0"):
        counts = Counter(index for rank in ranks for indices, _, _ in rank[epoch] for index in indices)
        assert counts == Counter(range(24)), epoch
    for rank in ranks:
        assert rank["1 from 3"] == rank["1 from 0"][3:], "resumed in mid-epoch it goes on as it would have"
        assert rank["0 from 0"] != rank["1 from 0"]


def test_a_shard_cut_short_is_a_counted_skip(sets, tmp_path):
    _, packed = sets
    clips = read_manifest(DataConfig(root=str(packed))).select("train")
    victim = shards.member_of(clips[0].path).shard
    inside = sorted((m.offset, clip.path) for clip in clips if (m := shards.member_of(clip.path)).shard == victim)
    assert len(inside) >= 3
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / Path(victim).name).open("r+b") as file:
        file.truncate(inside[1][0] + 100)
    seen, bad = [], {}
    for batch in loader(tmp_path).batches(0):
        assert len(batch.clips) == 4
        seen += batch.indices.tolist()
        bad |= dict(batch.bad)
    gone = {path for _, path in inside[1:]}
    assert set(bad) == {path.replace(str(packed), str(tmp_path)) for path in gone}
    assert set(bad.values()) == {"its shard is cut short"}
    assert set(seen) == {index for index, clip in enumerate(clips) if clip.path not in gone}
    (tmp_path / Path(victim).name).unlink()
    with pytest.raises(DecodeError, match=r"its shard can't be read \(No such file or directory\)"):
        open_video(next(iter(bad)))


class Store:
    """An object store on loopback that counts what is fetched, and can fail."""

    def __init__(self, folder: Path):
        store = self
        self.asked: list[str] = []
        self.failures = 0

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self):
                store.asked.append(self.path.lstrip("/"))
                if store.failures:
                    store.failures -= 1
                    self.send_error(403)
                else:
                    super().do_GET()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def store(sets):
    pytest.importorskip("webdataset", reason="webdataset is not installed (extra scale)")
    made = Store(sets[1])
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_an_object_store_are_fetched_once_and_give_the_same_batches(sets, store, tmp_path, workers):
    _, packed = sets
    remote = {"videos": store.url, "shard_cache": str(tmp_path / "cache")}
    ours = list(loader(packed / "index.csv", workers=workers, **remote).batches(0))
    theirs = list(loader(packed).batches(0))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.clips, other.clips) and torch.equal(one.indices, other.indices)
    assert sorted(store.asked) == sorted(path.name for path in packed.glob("train-*.tar"))
    list(loader(packed / "index.csv", workers=workers, **remote).batches(1))
    assert len(store.asked) == len(set(store.asked)), "a second training finds them in the cache"


def test_the_cache_keeps_to_its_size_and_forgets_the_oldest(sets, store, tmp_path):
    _, packed = sets
    sizes = {path.name: path.stat().st_size for path in packed.glob("train-*.tar")}
    cache = shards.ShardCache(tmp_path, gigabytes=(2.5 * max(sizes.values())) / 1e9)
    clips = read_manifest(DataConfig(root=str(packed / "index.csv"), videos=store.url)).select("train")
    for clip in clips:
        assert len(cache.read(shards.member_of(clip.path))) == shards.member_of(clip.path).size
    kept = list(tmp_path.glob("*.tar"))
    assert 1 <= len(kept) < len(sizes)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".tar", ".lock")]


def test_an_object_store_that_fails_is_asked_again_and_then_named(sets, store, tmp_path, monkeypatch):
    _, packed = sets
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    clip = read_manifest(DataConfig(root=str(packed / "index.csv"), videos=store.url)).select("train")[0]
    store.failures = 2
    assert shards.ShardCache(tmp_path).read(shards.member_of(clip.path))
    assert len(store.asked) == 3
    store.failures = 3
    with pytest.raises(DecodeError, match=r"its shard can't be read .*can't be fetched"):
        shards.ShardCache(tmp_path / "other").read(shards.member_of(clip.path))


def test_without_webdataset_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(MissingDependencyError, match=r"lean3d\[scale\]"):
        shards.ShardCache(tmp_path).fetch("https://store/train-000000.tar")


def test_a_training_from_shards(sets, tmp_path):
    _, packed = sets
    run = fit(tiny_config(packed, tmp_path / "run", optim_epochs=1)).run
    assert (run / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as leaving:
        main(["eval", str(run)])
    assert leaving.value.code == 0
    results = json.loads((run / "results.json").read_text())
    assert results["metrics"]["videos"] == 4 and results["metrics"]["bad_files"] == 0
