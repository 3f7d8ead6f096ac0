"""What a training tells: a bar in a terminal, a line an epoch elsewhere, rows in files, curves at the end."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lean3d.version import __version__

METRICS_FILE = "metrics.jsonl"

Row = dict[str, Any]
"""One line of `metrics.jsonl`: ``kind`` is "step" or "epoch"; ``step`` counts optimizer steps that were done."""


class RunLog:
    """The voice of one training. On all ranks but the first it is silent and writes nothing.

    Args:
        run: The run's folder.
        active: Whether this is the first rank.
    """

    def __init__(self, run: Path, *, active: bool = True):
        self.run = run
        self.active = active
        self.console = Console(quiet=not active)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._board: Any = None

    def open(self, step: int) -> list[Row]:
        """Begin at `step`: rows that a killed training wrote beyond it are taken out of `metrics.jsonl`.

        Returns:
            The rows that stay.
        """
        if not self.active:
            return []
        from torch.utils.tensorboard import SummaryWriter  # takes a second to load

        path = self.run / METRICS_FILE
        rows = [row for row in read_rows(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
        self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        return rows

    def close(self) -> None:
        """Give the terminal back and write out what waits."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def bar(self, title: str, total: int, done: int = 0) -> None:
        """Begin a bar of `total` steps, `done` of which are behind it."""
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def advance(self, steps: int, row: Row, seconds_left: float) -> None:
        """Move the bar on by `steps`, with the numbers of `row` beside it."""
        if self._progress is not None and self._task is not None:
            left = datetime.timedelta(seconds=round(seconds_left))
            numbers = (
                f"loss {row['loss']:.3f}  lr {row['lr']:.2g}  {row['clips_per_s']:.1f} clips/s  "
                f"waits for data {row['data_wait']:.0%}  left {left}"
            )
            self._progress.update(self._task, advance=steps, numbers=numbers)

    def write(self, row: Row) -> None:
        """Add a row to `metrics.jsonl` and its numbers to TensorBoard."""
        if not self.active:
            return
        with (self.run / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        if row["kind"] == "epoch":
            self._board.flush()


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut off is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def epoch_line(row: Row, epochs: int, *, best: bool) -> str:
    """An epoch in one line, the count of bad files beside the accuracy."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"loss {row['loss']:.4f}"]
    if "val_top1" in row:
        parts.append(f"val top-1 {row['val_top1']:.4f}" + (" (best)" if best else ""))
        if "val_top5" in row:
            parts.append(f"top-5 {row['val_top5']:.4f}")
        parts.append(f"val loss {row['val_loss']:.4f}")
    parts.append(f"{row['bad_files']} bad files")
    parts.append(f"{row['clips_per_s']:.1f} clips/s, {row['data_wait']:.0%} waiting for data")
    return "  ".join(parts)


def environment(step: int) -> Row:
    """What a run was started with: versions, the commit of lean3d where it lies in a git checkout, the command."""
    packages = ("torch", "numpy", "av", "lightning-fabric", "safetensors")
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "lean3d": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def draw_curves(rows: list[Row], path: str | Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file."""
    from matplotlib.figure import Figure  # pyplot would want a display

    epochs = [row for row in rows if row["kind"] == "epoch"]
    steps = [row for row in rows if row["kind"] == "step"]
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1) if epochs else 1.0
    curves = {
        "loss": {"training": (steps, "loss"), "validation": (epochs, "val_loss")},
        "accuracy": {"top-1": (epochs, "val_top1"), "top-5": (epochs, "val_top5")},
        "learning rate": {"": (steps, "lr")},
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for label, (source, key) in lines.items():
            points = [(row["step"] / per_epoch, row[key]) for row in source if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label or None, marker="." if len(points) < 50 else None)
        if len(axes.get_lines()) and axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def write_confusion(path: str | Path, confusion: torch.Tensor, classes: Sequence[str]) -> None:
    """Write a confusion matrix (K, K), true classes down, predicted across, as CSV."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *classes])
        writer.writerows([name, *counts] for name, counts in zip(classes, confusion.tolist(), strict=True))


def read_confusion(path: str | Path) -> tuple[torch.Tensor, list[str]]:
    """The matrix and the classes that `write_confusion` wrote."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        (_, *classes), *rows = csv.reader(file)
    return torch.tensor([[int(count) for count in row[1:]] for row in rows]), classes


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with a "+" where files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # installed into somebody else's checkout
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
