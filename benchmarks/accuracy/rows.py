"""One row: its training, its test, and what is kept of them.

Row -> key -> parts of the data -> fit (train, val) -> weights -> ledger -> test clips, once -> each probe -> result
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peers
import torch
from ledger import Ledger, digest
from probes import PROBES, apply
from studies import Row
from tasks import Parts, Places, content_digest, parts

from lean3d import checkpoint
from lean3d.bench import machine
from lean3d.config import TrainConfig, to_dict
from lean3d.data.loader import test_loader
from lean3d.engine import fit
from lean3d.errors import DataError
from lean3d.evaluate import Results, collect_scores, results_from_scores
from lean3d.models import cost

FORMAT = 3
"""Grows when the same settings would give other results."""
LATER = {
    "model": {"region": None},
    "augment": {"speed": 0.0, "time_shift": 0.0},
    "optim": {"teachers": [], "teachers_share": 0.5},
}
"""Settings that are younger than some results: at these values they are what there was before, and don't count."""

Result = dict[str, Any]


def key(row: Row) -> str:
    """What makes the row the row: everything that its result follows from but the files' bytes."""
    config = to_dict(row.config())
    settings = {part: config[part] for part in ("model", "augment", "optim", "init", "test")}
    for part, values in LATER.items():
        settings[part] = {k: v for k, v in settings[part].items() if k not in values or v != values[k]}
    teachers = [key(teacher) for teacher in row.teachers()]
    return digest([FORMAT, settings, asdict(row.task), row.share, row.seed, *([teachers] if teachers else [])])[:16]


@dataclass(frozen=True)
class Store:
    """The results of rows, in JSON lines by task; a row's last line counts."""

    folder: Path

    def read(self) -> dict[str, Result]:
        """All results by key."""
        found = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                found[result["key"]] = result
        return found

    def add(self, result: Result) -> None:
        """Keep a result; one write, so that two processes don't mix their lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rows-{result['task']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    @property
    def ledger(self) -> Ledger:
        """Of the readings of test clips."""
        return Ledger(self.folder / "ledger.jsonl")


def finished(row: Row, results: dict[str, Result]) -> bool:
    """Whether nothing is left to do for a row."""
    result = results.get(key(row))
    return result is not None and (not row.tested or "test" in result)


@contextlib.contextmanager
def claimed(row: Row, places: Places) -> Iterator[bool]:
    """Whether this process alone works on the row; False where another does."""
    places.work.mkdir(parents=True, exist_ok=True)
    with (places.work / f"{key(row)}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run(row: Row, places: Places, *, accelerator: str = "cpu") -> Result:
    """Train a row, or go on where it was stopped, then test it; the result is in the store.

    Raises:
        Interrupted: A signal came; called again, it goes on.
        ReadTwiceError: Its test clips were read before by other weights.
        DataError: The clips are not there, or have changed since the row began; another process trains its teacher.
        ConfigError: The net comes from a package that is not there.
        CheckpointError: What it or its teacher left when it was stopped can't be read.
    """
    store = Store(places.results)
    data = parts(row.task, row.share, row.seed, places)
    folder = places.work / key(row)
    for teacher in row.teachers():
        with claimed(teacher, places) as mine:
            if not mine:
                raise DataError(f"another process trains its teacher, {teacher.name}")
            _train(teacher, data, places, accelerator)
    spent, metrics = _train(row, data, places, accelerator)
    member = checkpoint.load(folder)
    spec = member.model.input_spec
    price = cost(member.model, (1, spec.channels, spec.num_frames, *spec.size))
    epochs = [r for r in _metrics_rows(folder) if r["kind"] == "epoch"]
    result: Result = {
        "key": key(row),
        "task": row.task.name,
        "share": row.share,
        "net": row.net.label,
        "recipe": row.trick.label,
        "seed": row.seed,
        "clips": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
        "data": content_digest([*data.train, *data.val]),
        "config": _bare(row.config()),
        "weights": price.weights,
        "macs": price.macs,
        "multiplications": price.multiplications,
        "weights_sha256": _weights_digest(member.model),
        "val": {
            "top1": round(metrics["val_top1"], 6),
            "loss": round(metrics["val_loss"], 6),
            "epoch": int(metrics["epoch"]) + 1,
        },
        "val_top1_by_epoch": [round(r["val_top1"], 4) for r in epochs],
        "minutes": round(spent.wall / 60, 2),
        "cpu_minutes": round(spent.cpu / 60, 2),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "machine": machine.describe(),
        "commit": _commit(folder),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if row.tested:
        result["test"] = _test(result, member, data, store)
    store.add(result)
    if row.tested:
        store.ledger.close_test(result["key"], result["test"])
    shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)  # optimizer's state: of no use any more
    return result


def _train(row: Row, data: Parts, places: Places, accelerator: str) -> tuple[_Spent, dict[str, float]]:
    """Fit, or go on, if it isn't done; what that took, and numbers of the epoch that was kept."""
    spent = _Spent(places.work / key(row) / "spent.json")
    with spent:
        return spent, _fit(row, data, places, accelerator)


def _fit(row: Row, data: Parts, places: Places, accelerator: str) -> dict[str, float]:
    """The list that the training gets has no test clip."""
    folder = places.work / key(row)
    table, digests, done = folder / "clips.csv", folder / "data.sha256", folder / "done.json"
    now = content_digest([*data.train, *data.val])
    if digests.is_file() and digests.read_text(encoding="utf-8") != now:
        raise DataError(f"the clips of {row.name} have changed since its training in {folder} began; remove it")
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    data.manifest("train", "val").to_csv(table)
    digests.write_text(now, encoding="utf-8")
    config = row.config()
    config = replace(
        config,
        data=replace(config.data, root=str(table), format="csv"),
        optim=replace(config.optim, teachers=tuple(str(places.work / key(teacher)) for teacher in row.teachers())),
        run=replace(config.run, out=str(folder), accelerator=accelerator),
    )
    if config.model.name in peers.FITTED:
        metrics = peers.FITTED[config.model.name](config)
    elif (folder / "config.json").is_file():
        metrics = fit(resume=folder).metrics
    else:
        metrics = fit(config).metrics
    done.write_text(json.dumps(metrics), encoding="utf-8")
    return metrics


def _test(result: Result, member: checkpoint.Checkpoint, data: Parts, store: Store) -> dict[str, Any]:
    """Read the test clips, once, and test the net on them as they are and under every probe."""
    clips = content_digest(data.test)
    store.ledger.open_test(result["key"], result["weights_sha256"], clips)
    assert member.recipe is not None
    loader = test_loader(data.test, member.recipe.data, member.model.input_spec, member.recipe.test)
    batches = list(loader)

    def scored(probe: str | None) -> Results:
        seen = (batch if probe is None else apply(PROBES[probe], batch) for batch in batches)
        return results_from_scores(collect_scores(member.model, seen, len(member.classes)), member.classes)

    plain = scored(None)
    return {
        **{name: round(value, 6) for name, value in plain.metrics().items()},
        "data": clips,
        "classes": list(plain.classes),
        "confusion": plain.confusion.tolist(),
        "probes": {name: round(scored(name).top1, 6) for name in PROBES},
    }


class _Spent:
    """Wall and processor seconds of all parts of a training; what a kill cut off is not counted."""

    def __init__(self, path: Path):
        self.path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"wall": 0.0, "cpu": 0.0}
        self.wall: float = kept["wall"]
        self.cpu: float = kept["cpu"]

    def __enter__(self) -> _Spent:
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall += time.monotonic() - self._wall
        self.cpu += _cpu_seconds() - self._cpu
        if self.path.parent.is_dir():
            self.path.write_text(json.dumps({"wall": self.wall, "cpu": self.cpu}), encoding="utf-8")


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _bare(config: TrainConfig) -> dict[str, Any]:
    """The config without the places of files."""
    plain = to_dict(config)
    return {part: plain[part] for part in ("model", "augment", "optim", "init", "test")}


def _metrics_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _commit(folder: Path) -> str | None:
    file = folder / "environment.json"
    return json.loads(file.read_text(encoding="utf-8"))[0]["commit"] if file.is_file() else None


def _weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of names and bytes of all weights; not of their file, which names folders."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
