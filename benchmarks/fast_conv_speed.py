"""Native fast convolutions against PyTorch's best and against what any direct convolution can reach.

    python benchmarks/fast_conv_speed.py [--threads 1 2] [--rounds 9] [--only c3d]

The layers are C3D's at 16x112x112, and those of ResNets at 8 or 16 frames: 1x3x3 and 3x1x1. PyTorch's best is the
faster one of `conv3d` in channels_last_3d and `lean3d.ops.conv3d`, which folds flat kernels into `conv2d`. Results are
compared first. Then PyTorch, a product of two 1024 x 1024 matrices (sgemm, the machine's peak) and each tile run in
interleaved rounds. `ratio` is the median over rounds of PyTorch's time by ours; `of peak` that of the effective rate,
2 x direct multiplications / time, by sgemm's in the same round. Prints a table and one JSON line, and keeps the latter
in `benchmarks/results/fast_conv_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lean3d
from lean3d.ops import conv3d, fused_conv, native
from lean3d.ops.fast_conv import native as fast_conv

Run = Callable[[], Tensor]
Layer = tuple[int, int, int, int]
"""Channels in and out, frames, height and width."""

C3D: list[Layer] = [
    (3, 64, 16, 112),
    (64, 128, 16, 56),
    (128, 256, 8, 28),
    (256, 256, 8, 28),
    (256, 512, 4, 14),
    (512, 512, 4, 14),
    (512, 512, 2, 7),
    (512, 512, 2, 7),
]
SPACE: list[Layer] = [(64, 64, 8, 56), (128, 128, 8, 28), (256, 256, 8, 14), (512, 512, 8, 7)]
TIME: list[Layer] = [
    (64, 64, 16, 56),
    (128, 128, 16, 28),
    (256, 256, 8, 14),
    (512, 512, 8, 7),
    (1024, 256, 8, 14),
    (2048, 512, 8, 7),
]
GROUPS = {
    "c3d": ((3, 3, 3), C3D, ("direct", "F(1x4x4)", "F(2x2x2)", "F(2x4x4)", "F(4x4x4)")),
    "1x3x3": ((1, 3, 3), SPACE, ("F(1x2x2)", "F(1x4x4)")),
    "3x1x1": ((3, 1, 1), TIME, ("F(2x1x1)", "F(4x1x1)")),
}


def clock(run: Run) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def compare(kernel: tuple[int, int, int], layer: Layer, tiles: tuple[str, ...], rounds: int) -> list[dict]:
    """A row for each tile."""
    c, o, t, size = layer
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    geometry = {"stride": (1, 1, 1), "padding": padding}
    x = torch.randn(1, c, t, size, size).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(o, c, *kernel) / (c * kernel[0] * kernel[1] * kernel[2]) ** 0.5, torch.randn(o)
    a, b, product = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    theirs: list[Run] = [
        lambda: F.conv3d(x, weight, bias, padding=padding),
        lambda: conv3d(x, weight, bias, padding=padding),
    ]
    best = min(theirs, key=lambda run: (run(), min(clock(run) for _ in range(3)))[1])
    reference = best()
    runs: dict[str, Run] = {"torch": best, "sgemm": lambda: torch.mm(a, b, out=product)}
    errors: dict[str, float] = {}
    out = torch.empty(reference.shape, memory_format=torch.channels_last_3d)
    for tile in tiles:
        room = fused_conv if tile == "direct" else fast_conv
        if c == 3 and tile != "direct":
            continue
        packed = room.pack(weight, bias, **geometry, algorithm=tile)
        errors[tile] = ((packed(x, out) - reference).abs().max() / reference.abs().max()).item()
        if not errors[tile] < 2e-5:
            raise SystemExit(f"{kernel} {layer} {tile}: results differ by {errors[tile]:.1e}")
        runs[tile] = lambda packed=packed: packed(x, out)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run))
    flops = 2 * reference.numel() * weight[0].numel()
    return [
        {
            "kernel": "x".join(map(str, kernel)),
            "layer": f"{c}->{o}, {t}x{size}x{size}",
            "tile": tile,
            "torch_ms": round(statistics.median(times["torch"]), 3),
            "ours_ms": round(statistics.median(times[tile]), 3),
            "sgemm_gflops": round(2 * 1024**3 / statistics.median(times["sgemm"]) / 1e6, 1),
            "ratio": round(statistics.median(p / q for p, q in zip(times["torch"], times[tile], strict=True)), 2),
            "of_peak": round(
                flops
                / 2
                / 1024**3
                * statistics.median(p / q for p, q in zip(times["sgemm"], times[tile], strict=True)),
                2,
            ),
            "gflops": round(flops / statistics.median(times[tile]) / 1e6, 1),
            "difference": float(f"{errors[tile]:.1e}"),
        }
        for tile in errors
    ]


@torch.no_grad()
def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=GROUPS, help="one group of layers; nothing is kept then")
    args = parser.parse_args()
    if not native.available():
        raise SystemExit(f"the native kernels are {native.absence()}")
    torch.manual_seed(0)
    rows, sums = [], []
    for threads in args.threads:
        torch.set_num_threads(threads)
        table = Table("kernel", "layer", "tile", "torch, ms", "ours, ms", "GFLOP/s", "ratio", "of peak", "difference")
        table.title = f"{threads} threads"
        for group, (kernel, layers, tiles) in GROUPS.items():
            if args.only not in (None, group):
                continue
            ours = theirs = work = peak = 0.0
            for layer in layers:
                found = compare(kernel, layer, tiles, args.rounds)
                rows += [{"threads": threads, **row} for row in found]
                best = min(found, key=lambda row: row["ours_ms"])
                ours, theirs = ours + best["ours_ms"], theirs + best["torch_ms"]
                work += best["gflops"] * best["ours_ms"]
                peak += best["gflops"] * best["ours_ms"] / best["sgemm_gflops"]
                for row in found:
                    shown = [row[key] for key in ("torch_ms", "ours_ms", "gflops", "ratio", "of_peak", "difference")]
                    table.add_row(row["kernel"], row["layer"], row["tile"], *map(str, shown))
            total = {"threads": threads, "group": group, "torch_ms": round(theirs, 2), "ours_ms": round(ours, 2)}
            total |= {"ratio": round(theirs / ours, 2), "of_peak": round(peak / ours, 2)}
            sums.append(total)
            shown = [total["torch_ms"], total["ours_ms"], round(work / ours, 1), total["ratio"], total["of_peak"]]
            table.add_row(group, "sum", "the best", *map(str, shown), "")
        Console(width=130).print(table)
    result = {
        "benchmark": "fast_conv_speed",
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "isa": native.kernels().isa(),
        "rounds": args.rounds,
        "sums": sums,
        "rows": rows,
    }
    print(json.dumps(result))
    if args.only is None:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "fast_conv_speed.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
