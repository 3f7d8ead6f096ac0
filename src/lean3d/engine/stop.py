"""Ctrl-C and a polite kill: the first asks the training to save and stop, the second ends it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A training was stopped by a signal, after it saved itself.

    Args:
        run: The run's folder.
        step: Optimizer steps that were done.
        signum: The signal: SIGINT (Ctrl-C) or SIGTERM.
    """

    def __init__(self, run: str | Path, step: int, signum: int = signal.SIGINT):
        super().__init__(f"stopped and saved after step {step}; to go on: lean3d train --resume {run}")
        self.run = Path(run)
        self.step = step
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a command should exit with, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Path, int, int]]:
        return type(self), (self.run, self.step, self.signum)


class _Signals:
    """While it is entered, SIGINT and SIGTERM go to `handle`. Outside the main thread it does nothing."""

    def __enter__(self):  # type: ignore[no-untyped-def]  # Self
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


class StopSignal(_Signals):
    """Remembers the first signal in `signum`; the second raises KeyboardInterrupt.

    Args:
        on_first: Called when the first one comes; it must be quick.
    """

    def __init__(self, on_first: Callable[[], None] | None = None):
        self.signum = 0
        self._on_first = on_first

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        if self._on_first:
            self._on_first()


class PassOn(_Signals):
    """For a process that only waits for the ranks it started.

    A terminal sends Ctrl-C to the ranks too; SIGTERM comes to this process alone, so it is passed on.
    """

    def __init__(self) -> None:
        self._count = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            raise KeyboardInterrupt
        if signum == signal.SIGTERM:
            for child in multiprocessing.active_children():
                if child.pid:
                    os.kill(child.pid, signum)
