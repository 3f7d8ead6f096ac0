"""One runtime with one number of threads in a process of its own, which computes only when it is told to.

Runtimes keep threads, caches and allocators that disturb each other. So each sits in its own process and waits at a
pipe: `Worker` here, `_serve` at the other end.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lean3d.bench.runtimes import WAYS, Call, Task
from lean3d.errors import MissingDependencyError

TURN_SECONDS, TURN_CALLS = 0.3, 3
"""A turn is one call, and further ones as long as both allow."""
REASON_LENGTH = 500
PREPARE_SECONDS = 900.0
"""A runtime that takes longer to prepare its calls is given up."""
PACKAGES = {
    "compile": "torch._inductor.compile_fx",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "fast": "torch._dynamo",  # PyTorch's meta device brings it in
}
"""What a runtime loads; memory is counted from there on."""


@dataclass(frozen=True)
class Prepared:
    """A way that was made ready, or the reason why it can't be."""

    scores: np.ndarray | None
    reason: str
    seconds: float
    """Until two calls were done."""


class WorkerError(RuntimeError):
    """The process has died, or it did not answer."""


class Worker:
    """The near end. Each question may raise WorkerError.

    Args:
        runtime: One of `lean3d.bench.runtimes.WAYS`.
        task: What to compute, and with how many threads.
    """

    def __init__(self, runtime: str, task: Task):
        self.runtime, self.threads = runtime, task.threads
        self._log = task.folder / f"{runtime}-{task.threads}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, runtime, task, self._log), daemon=True)
        self._process.start()
        far.close()

    def start_preparing(self) -> None:
        """Make all ways ready, and go through each twice; other processes may do so at the same time."""
        self._send("prepare")

    def prepared(self) -> dict[str, Prepared]:
        """Wait for what `start_preparing` began."""
        return self._receive(PREPARE_SECONDS)

    def turn(self, way: str) -> list[float]:
        """Seconds of a few calls, each timed."""
        return self._ask("turn", way)

    def keep(self, ways: Sequence[str]) -> None:
        """Forget all other ways, and give their memory back."""
        self._ask("keep", tuple(ways))

    def memory(self, way: str) -> int | None:
        """Bytes of memory at the peak of a call, over those before the net was read; None where no system tells."""
        return self._ask("memory", way)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *question: Any) -> Any:
        self._send(*question)
        return self._receive(PREPARE_SECONDS)

    def _send(self, *question: Any) -> None:
        try:
            self._pipe.send(question)
        except OSError as error:
            raise WorkerError(self._death()) from error

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                self._process.kill()
                raise WorkerError(f"gave no answer in {seconds:.0f} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._death()) from error

    def _death(self) -> str:
        self._process.join(5)
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        last = f": {lines[-1]}" if lines else ""
        return f"its process died with exit code {self._process.exitcode}{last}"


def _serve(pipe: Connection, runtime: str, task: Task, log: Path) -> None:
    """The far end: answer questions until the near end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the near end says when it is over
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):  # libraries write to the descriptors
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(task.threads)
    ways = WAYS[runtime](task)
    _load(PACKAGES.get(runtime))
    before = _memory("VmRSS")
    ready: dict[str, Call] = {}

    def prepare() -> dict[str, Prepared]:
        return {name: _prepare(name, make, ready) for name, make in ways.items()}

    def keep(names: tuple[str, ...]) -> None:
        for name in set(ready) - set(names):
            del ready[name]
        ways.clear()
        _release()

    def memory(way: str) -> int | None:
        _release()
        if before is None or not _reset_peak():
            return None
        ready[way]()
        peak = _memory("VmHWM")
        return None if peak is None else peak - before

    answers: dict[str, Callable[..., Any]] = {
        "prepare": prepare,
        "turn": lambda way: _turn(ready[way]),
        "keep": keep,
        "memory": memory,
    }
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(answers[question](*arguments))


def _end_with_parent() -> None:
    """A near end that was killed leaves nobody who would want an answer, which may be minutes away."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(name: str, make: Callable[[], Call], ready: dict[str, Call]) -> Prepared:
    start = time.perf_counter()
    try:
        call = make()
        scores = np.array(call())
        call()  # torch.compile may compile once more, and allocators settle
    except Exception as error:  # whatever stops a runtime is the user's answer
        return Prepared(None, reason(error), time.perf_counter() - start)
    ready[name] = call
    return Prepared(scores, "", time.perf_counter() - start)


def _turn(call: Call) -> list[float]:
    times: list[float] = []
    while not times or (len(times) < TURN_CALLS and sum(times) < TURN_SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def reason(error: Exception) -> str:
    """An error in one line that is not too long."""
    if isinstance(error, MissingDependencyError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]} ..."


def _load(package: str | None) -> None:
    """Load a runtime's package, and what PyTorch loads with its first products: memory is counted without them."""
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError:
            return  # the ways say so
    with torch.no_grad():
        torch.nn.functional.conv3d(torch.ones(1, 8, 4, 8, 8), torch.ones(8, 8, 3, 3, 3))
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))


def _release() -> None:
    """Give memory that nobody needs back to the system."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        trim(0)


def _memory(field: str) -> int | None:
    """Bytes of a field in Linux's /proc/self/status: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _reset_peak() -> bool:
    """Have the system count VmHWM anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
