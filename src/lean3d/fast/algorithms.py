"""The ways in which an operation can be computed. All give the same numbers, but for rounding; which one is fastest
depends on the shape and on the machine, and is measured.

    native      kernels of lean3d's own: direct, fast (Winograd), depthwise, and the fused ones
    torch       oneDNN by way of PyTorch, in the forms that it serves well: flat kernels in two dimensions, weights
                packed once, residual and ReLU in the convolution's own pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.fast.graph import (
    Affine,
    Call,
    Concat,
    Conv,
    ConvPool,
    Elementwise,
    Gradient,
    MaxPool,
    Op,
    SmallBig,
    StageTwo,
)
from lean3d.ops import fast_conv, fused_conv, native
from lean3d.ops.conv.op import fold_time
from lean3d.ops.fast_conv import native as native_fast_conv
from lean3d.ops.fast_conv import native_time
from lean3d.ops.pool.op import max_pool3d, pool3d

Run = Callable[[Sequence[Tensor], Tensor | None], Tensor]

WIDE = 128
"""Channels from which the fast algorithm in plain PyTorch may pay."""


@dataclass(frozen=True)
class Kernel:
    """An algorithm with its weights packed, ready to run.

    Args:
        run: inputs, out -> the output, in `torch.channels_last_3d` where it has five axes.
        fills: whether it writes into the `out` that it is given; else it makes its own tensor and wants None.
        in_place: the inputs whose memory `out` may be.
    """

    run: Run
    fills: bool = False
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """A way to compute an operation.

    Args:
        name: "native ..." or "torch ...".
        pack: makes the kernel.
        rounds: whether it may round more than the direct form.
        weights: bytes of its packed weights, where they are many.
    """

    name: str
    pack: Callable[[], Kernel]
    rounds: bool = False
    weights: int = 0


def algorithms(op: Op) -> list[Algorithm]:
    """All that can compute an operation here, those that are likely to be fast first."""
    return _ALGORITHMS[type(op)](op)


def backend() -> str:
    """What algorithms are made of here, in words."""
    if not native.available():
        return f"torch alone ({native.absence()})"
    return f"native {native.kernels().isa()}, torch"


# ---- convolution


def _conv(op: Any) -> list[Algorithm]:
    found: list[Algorithm] = []
    shape = {"stride": op.stride, "padding": op.padding, "groups": op.groups}
    plain = 4 * op.weight.numel()
    for module, rounds in ((fused_conv, False), (native_fast_conv, True), (native_time, True)):
        for name in module.algorithms(op.weight.shape, **shape):
            size = 4 * native_fast_conv.packed_size(op.weight.shape, name, op.stride) if rounds else plain
            found.append(Algorithm(f"native {name}", _native_conv(op, module, name), rounds, size))
    found += [Algorithm(f"torch {name}", _torch_conv(op, form), weights=plain) for name, form in _forms(op)]
    *_, kt, kh, kw = op.weight.shape
    wide = min(op.weight.shape[:2]) >= WIDE and op.groups == 1 and op.stride == (1, 1, 1)
    if wide and kh * kw > 1 and not native.available():
        tile = fast_conv.auto_tile(op.output.shape[2:], (kt, kh, kw))
        if max(tile) > 1:
            name = native_fast_conv.name_of(tile)
            size = native_fast_conv.packed_size(op.weight.shape, name, op.stride)
            found.append(Algorithm(f"torch {name}", _torch_fast_conv(op, tile), True, 4 * size))
    return found


def _native_conv(op: Any, module: Any, name: str) -> Callable[[], Kernel]:
    relu = op.relu

    def pack() -> Kernel:
        conv = module.pack(op.weight, op.bias, stride=op.stride, padding=op.padding, groups=op.groups, algorithm=name)

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return conv(inputs[0], out, residual=inputs[1] if len(inputs) > 1 else None, relu=relu)

        return Kernel(run, fills=True, in_place=(1,))

    return pack


def _forms(op: Any) -> list[tuple[str, str]]:
    """(name, form) of the views in which oneDNN can do a convolution."""
    kt, kh, kw = op.weight.shape[2:]
    forms = []
    if kt == 1 and op.stride[0] == 1 and op.padding[0] == 0:
        forms.append(("conv2d", "plane"))
    elif kh == kw == 1 and op.stride[1:] == (1, 1) and op.padding[1:] == (0, 0):
        forms.append(("conv2d in time", "time"))
    if op.groups > 1 and kt % 2 and kt > 1 and op.stride[0] == 1 and op.padding[0] == kt // 2:
        forms.append(("conv2d by frame", "frames"))
    if kt == kh == kw == op.groups == 1 and op.stride != (1, 1, 1) and op.padding == (0, 0, 0):
        forms.append(("conv2d of a slice", "slice"))
    if not forms or (op.groups > 1 and kt > 1):
        forms.append(("conv3d", "space"))
    return forms


def _torch_conv(op: Any, form: str) -> Callable[[], Kernel]:
    def pack() -> Kernel:
        if form == "frames":
            return _by_frame(op)
        weight, stride, padding = op.weight, op.stride, op.padding
        x_shape = op.inputs[0].shape
        n, c, t, h, w = x_shape
        flat: Callable[[Tensor], Tensor]
        if form == "slice":
            size = (n * op.output.shape[2], c, *op.output.shape[3:])
            weight, stride, padding, flat = weight[:, :, 0], (1, 1), (0, 0), _sliced(op.stride)
        elif form == "plane":
            weight, stride, padding, flat, size = weight[:, :, 0], stride[1:], padding[1:], fold_time, (n * t, c, h, w)
        elif form == "time":
            weight, stride, padding = weight[..., 0], (stride[0], 1), (padding[0], 0)
            flat, size = _flat_plane, (n, c, t, h * w)
        else:
            flat, size = _as_it_is, tuple(x_shape)  # type: ignore[assignment]
        convolve = _one_dnn(weight, op.bias, stride, padding, op.groups, size, op.relu)
        places = op.output.shape[2:]

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            x = inputs[0]
            if out is None:
                y = convolve(flat(x), None)
                n = x.shape[0]
                y = y.unflatten(0, (n, -1)).transpose(1, 2) if form in ("plane", "slice") else y
                return y.unflatten(3, places[1:]) if form == "time" else y
            if out.data_ptr() != inputs[1].data_ptr():
                out.copy_(inputs[1])
            convolve(flat(x), fold_time(out) if form == "slice" else flat(out))
            return out

        residual = len(op.inputs) > 1
        return Kernel(run, fills=residual, in_place=(1,) if residual else ())

    return pack


def _sliced(stride: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What a strided pointwise kernel sees, copied together, with time folded into the batch."""
    t, h, w = stride
    return lambda x: fold_time(x[:, :, ::t, ::h, ::w].contiguous(memory_format=torch.channels_last_3d))


def _flat_plane(x: Tensor) -> Tensor:
    return x.flatten(3)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _one_dnn(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    size: Sequence[int],
    relu: bool,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(x, y) -> relu(conv(x) + bias), or, where y is given, y = relu(y + conv(x) + bias)."""
    dims = weight.ndim - 2
    stride, padding, dilation = list(stride), list(padding), [1] * dims
    if _has_one_dnn():
        ops = torch.ops.mkldnn
        packed = ops._reorder_convolution_weight(weight.contiguous(), padding, stride, dilation, groups, list(size))
        alone, onto = ops._convolution_pointwise.default, ops._convolution_pointwise_.binary
        after, unary = ("relu", "relu") if relu else ("none", None)

        def convolve(x: Tensor, y: Tensor | None) -> Tensor:
            if y is None:
                return alone(x, packed, bias, padding, stride, dilation, groups, after, [], "")
            return onto(y, x, packed, bias, padding, stride, dilation, groups, "add", 1.0, unary, [], "")

        return convolve
    plain, layout = (F.conv2d, torch.channels_last) if dims == 2 else (F.conv3d, torch.channels_last_3d)
    kept = weight.contiguous(memory_format=layout)

    def convolve_plainly(x: Tensor, y: Tensor | None) -> Tensor:
        z = plain(x, kept, bias, stride, padding, dilation, groups)
        z = z if y is None else y.add_(z)
        return z.relu_() if relu else z

    return convolve_plainly


def _has_one_dnn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def _by_frame(op: Any) -> Kernel:
    """A grouped K x R x S kernel as K flat ones, each added onto the frames that it reaches."""
    _, c, t, h, w = op.inputs[0].shape
    kt, pt = op.weight.shape[2], op.padding[0]
    taps = []
    for k in sorted(range(kt), key=lambda k: k != pt):  # the middle one first: it reaches all frames
        first, last = max(0, pt - k), min(t, t + pt - k)
        if first < last:
            bias = op.bias if k == pt else None
            size = (last - first, c, h, w)
            conv = _one_dnn(op.weight[:, :, k], bias, op.stride[1:], op.padding[1:], op.groups, size, False)
            taps.append((k - pt, first, last, conv))
    relu = op.relu

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        assert out is not None
        residual = len(inputs) > 1
        if residual and out.data_ptr() != inputs[1].data_ptr():
            out.copy_(inputs[1])
        for x, y in zip(_clips(inputs[0]), _clips(out), strict=True):
            for shift, first, last, conv in taps:
                part = x[first + shift : last + shift]
                if shift == 0 and not residual:
                    y.copy_(conv(part, None))
                else:
                    conv(part, y[first:last])
        return out.relu_() if relu else out

    return Kernel(run, fills=True, in_place=(1,))


def _clips(x: Tensor) -> list[Tensor]:
    """`(N, C, T, H, W)` -> N tensors `(T, C, H, W)`, views."""
    return [clip.transpose(0, 1) for clip in x]


def _torch_fast_conv(op: Any, tile: Any) -> Callable[[], Kernel]:
    def pack() -> Kernel:
        prepared = fast_conv.prepare_weight(op.weight, tile=tile, backend="torch")
        weight, bias, padding, relu = op.weight, op.bias, op.padding, op.relu

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            y = fast_conv.fast_conv3d(
                inputs[0], weight, bias, tile=tile, padding=padding, prepared=prepared, backend="torch"
            )
            if len(inputs) > 1:
                y += inputs[1]
            return y.relu_() if relu else y

        return Kernel(run)

    return pack


# ---- fused operations: in parts, see `passes.ways`, or by a native kernel


def _conv_pool(op: Any) -> list[Algorithm]:
    found = []
    ceil_mode = _shrinks_by_ceil(op, op.between())
    shape = {"stride": op.stride, "padding": op.padding, "groups": op.groups}

    def pack(name: str) -> Kernel:
        conv = native_time.pack(op.weight, op.bias, **shape, algorithm=name, shrink=op.shrink[1:], ceil_mode=ceil_mode)
        relu = op.relu
        return Kernel(lambda inputs, out: conv(inputs[0], out, relu=relu), fills=True)

    for name in native_time.algorithms(op.weight.shape, **shape):
        found.append(Algorithm(f"native {name}", partial(pack, name), True))
    return found


def _shrinks_by_ceil(op: Any, shape: Sequence[int]) -> bool:
    """Whether windows at the end that are not whole count, where `op.shrink` is done to this shape."""
    return op.output.shape[2:] != tuple(n // k for n, k in zip(shape[2:], op.shrink, strict=True))


def _small_big(op: Any) -> list[Algorithm]:
    if not native.available() or any(k is None for k in op.window[1:]):
        return []
    found = [Algorithm("native unit", _native_small_big(op), weights=8 * op.weight.numel())]
    if op.window[0] is None:
        return found
    both = (op.weight.shape[0], 2 * op.weight.shape[1], *op.weight.shape[2:])
    for name in native_fast_conv.algorithms(both, stride=op.stride, padding=op.padding):
        size = 4 * native_fast_conv.packed_size(both, name, op.stride)
        found.append(Algorithm(f"native {name} over both", _native_fast_small_big(op, name), True, size))
        if op.ratio is not None:
            found.append(Algorithm(f"native {name} shared", _native_shared_small_big(op, name), True, size // 2))
    return found


def _native_small_big(op: Any) -> Callable[[], Kernel]:
    def pack() -> Kernel:
        unit = fused_conv.pack_small_big(
            op.weight, op.big_weight, op.bias, window=op.window, stride=op.stride, padding=op.padding
        )
        relu = op.relu

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return unit(inputs[0], out, residual=inputs[1] if len(inputs) > 1 else None, relu=relu)

        return Kernel(run, fills=True, in_place=(1,))

    return pack


def _native_fast_small_big(op: Any, name: str) -> Callable[[], Kernel]:
    def pack() -> Kernel:
        both = torch.cat((op.weight, op.big_weight), 1)
        conv = native_fast_conv.pack(both, op.bias, stride=op.stride, padding=op.padding, algorithm=name)
        window, relu = op.window, op.relu

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            residual = inputs[1] if len(inputs) > 1 else None
            return conv(inputs[0], out, residual=residual, relu=relu, second=pool3d(inputs[0], window))

        return Kernel(run, fills=True, in_place=(1,))

    return pack


def _stage_two(op: Any) -> list[Algorithm]:
    channels = op.depthwise.shape[0]
    shape = {"stride": op.stride, "padding": op.padding, "groups": channels}
    if not native.available() or not fused_conv.algorithms(op.depthwise.shape, **shape):
        return []

    def pack() -> Kernel:
        stage = fused_conv.pack_stage_two(
            op.depthwise,
            op.depthwise_bias,
            op.pointwise,
            op.bias,
            stride=op.stride,
            padding=op.padding,
            middle_relu=op.middle_relu,
            temporal=op.temporal,
            shrink=op.shrink,
            ceil_mode=_shrinks_by_ceil(op, op.between()[2]),
        )
        relu = op.relu

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return stage(inputs[0], out, residual=inputs[1] if len(inputs) > 1 else None, relu=relu)

        return Kernel(run, fills=True, in_place=(1,))

    return [Algorithm("native stage two", pack)]


def _native_shared_small_big(op: Any, name: str) -> Callable[[], Kernel]:
    """x and what is pooled of it as two clips of one convolution, whose weights are there once and read once."""

    def pack() -> Kernel:
        conv = native_fast_conv.pack(op.weight, None, stride=op.stride, padding=op.padding, algorithm=name)
        ratio, bias = (v.view(-1, 1, 1, 1) for v in (op.ratio, op.bias))
        window, relu = op.window, op.relu
        padding = tuple(k // 2 for k in window)

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            x, *residual = inputs
            n = x.shape[0]
            both = torch.empty((2 * n, *x.shape[1:]), memory_format=torch.channels_last_3d)
            both[:n].copy_(x)
            max_pool3d(x, window, padding=padding, out=both[n:])
            y = conv(both)
            z = torch.addcmul(y[:n], y[n:], ratio, out=y[:n]).add_(bias)
            z = torch.add(z, residual[0], out=out) if residual else z
            return torch.clamp_min(z, 0, out=out) if relu else z if out is None else out.copy_(z)

        return Kernel(run, fills=True, in_place=(1,))

    return pack


# ---- pooling


def _max_pool(op: Any) -> list[Algorithm]:
    size = op.inputs[0].shape[2:]
    kernel = tuple(n if k is None else k for k, n in zip(op.kernel, size, strict=True))
    found = []
    if native.available():
        found.append(Algorithm("native", lambda: _native_max_pool(op, kernel)))
    found.append(Algorithm("torch slices", lambda: _sliced_max_pool(op, kernel)))
    found.append(Algorithm("torch max_pool", lambda: _torch_max_pool(op, kernel)))
    return found


def _ceil_mode(op: Any, kernel: Sequence[int]) -> bool:
    floor = [
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(op.inputs[0].shape[2:], kernel, op.stride, op.padding, strict=True)
    ]
    return floor != list(op.output.shape[2:])


def _native_max_pool(op: Any, kernel: Any) -> Kernel:
    stride, padding, ceil_mode = op.stride, op.padding, _ceil_mode(op, kernel)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        return max_pool3d(inputs[0], kernel, stride, padding, ceil_mode=ceil_mode, out=out)

    return Kernel(run, fills=True)


def _torch_max_pool(op: Any, kernel: Any) -> Kernel:
    stride, padding, ceil_mode = op.stride, op.padding, _ceil_mode(op, kernel)
    flat = kernel[0] == stride[0] == 1 and padding[0] == 0

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = inputs[0]
        if flat:
            y = F.max_pool2d(fold_time(x), kernel[1:], stride[1:], padding[1:], ceil_mode=ceil_mode)
            return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)

    return Kernel(run)


def _sliced_max_pool(op: Any, kernel: Any) -> Kernel:
    """One axis after another, each the maximum of its taps' slices."""
    axes = list(zip((2, 3, 4), kernel, op.stride, op.padding, op.output.shape[2:], strict=True))
    axes = [axis for axis in axes if axis[1:4] != (1, 1, 0)]
    axes.sort(key=lambda axis: -axis[2])  # those that shrink x come first

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = inputs[0]
        for dim, k, s, p, n in axes:
            x = _max_along(x, dim, k, s, p, n)
        return x if axes else x.clone()

    return Kernel(run)


def _max_along(x: Tensor, dim: int, k: int, stride: int, padding: int, n: int) -> Tensor:
    size = x.shape[dim]
    if n == 1 and k == size and padding == 0:
        return x.amax(dim, keepdim=True)
    shape = [*x.shape]
    shape[dim] = n
    y = torch.empty(shape, memory_format=torch.channels_last_3d)
    step = (slice(None),) * dim + (slice(None, None, stride),)
    taps = []
    for i in range(k):
        first = max(0, -((i - padding) // stride))
        last = min(n, (size - 1 + padding - i) // stride + 1)  # outputs whose place i is inside of x
        if first < last:
            start = first * stride - padding + i
            taps.append((first, last, x.narrow(dim, start, (last - first - 1) * stride + 1)[step]))
    taps.sort(key=lambda tap: tap[0] - tap[1])  # one that all outputs have comes first
    (_, last, whole), *others = taps
    if last - taps[0][0] < n or not others:
        y.fill_(-torch.inf)
        others = taps
    else:  # the first two at once
        first, last, part = others.pop(0)
        torch.maximum(whole.narrow(dim, first, last - first), part, out=y.narrow(dim, first, last - first))
        y.narrow(dim, 0, first).copy_(whole.narrow(dim, 0, first))
        y.narrow(dim, last, n - last).copy_(whole.narrow(dim, last, n - last))
    for first, last, part in others:
        torch.maximum(y.narrow(dim, first, last - first), part, out=y.narrow(dim, first, last - first))
    return y


# ---- the rest


def _elementwise(op: Any) -> list[Algorithm]:
    if op.function in ("add", "mul"):
        function: Any = {"add": torch.add, "mul": torch.mul}[op.function]

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return function(inputs[0], inputs[1], out=out)

    elif op.function == "relu":

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return torch.clamp_min(inputs[0], 0, out=out)

    else:
        write = {"silu": torch.ops.aten.silu.out, "sigmoid": torch.ops.aten.sigmoid.out}[op.function]

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return write(inputs[0], out=out)

    in_place = tuple(i for i, v in enumerate(op.inputs) if v.shape == op.output.shape)
    return [Algorithm(f"torch {op.function}", lambda: Kernel(run, fills=True, in_place=in_place))]


def _concat(op: Any) -> list[Algorithm]:
    widths = [v.shape[1] for v in op.inputs]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        assert out is not None
        for part, x in zip(out.split(widths, 1), inputs, strict=True):
            part.copy_(x)
        return out

    return [Algorithm("torch copy", lambda: Kernel(run, fills=True))]


def _gradient(op: Any) -> list[Algorithm]:
    """Written to where it belongs: joining slices that were made apart takes several times as long."""
    channels, frames = op.inputs[0].shape[1:3]
    mean = 0 if op.mean_first else frames - 1

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        assert out is not None
        x, y = inputs[0], out
        if op.beside:
            out[:, :channels].copy_(x)
            y = out[:, channels:]
        torch.mean(x, 2, keepdim=True, out=y.narrow(2, mean, 1))
        torch.sub(x[:, :, 1:], x[:, :, :-1], out=y.narrow(2, int(op.mean_first), frames - 1))
        return out

    return [Algorithm("torch differences", lambda: Kernel(run, fills=True))]


def _affine(op: Any) -> list[Algorithm]:
    def pack() -> Kernel:
        shape = (-1, *[1] * (len(op.output.shape) - 2))
        scale, shift = op.scale.float().view(shape), op.shift.float().view(shape)

        def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            return torch.addcmul(shift, inputs[0], scale, out=out)

        return Kernel(run, fills=True, in_place=(0,))

    return [Algorithm("torch addcmul", pack)]


def _call(op: Call) -> list[Algorithm]:
    """As the net has it; a result with five axes comes in the layout of all others."""

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Any:
        results = op.run(dict(zip(op.inputs, inputs, strict=True)))
        results = [y.contiguous(memory_format=torch.channels_last_3d) if y.ndim == 5 else y for y in results]
        return results[0] if len(results) == 1 else results

    return [Algorithm("torch", lambda: Kernel(run))]


_ALGORITHMS: dict[type, Callable[[Any], list[Algorithm]]] = {
    Conv: _conv,
    ConvPool: _conv_pool,
    SmallBig: _small_big,
    StageTwo: _stage_two,
    MaxPool: _max_pool,
    Elementwise: _elementwise,
    Concat: _concat,
    Gradient: _gradient,
    Affine: _affine,
    Call: _call,
}
