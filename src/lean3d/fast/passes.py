"""What is done to a graph before algorithms are chosen: the same function in fewer, larger operations."""

from __future__ import annotations

import dataclasses
import math

import torch

from lean3d.fast.graph import Affine, Conv, ConvPool, Elementwise, Graph, MaxPool, Op, SmallBig, StageTwo, Value
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fused_conv import TemporalConv
from lean3d.ops.fused_conv.op import MAX_SHRINK


def simplify(graph: Graph) -> None:
    """All passes, in their order."""
    fold_normalisations(graph)
    fuse_small_big(graph)
    fuse_additions(graph)
    fuse_stage_two(graph)
    fuse_around_stage_two(graph)
    fuse_pooling(graph)
    graph.drop_unused()


def fold_normalisations(graph: Graph) -> None:
    """`BN(conv(x))` is a convolution with scaled weights and another bias; folded in float64, rounded once."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    for op in graph.ops:
        if not isinstance(op, Affine):
            continue
        conv = makers.get(op.inputs[0])
        if not isinstance(conv, Conv) or len(users[conv.output]) > 1 or conv.output in keep or conv.relu:
            continue
        bias = op.shift if conv.bias is None else op.shift + op.scale * conv.bias.double()
        conv.weight = (conv.weight.double() * op.scale[:, None, None, None, None]).float()
        conv.bias = bias.float()
        conv.outputs = op.outputs
        conv.sources += op.sources
        makers[op.output] = conv
        op.outputs = []
    graph.ops = [op for op in graph.ops if op.outputs]


def fuse_small_big(graph: Graph) -> None:
    """`conv(x) + conv_big(pool(x))`, pooling at stride 1: the SmallBig unit."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    for place, op in enumerate(graph.ops):
        if not isinstance(op, Elementwise) or op.function != "add" or len(op.inputs) != 2:
            continue
        convs = [makers.get(v) for v in op.inputs]
        for small, big in (convs, convs[::-1]):
            if not _plain_conv(small) or not _plain_conv(big) or small is big:
                continue
            assert isinstance(small, Conv) and isinstance(big, Conv)
            pool = makers.get(big.inputs[0])
            if not isinstance(pool, MaxPool) or pool.stride != (1, 1, 1) or pool.inputs[0] is not small.inputs[0]:
                continue
            if any(len(users[v]) > 1 or v in keep for v in (small.output, big.output)):
                continue
            same = small.weight.shape == big.weight.shape and small.groups == big.groups == 1
            if not same or (small.stride, small.padding) != (big.stride, big.padding) or small.weight.shape[2] != 1:
                continue
            bias = torch.zeros(small.weight.shape[0])
            for part in (small.bias, big.bias):
                bias = bias if part is None else bias + part
            fused = SmallBig(
                [small.inputs[0]],
                op.outputs,
                small.weight,
                big.weight,
                bias,
                pool.kernel,
                small.stride,
                small.padding,
                sources=[*small.sources, *pool.sources, *big.sources],
            )
            graph.ops[place] = fused
            makers[fused.output] = fused
            small.outputs = big.outputs = []
            break
    graph.ops = [op for op in graph.ops if op.outputs]
    graph.drop_unused()


def fuse_additions(graph: Graph) -> None:
    """A residual and a ReLU behind a convolution become its last step."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    place = {op: i for i, op in enumerate(graph.ops)}
    for op in list(graph.ops):
        if not isinstance(op, Elementwise) or not op.outputs:
            continue
        if op.function == "add":
            ready = [
                (place[m], v)
                for v in op.inputs
                if isinstance(m := makers.get(v), Conv | SmallBig)
                and len(m.inputs) == 1
                and not m.relu
                and len(users[v]) == 1
                and v not in keep
                and v.shape == op.output.shape
            ]
            if not ready or op.inputs[0] is op.inputs[1]:
                continue
            value = max(ready, key=lambda pair: pair[0])[1]
            other = op.inputs[1] if op.inputs[0] is value else op.inputs[0]
            n, c, _, h, w = op.output.shape
            if other.shape not in (op.output.shape, (n, c, 1, h, w)) or other.dtype != value.dtype:
                continue
            conv = makers[value]
            conv.inputs = [*conv.inputs, other]
        elif op.function == "relu":
            value = op.inputs[0]
            conv = makers.get(value)  # type: ignore[assignment]
            if not isinstance(conv, Conv | SmallBig) or conv.relu or len(users[value]) > 1 or value in keep:
                continue
            conv.relu = True
        else:
            continue
        conv.sources += op.sources
        conv.outputs = op.outputs
        makers[conv.output] = conv
        # it now runs where the addition did: the residual is there by then
        graph.ops.remove(conv)
        graph.ops[graph.ops.index(op)] = conv
        place[conv] = place[op]
        op.outputs = []


def fuse_stage_two(graph: Graph) -> None:
    """Depthwise in the plane, then pointwise: stage two of the Fully Separable Block."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    for i, op in enumerate(graph.ops):
        if not isinstance(op, Conv) or op.groups != 1 or op.weight.shape[2:] != (1, 1, 1):
            continue
        if op.stride != (1, 1, 1) or op.padding != (0, 0, 0):
            continue
        first = makers.get(op.inputs[0])
        if not isinstance(first, Conv) or len(users[first.output]) > 1 or first.output in keep or len(first.inputs) > 1:
            continue
        channels = first.weight.shape[0]
        plane = first.weight.shape[2] == 1 and first.stride[0] == 1 and first.padding[0] == 0
        if first.groups != channels or first.weight.shape[1] != 1 or channels == 1 or not plane:
            continue
        graph.ops[i] = StageTwo(
            [first.inputs[0], *op.inputs[1:]],
            op.outputs,
            first.weight,
            first.bias,
            first.stride,
            first.padding,
            op.weight,
            op.bias,
            first.relu,
            op.relu,
            sources=first.sources + op.sources,
        )
        first.outputs = []
    graph.ops = [op for op in graph.ops if op.outputs]


FEW = 16
"""Input channels up to which a convolution in time may be computed inside stage two."""


def fuse_around_stage_two(graph: Graph) -> None:
    """A convolution in time before stage two, if of few input channels, and max pooling behind become its parts."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    for op in graph.ops:
        if not isinstance(op, StageTwo):
            continue
        first = makers.get(op.inputs[0])
        if (
            isinstance(first, Conv)
            and first.weight.shape[3:] == (1, 1)
            and first.weight.shape[1] <= FEW
            and first.weight.shape[2] <= MAX_SHRINK
            and first.groups == 1
            and (*first.stride[1:], *first.padding[1:]) == (1, 1, 0, 0)
            and len(first.inputs) == len(users[first.output]) == 1
            and first.output not in keep
        ):
            op.temporal = TemporalConv(first.weight, first.bias, first.stride[0], first.padding[0], first.relu)
            op.inputs = [*first.inputs, *op.inputs[1:]]
            op.sources = first.sources + op.sources
            first.outputs = []
        after = users.get(op.output, [])
        pool = after[0] if len(after) == 1 and op.output not in keep and len(op.inputs) == 1 else None
        if isinstance(pool, MaxPool) and pool.kernel == pool.stride and pool.padding == (0, 0, 0):
            places = math.prod(pool.stride)
            if 1 < places <= MAX_SHRINK:
                op.shrink = pool.stride
                op.outputs = pool.outputs
                op.sources += pool.sources
                pool.outputs = []
    graph.ops = [op for op in graph.ops if op.outputs]


def fuse_pooling(graph: Graph) -> None:
    """A convolution of few channels, and maxima over windows side by side in the plane: the start of C3D."""
    users, makers = graph.users(), _makers(graph)
    keep = set(graph.results())
    for i, pool in enumerate(graph.ops):
        if (
            not isinstance(pool, MaxPool)
            or pool.kernel != pool.stride
            or (pool.stride[0], *pool.padding) != (1, 0, 0, 0)
        ):
            continue
        conv = makers.get(pool.inputs[0])
        if type(conv) is not Conv or len(conv.inputs) > 1 or conv.groups > 1 or conv.weight.shape[1] > FEW:
            continue
        if len(users[conv.output]) > 1 or conv.output in keep or math.prod(pool.stride) > MAX_SHRINK:
            continue
        graph.ops[i] = ConvPool(
            conv.inputs,
            pool.outputs,
            conv.weight,
            conv.bias,
            conv.stride,
            conv.padding,
            1,
            conv.relu,
            pool.stride,
            sources=conv.sources + pool.sources,
        )
        conv.outputs = []
    graph.ops = [op for op in graph.ops if op.outputs]


def ways(op: Op) -> list[list[Op]]:
    """An operation whole, and the ways to take a fused one apart: parts have algorithms of their own. The last way has
    the smallest parts; all of a value's makers agree on it."""
    if isinstance(op, StageTwo):
        return _stage_two_ways(op)
    if isinstance(op, SmallBig):
        return [[op], _small_big_parts(op)]
    if isinstance(op, ConvPool):
        full = Value(op.between(), op.output.dtype)
        geometry = op.stride, op.padding, op.groups, op.relu
        conv = Conv(op.inputs, [full], op.weight, op.bias, *geometry, sources=op.sources)
        return [[op], [conv, MaxPool([full], op.outputs, op.shrink, op.shrink, (0, 0, 0), sources=op.sources)]]
    return [[op]]


def split(op: Op) -> list[Op]:
    """An operation in its smallest parts."""
    return ways(op)[-1]


def _stage_two_ways(op: StageTwo) -> list[list[Op]]:
    x, *residual = op.inputs
    values = [Value(shape, x.dtype) for shape in op.between()]
    before: list[Op] = []
    behind: list[Op] = []
    first, shrinks = op.temporal, op.shrink != (1, 1, 1)
    if first is not None:
        along = (first.stride, 1, 1), (first.padding, 0, 0)
        before.append(Conv([x], [values[0]], first.weight, first.bias, *along, 1, first.relu, sources=op.sources))
        x = values[0]
    full = op.output
    if shrinks:
        full = values[2]
        behind.append(MaxPool([full], op.outputs, op.shrink, op.shrink, (0, 0, 0), sources=op.sources))

    def middle(output: Value, shrink: Triple) -> StageTwo:
        return dataclasses.replace(op, inputs=[x, *residual], outputs=[output], temporal=None, shrink=shrink)

    found: list[list[Op]] = [[op]]
    if before and behind:
        found.append([*before, middle(op.output, op.shrink)])
    if before or behind:
        found.append([*before, middle(full, (1, 1, 1)), *behind])
    depthwise = Conv(
        [x],
        [values[1]],
        op.depthwise,
        op.depthwise_bias,
        op.stride,
        op.padding,
        op.depthwise.shape[0],
        op.middle_relu,
        sources=op.sources,
    )
    flat = (1, 1, 1), (0, 0, 0)
    pointwise = Conv([values[1], *residual], [full], op.pointwise, op.bias, *flat, 1, op.relu, sources=op.sources)
    return [*found, [*before, depthwise, pointwise, *behind]]


def _small_big_parts(op: SmallBig) -> list[Op]:
    x, *residual = op.inputs
    n, c, t, h, w = x.shape
    pooled_shape = (n, c, *(1 if k is None else size for k, size in zip(op.window, (t, h, w), strict=True)))
    pooled = Value(pooled_shape, x.dtype)  # type: ignore[arg-type]
    places = [
        (size + 2 * p - k) // s + 1
        for size, k, s, p in zip(pooled_shape[2:], op.weight.shape[2:], op.stride, op.padding, strict=True)  # type: ignore[misc]
    ]
    big = Value((n, op.weight.shape[0], *places), x.dtype)
    padding = tuple(0 if k is None else k // 2 for k in op.window)
    parts: list[Op] = [MaxPool([x], [pooled], op.window, (1, 1, 1), padding, sources=op.sources)]  # type: ignore[arg-type]
    conv = (op.stride, op.padding, 1)
    if not residual:
        parts.append(Conv([pooled], [big], op.big_weight, op.bias, *conv, sources=op.sources))
        if big.shape[3:] == op.output.shape[3:]:  # one frame for all frames is added by the convolution, too
            parts.append(Conv([x, big], op.outputs, op.weight, None, *conv, op.relu, sources=op.sources))
            return parts
        small, both = Value(op.output.shape, x.dtype), Value(op.output.shape, x.dtype) if op.relu else op.output
        parts.append(Conv([x], [small], op.weight, None, *conv, sources=op.sources))
        parts.append(Elementwise([small, big], [both], "add", sources=op.sources))
        if op.relu:
            parts.append(Elementwise([both], op.outputs, "relu", sources=op.sources))
        return parts
    if big.shape == op.output.shape:
        half = Value(op.output.shape, x.dtype)
        parts.append(Conv([pooled, *residual], [half], op.big_weight, op.bias, *conv, sources=op.sources))
        parts.append(Conv([x, half], op.outputs, op.weight, None, *conv, op.relu, sources=op.sources))
        return parts
    half = Value(op.output.shape, x.dtype)
    parts.append(Conv([pooled], [big], op.big_weight, op.bias, *conv, sources=op.sources))
    parts.append(Elementwise([residual[0], big], [half], "add", sources=op.sources))
    parts.append(Conv([x, half], op.outputs, op.weight, None, *conv, op.relu, sources=op.sources))
    return parts


def _plain_conv(op: Op | None) -> bool:
    return isinstance(op, Conv) and len(op.inputs) == 1 and not op.relu


def _makers(graph: Graph) -> dict[Value, Op]:
    return {value: op for op in graph.ops for value in op.outputs}
