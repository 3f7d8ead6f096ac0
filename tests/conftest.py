"""Fixtures that many tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lean3d import checkpoint
from lean3d.config import TrainConfig, ViewsConfig, to_dict
from lean3d.ops import native
from stream_parts import CLASSES, small_net
from video_files import moving_frames, write_video


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


@pytest.fixture(scope="session")
def stream_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a causal net that sees every second frame."""
    folder = tmp_path_factory.mktemp("run")
    recipe = TrainConfig(test=ViewsConfig(crop_area=0.85))
    checkpoint.save_model(folder / "model.safetensors", small_net(), CLASSES, to_dict(recipe))
    return folder


@pytest.fixture(scope="session")
def stream_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty frames, 25 in a second."""
    return write_video(tmp_path_factory.mktemp("videos") / "walk.mp4", moving_frames(60, 48, 64))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads; and tiny nets are fastest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
