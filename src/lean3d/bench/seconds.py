"""What nets take on this machine, in one runtime and another.

    Net -> a folder (weights, clip, ONNX) -> workers -> parity -> the best way of each runtime -> rounds -> Report

Every runtime has the same weights and the same clip, in float32, one clip at a time. Before anything is timed its
scores are held against the same net in float64. Then all take turns: in each round every runtime computes once, in
another order, and alone on the machine; a large matrix product and a large copy take turns with them.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from lean3d import checkpoint
from lean3d.bench import machine
from lean3d.bench.nets import Net
from lean3d.bench.runtimes import (
    CLIP_FILE,
    COPY,
    MATRIX,
    MODEL_FILE,
    ONNX_FILE,
    RUNTIMES,
    TOLERANCE,
    Task,
    torch_layers,
)
from lean3d.bench.worker import Worker, WorkerError, reason
from lean3d.errors import ConfigError, MissingDependencyError, did_you_mean
from lean3d.models import VideoNet, cost

ROUNDS = 5
FROM_ONNX = ("onnxruntime", "openvino")
TOO_SLOW = 3.0
"""A way whose first turn takes this many times the best way's gets no second one."""
SEED = 0


@dataclass(frozen=True)
class Timing:
    """A runtime with a number of threads on a net."""

    runtime: str
    threads: int
    reason: str = ""
    """Why it was not timed; empty where it was."""
    way: str = ""
    """The way of the runtime that was fastest, and stands for it."""
    ways: dict[str, float | str] = field(default_factory=dict)
    """Every way: its best seconds when the choice was made, or the reason why it was out."""
    error: float | None = None
    """max|scores - reference| / max|reference|, against float64."""
    memory: int | None = None
    """Bytes at the peak of a call, weights included, over those of the process before it read the net."""
    times: tuple[float, ...] = ()
    """Seconds of each call in the rounds."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.times)

    @property
    def least(self) -> float:
        """Seconds."""
        return min(self.times)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.times, n=4) if len(self.times) > 1 else (self.least,) * 3
        return (high - low) / 2 / self.median

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        content: dict[str, Any] = {"runtime": self.runtime, "threads": self.threads}
        if self.reason:
            return {**content, "reason": self.reason, "ways": _rounded(self.ways)}
        return {
            **content,
            "way": self.way,
            "ms": round(self.median * 1e3, 3),
            "least_ms": round(self.least * 1e3, 3),
            "spread": round(self.spread, 4),
            "calls": len(self.times),
            "error": float(f"{self.error:.2e}"),
            "memory": self.memory,
            "ways": _rounded(self.ways),
        }


@dataclass(frozen=True)
class NetReport:
    """A net in all runtimes."""

    net: Net
    macs: int
    """Multiply-accumulates of the direct form on the clip."""
    timings: tuple[Timing, ...]
    sgemm: dict[int, float]
    """Operations a second of the machine's matrix product at its best, in the same rounds, by number of threads."""
    copy: dict[int, float]
    """Bytes a second, read and written, of the machine's copy at its best."""

    def find(self, runtime: str, threads: int) -> Timing | None:
        """A runtime's timing; None where it has none."""
        for timing in self.timings:
            if (timing.runtime, timing.threads) == (runtime, threads) and not timing.reason:
                return timing
        return None

    def rate(self, timing: Timing) -> float:
        """Operations of the direct form by time, as a share of the machine's matrix product."""
        return 2 * self.macs / timing.median / self.sgemm[timing.threads]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "name": self.net.name,
            "model": self.net.spec["name"],
            "arguments": self.net.spec["arguments"],
            "clip": list(self.net.clip),
            "macs": self.macs,
            "sgemm_gflops": {str(threads): round(rate / 1e9, 1) for threads, rate in self.sgemm.items()},
            "copy_gbytes": {str(threads): round(rate / 1e9, 2) for threads, rate in self.copy.items()},
            "timings": [
                {**timing.to_dict(), **({} if timing.reason else {"of_sgemm": round(self.rate(timing), 3)})}
                for timing in self.timings
            ],
        }


@dataclass(frozen=True)
class Report:
    """All nets, and the machine."""

    machine: dict[str, Any]
    rounds: int
    nets: tuple[NetReport, ...]

    def to_json(self) -> str:
        """Everything as one line."""
        return json.dumps(
            {
                "bench": "seconds",
                "tolerance": TOLERANCE,
                "rounds": self.rounds,
                "machine": self.machine,
                "nets": [net.to_dict() for net in self.nets],
            }
        )


@dataclass(frozen=True)
class Lead:
    """What a runtime gains on a net: how many times less time it takes than another."""

    net: str
    threads: int
    peer: str
    """The fastest of the others."""
    over_peer: float
    over_eager: float | None
    over_literal: float | None
    """Over eager PyTorch with torch's own layers, in the default layout (as timed when ways were chosen)."""


def leads(report: Report, runtime: str = "fast") -> list[Lead]:
    """What a runtime gains on each net, where it and another were timed."""
    found = []
    for net, threads in ((one, number) for one in report.nets for number in one.sgemm):
        mine = net.find(runtime, threads)
        others = [t for name in RUNTIMES if name != runtime and (t := net.find(name, threads)) is not None]
        if mine is None or not others:
            continue
        peer = min(others, key=lambda timing: timing.median)
        eager = net.find("eager", threads)
        literal = eager.ways["torch's layers"] if eager else None
        found.append(
            Lead(
                net.net.name,
                threads,
                peer.runtime,
                peer.median / mine.median,
                eager.median / mine.median if eager else None,
                literal / mine.median if isinstance(literal, float) else None,
            )
        )
    return found


def parse_runtimes(text: str) -> tuple[str, ...]:
    """ "eager,fast" -> ("eager", "fast").

    Raises:
        ConfigError: One that bench doesn't know.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError(f"--runtimes has no {name!r}: {did_you_mean(name, RUNTIMES)}")
    return names


def parse_threads(text: str) -> tuple[int, ...]:
    """ "1,2" -> (1, 2).

    Raises:
        ConfigError: Not whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--threads are whole numbers above 0 with commas, such as 1,2; got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def measure(
    nets: Sequence[Net],
    *,
    runtimes: Sequence[str] = RUNTIMES,
    threads: Sequence[int] = (1, 2),
    rounds: int = ROUNDS,
    quiet: bool = False,
    after_net: Callable[[Report], None] | None = None,
) -> Report:
    """Time nets in runtimes, see the module's text. A runtime that can't be used or is wrong has the reason.

    Nets without trained weights get random ones, with normalisations that keep activations near 1 and no layer at zero.

    Args:
        nets: See `lean3d.bench.nets.find_nets`.
        runtimes: Some of `RUNTIMES`.
        threads: Numbers of threads to compute with.
        rounds: Turns of each runtime, at least 1.
        quiet: No progress bar.
        after_net: Gets the report so far after each net; what takes long can be kept in case it is stopped.

    Raises:
        ConfigError: `rounds` is below 1.
        CheckpointError: A net's weights don't fit it.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    here = machine.describe()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        bar = progress.add_task("", total=len(nets) * (2 + rounds * len(threads)))
        report = Report(here, rounds, ())
        for net in nets:

            def step(what: str, name: str = net.name) -> None:
                progress.update(bar, description=f"{name}: {what}")

            with tempfile.TemporaryDirectory(prefix="lean3d-bench-") as folder:
                found = _measure(net, Path(folder), runtimes, threads, rounds, step, lambda: progress.advance(bar))
            report = replace(report, nets=(*report.nets, found))
            if after_net is not None:
                after_net(report)
    return report


def _measure(
    net: Net,
    folder: Path,
    runtimes: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    step: Callable[[str], None],
    advance: Callable[[], None],
) -> NetReport:
    step("weights and reference")
    reference, out = _lay_out(net, folder, runtimes)
    advance()
    with ExitStack() as stack:
        crew = []
        for runtime, number in itertools.product(("machine", *(name for name in runtimes if name not in out)), threads):
            worker = Worker(runtime, Task(folder, number))
            stack.callback(worker.close)
            crew.append(worker)
        step("runtimes compile")
        timings = _prepare(crew, reference)
        for worker in crew:
            if not timings[worker].reason:
                step(f"{worker.runtime}, {worker.threads} threads: best way")
                timings[worker] = _attempt(timings[worker], partial(_choose, worker))
        advance()
        calls: dict[tuple[Worker, str], list[float]] = {}
        order = random.Random(SEED)
        for number, turn in itertools.product(threads, range(rounds)):
            step(f"{number} thread{'s' * (number > 1)}, round {turn + 1}")
            turns = [(w, way) for w in crew if w.threads == number for way in _timed_ways(w, timings[w])]
            for worker, way in order.sample(turns, len(turns)):
                if timings[worker].reason:
                    continue

                def take(timing: Timing, worker: Worker = worker, way: str = way) -> Timing:
                    calls.setdefault((worker, way), []).extend(worker.turn(way))
                    return timing

                timings[worker] = _attempt(timings[worker], take)
            advance()
    best = {(worker.threads, way): min(times) for (worker, way), times in calls.items() if worker.runtime == "machine"}
    found = {(name, number): Timing(name, number, reason=why) for name, why in out.items() for number in threads}
    for worker in crew:
        times = tuple(calls.get((worker, timings[worker].way), ()))
        found[worker.runtime, worker.threads] = replace(timings[worker], times=times)
    return NetReport(
        net,
        cost(net.build("meta"), net.clip).macs,
        tuple(found[name, number] for number in threads for name in runtimes),
        sgemm={number: 2 * MATRIX**3 / best[number, "sgemm"] for number in threads},
        copy={number: 8 * COPY / best[number, "copy"] for number in threads},
    )


def _lay_out(net: Net, folder: Path, runtimes: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """Write what the workers read.

    Returns:
        The scores in float64, and the runtimes that are out already, each with the reason.
    """
    generator = torch.Generator().manual_seed(SEED)
    clip = torch.randn(net.clip, generator=generator)
    model = net.build().eval().requires_grad_(False)
    if net.weights is None:
        _randomize(model, clip, generator)
    else:
        checkpoint.fill_model(model, checkpoint.load(net.weights).model.state_dict(), net.weights)
    names = [str(number) for number in range(model.spec["arguments"]["num_classes"])]
    checkpoint.save_model(folder / MODEL_FILE, model, names, {})
    np.save(folder / CLIP_FILE, clip.numpy())
    plain = torch_layers(model)
    out = {}
    if set(runtimes) & set(FROM_ONNX):
        try:
            _export(plain, clip, folder / ONNX_FILE)
        except Exception as error:  # whatever stops an export, the other runtimes can be timed
            out = {name: f"no ONNX: {reason(error)}" for name in runtimes if name in FROM_ONNX}
    with torch.no_grad():
        return plain.double()(clip.double()).numpy(), out


@torch.no_grad()
def _randomize(model: VideoNet, clip: Tensor, generator: torch.Generator) -> None:
    """Weights with which every layer matters: what starts at zero does not stay there, normalisations fit the clip."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1, generator=generator)
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.weight.uniform_(0.5, 1, generator=generator)
            hooks.append(module.register_forward_pre_hook(_fit_to_input))
    model(clip)
    for hook in hooks:
        hook.remove()


def _fit_to_input(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Give a normalisation the statistics of what it is about to normalise.

    Those of all channels together: by channel they would take the signal out where a map has few places.
    """
    variance, mean = torch.var_mean(inputs[0])
    norm.running_mean.fill_(mean)  # type: ignore[union-attr, operator]
    norm.running_var.fill_(variance)  # type: ignore[union-attr, operator]


def _export(model: nn.Module, clip: Tensor, path: Path) -> None:
    """The net as ONNX.

    Raises:
        MissingDependencyError: ONNX is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnx", "export") from error
    with _muted():
        torch.onnx.export(model, (clip,), path, dynamo=True, verbose=False)


@contextmanager
def _muted() -> Iterator[None]:
    """Without the exporter's notes, which concern packages that lean3d doesn't use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _prepare(crew: Sequence[Worker], reference: np.ndarray) -> dict[Worker, Timing]:
    """Make all workers ready, and hold their scores against the reference."""

    def ready(worker: Worker) -> Timing:
        timing = Timing(worker.runtime, worker.threads)

        def check(timing: Timing) -> Timing:
            worker.start_preparing()
            if worker.runtime == "machine":
                worker.prepared()
                return timing
            return _checked(timing, worker, reference)

        return _attempt(timing, check)

    together = [worker for worker in crew if worker.runtime != "fast"]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        timings = dict(zip(together, pool.map(ready, together), strict=True))
    for worker in crew:  # it measures while it compiles, so it has the machine for itself
        if worker.runtime == "fast":
            timings[worker] = ready(worker)
    return timings


def _checked(timing: Timing, worker: Worker, reference: np.ndarray) -> Timing:
    """A timing with its ways that are right; the reason where there is none."""
    ways: dict[str, float | str] = {}
    errors = []
    for name, way in worker.prepared().items():
        error = math.inf
        if way.scores is not None and way.scores.shape == reference.shape:
            error = float(np.abs(way.scores - reference).max() / np.abs(reference).max())
        if way.scores is None:
            ways[name] = way.reason
        elif not error <= TOLERANCE:  # NaN too
            ways[name] = f"wrong: its error is {error:.1e} and at most {TOLERANCE:.0e} is allowed"
        else:
            ways[name] = math.inf
            errors.append(error)
    if not errors:
        return replace(timing, ways=ways, reason=str(next(iter(ways.values()))))
    return replace(timing, ways=ways, error=max(errors))


def _choose(worker: Worker, timing: Timing) -> Timing:
    """The fastest way, alone in its process from here on."""
    if worker.runtime == "machine":
        return timing
    ways = dict(timing.ways)
    right = [name for name, value in ways.items() if isinstance(value, float)]
    for _ in range(2 if len(right) > 1 else 1):
        for name in right:
            best = min(value for value in ways.values() if isinstance(value, float))
            mine = ways[name]
            assert isinstance(mine, float)
            if mine == math.inf or mine <= TOO_SLOW * best:
                ways[name] = min(mine, *worker.turn(name))
    way = min(right, key=lambda name: ways[name])
    worker.keep([way])
    return replace(timing, ways=ways, way=way, memory=worker.memory(way))


def _timed_ways(worker: Worker, timing: Timing) -> Sequence[str]:
    return ("sgemm", "copy") if worker.runtime == "machine" else (timing.way,)


def _attempt(timing: Timing, what: Callable[[Timing], Timing]) -> Timing:
    """A step with a worker; where its process dies, that is the reason."""
    try:
        return what(timing)
    except WorkerError as error:
        if timing.runtime == "machine":
            raise
        return replace(timing, reason=str(error))


def _rounded(ways: dict[str, float | str]) -> dict[str, float | str]:
    """Seconds as milliseconds, reasons as they are."""
    return {name: value if isinstance(value, str) else round(value * 1e3, 3) for name, value in ways.items()}
