"""Fixtures that many tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lean3d.ops import native


def pytest_report_header() -> str:
    """Which backend the operators' tests run."""
    if not native.available():
        return f"native kernels: none ({native.absence()})"
    return f"native kernels: {native.kernels().isa()}, threads by {native.kernels().thread_pool()}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real clips, beside the checkout or where LEAN3D_SHARED says; without it the test is skipped."""
    folder = Path(os.environ.get("LEAN3D_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "media").is_dir():
        pytest.skip(f"no real clips at {folder} (set LEAN3D_SHARED to a folder with data/ and media/)")
    return folder
