"""Nets that the zoo doesn't have, for the comparison only.

`linear_pixels` is a ridge regression on the clip's pixels, averaged over squares of 4 x 4. `movinet_a0` wraps
MoViNet-A0 (Kondratyuk et al., CVPR 2021, arXiv 2103.11511) as others wrote it for PyTorch: have
github.com/Atze00/MoViNet-pytorch and its packages einops and fvcore on PYTHONPATH. `behind_trg` is any of the zoo's or
of these nets on the temporal residual gradient of its clip.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lean3d import checkpoint
from lean3d.blocks import Conv3d, TemporalResidualGradient
from lean3d.config import TrainConfig, to_dict
from lean3d.data.loader import test_loader
from lean3d.data.manifest import Clip, read_manifest
from lean3d.data.transforms import normalize
from lean3d.errors import ConfigError
from lean3d.evaluate import evaluate
from lean3d.models import VideoNet, create_model, model_from_config
from lean3d.models.registry import register_model

RIDGES = tuple(10.0**power for power in range(-3, 3))
"""What is added to the diagonal, relative to its mean; the one that is best on val stays."""


class _Flat(nn.Module):
    """A linear classifier of everything."""

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Any `(N, ...)` -> `(N, num_classes)`."""
        return self.linear(x.flatten(1))


@register_model(sampling_rate=1, size=80)
def linear_pixels(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.0,
    places: int = 140,
) -> VideoNet:
    """A linear classifier of pixels, averaged over squares of 4 x 4.

    Args:
        width, dropout: it has none; accepted as every net's.
        places: squares in a frame; 140 in one of 40 x 56, 144 in one of 48 x 48.
    """
    stem = nn.AvgPool3d((1, 4, 4), ceil_mode=True)
    return VideoNet(stem, [], _Flat(in_channels * num_frames * places, num_classes))


class _MoViNetHead(nn.Module):
    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3, 4), keepdim=True)).flatten(1)


def _in_faster_forms(net: nn.Module) -> None:
    """The same convolutions and activations, to the last weight, that train twice as fast on a processor."""
    for name, part in net.named_children():
        if type(part) is nn.Conv3d:
            setattr(net, name, Conv3d.of(part))  # type: ignore[arg-type]
        elif type(part).__name__ == "Swish":
            setattr(net, name, nn.SiLU())
        else:
            _in_faster_forms(part)


@register_model(sampling_rate=1, size=172)
def movinet_a0(
    *, num_classes: int = 400, num_frames: int = 16, in_channels: int = 3, width: float = 1.0, dropout: float = 0.2
) -> VideoNet:
    """MoViNet-A0 base, from scratch."""
    try:
        from movinets import MoViNet
        from movinets.config import _C
    except ImportError as error:
        raise ConfigError(
            f"MoViNet needs a checkout of github.com/Atze00/MoViNet-pytorch, einops and fvcore on PYTHONPATH: {error}"
        ) from error
    if width != 1:
        raise ConfigError(f"movinet_a0 has one width, 1; got {width}")
    settings = _C.MODEL.MoViNetA0.clone()
    settings.conv1.input_channels = in_channels
    net = MoViNet(settings, causal=False, pretrained=False, num_classes=num_classes)
    net.classifier[2].p = dropout
    nn.init.normal_(net.classifier[3].conv_1.conv3d.weight, std=0.01)  # theirs starts at a loss of 10
    _in_faster_forms(net)
    return VideoNet(net.conv1, [*net.blocks, net.conv7], _MoViNetHead(net.classifier))


@register_model(sampling_rate=1, size=80)
def behind_trg(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.2,
    net: str = "x3d_s",
) -> VideoNet:
    """A net that gets the clip's temporal residual gradient in place of the clip.

    Args:
        net: its name.
    """
    behind = create_model(
        net, num_classes=num_classes, num_frames=num_frames, in_channels=in_channels, width=width, dropout=dropout
    )
    return VideoNet(nn.Sequential(TemporalResidualGradient(), behind.stem), behind.stages, behind.head)


def fit_ridge(config: TrainConfig) -> dict[str, float]:
    """Fit `linear_pixels` in closed form, on the test view of each training clip, and leave a run's files.

    Returns:
        As `lean3d.engine.fit` gives them: `val_top1`, `val_loss`, `epoch`.
    """
    manifest = read_manifest(config.data)
    folder = Path(config.run.out)
    model = model_from_config(config.model, len(manifest.classes))
    spec = model.input_spec

    def loader(clips: tuple[Clip, ...]):
        return test_loader(clips, config.data, spec, config.test)

    features, labels = [], []
    for batch in loader(manifest.select("train")):
        clips = normalize(batch.clips.flatten(0, 1), spec)
        features.append(model.stem(clips).flatten(1))
        labels.append(batch.labels.repeat_interleave(batch.clips.shape[1]))
    x = torch.cat(features).double()
    y = nn.functional.one_hot(torch.cat(labels), len(manifest.classes)).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean) @ (x - x_mean).T
    val = list(loader(manifest.select("val")))
    best: dict[str, float] = {}
    for ridge in RIDGES:
        amount = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        weight = torch.linalg.solve(gram + amount, y - y_mean).T @ (x - x_mean)
        with torch.no_grad():
            model.head.linear.weight.copy_(weight)
            model.head.linear.bias.copy_(y_mean - weight @ x_mean)
        found = evaluate(model, val, manifest.classes)
        if not best or found.top1 > best["val_top1"]:
            best = {"val_top1": found.top1, "val_loss": found.loss, "epoch": 0, "ridge": ridge}
            checkpoint.save_model(folder / checkpoint.MODEL_FILE, model, manifest.classes, to_dict(config))
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "epoch", "step": 0, **best}) + "\n", encoding="utf-8")
    return best


FITTED: dict[str, Callable[[TrainConfig], dict[str, float]]] = {"linear_pixels": fit_ridge}
"""Nets that are not trained by gradients."""
