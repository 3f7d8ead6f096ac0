"""data/fingerprint.py: copies that were encoded anew are found, and others are not taken for copies."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from lean3d.data.fingerprint import ALIKE, Fingerprint, alike
from lean3d.data.readers import open_video
from video_files import moving_frames, write_video


def numbers(path: Path, part: int = 1000) -> np.ndarray | None:
    with open_video(path) as video:
        frames = video.get_frames(range(video.num_frames), size=(64, 64), channels=1).numpy()[..., 0]
    fingerprint = Fingerprint(len(frames))
    for start in range(0, len(frames), part):
        fingerprint.add(frames[start : start + part])
    return fingerprint.numbers()


def scaled(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    return np.stack([p.reformat(width, height, interpolation="AREA").to_ndarray(format="rgb24") for p in pictures])


def copies(frames: np.ndarray, fps: int, folder: Path) -> dict[str, Path]:
    """A clip encoded anew in several ways; frames have an even height and width."""
    height, width = frames.shape[1:3]
    half = scaled(frames, height // 4 * 2, width // 4 * 2)
    bright = np.clip(frames * 0.8 + 30, 0, 255).astype(np.uint8)
    return {
        "half the size": write_video(folder / "half.avi", half, fps, "mpeg4", options={"b": "400k"}),
        "brighter": write_video(folder / "bright.mp4", bright, fps),
        "squeezed": write_video(folder / "square.mp4", scaled(frames, height, height), fps, options={"crf": "28"}),
        "half the rate": write_video(folder / "rate.mp4", frames[::2], max(1, fps // 2)),
        "badly encoded": write_video(folder / "bad.mp4", frames, fps, options={"crf": "36"}),
    }


def test_copies_that_were_encoded_anew_are_found_and_nothing_else(tmp_path):
    clips = [write_video(tmp_path / f"{i}.mp4", moving_frames(24, 96, 128, seed=i)) for i in range(12)]
    paths = [*clips, *copies(moving_frames(24, 96, 128, seed=3), 25, tmp_path).values()]
    found = alike([numbers(path) for path in paths])
    assert {(first, second) for first, second, _ in found if first < 12} == {(3, other) for other in range(12, 17)}
    assert all(first == 3 or first >= 12 for first, _, _ in found)
    assert all(ALIKE <= cosine <= 1.0001 for _, _, cosine in found)


def test_parts_make_the_whole_and_what_stands_still_has_none(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(21, seed=5))
    assert np.array_equal(numbers(path), numbers(path, part=4))
    still = write_video(tmp_path / "still.mp4", moving_frames(1, seed=5).repeat(20, 0))
    assert numbers(still) is None and numbers(write_video(tmp_path / "one.mp4", moving_frames(1))) is None
    assert alike([None, numbers(path), None]) == [] == alike([])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["grid_lips/color", "grid_lips/digit", "grid_lips/letter", "surv_fight"])
def test_on_real_sets(shared, tmp_path, name):
    """One speaker before one camera is the hardest case: all frames are nearly equal, and all mouths open and shut."""
    paths = sorted((shared / "data" / name).rglob("*.mp4"))
    own = [numbers(path) for path in paths]
    strangers = alike(own)
    found: dict[str, int] = {}
    picked = random.Random(0).sample(range(len(paths)), 40)
    for place in picked:
        with open_video(paths[place]) as video:
            frames, fps = video.get_frames(range(video.num_frames)).numpy(), max(1, round(video.fps))
        frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        for kind, path in copies(frames, fps, tmp_path).items():
            found[kind] = found.get(kind, 0) + bool(alike([own[place], numbers(path)]))
    print(f"\n{name}: {len(strangers)} of {len(paths) * (len(paths) - 1) // 2} pairs taken for copies; of 40: {found}")
    assert len(strangers) <= 2
    assert found["half the size"] >= 38 and found["brighter"] >= 38 and found["squeezed"] >= 36
