"""Rounding errors of the fast convolution in float32, for each tile, against the direct form in float64.

    python benchmarks/fast_conv_error.py [--draws 5]

The error is max|d| / max|reference|, the largest of some draws: inputs as after a ReLU (the positive half of a normal
distribution, zero elsewhere), weights as PyTorch initialises them. Of the gradients it is that of a loss whose gradient
at the output is normal. Torch's own float32 convolution stands beside ours ("direct"), and the native kernel, where it
was built, beside the plain PyTorch form (its gradient of the weight is that one's). Of the forms at stride 2, which are
the compiler's, only outputs. Prints a table and one JSON line,
and keeps the latter in `benchmarks/results/fast_conv_error.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lean3d
from lean3d.errors import BackendError
from lean3d.ops import native
from lean3d.ops.fast_conv import choose_backend, fast_conv3d, native_time, transforms
from lean3d.ops.fast_conv import native as native_fast_conv

SIZE = (12, 24, 24)  # divided by all m: each tile is a full one
CHANNELS = (16, 64, 256)
OUT_CHANNELS = 32
TILES = {
    (3, 1, 1): [(2, 1, 1), (4, 1, 1), (6, 1, 1)],
    (1, 3, 3): [(1, 2, 2), (1, 4, 4), (1, 6, 6)],
    (3, 3, 3): [(2, 2, 2), (1, 4, 4), (2, 4, 4), (4, 4, 4), (2, 6, 6), (6, 6, 6)],
}
STRIDED = [
    # kernel, channels, tile: forms that the compiler alone uses, at stride 2 in the plane
    ((1, 3, 3), CHANNELS, native_fast_conv, (1, 4, 4)),
    ((3, 7, 7), (3, 16), native_time, (4, 1, 1)),
    ((5, 7, 7), (3, 16), native_time, (2, 1, 1)),
    ((5, 7, 7), (3, 16), native_time, (4, 1, 1)),
]
UNSCALED = ", points unscaled"
Convolution = Callable[[Tensor, Tensor], Tensor]


def results(f: Convolution, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = f(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), gradient)]


def runs(backend: str, kernel: tuple[int, ...], tile: tuple[int, ...]) -> bool:
    """Whether a backend is here and computes this tile."""
    try:
        choose_backend(backend, torch.empty(1, 8, *SIZE), torch.empty(8, 8, *kernel), tile, 1)
    except BackendError:
        return False
    return True


@contextmanager
def unscaled_points() -> Iterator[None]:
    """F(4, 3) with the points 0, 1, -1, 2, -2 of other implementations, where ours are 3/4 of them."""
    plain = [Fraction(p) for p in (0, 1, -1, 2, -2)]
    transforms.cook_toom.cache_clear()
    with mock.patch.object(transforms, "points", lambda count: plain[:count]):
        yield
    transforms.cook_toom.cache_clear()


def errors(kernel: tuple[int, ...], channels: int, draws: int) -> dict[str, list[float]]:
    """For "direct" and each tile and backend: the largest errors of output, input's and weight's gradient."""
    padding = tuple(r // 2 for r in kernel)
    forms: dict[str, Convolution] = {"direct": lambda x, w: F.conv3d(x, w, None, 1, padding)}
    for tile, backend in itertools.product(TILES[kernel], ("torch", "native")):
        if runs(backend, kernel, tile):
            form = partial(fast_conv3d, tile=tile, padding=padding, backend=backend)
            name = f"{'x'.join(map(str, tile))} {backend}"
            forms[name] = form
            if backend == "torch" and max(tile) == 4:
                forms[f"{name}{UNSCALED}"] = form
    worst = {name: [0.0] * 3 for name in forms}
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, channels, *SIZE, generator=generator).relu()
        bound = 1 / math.sqrt(channels * math.prod(kernel))
        weight = (torch.rand(OUT_CHANNELS, channels, *kernel, generator=generator) * 2 - 1) * bound
        gradient = torch.randn(1, OUT_CHANNELS, *SIZE, generator=generator)
        exact = results(forms["direct"], x.double(), weight.double(), gradient.double())
        for name, form in forms.items():
            with unscaled_points() if name.endswith(UNSCALED) else nullcontext():
                found = results(form, x, weight, gradient)
            for i, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
                error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
                worst[name][i] = max(worst[name][i], error)
    return worst


def strided_error(
    kernel: tuple[int, ...], channels: int, module: Any, tile: tuple[int, ...] | None, draws: int
) -> float:
    """Of a form at stride 2 in the plane, or of torch's own convolution where `tile` is None."""
    shape = {"stride": (1, 2, 2), "padding": tuple(r // 2 for r in kernel)}
    worst = 0.0
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, channels, *SIZE, generator=generator).relu()
        bound = 1 / math.sqrt(channels * math.prod(kernel))
        weight = (torch.rand(OUT_CHANNELS, channels, *kernel, generator=generator) * 2 - 1) * bound
        exact = F.conv3d(x.double(), weight.double(), **shape)
        if tile is None:
            y = F.conv3d(x, weight, **shape)
        else:
            y = module.pack(weight, **shape, algorithm=native_fast_conv.name_of(tile))(x)
        worst = max(worst, ((y - exact).abs().max() / exact.abs().max()).item())
    return worst


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    rows = []
    table = Table(
        "kernel", "form", "channels", "output", "gradient of x", "gradient of weight", title="errors, float32"
    )
    for kernel in TILES:
        found = {channels: errors(kernel, channels, args.draws) for channels in CHANNELS}
        for name in found[CHANNELS[0]]:
            for channels in CHANNELS:
                y, dx, dw = (float(f"{error:.1e}") for error in found[channels][name])
                shape = "x".join(map(str, kernel))
                rows.append({"kernel": shape, "form": name, "channels": channels, "output": y, "dx": dx, "dweight": dw})
                table.add_row(shape, name, str(channels), f"{y:.1e}", f"{dx:.1e}", f"{dw:.1e}")
    for (kernel, _, module, tile), channels in ((case, count) for case in STRIDED for count in case[1]):
        shape = "x".join(map(str, kernel)) + ", stride 2"
        forms = {"direct": None, **({f"{'x'.join(map(str, tile))} native": tile} if native.available() else {})}
        for name, wanted in forms.items():
            y = float(f"{strided_error(kernel, channels, module, wanted, args.draws):.1e}")
            rows.append({"kernel": shape, "form": name, "channels": channels, "output": y})
            table.add_row(shape, name, str(channels), f"{y:.1e}")
    Console().print(table)
    result = {
        "benchmark": "fast_conv_error",
        "draws": args.draws,
        "size": list(SIZE),
        "out_channels": OUT_CHANNELS,
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "native": native.absence() or "there",
        "rows": rows,
    }
    print(json.dumps(result))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "fast_conv_error.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
