"""A training step with the forms in `lean3d.ops` against the same nets spelled out in torch's own 3D layers.

    python benchmarks/training_step.py [--threads 2] [--rounds 5]

Both nets have the same weights and get the same batch. Their losses and gradients are compared first; then forward,
backward and optimizer step are timed in interleaved rounds, both nets in one process that keeps freed memory, as
lean3d's training does: what that saves is given to both sides alike. The single operators, forward and backward,
follow; the tests hold them against the same references. Prints tables and one JSON line, and keeps the latter in
`benchmarks/results/training_step.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lean3d
from lean3d.blocks import Conv3d, Pool3d
from lean3d.blocks.stem import SpatialMaxPool
from lean3d.engine.setup import keep_freed_memory
from lean3d.models import create_model
from lean3d.models.c3d import ShrinkPool
from lean3d.ops import conv3d, conv3d_reference, native, pool3d, pool3d_reference

Operator = Callable[[Tensor], Tensor]
NETS = {"c3d_light": (4, 3, 16, 112, 112), "smallbig18": (4, 3, 8, 112, 112), "x3d_s": (4, 3, 13, 160, 160)}


class LiteralPool(nn.Module):
    """`Pool3d` by torch's `max_pool3d`."""

    def __init__(self, window: tuple[int | None, int | None, int | None]):
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same, or 1 along whole axes."""
        return pool3d_reference(x, self.window)


class LiteralNorm(nn.BatchNorm3d):
    """Under a class of its own `blocks.norm.normalise` calls the module, and the ReLU after it, as they are."""


def literal(model: nn.Module) -> nn.Module:
    """The same net and weights from `nn.Conv3d`, `nn.MaxPool3d`, `nn.BatchNorm3d` and `nn.ReLU`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv3d):
                child.__class__ = nn.Conv3d
            elif isinstance(child, nn.BatchNorm3d):
                child.__class__ = LiteralNorm
            elif isinstance(child, Pool3d):
                setattr(parent, name, LiteralPool(child.window))
            elif isinstance(child, SpatialMaxPool):
                setattr(parent, name, nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
            elif isinstance(child, ShrinkPool):
                setattr(parent, name, nn.MaxPool3d(child.window, child.window, ceil_mode=True))
    return model


def loss_and_gradients(model: nn.Module, clips: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """One forward and backward without an optimizer step."""
    model.zero_grad()
    loss = F.cross_entropy(model(clips), labels)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def time_step(model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(clips), labels).backward()
    optimizer.step()
    return time.perf_counter() - start


def compare(name: str, shape: tuple[int, ...], rounds: int) -> dict:
    """Parity, then medians of interleaved rounds."""
    torch.manual_seed(0)
    clips, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])
    nets = {"lean3d": create_model(name, num_classes=10, dropout=0.0).train()}
    nets["conv3d"] = literal(nets["lean3d"])
    small = clips[:2, :, :, ::2, ::2].double()  # in float32, BN over few values blows rounding up
    (loss_a, grad_a), (loss_b, grad_b) = (
        loss_and_gradients(copy.deepcopy(net).double(), small, labels[:2]) for net in nets.values()
    )
    gradient_error = ((grad_a - grad_b).norm() / grad_b.norm()).item()
    if abs(loss_a - loss_b) > 1e-9 * abs(loss_b) or gradient_error > 1e-9:
        raise SystemExit(f"{name}: the forms differ: losses {loss_a} {loss_b}, gradients by {gradient_error:.1e}")
    optimizers = {kind: torch.optim.SGD(net.parameters(), lr=1e-3) for kind, net in nets.items()}
    times: dict[str, list[float]] = {kind: [] for kind in nets}
    for round_number in range(rounds + 1):
        for kind, net in nets.items():
            seconds = time_step(net, optimizers[kind], clips, labels)
            if round_number:  # the first one warms up
                times[kind].append(seconds)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "model": name,
        "batch": list(shape),
        "conv3d_ms": round(medians["conv3d"] * 1e3, 1),
        "lean3d_ms": round(medians["lean3d"] * 1e3, 1),
        "ratio": round(medians["conv3d"] / medians["lean3d"], 2),
        "gradient_error": float(f"{gradient_error:.1e}"),
    }


def compare_operator(name: str, shape: tuple[int, ...], ours: Operator, reference: Operator, rounds: int) -> dict:
    """Medians of forward and backward: ours in channels_last_3d, the reference in torch's default layout."""
    torch.manual_seed(0)
    x = torch.randn(shape).relu()
    inputs = {"lean3d": x.contiguous(memory_format=torch.channels_last_3d), "conv3d": x.contiguous()}
    times: dict[str, list[float]] = {kind: [] for kind in inputs}
    for round_number in range(rounds + 1):
        for kind, operator in (("lean3d", ours), ("conv3d", reference)):
            leaf = inputs[kind].detach().requires_grad_()
            gradient = torch.ones_like(operator(leaf.detach()))
            start = time.perf_counter()
            operator(leaf).backward(gradient)
            if round_number:
                times[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "operator": name,
        "input": list(shape),
        "conv3d_ms": round(medians["conv3d"] * 1e3, 1),
        "lean3d_ms": round(medians["lean3d"] * 1e3, 1),
        "ratio": round(medians["conv3d"] / medians["lean3d"], 2),
    }


def operators() -> list[tuple[str, tuple[int, ...], Operator, Operator]]:
    """Name, input, ours and the reference."""
    shape = (8, 64, 8, 28, 28)
    kernels = {
        "temporal 3x1x1": (3, 1, 1),
        "depthwise 1x3x3": (1, 3, 3),
        "depthwise 3x3x3": (3, 3, 3),
        "pointwise 1x1x1": (1, 1, 1),
    }
    rows: list[tuple[str, tuple[int, ...], Operator, Operator]] = []
    for name, kernel in kernels.items():
        groups = 64 if name.startswith("depthwise") else 1
        weight = torch.randn(64, 64 // groups, *kernel, requires_grad=True)
        settings = {"padding": tuple(k // 2 for k in kernel), "groups": groups}
        ours = partial(conv3d, weight=weight, **settings)
        rows.append((name, shape, ours, partial(conv3d_reference, weight=weight, **settings)))
    pools = partial(pool3d, window=(3, 3, 3)), partial(pool3d_reference, window=(3, 3, 3))
    return [*rows, ("max pooling 3x3x3", shape, *pools)]


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows = [compare(name, shape, args.rounds) for name, shape in NETS.items()]
    table = Table("model", "batch", "conv3d, ms", "lean3d, ms", "ratio", title=f"training step, {args.threads} threads")
    for row in rows:
        shape = "x".join(map(str, row["batch"]))
        table.add_row(row["model"], shape, f"{row['conv3d_ms']}", f"{row['lean3d_ms']}", f"{row['ratio']}x")
    Console().print(table)
    parts = [compare_operator(*operator, args.rounds) for operator in operators()]
    table = Table("operator", "input", "conv3d, ms", "lean3d, ms", "ratio", title="forward and backward")
    for row in parts:
        shape = "x".join(map(str, row["input"]))
        table.add_row(row["operator"], shape, f"{row['conv3d_ms']}", f"{row['lean3d_ms']}", f"{row['ratio']}x")
    Console().print(table)
    result = {
        "benchmark": "training_step",
        "threads": args.threads,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "native": native.kernels().isa() if native.available() else None,
        "rows": rows,
        "operators": parts,
    }
    print(json.dumps(result))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "training_step.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
