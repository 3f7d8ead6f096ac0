"""The native kernels, where they were built: `lean3d._native`, see isa.h and bind.h beside.

Everything works without them. `LEAN3D_NATIVE` in the environment decides when lean3d is imported: "off" goes without,
a path names a library built elsewhere (a sanitizer's), and "on" makes their absence an error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import mmap
import os
from types import ModuleType

import torch
from torch import Tensor

from lean3d.errors import BackendError

INTERFACE = 2
"""What module.cpp must say: a library that was built from other sources would be called with wrong arguments."""


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why not."""
    wanted = os.environ.get("LEAN3D_NATIVE", "")
    if wanted == "off":
        return None, "switched off by LEAN3D_NATIVE=off"
    try:
        if wanted in ("", "on"):
            return _checked(importlib.import_module("lean3d._native")), ""
        spec = importlib.util.spec_from_file_location("_native", wanted)
        if spec is None or spec.loader is None:
            raise ImportError(f"LEAN3D_NATIVE must be off, on, or the path of a library, got {wanted!r}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _checked(module), ""
    except ImportError as error:
        if wanted:
            raise BackendError(
                f"LEAN3D_NATIVE={wanted}, but the native kernels can't be loaded: {error}. With a C++ compiler at "
                "hand, install lean3d again (pip install --force-reinstall --no-deps .), or leave LEAN3D_NATIVE unset"
            ) from error
        return None, f"not built, or not for this version: {error}"


def _checked(module: ModuleType) -> ModuleType:
    found = getattr(module, "INTERFACE", 1)
    if found != INTERFACE:
        raise ImportError(
            f"{module.__file__} was built from other sources (interface {found}, these have {INTERFACE}): build "
            "it again with make native, or pip install ."
        )
    return module


_module, _absence = _load()


def available() -> bool:
    """Whether the native kernels are there."""
    return _module is not None


def absence() -> str:
    """Why they are not there; empty where they are."""
    return _absence


def kernels() -> ModuleType:
    """The module with all kernels. They take addresses and sizes and check nothing: their operators do.

    Raises:
        BackendError: They are not there.
    """
    if _module is None:
        raise BackendError(f"the native kernels are not there: {_absence}")
    return _module


def address(x: Tensor | None) -> int:
    """What a kernel takes for a tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


LARGE_PAGE = 2 << 20
"""Bytes of one, on x86-64 and AArch64."""


def empty_for_weights(count: int) -> Tensor:
    """Floats `(count,)`, not set to anything, in large pages where there are many and Linux has them.

    A kernel that reads packed weights once from start to end is held up by the look-up of every 4 KB page.
    """
    if 4 * count < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count)
    size = -(-4 * count // LARGE_PAGE) * LARGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32, count=count)


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there for these tensors: float32 on the CPU (None is fine)."""
    return _module is not None and all(
        x is None or (x.dtype is torch.float32 and x.device.type == "cpu") for x in tensors
    )


_last: dict[str, str] = {}


def ran(op: str, backend: str) -> None:
    """Note which backend an operator's last call ran on: "native" or "torch"."""
    _last[op] = backend


def last_backend(op: str) -> str:
    """The backend of an operator's last call in this process: "native", "torch", or "none" before the first."""
    return _last.get(op, "none")
