"""Packed convolutions against the best form that PyTorch has for the same layer, at inference.

    python benchmarks/fused_conv.py [--threads 1 2] [--seconds 0.4] [--only SmallBig]

The other side is `lean3d.ops.conv3d` (or `addmm` for pointwise layers) with normalisation folded in and activations
channels last, and `lean3d.ops.pool3d`, native, for SmallBig units. Each pair is compared first. Then both are timed in
interleaved rounds; the ratio is the median over rounds of theirs by ours. Prints a table and one JSON line, and keeps
the latter in `benchmarks/results/fused_conv.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lean3d
from lean3d.ops import conv3d, max_pool3d, native, pool3d
from lean3d.ops.fused_conv import TemporalConv, algorithms, pack, pack_small_big, pack_stage_two

Run = Callable[[], Tensor]
Case = tuple[str, str, float, Run, Run]
"""Group, layer, millions of multiplications, torch's, ours."""


def tensor(*shape: int) -> Tensor:
    """Normal numbers, activations channels last."""
    x = torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


def weights(*shape: int) -> Tensor:
    """Normal numbers that keep the scale of activations."""
    return torch.randn(shape) / (shape[1] * shape[2] * shape[3] * shape[4]) ** 0.5


def pointwise() -> Iterator[Case]:
    """1x1x1 layers of 50-layer nets."""
    for c, o, t, size in [
        (64, 256, 8, 56),
        (256, 64, 8, 56),
        (512, 128, 8, 28),
        (128, 512, 8, 28),
        (1024, 256, 8, 14),
        (256, 1024, 8, 14),
        (2048, 512, 8, 7),
        (512, 2048, 8, 7),
    ]:
        x, weight, bias = tensor(1, c, t, size, size), weights(o, c, 1, 1, 1), torch.randn(o)
        packed = pack(weight, bias, algorithm="pointwise")
        out = torch.empty(packed.out_shape(x.shape), memory_format=torch.channels_last_3d)
        rows, matrix, flat = x.permute(0, 2, 3, 4, 1).reshape(-1, c), weight.flatten(1).t(), torch.empty(t * size**2, o)

        def theirs(rows=rows, matrix=matrix, bias=bias, flat=flat, t=t, size=size) -> Tensor:
            return torch.addmm(bias, rows, matrix, out=flat).view(1, t, size, size, -1).permute(0, 4, 1, 2, 3)

        yield (
            "pointwise",
            f"{c}->{o}, {t}x{size}x{size}",
            out.numel() * c / 1e6,
            theirs,
            lambda p=packed, x=x, y=out: p(x, y),
        )


def dense() -> Iterator[Case]:
    """Convolutions that span places, with bias and ReLU."""
    layers = [(c, c, 8, size, (1, 3, 3), (1, 1, 1)) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))]
    layers += [(c, c, 8, size, (3, 1, 1), (1, 1, 1)) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))]
    layers += [(c, c, 8, size, (1, 3, 3), (1, 2, 2)) for c, size in ((128, 56), (256, 28), (512, 14))]
    layers += [
        (3, 64, 8, 224, (1, 7, 7), (1, 2, 2)),
        (3, 8, 32, 224, (5, 7, 7), (1, 2, 2)),
        (3, 64, 16, 112, (3, 3, 3), (1, 1, 1)),
        (8, 16, 32, 56, (7, 1, 1), (4, 1, 1)),
        (64, 128, 16, 56, (3, 3, 3), (1, 1, 1)),
        (512, 512, 2, 7, (3, 3, 3), (1, 1, 1)),
    ]
    for c, o, t, size, kernel, stride in layers:
        x, weight, bias = tensor(1, c, t, size, size), weights(o, c, *kernel), torch.randn(o)
        geometry = {"stride": stride, "padding": tuple(k // 2 for k in kernel)}
        packed = pack(weight, bias, **geometry, algorithm="direct")
        out = torch.empty(packed.out_shape(x.shape), memory_format=torch.channels_last_3d)
        name = f"{'x'.join(map(str, kernel))} / {'x'.join(map(str, stride))}, {c}->{o}, {t}x{size}x{size}"

        def theirs(x=x, weight=weight, bias=bias, geometry=geometry) -> Tensor:
            return conv3d(x, weight, bias, **geometry).relu_()

        macs = out.numel() * weight[0].numel() / 1e6
        yield "dense", name, macs, theirs, lambda p=packed, x=x, y=out: p(x, y, relu=True)


def separable() -> Iterator[Case]:
    """Depthwise layers, and those with the pointwise one behind them."""
    for c, t, size, step in [(64, 16, 56, 1), (128, 16, 28, 1), (256, 8, 14, 1), (512, 8, 7, 1), (128, 16, 56, 2)]:
        x, depthwise, middle_bias = tensor(1, c, t, size, size), weights(c, 1, 1, 3, 3), torch.randn(c)
        weight, bias = weights(c, c, 1, 1, 1), torch.randn(c)
        geometry = {"stride": (1, step, step), "padding": (0, 1, 1)}
        alone = pack(depthwise, middle_bias, **geometry, groups=c, algorithm="depthwise")
        both = pack_stage_two(depthwise, middle_bias, weight, bias, **geometry)
        out = torch.empty(both.out_shape(x.shape), memory_format=torch.channels_last_3d)

        def first(x=x, weight=depthwise, bias=middle_bias, geometry=geometry, c=c) -> Tensor:
            return conv3d(x, weight, bias, **geometry, groups=c).relu_()

        def second(first=first, weight=weight, bias=bias) -> Tensor:
            return conv3d(first(), weight, bias).relu_()

        name = f"1x3x3 / {step}, {c}, {t}x{size}x{size}"
        yield "depthwise", name, out.numel() * 9 / 1e6, first, lambda p=alone, x=x, y=out: p(x, y, relu=True)
        yield "stage two", name, out.numel() * (9 + c) / 1e6, second, lambda p=both, x=x, y=out: p(x, y, relu=True)


def blocks() -> Iterator[Case]:
    """Stage two with what stands around it in C3D's light form: the first block's convolution in time, max pooling."""
    for c, middle, o, t, size, window in [(3, 32, 64, 16, 112, (1, 2, 2)), (64, 64, 128, 16, 56, (2, 2, 2))]:
        x, depthwise, weight = tensor(1, c, t, size, size), weights(middle, 1, 1, 3, 3), weights(o, middle, 1, 1, 1)
        in_time = weights(middle, c, 3, 1, 1) if c < middle else None
        bias, middle_bias = torch.randn(o), torch.randn(middle)
        packed = pack_stage_two(
            depthwise,
            middle_bias,
            weight,
            bias,
            padding=(0, 1, 1),
            temporal=None if in_time is None else TemporalConv(in_time, middle_bias, padding=1, relu=True),
            shrink=window,
        )
        out = torch.empty(packed.out_shape(x.shape), memory_format=torch.channels_last_3d)

        def theirs(x=x, f=in_time, d=depthwise, b=middle_bias, w=weight, bias=bias, window=window) -> Tensor:
            y = x if f is None else conv3d(x, f, b, padding=(1, 0, 0)).relu_()
            y = conv3d(y, d, b, padding=(0, 1, 1), groups=len(d)).relu_()
            return max_pool3d(conv3d(y, w, bias).relu_(), window, window)

        name = f"{'3x1x1, ' if in_time is not None else ''}1x3x3, 1x1x1, pool {'x'.join(map(str, window))}, {c}->{o}"
        each = (3 * c * middle if in_time is not None else 0) + 9 * middle + middle * o
        macs = t * size**2 * each / 1e6
        yield "block", f"{name}, {t}x{size}x{size}", macs, theirs, lambda p=packed, x=x, y=out: p(x, y, relu=True)


def small_big() -> Iterator[Case]:
    """The three units of SmallBig-50's blocks."""
    for c, o, size, kernel, step, time_window in [
        (256, 128, 56, 1, 1, 3),
        (512, 128, 28, 1, 1, 3),
        (1024, 256, 14, 1, 1, 3),
        (2048, 512, 7, 1, 1, 3),
        (128, 128, 56, 3, 2, 3),
        (128, 128, 28, 3, 1, 3),
        (256, 256, 14, 3, 1, 3),
        (512, 512, 7, 3, 1, 3),
        (128, 512, 28, 1, 1, None),
        (256, 1024, 14, 1, 1, None),
        (512, 2048, 7, 1, 1, None),
    ]:
        x, bias = tensor(1, c, 8, size, size), torch.randn(o)
        small, big = (weights(o, c, 1, kernel, kernel) for _ in range(2))
        window = (time_window, 3, 3)
        geometry = {"stride": (1, step, step), "padding": (0, kernel // 2, kernel // 2)}
        packed = pack_small_big(small, big, bias, window=window, **geometry)
        shape = packed.out_shape(x.shape)
        out = torch.empty(shape, memory_format=torch.channels_last_3d)
        # The last unit of a block is the one with the residual.
        residual = tensor(*shape) if time_window is None else None

        def theirs(x=x, small=small, big=big, bias=bias, window=window, geometry=geometry, residual=residual) -> Tensor:
            y = conv3d(x, small, bias, **geometry).add_(conv3d(pool3d(x, window), big, **geometry))
            return F.relu_(y if residual is None else y.add_(residual))

        name = f"{kernel}x{kernel} / {step}, {c}->{o}, 8x{size}x{size}, pool {time_window or 'T'}x3x3"
        macs = out.numel() * small[0].numel() * (2 if time_window else 1 + 1 / 8) / 1e6
        yield "SmallBig", name, macs, theirs, lambda p=packed, x=x, y=out, r=residual: p(x, y, residual=r, relu=True)


def compare(case: Case, threads: int, seconds: float) -> dict:
    """Parity, then times."""
    group, layer, macs, theirs, ours = case
    reference = theirs().clone()
    error = ((ours() - reference).abs().max() / reference.abs().max()).item()
    if not error < 1e-5:
        raise SystemExit(f"{group} {layer}: results differ by {error:.1e}")
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, run in (("torch", theirs), ("ours", ours)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["torch"], times["ours"], strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "group": group,
        "layer": layer,
        "threads": threads,
        "torch_ms": round(medians["torch"] * 1e3, 3),
        "ours_ms": round(medians["ours"] * 1e3, 3),
        "ours_gflops": round(2 * macs / 1e3 / min(times["ours"]), 1),
        "ratio": round(ratio, 2),
        "error": float(f"{error:.1e}"),
    }


def sgemm(seconds: float) -> float:
    """The machine's own rate at 1024 x 1024 x 1024, GFLOP/s."""
    a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return round(2 * 1024**3 / best / 1e9, 1)


@torch.no_grad()
def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each layer")
    parser.add_argument("--only", default="", help="a group: pointwise, dense, depthwise, stage two, block, SmallBig")
    args = parser.parse_args()
    if algorithms((1, 1, 1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0)) == []:
        raise SystemExit(f"the native kernels are {native.absence()}")
    torch.manual_seed(0)
    rows, rates = [], {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        rates[threads] = sgemm(args.seconds)
        table = Table("group", "layer", "torch, ms", "ours, ms", "ours, GFLOP/s", "ratio", "error")
        table.title = f"{threads} threads, sgemm {rates[threads]} GFLOP/s"
        for cases in (pointwise(), dense(), separable(), blocks(), small_big()):
            for case in cases:
                if args.only not in case[0]:
                    continue
                row = compare(case, threads, args.seconds)
                rows.append(row)
                shown = [row[key] for key in ("torch_ms", "ours_ms", "ours_gflops", "ratio", "error")]
                table.add_row(row["group"], row["layer"], *map(str, shown))
        Console(width=120).print(table)
    result = {
        "benchmark": "fused_conv",
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "isa": native.kernels().isa(),
        "sgemm_gflops": rates,
        "rows": rows,
    }
    print(json.dumps(result))
    if not args.only:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "fused_conv.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
