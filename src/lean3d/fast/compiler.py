"""`compile`, and what it gives."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lean3d.errors import ConfigError
from lean3d.fast.algorithms import algorithms, backend
from lean3d.fast.cache import Cache
from lean3d.fast.choose import Choice, choose, measure_graph, relative_error
from lean3d.fast.clock import clock
from lean3d.fast.graph import Call, Elementwise, Graph, Op
from lean3d.fast.passes import simplify, ways
from lean3d.fast.plan import Plan, Step
from lean3d.fast.trace import Stopwatch, trace

MOST_PLANS = 4
"""Shapes whose plans are kept, the latest used."""
TIGHTER = 4
"""A budget that proved too large is divided by this."""


@dataclass(frozen=True)
class Layer:
    """One row of `CompiledModel.layers`.

    Attributes:
        name: The module, or the first of several that became one.
        kind: What it became.
        shape: Of its result.
        algorithms: What computes it; several where it runs in parts.
        before: Seconds in the net as it is (eager); None where that was not measured.
        after: Seconds in the compiled net, measured alone.
        error: max|y - exact| / max|exact| of this operation on the example, against float64.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    algorithms: tuple[str, ...]
    before: float | None
    after: float
    error: float


@dataclass
class _Compiled:
    """A plan and what is known of it."""

    plan: Plan
    layers: tuple[Layer, ...]
    error: float
    before: float | None


class CompiledModel:
    """A net that is ready to run fast; made by `compile`.

    Call it as the net: `(N, C, T, H, W)` float32 -> the net's outputs, new tensors each time. Other shapes than the
    example's get plans of their own when they first come: another number of clips takes over the algorithms, another
    length or size is measured as the example was. The latest four shapes are kept.

    One call runs at a time, others wait for it: buffers are the plan's. It runs on `threads` threads, whatever
    `torch.get_num_threads` says outside, which is as before afterwards.

    The compiled net has its own, packed, weights: it does not see later changes of the net's. It keeps the net, to make
    plans for other shapes of it, until `freeze` is called. Modules that it can't take apart run
    as they are, with the weights that they have.

    Attributes:
        threads: What it runs on.
        tolerance: The largest error of the outputs, see `compile`.
    """

    def __init__(self, model: nn.Module, threads: int, tolerance: float, cache: str | Path | None, quiet: bool):
        self.threads, self.tolerance = threads, tolerance
        self._model: nn.Module | None = model
        self._cache, self._quiet = cache, quiet
        self._plans: OrderedDict[Any, _Compiled] = OrderedDict()
        self._choices: dict[Any, list[Choice]] = {}  # by shape without the number of clips
        self._lock = threading.RLock()
        spec: Any = getattr(model, "spec", None)
        self._name: str = spec["name"] if isinstance(spec, dict) else type(model).__name__

    def __call__(self, *inputs: Tensor) -> Any:
        """The net's outputs.

        Args:
            inputs: what the net takes, on the CPU.

        Raises:
            ConfigError: A gradient is wanted; a tensor of another type or number of axes than the example's, or, after
                `freeze`, of another shape.
        """
        with self._lock, _threads(self.threads), torch.no_grad():
            return self._compiled(inputs).plan(inputs)

    @property
    def error(self) -> float:
        """max|y - exact| / max|exact| of the outputs on the example, against the net in float64."""
        return self._latest().error

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What became of the net for the shape that was used last."""
        return self._latest().layers

    @property
    def buffer_bytes(self) -> int:
        """Memory for activations, of all shapes' plans together; weights not counted."""
        return sum(compiled.plan.bytes for compiled in self._plans.values())

    def freeze(self) -> CompiledModel:
        """Let go of the net, whose own weights are then free where nobody else has it; shapes so far stay, others are
        refused."""
        self._model = None
        return self

    def explain(self, *inputs: Tensor, runs: int = 5) -> Table:
        """A table of layers with algorithms, times before and after, and errors; print it with rich.

        Args:
            inputs: run the plan on these and show each step's time there, the median of `runs`; without them, the
                times are those of the measurements, each layer alone.
            runs: how often.
        """
        with self._lock, _threads(self.threads), torch.no_grad():
            compiled = self._compiled(inputs) if inputs else self._latest()
            after = [layer.after for layer in compiled.layers]
            if inputs:
                after = compiled.plan.profile(inputs, runs, len(compiled.layers))
        table = Table(
            "layer",
            "became",
            "result",
            "algorithm",
            "eager ms",
            "fast ms",
            "error",
            title=self._name,
            title_justify="left",
        )
        for column in table.columns[4:]:
            column.justify = "right"
        for layer, seconds in zip(compiled.layers, after, strict=True):
            table.add_row(
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                " + ".join(layer.algorithms),
                _ms(layer.before),
                _ms(seconds),
                f"{layer.error:.0e}" if layer.error else "",
            )
        total = f"{compiled.error:.1e}"
        table.add_section()
        table.add_row("all", "", "", "", _ms(compiled.before), _ms(sum(after)), total)
        table.caption = (
            f"{backend()}; {self.threads} threads; buffers {compiled.plan.bytes / 2**20:.1f} MiB; eager as measured "
            f"when it was compiled; errors against float64, the last one of the outputs (tolerance {self.tolerance:g})"
        )
        return table

    # ---- plans

    def _latest(self) -> _Compiled:
        if not self._plans:
            raise ConfigError("nothing is compiled yet: give fast.compile an example, or call the compiled net first")
        return next(reversed(self._plans.values()))

    def _compiled(self, inputs: Sequence[Tensor]) -> _Compiled:
        _check(inputs, self._name)
        key = tuple((x.shape, x.dtype) for x in inputs)
        found = self._plans.get(key)
        if found is None:
            found = self._make(inputs)
            self._plans[key] = found
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return found

    def _make(self, inputs: Sequence[Tensor]) -> _Compiled:
        if self._model is None:
            raise ConfigError(
                f"this compiled {self._name} was frozen, and knows the shapes "
                f"{[tuple(map(tuple, (shape for shape, _ in key))) for key in self._plans]} only; "
                f"got {[tuple(x.shape) for x in inputs]}: compile the net again for it"
            )
        graph = trace(self._model, inputs)
        simplify(graph)
        clip = tuple(x.shape[1:] for x in inputs)
        if clip in self._choices and len(self._choices[clip]) == len(graph.ops):
            choices = self._choices[clip]
            plan = build(graph, choices)
            error = next(reversed(self._plans.values())).error if self._plans else 0.0
            return _Compiled(plan, _layers(graph, choices, None), error, None)
        cache = Cache(self._cache, self.threads)
        key = _key(graph, self._model, self.tolerance)
        compiled, choices = self._from_cache(graph, cache, key) or self._measured(graph, inputs, cache, key)
        self._choices[clip] = choices
        return compiled

    def _from_cache(self, graph: Graph, cache: Cache, key: str) -> tuple[_Compiled, list[Choice]] | None:
        net = cache.nets.get(key)
        if net is None:
            return None
        choices = [Choice(*choice) for choice in net["choices"]]
        if len(choices) != len(graph.ops) or not all(map(_possible, graph.ops, choices)):
            return None
        layers = _layers(graph, choices, net["seconds"])
        return _Compiled(build(graph, choices), layers, net["error"], net["before"]), choices

    def _measured(
        self, graph: Graph, inputs: Sequence[Tensor], cache: Cache, key: str
    ) -> tuple[_Compiled, list[Choice]]:
        model = self._model
        assert model is not None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=self._quiet, transient=True) as bar:
            task = bar.add_task(f"measuring {self._name}", total=len(graph.ops))
            right, _ = measure_graph(
                graph, inputs, cache.layers, lambda done, total: bar.update(task, completed=done, total=total)
            )
        eager, seconds, before = _eager(model, graph, inputs)
        budget = self.tolerance
        while True:
            choices = [choose(op, cache.layers, budget) for op in graph.ops]
            plan = build(graph, choices)
            found = [y for y in tree_flatten(plan(inputs))[0] if isinstance(y, Tensor)]
            error = relative_error(found, right)
            if error <= self.tolerance:
                break
            del plan
            if budget == 0:
                raise ConfigError(_missed(self._name, self.tolerance, error, relative_error(eager, right)))
            budget = budget / TIGHTER if budget > 1e-7 else 0.0
        cache.nets[key] = {
            "choices": [[choice.names, choice.seconds, choice.error, choice.way] for choice in choices],
            "seconds": seconds,
            "before": before,
            "error": error,
        }
        cache.write()
        return _Compiled(plan, _layers(graph, choices, seconds), error, before), choices


def compile(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | None = None,
    *,
    threads: int | None = None,
    tolerance: float = 1e-4,
    cache: str | Path | None = None,
    quiet: bool = False,
) -> CompiledModel:
    """Make a net fast for inference on this machine's CPU: the same function, from the same weights.

    Normalisations are folded into convolutions; residuals, activations and pooling are fused into them where that has a
    kernel; and each operation gets the algorithm that is fastest here, of those that are exact enough, found by running
    them. That takes some seconds to a minute when a net comes for the first time, and a moment when its shapes and
    weights were compiled before: what was measured is kept on disk.

    Works with any net that is in eval mode when it is compiled. What it does not understand runs as it is.

    Args:
        model: on the CPU, in float32 and in eval mode. Any module that takes tensors.
        example: its input, or inputs, as they will be: `(N, C, T, H, W)`, float32. Errors are measured on its numbers,
            so real clips are better than noise. Without it, that is done at the first call, with what comes.
        threads: what it will run on; default: `torch.get_num_threads()`.
        tolerance: the largest error of the outputs on the example, as max|y - exact| / max|exact|, where exact is the
            same net in float64. 1e-6 allows little more than what single precision makes by itself.
        cache: the folder of measurements; default: `LEAN3D_CACHE` of the environment, or the user's cache folder.
        quiet: no progress bar.

    Returns:
        A function with the net's outputs.

    Raises:
        ConfigError: The net is in training mode or elsewhere than on the CPU; the example is no float32 tensor that the
            net takes; the tolerance is smaller than single precision's error.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}; leave it out for torch.get_num_threads()")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance must be above 0 and below 1, got {tolerance}; the default is 1e-4")
    check_model(model)
    compiled = CompiledModel(model, threads or torch.get_num_threads(), tolerance, cache, quiet)
    if example is not None:
        with _threads(compiled.threads), torch.no_grad():
            compiled._compiled((example,) if isinstance(example, Tensor) else tuple(example))
    return compiled


def check_model(model: nn.Module) -> None:
    """Refuse what can't be compiled.

    Raises:
        ConfigError: The net is not on the CPU, or not in float32.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int64):
            raise ConfigError(
                f"fast.compile takes float32 nets on the CPU; {name} is {tensor.dtype} on {tensor.device}: "
                "compile model.float().cpu()"
            )


def device(name: str) -> torch.device:
    """The device of compiled nets, where the user named one.

    Raises:
        ConfigError: It is not the CPU.
    """
    if name not in ("auto", "cpu"):
        raise ConfigError(f"fast is for CPUs, got device {name}: leave one of them out")
    return torch.device("cpu")


def build(graph: Graph, choices: Sequence[Choice]) -> Plan:
    """Pack the weights of the chosen algorithms, and put everything into its place.

    Args:
        graph: simplified.
        choices: one for each of its operations.
    """
    steps = []
    for i, (op, choice) in enumerate(zip(graph.ops, choices, strict=True)):
        parts = ways(op)[choice.way]
        for part, name in zip(parts, choice.names, strict=True):
            algorithm = next(a for a in algorithms(part) if a.name == name)
            steps.append(Step(part, algorithm.pack(), i))
    return Plan(graph, steps)


def _possible(op: Op, choice: Choice) -> bool:
    found = ways(op)
    parts = found[choice.way] if choice.way < len(found) else []
    return len(parts) == len(choice.names) and all(
        name in [a.name for a in algorithms(part)] for part, name in zip(parts, choice.names, strict=True)
    )


def _check(inputs: Sequence[Tensor], name: str) -> None:
    for x in inputs:
        if not isinstance(x, Tensor):
            raise ConfigError(f"{name} takes tensors, got {type(x).__name__}: torch.as_tensor makes one of an array")
        wrong = x.dtype != torch.float32 and (x.is_floating_point() or x.ndim == 5)
        if wrong or x.device.type != "cpu":
            raise ConfigError(
                f"a compiled net takes float32 on the CPU, got {x.dtype} on {x.device}: x.float().cpu()"
                + ("; uint8 frames go through lean3d.data.transforms.normalize" if x.dtype == torch.uint8 else "")
            )
        if x.requires_grad:
            raise ConfigError(
                "a compiled net has no gradients: give it x.detach(), or take the net itself where gradients are wanted"
            )


def _eager(model: nn.Module, graph: Graph, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[float | None], float]:
    """The net as it is: results, seconds of each operation of the graph, seconds of all."""
    runs: list[list[float]] = []
    totals = []
    now = clock()
    for _ in range(2):
        begin = now()
        with Stopwatch(model, graph) as watch:
            result = model(*inputs)
        totals.append(now() - begin)
        runs.append(watch.seconds)
    flat = [y for y in tree_flatten(result)[0] if isinstance(y, Tensor)]
    if any(len(run) != len(graph.events) for run in runs):
        return flat, [None] * len(graph.ops), min(totals)
    least = [min(pair) for pair in zip(*runs, strict=True)]
    return flat, [sum(least[i] for i in set(op.sources)) for op in graph.ops], min(totals)


def _layers(graph: Graph, choices: Sequence[Choice], seconds: Sequence[float | None] | None) -> tuple[Layer, ...]:
    before = seconds or [None] * len(graph.ops)
    return tuple(
        Layer(
            graph.events[op.sources[0]],
            _kind(op),
            op.output.shape,
            tuple(choice.names),
            eager,
            choice.seconds,
            choice.error,
        )
        for op, choice, eager in zip(graph.ops, choices, before, strict=True)
    )


def _kind(op: Op) -> str:
    if isinstance(op, Call):
        return op.name.removeprefix("torch.").removeprefix("Tensor.").removeprefix("nn.functional.")
    name = op.function if isinstance(op, Elementwise) else type(op).__name__
    weight = getattr(op, "weight", None)
    kernel = "" if weight is None else " " + "x".join(map(str, weight.shape[2:]))
    residual = " + x" * (weight is not None and len(op.inputs) > 1)
    return name + kernel + residual + " relu" * getattr(op, "relu", False)


def _key(graph: Graph, model: nn.Module, tolerance: float) -> str:
    """Of a net: its operations and shapes, and its weights."""
    digest = hashlib.sha256("\n".join([*graph.signature(), repr(tolerance)]).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().contiguous().numpy())
    return digest.hexdigest()


def _missed(name: str, tolerance: float, error: float, eager: float) -> str:
    return (
        f"{name} can't be computed within the tolerance {tolerance:g} here: the most exact algorithms make "
        f"{error:.1e}, and the net as it is, in single precision, {eager:.1e}. "
        f"Give fast.compile a tolerance of {2 * error:.0e}"
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Run on so many threads."""
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"
