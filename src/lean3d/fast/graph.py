"""What a net is while it is compiled: operations on values, in the order in which they run.

Values are what tensors will be: a shape and a dtype. Activations `(N, C, T, H, W)` are kept in `torch.channels_last_3d`
all the way, so that time folds into the batch, and the plane into one axis, without copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from lean3d.ops.conv.reference import Triple
from lean3d.ops.fused_conv import TemporalConv
from lean3d.ops.pool.reference import Window


@dataclass(eq=False)
class Value:
    """A tensor that is yet to be computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(eq=False)
class Op:
    """An operation.

    Args:
        inputs: the values that it reads.
        outputs: those that it makes; all but `Call` make one.
        sources: the events of the net's run that it stands for, as indices of `Graph.events`.
    """

    inputs: list[Value]
    outputs: list[Value]
    sources: list[int] = field(default_factory=list, kw_only=True)

    @property
    def output(self) -> Value:
        """The only output."""
        return self.outputs[0]

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        return f"{type(self).__name__} {' '.join(_shape(v) for v in self.inputs)} -> {_shape(self.output)}"


@dataclass(eq=False)
class Conv(Op):
    """`relu(conv(x) + bias + residual)`; inputs are x and, where there is one, the residual.

    The residual has the output's shape, or length 1 in time.
    """

    weight: Tensor
    """`(O, C / groups, K, R, S)`."""
    bias: Tensor | None
    """`(O,)`."""
    stride: Triple
    padding: Triple
    groups: int
    relu: bool = False

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        kernel = "x".join(map(str, self.weight.shape[2:]))
        text = f"{super().signature()} k{kernel} s{_join(self.stride)} p{_join(self.padding)} g{self.groups}"
        return text + " bias" * (self.bias is not None) + " relu" * self.relu


@dataclass(eq=False)
class ConvPool(Conv):
    """The maxima of a convolution over windows side by side in the plane; it has no residual."""

    shrink: Triple = (1, 1, 1)
    """The window, 1 in time."""

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        return f"{super().signature()} shrink{_join(self.shrink)}"

    def between(self) -> tuple[int, ...]:
        """The shape of what the convolution makes."""
        n, _, *places = self.inputs[0].shape
        sizes = zip(places, self.weight.shape[2:], self.stride, self.padding, strict=True)
        return (n, self.weight.shape[0], *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes))


@dataclass(eq=False)
class SmallBig(Op):
    """`relu(conv(x) + conv_big(pool(x)) + bias + residual)`, pooling a maximum.

    Inputs are x and, where there is one, the residual.
    """

    weight: Tensor
    big_weight: Tensor
    """Of the same shape; with the shared convolution it differs from `weight` by the scale of its normalisation."""
    bias: Tensor
    window: Window
    stride: Triple
    padding: Triple
    relu: bool = False

    @cached_property
    def ratio(self) -> Tensor | None:
        """`(O,)`: big_weight = ratio * weight in each output channel, but for rounding; None where that is not so."""
        big, small = self.big_weight.double().flatten(1), self.weight.double().flatten(1)
        ratio = (big * small).sum(1) / (small * small).sum(1)
        error = (big - ratio[:, None] * small).abs().amax(1)
        same = ratio.isfinite().all() and (error <= 1e-6 * big.abs().amax(1)).all()
        return ratio.float() if same else None

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        kernel = "x".join(map(str, self.weight.shape[2:]))
        window = "x".join("T" if k is None else str(k) for k in self.window)
        text = f"{super().signature()} k{kernel} s{_join(self.stride)} p{_join(self.padding)} w{window}"
        return text + " relu" * self.relu


@dataclass(eq=False)
class StageTwo(Op):
    """`relu(pointwise(relu(depthwise(x))) + residual)`, each with its bias; inputs are x and, if any, the residual.

    A convolution in time may come first, and a maximum over windows side by side last; with the latter there is no
    residual.
    """

    depthwise: Tensor
    """`(C, 1, 1, R, S)`."""
    depthwise_bias: Tensor | None
    stride: Triple
    padding: Triple
    pointwise: Tensor
    """`(O, C, 1, 1, 1)`."""
    bias: Tensor | None
    middle_relu: bool
    relu: bool = False
    temporal: TemporalConv | None = None
    shrink: Triple = (1, 1, 1)

    def between(self) -> list[tuple[int, ...]]:
        """Shapes of what the convolution in time, the depthwise and the pointwise one make."""
        n, c, t, h, w = self.inputs[0].shape
        if self.temporal is not None:
            c, _, k, *_ = self.temporal.weight.shape
            t = (t + 2 * self.temporal.padding - k) // self.temporal.stride + 1
        (_, *s), (_, *p), (*_, r, q) = self.stride, self.padding, self.depthwise.shape
        h_out, w_out = (h + 2 * p[0] - r) // s[0] + 1, (w + 2 * p[1] - q) // s[1] + 1
        return [(n, c, t, h, w), (n, c, t, h_out, w_out), (n, self.pointwise.shape[0], t, h_out, w_out)]

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        kernel = "x".join(map(str, self.depthwise.shape[2:]))
        text = (
            f"{super().signature()} c{self.depthwise.shape[0]} k{kernel} s{_join(self.stride)} p{_join(self.padding)}"
        )
        if self.temporal is not None:
            first = self.temporal
            text += f" after k{first.weight.shape[2]} s{first.stride} p{first.padding}" + " relu" * first.relu
        if self.shrink != (1, 1, 1):
            text += f" shrink{_join(self.shrink)}"
        return text + " middle_relu" * self.middle_relu + " relu" * self.relu


@dataclass(eq=False)
class MaxPool(Op):
    """Max pooling; windows that reach over the border see what is inside.

    A kernel of None is the whole axis, whose output then has length 1.
    """

    kernel: Window
    stride: Triple
    padding: Triple

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        kernel = "x".join("T" if k is None else str(k) for k in self.kernel)
        return f"{super().signature()} k{kernel} s{_join(self.stride)} p{_join(self.padding)}"


@dataclass(eq=False)
class Gradient(Op):
    """The Temporal Residual Gradient of a clip: T - 1 differences of frames and their mean."""

    mean_first: bool
    beside: bool
    """Whether it stands beside x, as further channels."""

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        return super().signature() + " mean_first" * self.mean_first + " beside" * self.beside


@dataclass(eq=False)
class Affine(Op):
    """`x * scale + shift`, channel by channel: a batch normalisation that no convolution took in."""

    scale: Tensor
    shift: Tensor


@dataclass(eq=False)
class Elementwise(Op):
    """One of torch's functions of one or two tensors, broadcast as torch does, that can write where it reads."""

    function: str
    """"relu", "silu", "sigmoid", "add" or "mul"."""

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        return f"{self.function} {super().signature()}"


@dataclass(eq=False)
class Concat(Op):
    """The inputs side by side along the channels."""


@dataclass(eq=False)
class Call(Op):
    """Anything else: a function or a module of torch, called as the net calls it.

    `args` and `kwargs` hold Values where the net has tensors that depend on the input.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str

    def run(self, values: dict[Value, Tensor]) -> list[Tensor]:
        """All tensors of the result, in order."""
        args, kwargs = tree_map_only(Value, values.__getitem__, (self.args, self.kwargs))
        flat, _ = tree_flatten(self.function(*args, **kwargs))
        return [y for y in flat if isinstance(y, Tensor)]

    def signature(self) -> str:
        """All that an algorithm's time depends on, but for machine and threads."""
        return f"{self.name} {' '.join(_shape(v) for v in self.inputs)}"

    def replace(self, old: Value, new: Value) -> None:
        """Read `new` in place of `old`."""
        self.args, self.kwargs = tree_map_only(Value, lambda v: new if v is old else v, (self.args, self.kwargs))


@dataclass(eq=False)
class Graph:
    """A net for inputs of given shapes."""

    inputs: list[Value]
    ops: list[Op]
    result: Any
    """What the net returns, with Values for tensors: one, or lists, tuples and dictionaries of them."""
    events: list[str]
    """The names of the modules in which the net's run called a layer or a function, call by call."""
    opaque: frozenset[str] = frozenset()
    """Names of the modules that run as they are."""

    def results(self) -> list[Value]:
        """The values in `result`."""
        return [v for v in tree_flatten(self.result)[0] if isinstance(v, Value)]

    def users(self) -> dict[Value, list[Op]]:
        """The operations that read a value; twice where one reads it twice."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                users.setdefault(value, []).append(op)
        return users

    def replace(self, old: Value, new: Value) -> None:
        """Let all who read `old` read `new`."""
        for op in self.ops:
            if old in op.inputs:
                op.inputs = [new if v is old else v for v in op.inputs]
                if isinstance(op, Call):
                    op.replace(old, new)
        self.result = tree_map_only(Value, lambda v: new if v is old else v, self.result)

    def drop_unused(self) -> None:
        """Remove operations whose outputs nobody reads."""
        wanted = set(self.results())
        kept: list[Op] = []
        for op in reversed(self.ops):
            if wanted.intersection(op.outputs):
                kept.append(op)
                wanted.update(op.inputs)
        self.ops = kept[::-1]

    def signature(self) -> Iterator[str]:
        """All of it as text, wires included: two graphs with the same text differ in weights alone."""
        numbers = {value: i for i, value in enumerate(self.inputs)}
        yield " ".join(_shape(v) for v in self.inputs)
        for op in self.ops:
            reads = [numbers[v] for v in op.inputs]
            for v in op.outputs:
                numbers[v] = len(numbers)
            yield f"{op.signature()} {reads} {[numbers[v] for v in op.outputs]}"


def _shape(value: Value) -> str:
    return "x".join(map(str, value.shape))


def _join(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
