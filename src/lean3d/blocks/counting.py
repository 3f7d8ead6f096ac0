"""What a net costs: weights, multiply-accumulates, and multiplications under the hybrid fast algorithm.

Counting runs the net once on the meta device, where tensors have shapes and no numbers: nothing is computed, and nets
of any size are counted in a moment. Each convolution and matrix product is seen where PyTorch carries it out, so
shared convolutions count as often as they run, and a branch that is one time step long counts as one time step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lean3d.errors import ConfigError
from lean3d.ops import fast_conv  # noqa: F401  registers the operator that is counted by its own tile

TILES = (2, 4)
"""The m of the F(m, r) that are considered."""


@dataclass(frozen=True)
class LayerCost:
    """One layer's part of a `Cost`."""

    name: str
    """The module's name, such as ``stages.0.0.units.1.conv``."""
    kind: str
    """Its class, such as ``Conv3d``; for a matrix product outside of a layer, the class of the module around it."""
    kernel: tuple[int, ...]
    """Kernel sizes in time, height, width; empty for matrix products."""
    weights: int
    """Its own parameters."""
    macs: int
    """Multiply-accumulates, over all times that it ran."""
    multiplications: int
    """Multiplications with `algorithm`."""
    algorithm: str
    """``direct``, or the fast algorithm, such as ``F(4, 3)`` in time or ``F(4x4, 3x3)`` in the plane."""


@dataclass(frozen=True)
class Cost:
    """What one pass through a net costs; `print` shows it as a table."""

    weights: int
    """All parameters, normalisations and biases included."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products; what papers call GFLOPs is 1e9 of them."""
    multiplications: int
    """The same, each convolution by the fast algorithm that needs the fewest multiplications."""
    layers: tuple[LayerCost, ...]
    """The layers that multiply, in the order in which they first run."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = []
        rows.append(("layer", "kind", "kernel", "weights", "MACs", "multiplications", "algorithm"))
        for x in self.layers:
            numbers = (f"{number:,}" for number in (x.weights, x.macs, x.multiplications))
            rows.append((x.name, x.kind, "x".join(map(str, x.kernel)), *numbers, x.algorithm))
        rows.append(("total", "", "", f"{self.weights:,}", f"{self.macs:,}", f"{self.multiplications:,}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = "<<<>>><"
        return "\n".join(
            "  ".join(f"{x:{side}{width}}" for x, side, width in zip(row, sides, widths, strict=True)) for row in rows
        )


def fast_multiplications(
    outputs: Sequence[int], kernel: Sequence[int], stepped: Sequence[bool], tiles: Sequence[int] = TILES
) -> tuple[int, str]:
    """Multiplications that one channel pair of a convolution needs, and the algorithm (Lavin & Gray, CVPR 2016).

    Along an axis, F(m, r) computes m outputs of an r-tap filter in m + r - 1 multiplications; a last tile that is not
    full counts as a full one. Axes nest, so their counts multiply. Each axis takes the m with the fewest
    multiplications, one by one (m = 1: direct) where that is fewer still. Transforms are additions and products with
    constants and are not counted, as in the source.

    Args:
        outputs: the output's size along each axis.
        kernel: the kernel's size along each axis.
        stepped: the axes that have a stride or a dilation; they are computed directly.
        tiles: the m to choose from.
    """
    tile = [
        min((1, *(tiles if r > 1 and not direct else ())), key=lambda m: math.ceil(size / m) * (m + r - 1))
        for size, r, direct in zip(outputs, kernel, stepped, strict=True)
    ]
    return _tile_multiplications(outputs, kernel, tile)


def _tile_multiplications(outputs: Sequence[int], kernel: Sequence[int], tile: Sequence[int]) -> tuple[int, str]:
    """The same for a given m on each axis."""
    total = math.prod(math.ceil(size / m) * (m + r - 1) for size, r, m in zip(outputs, kernel, tile, strict=True))
    chosen = [(m, r) for m, r in zip(tile, kernel, strict=True) if m > 1]
    if not chosen:
        return total, "direct"
    return total, f"F({'x'.join(str(m) for m, _ in chosen)}, {'x'.join(str(r) for _, r in chosen)})"


def count(model: nn.Module, input_shape: Sequence[int], *, tiles: Sequence[int] = TILES) -> Cost:
    """The cost of one pass of a model in eval mode; the model itself is left alone.

    Args:
        model: any module that takes one tensor.
        input_shape: of that tensor, such as (1, 3, 16, 112, 112).
        tiles: the m of the F(m, r) that convolutions may use; see `fast_multiplications`.
    """
    if not all(m > 1 for m in tiles):
        raise ConfigError(f"tiles are the m of F(m, r), each above 1; got {tuple(tiles)}")
    ghost = _on_meta(model).eval()
    recorder = _Recorder(tuple(tiles))
    with torch.no_grad(), _tracked(ghost, recorder.stack), recorder:
        ghost(torch.empty(tuple(input_shape), device="meta"))
    layers = tuple(recorder.layers.values())
    return Cost(
        weights=sum(p.numel() for p in ghost.parameters()),
        macs=sum(layer.macs for layer in layers),
        multiplications=sum(layer.multiplications for layer in layers),
        layers=layers,
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without numbers: parameters and buffers are replaced before they are copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


@contextmanager
def _tracked(model: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the modules that are running right now, with their names, on `stack`."""

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, _, name=name: stack.append((name, m))))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):
    """Sees every operator that PyTorch carries out, and notes those that multiply under the module that runs."""

    def __init__(self, tiles: tuple[int, ...]):
        super().__init__()
        self.tiles = tiles
        self.stack: list[tuple[str, nn.Module]] = []
        self.layers: dict[str, LayerCost] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=out) // 2
            if func._overloadpacket is torch.ops.aten.convolution:
                self._add(macs, *self._convolution(macs, out, *args))
            elif func._overloadpacket is torch.ops.lean3d.fast_conv3d:  # with a tile of its own
                kernel, sizes, tile = args[1].shape[2:], out.shape[2:], args[6]
                fast, algorithm = _tile_multiplications(sizes, kernel, tile)
                self._add(macs, macs // (math.prod(sizes) * math.prod(kernel)) * fast, algorithm)
            else:
                self._add(macs, macs, "direct")
        return out

    def _convolution(
        self,
        macs: int,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        *_: Any,
    ) -> tuple[int, str]:
        if transposed:
            return macs, "direct"
        sizes, kernel = out.shape[2:], weight.shape[2:]
        stepped = [s > 1 or d > 1 for s, d in zip(stride, dilation, strict=True)]
        fast, algorithm = fast_multiplications(sizes, kernel, stepped, self.tiles)
        return macs // (math.prod(sizes) * math.prod(kernel)) * fast, algorithm

    def _add(self, macs: int, multiplications: int, algorithm: str) -> None:
        name, module = self.stack[-1]
        weights = sum(p.numel() for p in module.parameters(recurse=False))
        before = self.layers.get(name)
        if before is not None:
            macs, multiplications = before.macs + macs, before.multiplications + multiplications
            known = before.algorithm.split(" + ")
            algorithm = " + ".join([*known, *([] if algorithm in known else [algorithm])])
        kernel = tuple(getattr(module, "kernel_size", ())) if isinstance(module, nn.modules.conv._ConvNd) else ()
        self.layers[name] = LayerCost(name, type(module).__name__, kernel, weights, macs, multiplications, algorithm)
