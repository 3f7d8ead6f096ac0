"""Predicting very many videos on a cluster, by Ray Data: shards or files in, Parquet out.

    sources -> list of videos -> chunks -> | actor: model, once; each video of a chunk | -> OUT/part-000000.parquet
                                           | actor ...                                 | -> OUT/part-000001.parquet

A chunk's file appears when it is whole, and a chunk whose file is there is not done again. So a worker that dies costs
its chunk, which another takes over, and a run that is killed goes on with the chunks that are missing. A video that
kills its worker twice is taken for a bad one.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lean3d import checkpoint as checkpoints
from lean3d.data.annotations import VIDEOS, find_videos
from lean3d.data.dataset import BadFile
from lean3d.data.shards import Member, member_of
from lean3d.errors import ConfigError, DataError, DecodeError, MissingDependencyError
from lean3d.predict import Predictor, load_model

SETTINGS_FILE = "batch.json"
BAD_FILE = "bad_files.csv"
STORE_BYTES = 256 * 2**20
"""Shared memory of a Ray on this machine; only lists of paths go through it, and containers may have little."""
DEATHS = 2
"""A video that so many workers died of is bad."""


@dataclass(frozen=True)
class BatchResult:
    """What `run` left.

    Attributes:
        out: The folder with the Parquet files.
        videos: Videos in them, bad ones included.
        before: Those of them that were there from an earlier run.
        bad_files: Videos that could not be decoded; they have rows, too.
    """

    out: Path
    videos: int
    before: int
    bad_files: tuple[BadFile, ...]


def run(
    checkpoint: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    top_k: int = 5,
    stride: int | None = None,
    device: str = "auto",
    fast: bool = False,
    workers: int | None = None,
    chunk: int = 64,
    quiet: bool = False,
) -> BatchResult:
    """Predict every video, on the Ray cluster that is there (`RAY_ADDRESS`), else on one of this machine's own.

    Rows have ``path``, ``ok``, ``reason``; of good videos ``label`` and ``score`` of the best class, ``labels`` and
    ``scores`` of the `top_k` best, and ``windows``: start and end in seconds, label and score of each.

    Args:
        checkpoint: A `.safetensors` file of lean3d, or a run folder; every machine must see it.
        sources: Videos, patterns of them, folders, shards (tar), their index.csv; every machine must see them.
        out: The folder to write, or one that a run with the same settings and videos began, which then goes on.
        top_k, stride, device, fast: As in `predict.run`.
        workers: Processes, each with a model; default: one for each CPU (with GPUs: each GPU) of the cluster.
        chunk: Videos in a Parquet file, at least 1; what one dead worker costs at most.
        quiet: No progress bar.

    Raises:
        MissingDependencyError: Ray Data is not installed.
        DataError: There is no video.
        ConfigError: A number is below 1, or `out` holds another run.
        CheckpointError: The checkpoint is missing or damaged.
    """
    for name, value in (("top_k", top_k), ("chunk", chunk), ("workers", workers or 1)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    _require("ray.data", "pyarrow")
    model = Path(checkpoint).absolute()
    checkpoints.load(model)  # here, where its errors have a reader
    out = Path(out).absolute()
    videos = find_sources(sources)
    settings: dict[str, Any] = {"top_k": top_k, "stride": stride, "device": device, "fast": fast}
    _claim(out, videos, {"checkpoint": str(model), "chunk": chunk, **settings})
    chunks = [videos[first : first + chunk] for first in range(0, len(videos), chunk)]
    todo = [number for number in range(len(chunks)) if not _part(out, number).is_file()]
    before = len(videos) - sum(len(chunks[number]) for number in todo)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar:
        task = bar.add_task("videos", total=len(videos), completed=before)
        bad = 0
        if todo:
            rows = [{"chunk": number, "paths": chunks[number]} for number in todo]
            for done in _map(rows, workers, {"checkpoint": str(model), "out": str(out), **settings}):
                bad += done["bad"]
                bar.update(task, advance=done["videos"], description=f"videos ({bad} bad)" if bad else "videos")
    return BatchResult(out, len(videos), before, _write_bad(out))


def find_sources(sources: Sequence[str | Path]) -> list[str]:
    """Every video that is named: files, patterns, folders, shards and their index.csv; sorted, each once.

    A folder with an index.csv is its shards; else all shards in it; else all videos at any depth.

    Raises:
        DataError: A source does not exist, or has no video.
    """
    found: set[str] = set()
    for source in map(str, sources):
        paths = [Path(source)] if Path(source).exists() else _matches(source)
        if not paths:
            raise DataError(f"there is no file, folder or pattern {source!r} with a match")
        videos = [video for path in paths for video in _videos(path.absolute())]
        if not videos:
            raise DataError(f"there is no video in {source}")
        found.update(videos)
    return sorted(found)


def _matches(pattern: str) -> list[Path]:
    root = Path(Path(pattern).anchor)
    return sorted(root.glob(str(Path(pattern).relative_to(root))))


def _videos(path: Path) -> Iterator[str]:
    if path.is_dir() and (path / "index.csv").is_file():
        path = path / "index.csv"
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or ()):
                raise DataError(f"{path} has no column path, so it is no list of videos")
            yield from (str(path.parent / row["path"]) for row in rows)
    elif path.suffix == ".tar":
        yield from _members(path)
    elif path.is_dir():
        shards = sorted(path.glob("*.tar"))
        yield from (video for shard in shards for video in _members(shard))
        yield from map(str, find_videos(path) if not shards else ())
    else:
        yield str(path)


def _members(shard: Path) -> Iterator[str]:
    """The videos in a shard that has no index, from its headers; of one that is cut short those that are whole."""
    length = shard.stat().st_size
    index = shard.parent / "index.csv"
    if index.is_file():
        members = [member for path in _videos(index) if (member := member_of(path)) and member.shard == str(shard)]
        if members:
            yield from (member.path for member in members)
            return
    try:
        with tarfile.open(shard) as archive:
            for info in archive:
                if Path(info.name).suffix.lower() in VIDEOS and info.offset_data < length:
                    yield Member(str(shard), info.offset_data, info.size, info.name).path
    except tarfile.ReadError as error:
        if "unexpected end" not in str(error):
            raise DataError(f"{shard} is no shard: {error}") from error


def _claim(out: Path, videos: Sequence[str], settings: dict[str, Any]) -> None:
    digest = hashlib.sha256("\n".join(videos).encode("utf-8", "surrogateescape")).hexdigest()
    wanted = {"format": 1, "videos": len(videos), "digest": digest, **settings}
    file = out / SETTINGS_FILE
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in wanted.items() if there.get(name) != value]
        if changed:
            raise ConfigError(
                f"{out} holds predictions with another {' and '.join(changed)}: name a new folder, or repeat what "
                f"began it ({there.get('videos')} videos with {there.get('checkpoint')})"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and nothing that batch prediction began; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _map(rows: list[dict[str, Any]], workers: int | None, settings: dict[str, Any]) -> Iterator[dict[str, int]]:
    """What the workers say of each chunk, as it is done."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    try:
        gpu = settings["device"].startswith("cuda") or (settings["device"] == "auto" and torch.cuda.is_available())
        have = ray.cluster_resources().get("GPU" if gpu else "CPU", 1)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_kwargs=settings,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or int(have), len(rows))),
            num_cpus=1,
            num_gpus=1 if gpu else None,
        )
        yield from data.iter_rows()
    finally:
        if started:
            ray.shutdown()


class Worker:
    """An actor of Ray Data: loads the model once, then predicts chunk after chunk and writes their files.

    Args:
        checkpoint: As in `run`.
        out: As in `run`.
        top_k, stride, device, fast: As in `run`.
    """

    def __init__(self, checkpoint: str, out: str, top_k: int, stride: int | None, device: str, fast: bool):
        torch.set_num_threads(1)
        self.predictor: Predictor = load_model(checkpoint, device, fast=fast)
        self.out = Path(out)
        self.top_k = top_k
        self.stride = stride

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """One chunk: ``chunk``, its number, and ``paths``; gives its number, its videos, and how many were bad."""
        number = int(batch["chunk"][0])
        rows = self._rows(number, [str(path) for path in batch["paths"][0]])
        _write(_part(self.out, number), rows)
        _now(self.out, number).unlink(missing_ok=True)
        return {"chunk": [number], "videos": [len(rows)], "bad": [sum(not row["ok"] for row in rows)]}

    def _rows(self, number: int, paths: list[str]) -> list[dict[str, Any]]:
        now = _now(self.out, number)
        now.parent.mkdir(exist_ok=True)
        deaths = now.read_text(encoding="utf-8").splitlines() if now.is_file() else []
        rows = []
        for path in paths:
            if deaths.count(path) >= DEATHS:
                rows.append(_bad_row(path, "ends the process that decodes it"))
                continue
            # Whoever takes the chunk over finds here what its predecessor died of.
            now.write_text("\n".join([*deaths, path]), encoding="utf-8")
            try:
                rows.append(self._row(path))
            except DecodeError as error:
                rows.append(_bad_row(path, error.reason))
        return rows

    def _row(self, path: str) -> dict[str, Any]:
        found = self.predictor.predict(path, top_k=self.top_k, stride=self.stride)
        best = found.overall
        windows = [{"start": c.start, "end": c.end, "label": c.labels[0], "score": c.scores[0]} for c in found.clips]
        return {
            **{"path": path, "ok": True, "reason": None, "label": best.labels[0], "score": best.scores[0]},
            **{"labels": list(best.labels), "scores": list(best.scores), "windows": windows},
        }


def _bad_row(path: str, reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"label": None, "score": None, "labels": [], "scores": [], "windows": []}
    return {"path": path, "ok": False, "reason": reason, **empty}


def _part(out: Path, number: int) -> Path:
    return out / f"part-{number:06d}.parquet"


def _now(out: Path, number: int) -> Path:
    return out / ".now" / f"{number:06d}"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    window = pa.struct(
        [("start", pa.float64()), ("end", pa.float64()), ("label", pa.string()), ("score", pa.float64())]
    )
    schema = pa.schema(
        [
            *(("path", pa.string()), ("ok", pa.bool_()), ("reason", pa.string()), ("label", pa.string())),
            *(("score", pa.float64()), ("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))),
            ("windows", pa.list_(window)),
        ]
    )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write_bad(out: Path) -> tuple[BadFile, ...]:
    """The bad files of all parts, which are written to bad_files.csv."""
    from pyarrow import parquet

    bad: list[BadFile] = []
    for part in sorted(out.glob("part-*.parquet")):
        rows = parquet.read_table(part, columns=["path", "ok", "reason"]).to_pylist()
        bad += [BadFile(row["path"], row["reason"]) for row in rows if not row["ok"]]
    with (out / BAD_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows(bad)
    return tuple(bad)


def _require(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingDependencyError("ray[data]", "scale") from error
