"""The time that work takes, as far as other programs' work can be left out of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock() -> Callable[[], float]:
    """Seconds: of this thread's work where nothing else works for it, else those on the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
