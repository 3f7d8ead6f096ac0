"""The whole way once, in minutes: videos in which only the motion tells the class, a light net that sees motion, a 2D
net of equal width that does not, a test of both, a prediction, a report.

    make_motion_set -> fit, fit -> evaluate, evaluate -> predict -> report
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lean3d import evaluate, predict
from lean3d.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ViewsConfig,
    from_json,
)
from lean3d.data.synthetic import MOTION_CLASSES, make_motion_set
from lean3d.engine import fit
from lean3d.errors import ConfigError
from lean3d.report import write_report

SHOWN = "turns-right/00000.mp4"
"""The test clip that is predicted."""


@dataclass(frozen=True)
class DemoResult:
    """What came of a demo.

    Attributes:
        light: Top-1 of the light net on the test clips, in [0, 1].
        flat: Top-1 of the 2D net.
        report: The HTML page.
        video: The predicted clip with its classes drawn on.
    """

    light: float
    flat: float
    report: Path
    video: Path


def demo_configs(out: Path, minutes: float) -> tuple[TrainConfig, TrainConfig]:
    """The two trainings: a light net, and C2D of equal width in a third of the time.

    Args:
        out: The demo's folder; videos are in ``videos``, runs in ``light`` and ``flat``.
        minutes: Longest time of the light net's training.
    """
    light = TrainConfig(
        recipe="demo",
        model=ModelConfig(
            name="c3d_light",
            num_frames=16,
            sampling_rate=1,
            size=(48, 48),
            width=0.25,
            dropout=0.1,
            options={"stem": "conv", "expansion": 1.0, "layers": 5, "shrink": "stride"},
        ),
        # Nothing is held back: validation clips have the training's shapes and would pick an epoch by chance.
        data=DataConfig(root=str(out / "videos"), val_share=0.0, num_workers=1),
        augment=AugmentConfig(area=(0.75, 1.0), aspect=(0.9, 1.1), color_jitter=0.2),
        optim=OptimConfig(
            lr=3e-3, weight_decay=0.02, epochs=24, batch_size=16, warmup_epochs=1.0, label_smoothing=0.0, ema=0.98
        ),
        test=ViewsConfig(crop_area=0.85),
        run=RunConfig(out=str(out / "light"), max_minutes=minutes, accelerator="cpu"),
    )
    flat = dataclasses.replace(
        light,
        model=dataclasses.replace(light.model, name="c2d_r18", options={}),
        run=dataclasses.replace(light.run, out=str(out / "flat"), max_minutes=minutes / 3),
    )
    return light, flat


def run(
    out: str | Path, *, minutes: float = 3.0, clips_per_class: int = 80, console: Console | None = None
) -> DemoResult:
    """Run the demo. Videos that are there already are used again, and a training that was stopped goes on.

    Args:
        out: The demo's folder, new or of an earlier demo.
        minutes: Longest time of the light net's training; the 2D net gets a third.
        clips_per_class: Training videos of each of the ten classes; a quarter as many are made to test on.
        console: Where to tell what happens; default: the standard output.

    Raises:
        ConfigError: `minutes` or `clips_per_class` is too small, or the folder holds other things.
    """
    if minutes <= 0 or clips_per_class < 4:
        raise ConfigError(
            f"a demo needs minutes above 0 and at least 4 clips a class, got {minutes}, {clips_per_class}"
        )
    console = console or Console(highlight=False)
    began = time.monotonic()
    out = Path(out)
    light, flat = demo_configs(out, minutes)

    _step(console, 1, f"making videos of {len(MOTION_CLASSES)} motions; test shapes, colours and speeds are new ones")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("videos")
        videos = make_motion_set(
            out / "videos",
            clips_per_class=clips_per_class,
            test_clips_per_class=max(2, clips_per_class // 4),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _step(console, 2, f"training a light 3D net, {light.model.name}, for at most {minutes:g} minutes")
    _train(light, console)
    _step(console, 3, f"training a 2D net of equal width, {flat.model.name}, for at most {minutes / 3:.2g} minutes")
    _train(flat, console)
    _step(console, 4, "testing both on videos they have never seen")
    results = [evaluate.run(config.run.out, split="test") for config in (light, flat)]
    _step(console, 5, "predicting a clip and writing the report")
    video = out / "prediction.mp4"
    clip = videos / "test" / SHOWN
    best = predict.run(light.run.out, clip, video=video, quiet=True).videos[0].overall
    page = write_report(light.run.out, out / "report.html", compare=[flat.run.out])

    done = DemoResult(results[0].top1, results[1].top1, page, video)
    _sum_up(console, done, light, flat, f"{clip} shows {best.labels[0]} ({best.scores[0]:.2f})")
    console.print(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all.", style="dim")
    return done


def _step(console: Console, number: int, what: str) -> None:
    console.print(Text(f"\n[{number}/5] ", style="bold cyan") + Text(what, style="bold"))


def _train(config: TrainConfig, console: Console) -> None:
    """Train, or go on with the same training where an earlier demo left it."""
    folder = Path(config.run.out)
    before = folder / "config.json"
    if not before.is_file():
        fit(config)
        return
    old = from_json(TrainConfig, before.read_text(encoding="utf-8"))
    if old.recipe != config.recipe:
        raise ConfigError(f"{folder} holds another run (recipe {old.recipe}); name a new folder with --out")
    if old == config:
        console.print(f"{folder} is there from an earlier demo and goes on; remove it to start anew", style="dim")
        fit(resume=folder)
    else:
        shutil.rmtree(folder)
        fit(config)


def _sum_up(console: Console, done: DemoResult, light: TrainConfig, flat: TrainConfig, predicted: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    table.add_row(light.model.name, f"{done.light:.1%}", "a light 3D net: it sees motion")
    table.add_row(flat.model.name, f"{done.flat:.1%}", "a 2D net of equal width: it can't see the order of frames")
    table.add_row("chance", f"{1 / len(MOTION_CLASSES):.1%}")
    console.print()
    console.print(table)
    model = shlex.quote(light.run.out)
    console.print(
        f"\nprediction  {predicted}\n            {done.video}\nreport      {done.report}\n\n"
        f"What this net sees in another clip:\n  lean3d predict {model} VIDEO\n"
        "Train on your own videos, a folder that has a folder of clips for each class:\n"
        "  lean3d train FOLDER --dry-run\n  lean3d train FOLDER",
        soft_wrap=True,
        markup=False,
    )
