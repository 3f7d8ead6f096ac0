"""`convert_to_fsb` on nets that others wrote: weights and work before and after, and one training step.

    python benchmarks/convert_foreign.py --resnets ~/src/3D-ResNets-PyTorch --unet ~/src/pytorch-3dunet \
        --pytorchvideo ~/src/pytorchvideo --monai ~/src/monai

Each path is a checkout (MONAI's may be an unpacked wheel); a net without one is left out. Pytorchvideo needs fvcore.
Work is counted for the shape that is printed: MACs of the direct form, multiplications of the fast algorithm, each
before and after. The training step runs on a smaller input; the output must have the shape that it had before. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from lean3d.blocks import convert_to_fsb

Net = tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], dict[str, Any]]


def nets(options: argparse.Namespace) -> list[Net]:
    """Of each net its name, how to build it, the shape to count at, the shape to train with, conversion options."""
    found: list[Net] = []
    for path in (options.resnets, options.unet, options.pytorchvideo, options.monai):
        if path:
            sys.path.insert(0, str(path))
    for name in ("skimage", "skimage.color", "skimage.metrics", "h5py", "torchvision", "torchvision.ops"):
        sys.modules.setdefault(name, mock.MagicMock(__path__=[], __spec__=None))  # imported there, not used here
    if options.resnets:
        resnet = import_module("models.resnet")
        found.append(
            (
                "3D-ResNets-PyTorch resnet18",
                lambda: resnet.generate_model(18),
                (1, 3, 16, 112, 112),
                (2, 3, 8, 32, 32),
                {},
            )
        )
    if options.unet:
        unet = import_module("pytorch3dunet.unet3d.model")
        found.append(
            (
                "pytorch-3dunet ResidualUNet3D",
                lambda: unet.ResidualUNet3D(1, 2, f_maps=32, num_levels=4),
                (1, 1, 64, 128, 128),
                (1, 1, 16, 32, 32),
                {},
            )
        )
    if options.monai:
        monai = import_module("monai.networks.nets")
        found.append(
            (
                "MONAI DenseNet121",
                lambda: monai.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2),
                (1, 1, 96, 96, 96),
                (2, 1, 64, 64, 64),
                {},
            )
        )
        found.append(
            (
                "MONAI UNet",
                lambda: monai.UNet(3, 1, 2, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2),
                (1, 1, 96, 96, 96),
                (1, 1, 32, 32, 32),
                {},
            )
        )
    if options.pytorchvideo:
        hub = import_module("pytorchvideo.models.hub")
        found.append(
            (
                "pytorchvideo slow_r50, its 1x3x3",
                lambda: hub.slow_r50(pretrained=False),
                (1, 3, 8, 224, 224),
                (1, 3, 8, 224, 224),
                {"where": "*.conv_b"},
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for peer in ("resnets", "unet", "pytorchvideo", "monai"):
        parser.add_argument(f"--{peer}", type=Path)
    parser.add_argument("--expansion", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    rows = []
    print(f"{'net':34}{'input':18}{'FSBs':>5}{'weights M':>18}{'GMACs':>18}{'G multiplications':>20}{'loss':>18}")
    for name, build, shape, small, arguments in nets(options):
        model = build().train()
        before = tuple(model.eval()(torch.randn(small)).shape)
        report = convert_to_fsb(model, expansion=options.expansion, input_shape=shape, **arguments)
        losses = one_step(model.train(), torch.randn(small), before)
        a, b = report.cost_before, report.cost_after
        assert a and b
        print(
            f"{name:34}{'x'.join(map(str, shape)):18}{len(report.converted):5}"
            f"{a.weights / 1e6:9.2f}{b.weights / 1e6:9.2f}{a.macs / 1e9:9.2f}{b.macs / 1e9:9.2f}"
            f"{a.multiplications / 1e9:10.2f}{b.multiplications / 1e9:10.2f}{losses[0]:9.3f}{losses[1]:9.3f}",
            flush=True,
        )
        row = {"net": name, "input": shape, "converted": len(report.converted), "left_alone": len(report.left_alone)}
        for side, cost in (("before", a), ("after", b)):
            row[side] = {"weights": cost.weights, "macs": cost.macs, "multiplications": cost.multiplications}
        rows.append(row)
    print(json.dumps({"expansion": options.expansion, "torch": torch.__version__, "nets": rows}))


def one_step(model: nn.Module, x: torch.Tensor, shape: tuple[int, ...]) -> list[float]:
    """The loss before and after a step of SGD towards fixed random outputs."""
    target = torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        y = model(x)
        assert tuple(y.shape) == shape
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
