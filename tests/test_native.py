"""The native extension: how it is found, its threads, its instruction sets, and the product that all kernels end in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruction_sets import each_isa
from lean3d.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.absence()}")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "LEAN3D_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env={**kept, **environment}
    )


ASK = "from lean3d.ops import native; print(native.available(), '|', native.absence())"


def test_off_goes_without_and_says_so():
    done = python(ASK, LEAN3D_NATIVE="off")
    assert done.stdout.strip() == "False | switched off by LEAN3D_NATIVE=off"


@needs_native
def test_a_path_names_a_library_built_elsewhere():
    done = python(ASK, LEAN3D_NATIVE=native.kernels().__file__)
    assert done.stdout.strip() == "True |", done.stderr


@pytest.mark.parametrize("wanted", ["no/such/library.so", "yes"])
def test_a_library_that_is_asked_for_and_missing_is_an_error(wanted):
    done = python(ASK, LEAN3D_NATIVE=wanted)
    assert done.returncode != 0
    assert "BackendError" in done.stderr and "leave LEAN3D_NATIVE unset" in done.stderr


@needs_native
def test_a_library_of_another_version_is_left_out(monkeypatch):
    monkeypatch.delenv("LEAN3D_NATIVE", raising=False)
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    module, absence = native._load()
    assert module is None
    assert "built from other sources" in absence and "make native" in absence


WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
assert "torch" not in sys.modules
x = np.random.default_rng(0).standard_normal((3, 9, 20, 21, 24), np.float32)  # N, T, H, W, C
axes = [(n, n, 3, 1, 1) for n in x.shape[1:4]]
results = []
for threads in (1, 2, 3, 8, 2, 1) * 20:  # more and fewer again
    y = np.full_like(x, np.nan)
    kernels.max_pool(3, 24, *axes, x.ctypes.data, y.ctypes.data, 0, 0, threads)
    results.append(y)
padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), (1, 2, 3))
assert all(np.array_equal(y, windows.max((-3, -2, -1))) for y in results)
print(kernels.thread_pool())
"""


@needs_native
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the preloaded runtimes bring their own threads")
def test_threads_of_its_own_where_there_is_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, native.kernels().__file__], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "threads", done.stderr


@needs_native
def test_instruction_sets_are_named_and_others_refused():
    assert native.kernels().isa() in list(each_isa())
    with pytest.raises(ValueError, match="this machine has no vax"):
        native.kernels().use_isa("vax")


@needs_native
def test_nothing_is_there_for_other_types_and_devices():
    assert native.takes(torch.zeros(1), None)
    assert not native.takes(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not native.takes(torch.zeros(1, device="meta"))


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    k=st.integers(1, 40),
    gap=st.integers(0, 3),
    bias=st.booleans(),
    residual=st.sampled_from(["none", "rows", "one row"]),
    relu=st.booleans(),
    threads=st.integers(1, 3),
)
def test_product_of_any_size_with_all_that_follows_it(rows, columns, k, gap, bias, residual, relu, threads):
    g = torch.Generator().manual_seed(rows * 71 + columns)
    a = torch.randn(rows, k + gap, generator=g)
    b = torch.randn(k, columns, generator=g)
    add = torch.randn(columns, generator=g) if bias else None
    rest = {
        "none": None,
        "rows": torch.randn(rows, columns, generator=g),
        "one row": torch.randn(1, columns, generator=g),
    }
    more = rest[residual]
    expected = a[:, :k].double() @ b.double()
    for term in (add, more):
        expected = expected if term is None else expected + term
    expected = expected.relu() if relu else expected
    for _ in each_isa():
        kernels = native.kernels()
        packed = torch.full((kernels.gemm_packed_size(k, columns),), float("nan"))
        kernels.gemm_pack(b.data_ptr(), columns, 1, k, columns, packed.data_ptr())
        c = torch.full((rows, columns + gap), 7.0)
        kernels.gemm(
            *(a.data_ptr(), k + gap, packed.data_ptr(), c.data_ptr(), columns + gap),
            *(rows, columns, k, native.address(add)),
            *(native.address(more), columns if residual == "rows" else 0, relu, threads),
        )
        torch.testing.assert_close(c[:, :columns].double(), expected, rtol=1e-5, atol=1e-5)
        assert (c[:, columns:] == 7).all(), "it wrote behind its rows"
