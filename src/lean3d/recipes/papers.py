"""The published runs of SmallBigNet (arXiv 2006.14582), its studies, and runs on the data sets of both papers.

What SmallBigNet's published code says: SGD with momentum 0.9, weight decay 1e-4, a learning rate of 0.01 that falls
along a cosine over 100 epochs, batches of 64, multi-scale crops, ImageNet's 2D weights to start from; tests with 10
clips x 3 crops on Kinetics and 2 x 3 on Something-Something. What differs here: SGD is Nesterov's and norms are not
decayed, as everywhere in lean3d, and crops of a test are as large as those of a training (the paper's: 256).

The 2D weights are yours to bring: `--init.weights resnet50.pth`, torchvision's or timm's.

Where the papers are silent (16 and 32 frames; UCF101, HMDB51, Jester; everything about the light nets' training) the
settings are ours, and the recipe says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lean3d.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig, ViewsConfig
from lean3d.errors import ConfigError, did_you_mean
from lean3d.recipes import register_recipe

Format = Literal["kinetics", "something", "ucf101", "hmdb51", "jester"]

_SGD = OptimConfig(
    name="sgd",
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    epochs=100,
    batch_size=64,
    warmup_epochs=0.0,
    clip_norm=0.0,
    label_smoothing=0.0,
)


def _dense(model: str, data: Format, *, num_frames: int = 8, sampling_rate: int = 8) -> TrainConfig:
    """Frames at a fixed distance, flips, 10 clips x 3 crops: as on Kinetics."""
    return TrainConfig(
        model=ModelConfig(name=model, num_frames=num_frames, sampling_rate=sampling_rate),
        data=DataConfig(format=data, sampling="dense"),
        augment=AugmentConfig(crop="multi_scale", flip="on", color_jitter=0.0),
        optim=_SGD,
        test=ViewsConfig(num_clips=10, num_crops=3),
    )


def _segments(model: str, data: Format, *, num_frames: int = 8) -> TrainConfig:
    """One frame from each of as many segments, no flips, 2 clips x 3 crops: as on Something-Something."""
    return TrainConfig(
        model=ModelConfig(name=model, num_frames=num_frames),
        data=DataConfig(format=data, sampling="segments"),
        augment=AugmentConfig(crop="multi_scale", flip="off", color_jitter=0.0),
        optim=_SGD,
        test=ViewsConfig(num_clips=2, num_crops=3),
    )


def _fine_tuned(config: TrainConfig) -> TrainConfig:
    """A tenth of the learning rate and half of the epochs, for nets that start from a training on Kinetics."""
    return replace(config, optim=replace(config.optim, lr=0.001, epochs=50))


@register_recipe
def k400_c2d_r50() -> TrainConfig:
    """Kinetics-400: C2D-50, SmallBigNet's 2D baseline. Bring --init.weights."""
    return _dense("c2d_r50", "kinetics")


@register_recipe
def k400_slow_r50() -> TrainConfig:
    """Kinetics-400: SlowOnly-50, SmallBigNet's 3D baseline. Bring --init.weights."""
    return _dense("slow_r50", "kinetics")


@register_recipe
def k400_slow_r50_extra() -> TrainConfig:
    """Kinetics-400: SlowOnly-50 with SmallBigNet's attention. Bring --init.weights."""
    return _dense("slow_r50_extra", "kinetics")


@register_recipe
def k400_smallbig23() -> TrainConfig:
    """Kinetics-400: SmallBig-23, 8 frames 8 apart. No 2D weights of that depth are published."""
    return _dense("smallbig23", "kinetics")


@register_recipe
def k400_smallbig50() -> TrainConfig:
    """Kinetics-400: SmallBig-50, 8 frames 8 apart. Bring --init.weights."""
    return _dense("smallbig50", "kinetics")


@register_recipe
def k400_smallbig50_16f() -> TrainConfig:
    """Kinetics-400: SmallBig-50, 16 frames; 4 apart, our choice, which keeps the 64 frames that 8 span."""
    return _dense("smallbig50", "kinetics", num_frames=16, sampling_rate=4)


@register_recipe
def k400_smallbig50_extra() -> TrainConfig:
    """Kinetics-400: SmallBig-50 with the attention, 8 frames 8 apart. Bring --init.weights."""
    return _dense("smallbig50_extra", "kinetics")


@register_recipe
def k400_smallbig101() -> TrainConfig:
    """Kinetics-400: SmallBig-101, 8 frames 8 apart. Bring --init.weights."""
    return _dense("smallbig101", "kinetics")


@register_recipe
def k400_smallbig101_32f() -> TrainConfig:
    """Kinetics-400: SmallBig-101, 32 frames, the paper's best (77.4 top-1); 2 apart is our choice."""
    return _dense("smallbig101", "kinetics", num_frames=32, sampling_rate=2)


@register_recipe
def sthv1_smallbig50() -> TrainConfig:
    """Something-Something V1: SmallBig-50, a frame from each of 8 segments. Half of the paper's ensemble."""
    return _segments("smallbig50", "something")


@register_recipe
def sthv1_smallbig50_16f() -> TrainConfig:
    """Something-Something V1: SmallBig-50, 16 segments. The other half of the ensemble."""
    return _segments("smallbig50", "something", num_frames=16)


@register_recipe
def sthv2_smallbig50() -> TrainConfig:
    """Something-Something V2: SmallBig-50, a frame from each of 8 segments. Half of the paper's ensemble."""
    return _segments("smallbig50", "something")


@register_recipe
def sthv2_smallbig50_16f() -> TrainConfig:
    """Something-Something V2: SmallBig-50, 16 segments. The other half of the ensemble."""
    return _segments("smallbig50", "something", num_frames=16)


@register_recipe
def sthv1_tsm_r50() -> TrainConfig:
    """Something-Something V1: TSM-50 under SmallBigNet's settings, to compare with."""
    return _segments("tsm_r50", "something")


@register_recipe
def ucf101_smallbig50() -> TrainConfig:
    """UCF101: SmallBig-50, for --init.weights of a Kinetics run; settings ours."""
    return _fine_tuned(_dense("smallbig50", "ucf101"))


@register_recipe
def hmdb51_smallbig50() -> TrainConfig:
    """HMDB51: SmallBig-50, for --init.weights of a Kinetics run; settings ours."""
    return _fine_tuned(_dense("smallbig50", "hmdb51"))


@register_recipe
def jester_smallbig50() -> TrainConfig:
    """Jester: SmallBig-50, a frame from each of 8 segments, no flips: half of its gestures have a direction."""
    return _segments("smallbig50", "jester")


def _from_scratch(model: str, data: Format) -> TrainConfig:
    """The light net's settings for small data, ours: the paper's are not known."""
    return TrainConfig(
        model=ModelConfig(name=model),
        data=DataConfig(format=data, sampling="segments" if data == "jester" else "dense"),
        augment=AugmentConfig(crop="multi_scale", flip="off" if data == "jester" else "on"),
        optim=replace(_SGD, lr=0.02, batch_size=32, warmup_epochs=5.0, clip_norm=5.0, label_smoothing=0.1),
        test=ViewsConfig(num_clips=10, num_crops=1),
    )


@register_recipe
def ucf101_c3d() -> TrainConfig:
    """UCF101: C3D from scratch, what the light net is compared with; settings ours."""
    return _from_scratch("c3d", "ucf101")


@register_recipe
def ucf101_c3d_light() -> TrainConfig:
    """UCF101: light C3D from scratch; settings ours."""
    return _from_scratch("c3d_light", "ucf101")


@register_recipe
def hmdb51_c3d_light() -> TrainConfig:
    """HMDB51: light C3D from scratch; settings ours."""
    return _from_scratch("c3d_light", "hmdb51")


@register_recipe
def jester_c3d_light() -> TrainConfig:
    """Jester: light C3D from scratch; settings ours."""
    return _from_scratch("c3d_light", "jester")


_STUDIES: dict[str, tuple[tuple[str, dict[str, str | bool | int | float]], ...]] = {
    "blocks": tuple(("smallbig50", {"block": letter}) for letter in "abcdef"),
    "which-convolution": tuple(
        ("smallbig50", {"block": block}) for block in ("3x3x3, -, -", "-, 3x3x3, -", "-, -, Tx3x3")
    ),
    "windows": tuple(
        ("smallbig50", {"block": f"-, {window}, -"})
        for window in ("1x3x3", "3x1x1", "3x3x3", "5x5x5", "Tx1x1", "Tx3x3", "TxHxW")
    ),
    "last-window": tuple(
        ("smallbig50", {"block": f"3x3x3, 3x3x3, {window}"}) for window in ("3x3x3", "Tx1x1", "Tx3x3", "TxHxW")
    ),
    "pooling": tuple(("smallbig50", {"pooling": mode}) for mode in ("max", "average")),
    "sharing": tuple(("smallbig50", {"shared": shared}) for shared in (True, False)),
    "stages": tuple(
        ("smallbig50", {"stages": stages})
        for stages in ("res5", "res4, res5", "res3, res4, res5", "res2, res3, res4, res5")
    ),
    "depth": (("c2d_r50", {}), ("smallbig23", {}), ("smallbig50", {}), ("smallbig101", {})),
    "attention": (("slow_r50", {}), ("slow_r50_extra", {}), ("smallbig50", {}), ("smallbig50_extra", {})),
}
STUDIES = tuple(_STUDIES)
"""Names of SmallBigNet's studies, for `study`."""


def study(name: str) -> list[TrainConfig]:
    """The rows of one of SmallBigNet's studies on Kinetics-400, each a whole config under the recipe of its net.

    Typed, a row is its recipe with the options: `lean3d train k400-smallbig50 DATA --model.options block c`.

    Raises:
        ConfigError: No such study; names the nearest.
    """
    if name not in _STUDIES:
        raise ConfigError(f"no study {name!r}: {did_you_mean(name, STUDIES)}")
    rows = []
    for model, options in _STUDIES[name]:
        config = _dense(model, "kinetics")
        recipe = f"k400-{model.replace('_', '-')}"
        rows.append(replace(config, recipe=recipe, model=replace(config.model, options=dict(options))))
    return rows
