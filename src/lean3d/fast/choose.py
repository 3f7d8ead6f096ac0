"""Which algorithm each operation gets: measured on this machine, on the numbers that really come there.

The example is taken through the net in float64, operation by operation. So each operation's real input is at hand, and
its exact output: an algorithm's error is that of this operation alone. Operations of equal shape are measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lean3d.fast.algorithms import Algorithm, Kernel, algorithms
from lean3d.fast.clock import clock
from lean3d.fast.exact import exact
from lean3d.fast.graph import Call, Graph, Op, Value
from lean3d.fast.passes import ways

PATIENCE = 0.15
"""Seconds after which an operation's algorithms are not run once more."""
ROUNDS = 7
HOPELESS = 1.6
"""An algorithm that takes this many times longer than another is not run again."""
HOPELESS_AT_FIRST = 5
"""The same for the first run, in which memory is new to the process."""
WEIGHT_PRICE = 2e-10
"""Seconds that a byte of packed weights must save, on one thread; on more of them time is dearer, and this shared. So
an algorithm with many weights has to be clearly faster than one with few."""

Measured = dict[str, list[float]]
"""Algorithm -> [seconds, error]."""


@dataclass
class Choice:
    """The algorithms that an operation gets: its own, or one for each of its parts.

    Args:
        names: one, or as many as there are parts.
        seconds: measured, all of them.
        error: the largest of theirs, max|y - exact| / max|exact|.
        way: of `passes.ways`: 0 for the operation as a whole.
        weights: bytes of their packed weights.
    """

    names: list[str]
    seconds: float
    error: float
    way: int = 0
    weights: int = 0

    @property
    def price(self) -> float:
        """What is chosen by: time, and what memory is worth."""
        return self.seconds + WEIGHT_PRICE / torch.get_num_threads() * self.weights


def measure_graph(
    graph: Graph, example: Sequence[Tensor], known: dict[str, Measured], progress: Callable[[int, int], None]
) -> tuple[list[Tensor], bool]:
    """Measure all algorithms of all operations, those that are known already left out.

    Args:
        graph: simplified.
        example: the net's inputs.
        known: measurements by `Op.signature`; new ones join.
        progress: is told how many operations are done, and how many there are.

    Returns:
        The exact results of the net, in float64, and whether anything new was measured.
    """
    values = {v: _prepared(x) for v, x in zip(graph.inputs, example, strict=True)}
    last = {v: i for i, op in enumerate(graph.ops) for v in op.inputs}
    results = set(graph.results())
    new = False
    for i, op in enumerate(graph.ops):
        inputs = [values[v] for v in op.inputs]
        outputs = exact(op, inputs)
        values.update(zip(op.outputs, outputs, strict=True))
        new |= _measure_op(op, inputs, outputs, known)
        for v in [*op.inputs, *op.outputs]:
            if last.get(v, -1) <= i and v not in results:
                values.pop(v, None)
        progress(i + 1, len(graph.ops))
    return [values[v] for v in graph.results()], new


def choose(op: Op, known: dict[str, Measured], budget: float) -> Choice:
    """The fastest algorithm, or the fastest ones for its parts, whose error is within the budget; one that needs much
    more memory must be worth it.

    Args:
        op: of the simplified graph.
        known: its measurements.
        budget: the largest error of an algorithm that rounds more than the direct form.
    """
    choices = []
    for way, parts in enumerate(ways(op)):
        best = [_best(part, known, budget) for part in parts]
        chosen = [choice for choice in best if choice is not None]
        if len(chosen) == len(parts):
            choices.append(
                Choice(
                    [choice.names[0] for choice in chosen],
                    sum(choice.seconds for choice in chosen),
                    max(choice.error for choice in chosen),
                    way,
                    sum(choice.weights for choice in chosen),
                )
            )
    return min(choices, key=lambda choice: choice.price)


def _best(op: Op, known: dict[str, Measured], budget: float) -> Choice | None:
    """None for a fused operation that has no algorithm of its own here."""
    measured = known.get(op.signature(), {})
    allowed = [
        Choice([a.name], measured[a.name][0], measured[a.name][1], weights=a.weights)
        for a in algorithms(op)
        if a.name in measured and (not a.rounds or measured[a.name][1] <= budget)
    ]
    return min(allowed, key=lambda choice: choice.price, default=None)


def _measure_op(op: Op, inputs: Sequence[Tensor], outputs: Sequence[Tensor], known: dict[str, Measured]) -> bool:
    new = False
    *larger, smallest = ways(op)
    values: dict[Value, Tensor] = dict(zip([*op.inputs, *op.outputs], [*inputs, *outputs], strict=True))
    for part in smallest:
        if part.output not in values:
            values[part.output] = exact(part, [values[v] for v in part.inputs])[0]
    for part in dict.fromkeys(part for way in (smallest, *larger) for part in way):
        reads, made = ([values[v] for v in vs] for vs in (part.inputs, part.outputs))
        new |= _measure_one(part, part.signature(), reads, made, known)
    return new


def _measure_one(
    op: Op, signature: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], known: dict[str, Measured]
) -> bool:
    candidates = algorithms(op)
    measured = known.setdefault(signature, {})
    if all(a.name in measured for a in candidates):
        return False
    single = [x.float() if x.dtype == torch.float64 else x for x in inputs]
    measured.update(measure(op, candidates, single, outputs))
    return True


def measure(op: Op, candidates: Sequence[Algorithm], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Measured:
    """Seconds and error of each algorithm on these inputs, run in turns; seconds are the least of several runs."""
    if len(candidates) == 1 and isinstance(op, Call):
        return {candidates[0].name: [0.0, 0.0]}  # there is nothing to choose
    now = clock()
    kernels = {a.name: a.pack() for a in candidates}
    errors, best = {}, {}
    for name, kernel in kernels.items():
        begin = now()
        y = kernel.run(inputs, _out(op, kernel, inputs, in_place=False))
        best[name] = now() - begin
        errors[name] = relative_error([y], outputs)
        del y
    outs = {name: _out(op, kernel, inputs, in_place=True) for name, kernel in kernels.items()}
    begin = now()
    for turn in range(ROUNDS):
        slowest = min(best.values()) * (HOPELESS if turn else HOPELESS_AT_FIRST)
        for name, kernel in kernels.items():
            if best[name] > slowest and best[name] - min(best.values()) > 1e-4:
                continue
            out = outs[name]
            given = inputs
            if out is not None and len(inputs) > 1 and 1 in kernel.in_place:
                given = [inputs[0], out]  # as in the plan, where it can: the residual is written over
            start = now()
            kernel.run(given, out)
            best[name] = min(best[name], now() - start)
        if now() - begin > PATIENCE:
            break
    return {name: [best[name], errors[name]] for name in kernels}


def relative_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """max|found - right| / max|right|, the largest of all tensors; infinite where one has NaN and the other has not."""
    worst = 0.0
    for x, y in zip(found, right, strict=True):
        if not y.is_floating_point():
            continue
        both = y.isfinite()
        if not torch.equal(x.isfinite(), both):
            return float("inf")
        difference = (x.double() - y).where(both, 0).abs().max().item()
        scale = y.where(both, 0).abs().max().item()
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _out(op: Op, kernel: Kernel, inputs: Sequence[Tensor], *, in_place: bool) -> Tensor | None:
    if not kernel.fills:
        return None
    shape = op.output.shape
    out = torch.empty(shape, memory_format=torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format)
    if in_place and len(inputs) > 1 and 1 in kernel.in_place:
        out.copy_(inputs[1])
    return out


def _prepared(x: Tensor) -> Tensor:
    x = tree_map_only(Tensor, lambda y: y.double() if y.is_floating_point() else y, x)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x
