"""Frames per second of nets that run frame by frame, side by side at equal input: lean3d's, and others' stream forms.

    python benchmarks/streams.py [--threads 1] [--size 112 112] [--rounds 5] [--movinet FOLDER] [--co3d FOLDER]

Every net gets the same frames, one at a time, batch 1, random weights, in eval mode; those of lean3d are `c3d_light` as
the recipe `light` has it (5 layers, a quarter of the width), and at its full width, both causal; each as it is, and
compiled for this machine (`lean3d.fast.compile_stream`). Times are CPU time
(other programs' work doesn't count), the median of interleaved rounds, each the mean over 16 frames of a stream whose
buffers are full.

--movinet: MoViNet-A0's stream form (Kondratyuk et al., CVPR 2021, arXiv 2103.11511) from a checkout of
github.com/Atze00/MoViNet-pytorch, whose files are imported from there; it needs the packages fvcore and einops.
--co3d: CoX3D-S (Hedegaard & Iosifidis, ECCV 2022, arXiv 2106.00050) from a checkout of github.com/LukasHedegaard/co3d,
on the package continual-inference. Each at the frames' size, which is not the one that it was made for.
Prints a table and one JSON line, and keeps the rows in `benchmarks/results/streams.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lean3d
from lean3d.fast import compile_stream
from lean3d.models import create_model
from lean3d.ops import native
from lean3d.recipes import get_recipe

LIGHT = get_recipe("light").model
FRAMES = 16
Step = Callable[[Tensor], Any]


def lean3d_net(width: float, size: tuple[int, int], *, fast: bool) -> tuple[nn.Module, Step]:
    """c3d_light in causal form, with the recipe's options."""
    net = create_model(
        LIGHT.name, num_classes=10, width=width, dropout=0.2, size=size, causal=True, **LIGHT.options
    ).eval()
    stream = compile_stream(net.stream()) if fast else net.stream()
    states = [stream.init_state()]

    def step(frame: Tensor) -> None:
        _, states[0] = stream.step(frame, states[0])

    return net, step


def build_movinet(folder: str, num_classes: int, in_channels: int) -> Any:
    """MoViNet-A0 with causal convolutions, from a checkout."""
    sys.path.insert(0, folder)
    models = importlib.import_module("movinets.models")
    config = importlib.import_module("movinets.config")._C.MODEL.MoViNetA0.clone()
    config.conv1.input_channels = in_channels
    return models.MoViNet(config, causal=True, pretrained=False, num_classes=num_classes)


def movinet(folder: str) -> tuple[nn.Module, Step]:
    """MoViNet-A0 frame by frame; its buffers are in its modules."""
    net = build_movinet(folder, 10, 3).eval()
    net.clean_activation_buffers()
    return net, net


def build_cox3d(
    folder: str, size: int, num_classes: int, in_channels: int, num_frames: int = 13, dropout: float = 0.5
) -> Any:
    """CoX3D-S, with the settings of its README's table, on the modules of the package `continual-inference`."""
    sys.path.insert(0, folder)
    common = types.ModuleType("models.common")  # its own __init__ asks for a training framework
    common.__path__ = [str(Path(folder) / "models/common")]
    sys.modules["models.common"] = common
    vars(common).update(vars(importlib.import_module("models.common.res")))
    return importlib.import_module("models.cox3d.modules.x3d").CoX3D(
        dim_in=in_channels,
        image_size=size,
        temporal_window_size=num_frames,
        num_classes=num_classes,
        x3d_conv1_dim=12,
        x3d_conv5_dim=2048,
        x3d_num_groups=1,
        x3d_width_per_group=64,
        x3d_width_factor=2.0,
        x3d_depth_factor=2.2,
        x3d_bottleneck_factor=2.25,
        x3d_use_channelwise_3x3x3=True,
        x3d_dropout_rate=dropout,
        x3d_head_activation="softmax",
        x3d_head_batchnorm=False,
        x3d_fc_std_init=0.01,
        x3d_final_batchnorm_zero_init=True,
    )


def cox3d(folder: str, size: tuple[int, int]) -> tuple[nn.Module, Step]:
    """CoX3D-S frame by frame."""
    net = build_cox3d(folder, size[0], 10, 3).eval()
    return net, lambda frame: net.forward_step(frame[:, :, 0])


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(112, 112))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--movinet", help="a checkout of Atze00/MoViNet-pytorch")
    parser.add_argument("--co3d", help="a checkout of LukasHedegaard/co3d")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = tuple(args.size)
    nets: dict[str, tuple[nn.Module, Step]] = {}
    for width in (LIGHT.width, 1.0):
        nets[f"c3d_light, light, width {width:g}"] = lean3d_net(width, size, fast=False)
        nets[f"c3d_light, light, width {width:g}, compiled"] = lean3d_net(width, size, fast=True)
    if args.movinet:
        nets["MoViNet-A0, stream"] = movinet(args.movinet)
    if args.co3d:
        nets["CoX3D-S"] = cox3d(args.co3d, size)
    frames = torch.randn(FRAMES, 1, 3, 1, *size)
    times: dict[str, list[float]] = {name: [] for name in nets}
    with torch.inference_mode():
        for _, step in nets.values():
            for i in range(96):
                step(frames[i % FRAMES])
        for _ in range(args.rounds):
            for name, (_, step) in nets.items():
                start = time.process_time()
                for frame in frames:
                    step(frame)
                times[name].append((time.process_time() - start) / FRAMES)
    rows = [
        {
            "net": name,
            "weights": sum(p.numel() for p in net.parameters()),
            "threads": args.threads,
            "size": list(size),
            "ms": round(statistics.median(times[name]) * 1e3, 2),
            "fps": round(1 / statistics.median(times[name]), 1),
        }
        for name, (net, _) in nets.items()
    ]
    table = Table("net", "weights (M)", "ms a frame", "frames/s", title=f"{size[0]}x{size[1]}, {args.threads} threads")
    for row in rows:
        table.add_row(row["net"], f"{row['weights'] / 1e6:.2f}", f"{row['ms']}", f"{row['fps']}")
    Console().print(table)
    result = {
        "benchmark": "streams",
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.kernels().isa() if native.available() else native.absence(),
        "rows": rows,
    }
    print(json.dumps(result))
    path = Path(__file__).parent / "results/streams.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
