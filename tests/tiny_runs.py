"""Small trainings on small real videos, for the tests of the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lean3d.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from video_files import moving_frames, write_video

CLASSES = ("bright", "dark")


def write_clips(root: Path, train: int = 12, val: int = 4) -> Path:
    """Class folders with `train` and `val` clips a class; one class is bright, the other dark."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                frames = moving_frames(10, 40, 48, seed=number + 100 * label + 1000 * (split == "val"))
                frames = frames // 2 + (127 if label == 0 else 0)
                write_video(folder / f"{number:02d}.mp4", frames.astype(np.uint8))
    return root


def tiny_config(root: Path, out: Path, **changes: Any) -> TrainConfig:
    """Six steps an epoch; `changes` are written as `optim_epochs=3`."""
    config = TrainConfig(
        model=ModelConfig(width=0.125, num_frames=4, size=(32, 32), sampling_rate=1, dropout=0.0),
        data=DataConfig(root=str(root), num_workers=0),
        augment=AugmentConfig(),
        optim=OptimConfig(epochs=2, batch_size=4, warmup_epochs=0.5, label_smoothing=0.0),
        run=RunConfig(out=str(out), accelerator="cpu"),
    )
    for name, value in changes.items():
        room, field = name.split("_", 1)
        config = replace(config, **{room: replace(getattr(config, room), **{field: value})})
    return config
