"""A net as a flat row of steps, each a packed kernel with the places of what it reads and writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lean3d.fast.algorithms import Kernel
from lean3d.fast.clock import clock
from lean3d.fast.graph import Call, Graph, Op, Value
from lean3d.fast.memory import ALIGNMENT, Block, place

OWN_MEMORY = {
    *(f"torch.Tensor.{name}" for name in ("mean", "amax", "sum", "sub", "div", "matmul", "softmax")),
    *(f"torch.nn.functional.{name}" for name in ("pad", "avg_pool3d")),
    *("torch.cat", "Linear", "AvgPool3d", "AdaptiveAvgPool3d"),
}
"""Calls whose results never share memory with what they read."""


@dataclass(frozen=True)
class Step:
    """An operation and the kernel that computes it.

    Args:
        op: the operation, of which the plan keeps inputs and outputs.
        kernel: packed.
        layer: index of the operation of the simplified graph that it belongs to.
    """

    op: Op
    kernel: Kernel
    layer: int


class Plan:
    """What runs: call it with the inputs.

    Buffers are this plan's own and used again by each call, so two calls at a time would spoil each other; results
    are new tensors.

    Args:
        graph: whose inputs and results these are.
        steps: in order.
    """

    def __init__(self, graph: Graph, steps: Sequence[Step]):
        self.result = graph.result
        self.inputs = list(range(len(graph.inputs)))
        self.layers = [step.layer for step in steps]
        numbers: dict[Value, int] = {}
        for value in [*graph.inputs, *(v for step in steps for v in step.op.outputs)]:
            numbers[value] = len(numbers)
        self._numbers = {v: numbers[v] for v in graph.results()}
        blocks, home = _blocks(graph, steps)
        self.bytes = place(list({id(b): b for b in blocks.values()}.values()))
        arena = torch.empty(self.bytes + ALIGNMENT, dtype=torch.uint8)
        start = -arena.data_ptr() % ALIGNMENT
        buffers = {v: _view(arena, start + b.offset, v) for v, b in blocks.items()}

        last_use = {v: i for i, step in enumerate(steps) for v in step.op.inputs}
        self.empty: list[Tensor | None] = [None] * len(numbers)
        self.entry = [buffers.get(v) for v in graph.inputs]
        self.steps: list[Callable[[list[Any]], None]] = []
        results = set(graph.results())
        for i, step in enumerate(steps):
            freed = [numbers[v] for v, last in last_use.items() if last == i and v not in buffers and v not in results]
            self.steps.append(_step(step, numbers, buffers, home, freed, step.op.outputs[0] in results))
        # results that may lie in memory that is not theirs
        own = {
            v for step in steps if not isinstance(step.op, Call) or step.op.name in OWN_MEMORY for v in step.op.outputs
        }
        self._copied = [numbers[v] for v in results if v not in own]

    def __call__(self, inputs: Sequence[Tensor], watch: list[float] | None = None) -> Any:
        """Run all steps.

        Args:
            inputs: of the shapes that the plan is for.
            watch: gets the seconds of each step added, where it is given.

        Returns:
            What the net returns.
        """
        values = self.empty.copy()
        for i, (x, buffer) in enumerate(zip(inputs, self.entry, strict=True)):
            if buffer is not None and not x.is_contiguous(memory_format=torch.channels_last_3d):
                x = buffer.copy_(x)
            values[i] = x
        if watch is None:
            for step in self.steps:
                step(values)
        else:
            now = clock()
            for i, step in enumerate(self.steps):
                begin = now()
                step(values)
                watch[i] += now() - begin
        for i in self._copied:
            values[i] = values[i].clone()  # type: ignore[union-attr]
        return tree_map_only(Value, lambda v: values[self._numbers[v]], self.result)

    def profile(self, inputs: Sequence[Tensor], runs: int, layers: int) -> list[float]:
        """Seconds of each layer, the medians of so many runs after a first one."""
        self(inputs)
        found = []
        for _ in range(runs):
            watch = [0.0] * len(self.steps)
            self(inputs, watch)
            found.append(watch)
        seconds = [0.0] * layers
        for layer, *times in zip(self.layers, *found, strict=True):
            seconds[layer] += statistics.median(times)
        return seconds


def _blocks(graph: Graph, steps: Sequence[Step]) -> tuple[dict[Value, Block], dict[Value, Value]]:
    """Memory of all values that are written where they are told; and for those written in place, over which input."""
    results = set(graph.results())
    last: dict[Value, int] = dict.fromkeys(results, len(steps))
    shared: set[Value] = set()  # values whose memory others may look into
    for i in reversed(range(len(steps))):
        op = steps[i].op
        until = i
        if isinstance(op, Call) and op.name not in OWN_MEMORY:
            until = max([i, *(last.get(v, i) for v in op.outputs)])
            shared.update(op.inputs, op.outputs)
        for v in op.inputs:
            last[v] = max(last.get(v, 0), until)
    blocks: dict[Value, Block] = {}
    home: dict[Value, Value] = {}
    for value in graph.inputs:
        if len(value.shape) == 5 and value.dtype == torch.float32:
            blocks[value] = Block(value.size, -1, last.get(value, 0))
    ours: set[Value] = set()
    for i, step in enumerate(steps):
        op, kernel = step.op, step.kernel
        if isinstance(op, Call):
            continue
        out = op.output
        ours.add(out)
        if not kernel.fills or out in results:
            continue
        for k in kernel.in_place:
            if k >= len(op.inputs):
                continue
            x = op.inputs[k]
            alone = op.inputs.count(x) == 1 or type(op).__name__ == "Elementwise"
            if x in ours and x not in shared and last[x] == i and x.shape == out.shape and alone and x not in results:
                home[out] = x
                if x in blocks:
                    blocks[out] = blocks[x]
                    blocks[x].last = last.get(out, i)
                break
        else:
            blocks[out] = Block(out.size, i, last.get(out, i))
    return blocks, home


def _view(arena: Tensor, offset: int, value: Value) -> Tensor:
    flat = arena[offset : offset + value.size].view(value.dtype)
    if len(value.shape) != 5:
        return flat.view(value.shape)
    n, c, t, h, w = value.shape
    return flat.view(n, t, h, w, c).permute(0, 4, 1, 2, 3)


def _step(
    step: Step,
    numbers: dict[Value, int],
    buffers: dict[Value, Tensor],
    home: dict[Value, Value],
    freed: list[int],
    result: bool,
) -> Callable[[list[Any]], None]:
    run, reads = step.kernel.run, [numbers[v] for v in step.op.inputs]
    writes = [numbers[v] for v in step.op.outputs]
    buffer = buffers.get(step.op.outputs[0])
    over = numbers[home[step.op.outputs[0]]] if step.op.outputs[0] in home else None
    shape = step.op.outputs[0].shape
    new = step.kernel.fills and result

    def apply(values: list[Any]) -> None:
        out = buffer
        if over is not None and out is None:
            out = values[over]
        elif new:
            layout = torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format
            out = torch.empty(shape, memory_format=layout)
        y = run([values[i] for i in reads], out)
        if len(writes) == 1:
            values[writes[0]] = y
        else:
            for i, part in zip(writes, y, strict=True):
                values[i] = part
        for i in freed:
            values[i] = None

    return apply
