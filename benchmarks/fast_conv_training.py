"""`c3d_light` trained with `FastConv3d` in place of its convolutions, and without: the same accuracy?

    python benchmarks/fast_conv_training.py [--epochs 16] [--clips 40] [--seeds 2] [--out FOLDER] [--quick]

The paper's net at a quarter of its width, and the demo's motion set, real videos that are made first. Both forms have
the same initial weights, clips, augmentation and order, so they differ in rounding alone. Prints a table and one JSON
line, and keeps the line as `fast_conv_training.json` in benchmarks/results, or in the folder that --out names. --quick:
one epoch of few clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lean3d import evaluate
from lean3d.bench import machine
from lean3d.blocks import use_fast_convs
from lean3d.config import TrainConfig
from lean3d.data.synthetic import make_motion_set
from lean3d.demo import demo_configs
from lean3d.engine import fit
from lean3d.models import VideoNet, create_model, register_model

RESULTS = Path(__file__).parent / "results"
FAST = "c3d_light_fast_convs"


@register_model(sampling_rate=2, size=112)
def c3d_light_fast_convs(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
) -> VideoNet:
    """`c3d_light` with `FastConv3d` wherever the algorithm applies."""
    model = create_model("c3d_light", **locals())
    assert use_fast_convs(model)
    return model


def train(config: TrainConfig, name: str, seed: int, folder: Path) -> dict[str, float]:
    """One training, tested at its end."""
    out = folder / f"{name}-{seed}"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=name, options={}),  # strides would leave nothing to convert
        run=dataclasses.replace(config.run, out=str(out), seed=seed, max_minutes=0.0),
    )
    begin = time.monotonic()
    fit(config)
    minutes = (time.monotonic() - begin) / 60
    results = evaluate.run(out, split="test", quiet=True)
    return {"top1": results.top1, "minutes": round(minutes, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--clips", type=int, default=40, help="of each of the ten classes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.clips, args.seeds = 1, 4, 1
    runs: dict[str, list[dict[str, float]]] = {"c3d_light": [], FAST: []}
    with tempfile.TemporaryDirectory() as folder:
        videos = make_motion_set(
            Path(folder) / "videos", clips_per_class=args.clips, test_clips_per_class=max(2, args.clips // 4)
        )
        config, _ = demo_configs(Path(folder), 60)
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, root=str(videos)),
            optim=dataclasses.replace(config.optim, epochs=args.epochs),
        )
        for seed in range(args.seeds):
            for name, found in runs.items():
                found.append(train(config, name, seed, Path(folder)))
    table = Table("net", "accuracy on the test videos", "mean", "minutes", box=None)
    for name, found in runs.items():
        tops = [run["top1"] for run in found]
        minutes = statistics.mean(run["minutes"] for run in found)
        table.add_row(name, " ".join(f"{top:.3f}" for top in tops), f"{statistics.mean(tops):.3f}", f"{minutes:.1f}")
    Console().print(table)
    line = json.dumps(
        {
            "bench": "fast_conv_training",
            "machine": machine.describe(),
            "epochs": args.epochs,
            "train_clips": 10 * args.clips,
            "runs": runs,
        }
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fast_conv_training.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
