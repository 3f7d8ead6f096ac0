"""Run a table of the accuracy study: train what is missing, test it once, keep a line of JSON for each row.

    python benchmarks/accuracy/run.py                  # the tables, what is done, hours that are left
    python benchmarks/accuracy/run.py light            # goes on where it was stopped, with Ctrl-C or by a kill
    python benchmarks/accuracy/run.py light --minutes 30 --only 'digit/25/*'
    python benchmarks/accuracy/run.py light --seconds  # milliseconds of its nets in lean3d.fast; on a quiet machine

Several may run at once: a row is worked on by one of them. Results are in benchmarks/results/accuracy, and `tables.py`
makes docs/accuracy.md's tables of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import peers
import rows
import seconds
import torch
from ledger import ReadTwiceError
from rich.console import Console
from rich.table import Table as Shown
from studies import EPOCHS, MOVINETS, TABLES, X3D_S, Row, Table, multiplications, width_of
from tasks import VAL_SHARE, Places, default_clips

from lean3d.errors import CheckpointError, ConfigError, DataError, did_you_mean

ROOT = Path(__file__).parents[2]


def main(words: Sequence[str] | None = None, tables: dict[str, Table] = TABLES) -> int:
    """Run what is asked for.

    Returns:
        0: all rows of the table are done. 1: some are left, for another process works on them or the time is over.
    """
    args = _arguments(words)
    console = Console(highlight=False, soft_wrap=True)
    places = Places(args.clips, args.work, args.results)
    store = rows.Store(places.results)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.table is None:
        console.print(_overview(tables, store))
        return 0
    if args.table not in tables:
        raise ConfigError(f"no table {args.table!r}: {did_you_mean(args.table, tables)}")
    wanted = [row for row in tables[args.table].rows() if _matches(row, args.only)]
    if not wanted:
        raise ConfigError(
            f"no row of {args.table} fits --only {' '.join(args.only)}; rows are task/share/net/recipe/seed"
        )
    if args.seconds:
        seconds.measure(wanted, places, console=console)  # a net on each of its clips once
        return 0
    if args.list:
        results = store.read()
        for row in wanted:
            console.print(f"{'done' if rows.finished(row, results) else 'left'}  {row.name}", markup=False)
        return 0

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside a training too it ends as Ctrl-C does
    clock = threading.Timer(60 * args.minutes, lambda: os.kill(os.getpid(), signal.SIGTERM))
    clock.daemon = True
    if args.minutes:
        clock.start()
    try:
        return _run(wanted, places, store, args.device, console)
    except KeyboardInterrupt as stopped:
        console.print(f"{str(stopped) or 'stopped'}\nthe same command goes on", markup=False)
        return 1
    finally:
        clock.cancel()


def _run(wanted: list[Row], places: Places, store: rows.Store, device: str, console: Console) -> int:
    """Each row that is not done, in order. What another process works on, or what lacks a package, is passed over."""
    passed_over: dict[str, str] = {}
    for row in wanted:
        with rows.claimed(row, places) as mine:
            results = store.read()
            if rows.finished(row, results):
                continue
            if not mine:
                passed_over[row.name] = "another process works on it"
                continue
            left = [other for other in wanted if not rows.finished(other, results)]
            console.print(
                f"{row.name}: {len(wanted) - len(left)} of {len(wanted)} rows done, {len(left)} left, about "
                f"{hours(left, results):.1f} processor hours",
                markup=False,
            )
            began = time.monotonic()
            try:
                result = rows.run(row, places, accelerator=device)
            except (CheckpointError, ConfigError, DataError, ReadTwiceError) as error:
                passed_over[row.name] = str(error)
                console.print(f"{row.name}: passed over: {error}", markup=False)
                continue
            tested = f", test {result['test']['top1']:.4f}" if "test" in result else ""
            minutes = (time.monotonic() - began) / 60
            console.print(f"{row.name}: val {result['val']['top1']:.4f}{tested}, {minutes:.1f} min", markup=False)
    for name, reason in passed_over.items():
        console.print(f"not done: {name}: {reason}", markup=False)
    return 1 if passed_over else 0


def hours(left: Sequence[Row], results: dict[str, rows.Result]) -> float:
    """Processor hours that rows will take: as long, per clip, as the same net's rows took, else by its cost."""
    speeds: dict[str, list[float]] = {}
    for result in results.values():
        clips, epochs = result["clips"], len(result["val_top1_by_epoch"])
        work = epochs * (clips["train"] + clips["val"] / 3)
        speeds.setdefault(result["net"], []).append(60 * result["cpu_minutes"] / max(1.0, work))
    total = 0.0
    for row in left:
        clips = row.task.clips[0] * ((1 - VAL_SHARE) * row.share / 100 + VAL_SHARE / 3)  # a forward pass: a third
        known = speeds.get(row.net.label)
        total += EPOCHS[row.share] * clips * (statistics.median(known) if known else _seconds_a_clip(row))
    return total / 3600


def _seconds_a_clip(row: Row) -> float:
    """What a training step takes by rule of thumb: some for memory, some for multiplications."""
    if row.net.model in peers.FITTED:
        return 0.0
    net = X3D_S if row.net in MOVINETS else row.net  # about as large, and may not be there
    counted = multiplications(net.model, tuple(net.options.items()), width_of(net))
    frames = (row.net.num_frames or row.task.num_frames) / row.task.num_frames
    return row.net.scale**2 * frames * (0.015 + 0.2e-9 * counted)


def _overview(tables: dict[str, Table], store: rows.Store) -> Shown:
    results = store.read()
    shown = Shown("table", "question", "rows", "done", "processor hours left", box=None, pad_edge=False)
    for table in tables.values():
        wanted = table.rows()
        left = [row for row in wanted if not rows.finished(row, results)]
        shown.add_row(
            table.name, table.question, str(len(wanted)), str(len(wanted) - len(left)), f"{hours(left, results):.1f}"
        )
    return shown


def _matches(row: Row, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", help="which table; none: list them")
    parser.add_argument("--minutes", type=float, default=0, help="stop, and keep what is done, after so long")
    parser.add_argument("--only", nargs="+", default=[], help="patterns of task/share/net/recipe/seed")
    parser.add_argument("--threads", type=int, default=0, help="processor threads of a training")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where to train")
    parser.add_argument("--seconds", action="store_true", help="measure milliseconds that are missing, and no row")
    parser.add_argument("--list", action="store_true", help="name the rows, and run none")
    parser.add_argument("--clips", type=Path, default=default_clips(), help="the folder with grid_lips and surv_fight")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "accuracy", help="runs and generated clips")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
