"""Accuracy of nets that run frame by frame, trained alike from scratch: lean3d's, MoViNet-A0's stream form, CoX3D-S.

    python benchmarks/streams_accuracy.py grid_lips/clips.csv OUT --movinet FOLDER --co3d FOLDER
        [--size 64] [--epochs 10] [--threads 1] [--nets c3d_light movinet_a0_stream cox3d_s ...]

All get the same clips (16 grey frames of the task "digit"), the same size, augmentation, optimiser and epochs: those
of the recipe `light`, but for its augmentation in time and the learning rates (`RATE`, `RATES`). MoViNet-A0 and X3D-S
don't take frames of 56x80, as in the README's training: their last features would be smaller than their kernels. Each
is tested twice on the test clips, one view each: as a clip net, and frame by frame, of which the last answer counts.
CoX3D is trained as X3D-S, which it is on clips, and has its answer on a stream when the 16 frames and as many zeros as
its delay is have come. With "+trg" behind its name a net of the others gets what c3d_light begins with, the temporal
residual gradient of the frames, in their place: what is left is the difference between the nets. "c3d_light:1" is ours
at full width in place of the recipe's quarter.

For the sources of MoViNet-A0 and CoX3D-S see `streams.py`. CoX3D's convolutions run by lean3d's forms while it is
trained and tested on clips (the same numbers, several times faster on a CPU); on the stream they are its own. A
training that is in OUT is gone on with, or not repeated. Prints a table and one JSON line, and keeps the rows, with
those of other nets that are there, in `benchmarks/results/streams_accuracy.json`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight

from lean3d import checkpoint, ops
from lean3d.blocks import TemporalResidualGradient
from lean3d.config import DataConfig, TrainConfig, ViewsConfig
from lean3d.data.loader import test_loader
from lean3d.data.manifest import read_manifest
from lean3d.data.transforms import normalize
from lean3d.engine import fit
from lean3d.models import VideoNet
from lean3d.models.registry import register_model
from lean3d.recipes import get_recipe
from streams import build_cox3d, build_movinet

FRAMES = 16
SOURCES = {"movinet_a0_stream": "MOVINET", "cox3d_s": "CO3D"}
"""Nets that are not lean3d's, and the variables of the environment that say where they lie."""
RATE = 3e-3
RATES = {"movinet_a0_stream": 1e-3}
"""Learning rates in place of that one: MoViNet-A0's loss rises at first, the less the gentler it is."""


def _before(trg: bool) -> nn.Module:
    """What stands before a net; it sees no frame of the future, and so may be taken of a clip or frame by frame."""
    gradient = TemporalResidualGradient()
    gradient.limit_time(FRAMES, causal=True)
    return gradient if trg else nn.Identity()


class _MoViNet(nn.Module):
    """The net keeps what it has seen; each clip is a stream of its own."""

    def __init__(self, net: Any, trg: bool):
        super().__init__()
        self.net, self.before = net, _before(trg)

    def forward(self, x: Tensor) -> Tensor:
        self.net.clean_activation_buffers()
        y = self.net(self.before(x))
        self.net.clean_activation_buffers()
        return y

    def last_of_stream(self, clip: Tensor) -> Tensor:
        """The answer at the last of the frames, one at a time."""
        self.net.clean_activation_buffers()
        y = [self.net(frame) for frame in self.before(clip).split(1, 2)][-1]
        self.net.clean_activation_buffers()
        return y


@register_model(sampling_rate=1, size=172)
def movinet_a0_stream(
    *,
    num_classes: int = 400,
    num_frames: int = FRAMES,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.2,
    trg: bool = False,
) -> VideoNet:
    """MoViNet-A0 with causal convolutions."""
    net = build_movinet(os.environ["MOVINET"], num_classes, in_channels)
    net.classifier[2].p = dropout
    return VideoNet(_MoViNet(net, trg), [], nn.Identity())


class _Depthwise(torch.autograd.Function):
    """K x K x K by channel at stride 1, whose gradient by x is the same convolution with the kernel turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, None, 1, [k // 2 for k in weight.shape[2:]], 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        padding = [k // 2 for k in weight.shape[2:]]
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        by_x = F.conv3d(gradient, weight.flip(2, 3, 4), None, 1, padding, 1, len(weight))
        return by_x, conv3d_weight(x, weight.shape, gradient, 1, padding, 1, len(weight))


def _conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
    """What `continual`'s Conv3d does on clips."""
    how = {
        name: (value,) * 3 if isinstance(value, int) else value for name, value in how.items() if name != "groups"
    } | {"groups": how["groups"]}
    same = how["padding"] == tuple(k // 2 for k in weight.shape[2:]) and how["stride"] == how["dilation"] == (1, 1, 1)
    if how["groups"] == len(weight) and same and bias is None and min(weight.shape[2:]) > 1:
        return _Depthwise.apply(input.contiguous(memory_format=torch.channels_last_3d), weight)
    return ops.conv3d(input, weight, bias, **how)


class _CoX3D(nn.Module):
    """CoX3D-S on clips, for training, and on streams."""

    def __init__(self, build: Callable[[], Any], trg: bool):
        super().__init__()
        self.build, self.trg, self.net, self.before = build, trg, build(), _before(trg)
        del self.net.head.act  # scores before the softmax, in eval mode too
        for module in self.net.modules():
            if hasattr(module, "_conv_func"):
                module._conv_func = _conv3d

    def __deepcopy__(self, memo: dict[int, Any]) -> _CoX3D:
        """For the moving average of weights; modules of `continual` can't be copied."""
        copied = _CoX3D(self.build, self.trg)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward(self.before(x)).flatten(2).mean(2)

    def last_of_stream(self, clip: Tensor) -> Tensor:
        """The answer when the frames, one at a time, and the zeros behind them have come."""
        self.net.clean_state()
        y = self.net.forward_steps(self.before(clip), pad_end=True)
        self.net.clean_state()
        return y.flatten(2)[:, :, -1]


@register_model(sampling_rate=1, size=182)
def cox3d_s(
    *,
    num_classes: int = 400,
    num_frames: int = FRAMES,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    trg: bool = False,
) -> VideoNet:
    """CoX3D-S, whose window is the clip."""
    how = os.environ["CO3D"], int(os.environ["CO3D_SIZE"]), num_classes, in_channels, num_frames, dropout
    return VideoNet(_CoX3D(lambda: build_cox3d(*how), trg), [], nn.Identity())


def config_of(name: str, root: str, out: Path, size: int, epochs: int) -> TrainConfig:
    """The recipe `light` for one net, without its augmentation in time, which ten epochs are too few for."""
    recipe = get_recipe("light")
    name, _, trg = name.partition("+")
    name, _, width = name.partition(":")
    own: dict[str, Any] = {"width": 1.0, "options": {"trg": True} if trg else {}}
    if name == "c3d_light":
        own = {"width": float(width or recipe.model.width), "options": {**recipe.model.options, "causal": True}}
    return replace(
        recipe,
        model=replace(
            recipe.model, name=name, in_channels=1, size=(size, size), sampling_rate=1, num_frames=FRAMES, **own
        ),
        data=DataConfig(root=root, where={"task": "digit"}, val_share=0.0),
        augment=replace(recipe.augment, speed=0.0, time_shift=0.0),
        optim=replace(recipe.optim, epochs=epochs, lr=RATES.get(name, RATE)),
        test=ViewsConfig(num_clips=1, num_crops=1, crop_area=recipe.test.crop_area),
        run=replace(recipe.run, out=str(out), accelerator="cpu"),
    )


def last_of_stream(net: VideoNet) -> Callable[[Tensor], Tensor]:
    """A net's last answer on a stream of a clip's frames."""
    if isinstance(net.stem, _MoViNet | _CoX3D):
        return net.stem.last_of_stream
    stream = net.stream()

    def run(clip: Tensor) -> Tensor:
        state, scores = stream.init_state(), []
        for frame in clip.split(1, 2):
            y, state = stream.step(frame, state)
            scores += [] if y is None else [y]
        return [*scores, *stream.flush(state)][-1]

    return run


def tested(folder: Path, config: TrainConfig) -> dict[str, float]:
    """Shares of the test clips that are right, as clips and as streams, and how far their scores are apart."""
    member = checkpoint.load(folder)
    net = member.model.eval()
    step = last_of_stream(net)
    right = {"clip": 0, "stream": 0}
    count, apart = 0, 0.0
    with torch.no_grad():
        for batch in test_loader(read_manifest(config.data).select("test"), config.data, net.input_spec, config.test):
            clips = normalize(batch.clips.flatten(0, 1), net.input_spec)
            clip, stream = net(clips), step(clips)
            apart = max(apart, ((clip - stream).abs().max() / clip.abs().max()).item())
            for form, scores in (("clip", clip), ("stream", stream)):
                right[form] += int((scores.argmax(1) == batch.labels).sum())
            count += len(clips)
    return {"test_clips": count, **{f"{form}_top1": round(n / count, 4) for form, n in right.items()}, "apart": apart}


def main() -> None:
    """Train, test, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", help="grid_lips/clips.csv")
    parser.add_argument("out", type=Path, help="where the trainings go")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", nargs="*", default=["c3d_light", *SOURCES])
    parser.add_argument("--movinet", help="a checkout of Atze00/MoViNet-pytorch")
    parser.add_argument("--co3d", help="a checkout of LukasHedegaard/co3d")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.update(MOVINET=args.movinet or "", CO3D=args.co3d or "", CO3D_SIZE=str(args.size))
    for name in args.nets:
        source = SOURCES.get(name.partition("+")[0])
        if source and not os.environ[source]:
            parser.error(f"{name} needs --{source.lower()}, a checkout of its repository")
    path = Path(__file__).parent / "results/streams_accuracy.json"
    rows: dict[str, Any] = {}
    for name in args.nets:
        folder = args.out / f"{name}-{args.size}-{args.epochs}"
        config = config_of(name, args.clips, folder, args.size, args.epochs)
        if (folder / "config.json").exists():
            fit(resume=folder)  # a finished one comes back as it is
        else:
            fit(config)
        net = checkpoint.load(folder).model
        weights = sum(p.numel() for p in net.parameters())
        row = {"net": name, "weights": weights, "size": args.size, "epochs": args.epochs, **tested(folder, config)}
        rows = {kept["net"]: kept for kept in (json.loads(path.read_text())["rows"] if path.exists() else [])}
        rows[name] = row
        path.write_text(json.dumps({"benchmark": "streams_accuracy", "rows": list(rows.values())}, indent=2) + "\n")
    table = Table("net", "weights (M)", "as a clip", "as a stream", "scores apart")
    for row in rows.values():
        weights = f"{row['weights'] / 1e6:.2f}"
        table.add_row(row["net"], weights, f"{row['clip_top1']}", f"{row['stream_top1']}", f"{row['apart']:.0e}")
    Console().print(table)
    print(json.dumps({"benchmark": "streams_accuracy", "rows": list(rows.values())}))


if __name__ == "__main__":
    main()
