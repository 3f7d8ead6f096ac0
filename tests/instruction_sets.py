"""All of the machine's instruction sets in turn, for tests of native kernels."""

from __future__ import annotations

from collections.abc import Iterator

from lean3d.ops import native


def each_isa() -> Iterator[str]:
    """Each set that this machine has, with its kernels in use; without native kernels one turn, "none"."""
    if not native.available():
        yield "none"
        return
    kernels = native.kernels()
    best = kernels.isa()
    try:
        for name in ("generic", "avx2", "avx512", "neon"):
            try:
                kernels.use_isa(name)
            except ValueError:  # not on this machine
                continue
            yield name
    finally:
        kernels.use_isa(best)
