"""Fixtures that many tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real clips, beside the checkout or where LEAN3D_SHARED says; without it the test is skipped."""
    folder = Path(os.environ.get("LEAN3D_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "media").is_dir():
        pytest.skip(f"no real clips at {folder} (set LEAN3D_SHARED to a folder with data/ and media/)")
    return folder
