"""The motion set of the demo: real mp4 clips in which nothing but the motion tells the class.

Every clip shows one marked shape whose four properties - place across, place down, angle, size - all change all the
time. Along three of them (or all four) the shape swings there and back, less far; the class is the one property that
goes one way only, or the order of two events, a flash of light and the shape's hiding:

```
           moves-right           turns-left            flash-then-hide       hide-then-flash
across     ⟋ once, rightwards    ∿ there and back      ∿                     ∿
down       ∿ there and back      ∿                     ∿                     ∿
angle      ∿                     ⟋ once                ∿                     ∿
size       ∿                     ∿                     ∿                     ∿
events                                                 fff hhh               hhh fff
```

The ten classes are five pairs, and the two of a pair are each other played backwards: they have the same frames in
another order. A net that averages over frames can't tell them apart: it gets half of the clips right at the very best,
if it knows the pair of each, and the swings along the other properties make even that hard. Test clips have shapes,
hues and speeds that training clips don't.

The set comes in three difficulties, each with what the one before has:

    plain         the shape alone
    distracting   behind it three small shapes without a mark go one way, turn and grow, each as it likes
    degraded      the light flickers, the sensor is noisy, and the file is compressed hard
"""

from __future__ import annotations

import colorsys
import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Literal, cast

import av
import numpy as np
from PIL import Image, ImageDraw

from lean3d.data.drawing import ON_EVERY_CPU
from lean3d.errors import ConfigError, did_you_mean

Split = Literal["train", "test"]
Difficulty = Literal["plain", "distracting", "degraded"]
Job = tuple[Path, str, Split, int, int, int, int, int, Difficulty]
"""A clip to write: path, class, split, index, size, num_frames, fps, seed, difficulty."""

DIFFICULTIES: tuple[Difficulty, ...] = ("plain", "distracting", "degraded")
"""From the easiest to the hardest."""

_ONE_WAY = {
    "moves-left": ("across", -1),
    "moves-right": ("across", 1),
    "moves-up": ("down", -1),
    "moves-down": ("down", 1),
    "turns-left": ("angle", -1),
    "turns-right": ("angle", 1),
    "shrinks": ("size", -1),
    "grows": ("size", 1),
}
_ORDERS = {"flash-then-hide": "fh", "hide-then-flash": "hf"}

MOTION_CLASSES: tuple[str, ...] = tuple(sorted((*_ONE_WAY, *_ORDERS)))
"""The ten classes. A horizontal flip exchanges left and right in four of them and keeps the other six."""

_SWING = {"across": 0.6, "down": 0.6, "angle": 0.6, "size": 0.5}
"""How far a property that is not the class's own goes there and back, relative to one that is."""
_CALM = 0.5  # the same is multiplied by this in the classes that are hardest to see: turns and orders of events
_DISTRACTORS = 3
_NOISE = 14.0  # standard deviation of a degraded clip's pixels, of 255
_FLICKER = 0.1  # standard deviation of its light, from frame to frame
_QUALITY = {  # encoder -> options by difficulty
    "libx264": {
        "plain": {"preset": "veryfast", "crf": "20", **ON_EVERY_CPU},
        "degraded": {"preset": "veryfast", "crf": "36", **ON_EVERY_CPU},
    },
    "mpeg4": {"plain": {"q:v": "3"}, "degraded": {"q:v": "20"}},
}
_OVERSAMPLE = 3
_RECORD = "motion_set.json"
_FORMAT = 3  # grows when the same settings would give other pictures


def make_motion_set(
    root: str | Path,
    *,
    clips_per_class: int = 80,
    test_clips_per_class: int = 20,
    size: int = 80,
    num_frames: int = 16,
    fps: int = 8,
    seed: int = 0,
    difficulty: Difficulty = "plain",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the motion set: ``root/train/<class>/00000.mp4`` ... and ``root/test/<class>/00000.mp4`` ...

    The pictures follow from the arguments alone. Called again with the same arguments it only writes what is missing.

    Args:
        root: A new or empty folder, or one with the same set.
        clips_per_class: Training clips of each of the ten classes.
        test_clips_per_class: Test clips of each class.
        size: Height and width of the videos in pixels; even, at least 32.
        num_frames: Frames of each video, at least 16. A model should see most of them: a part of a motion there and
            back is a motion one way.
        fps: Frames per second of the videos.
        seed: Another seed gives another set.
        difficulty: See the module's text. The shape and its motion are the same in all three.
        workers: Processes that draw and encode (1: this process alone).
        progress: Called with (clips done, clips in all), now and then.

    Returns:
        `root` as a path.

    Raises:
        ConfigError: A setting is out of its range, or `root` holds something else.
    """
    if min(clips_per_class, test_clips_per_class) < 0 or fps < 1 or workers < 1:
        raise ConfigError(
            "clips must be at least 0, fps and workers at least 1; got "
            f"{clips_per_class} and {test_clips_per_class} clips, fps={fps}, workers={workers}"
        )
    _check_picture(size, num_frames)
    root = Path(root)
    _check_difficulty(difficulty)
    settings = {"format": _FORMAT, "size": size, "num_frames": num_frames, "fps": fps, "seed": seed}
    _claim(root, {**settings, "difficulty": difficulty})
    jobs: list[Job] = []
    numbers: dict[Split, int] = {"train": clips_per_class, "test": test_clips_per_class}
    for split, number in numbers.items():
        for name in MOTION_CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            files = [(folder / f"{index:05d}.mp4", index) for index in range(number)]
            if extra := {path.name for path in folder.glob("*.mp4")} - {path.name for path, _ in files}:
                raise ConfigError(
                    f"{folder} holds more than the set ({min(extra)}, ...); remove it or name a new folder"
                )
            jobs += [(path, name, split, index, size, num_frames, fps, seed, difficulty) for path, index in files]
    missing = [job for job in jobs if not job[0].exists()]
    done = len(jobs) - len(missing)
    report = progress or (lambda done, total: None)
    report(done, len(jobs))
    if workers == 1 or len(missing) < 16:
        for job in missing:
            _write_clip(job)
            report(done := done + 1, len(jobs))
        return root
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_write_clip, missing, chunksize=8):
            report(done := done + 1, len(jobs))
    return root


def draw_motion_clip(
    name: str,
    *,
    split: Split = "train",
    index: int = 0,
    size: int = 80,
    num_frames: int = 16,
    seed: int = 0,
    difficulty: Difficulty = "plain",
) -> np.ndarray:
    """The frames of one clip, before it is encoded.

    Args:
        name: One of `MOTION_CLASSES`.
        split: Which shapes, hues and speeds.
        index: Number of the clip within its class and split.
        size: Height and width in pixels; even, at least 32.
        num_frames: At least 16.
        seed: Of the set.
        difficulty: See the module's text; a degraded clip's compression is not part of its frames.

    Returns:
        uint8 (num_frames, size, size, 3), RGB.

    Raises:
        ConfigError: An unknown class, split or difficulty, or a number out of its range.
    """
    if name not in MOTION_CLASSES:
        raise ConfigError(f"no motion class is named {name!r}: {did_you_mean(name, MOTION_CLASSES)}")
    if split not in _SHAPES:
        raise ConfigError(f"split must be train or test, got {split!r}")
    _check_picture(size, num_frames)
    _check_difficulty(difficulty)
    words = [seed, list(_SHAPES).index(split), MOTION_CLASSES.index(name), index]
    random = np.random.default_rng(words)
    others = np.random.default_rng([*words, 1])  # its own, so that the shape is the same in all difficulties
    calm = 1.0 if name.startswith(("moves", "grows", "shrinks")) else _CALM
    courses = {key: calm * swing * _course(random, num_frames) for key, swing in _SWING.items()}
    if name in _ONE_WAY:
        key, sign = _ONE_WAY[name]
        courses[key] = -sign * np.cos(np.pi * (np.arange(num_frames) + 0.5) / num_frames)
    events = _events(random, num_frames, _ORDERS.get(name, ""))

    def extent(low: float, high: float) -> float:
        """How far a property goes, and so how fast: tests are slower or faster than all training."""
        middle, half = (low + high) / 2, (high - low) / 2
        speed = random.uniform(-0.6, 0.6) if split == "train" else random.choice([-1, 1]) * random.uniform(0.6, 1)
        return middle + half * speed

    across = random.uniform(0.46, 0.54) + extent(0.08, 0.15) * courses["across"]
    down = random.uniform(0.46, 0.54) + extent(0.08, 0.15) * courses["down"]
    angle = random.uniform(0, 2 * math.pi) + extent(1.2, 1.8) * courses["angle"]
    radius = random.uniform(0.23, 0.26) * extent(1.2, 1.45) ** courses["size"]
    background, shape_colour, mark_colour = _colours(random, split, size)
    shapes = _SHAPES[split]
    outline = shapes[random.integers(len(shapes))]
    distractors = []
    if difficulty != "plain":
        distractors = [_distractor(others, shapes, background, num_frames) for _ in range(_DISTRACTORS)]
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for t in range(num_frames):
        picture = background
        for corners, colour in distractors:
            picture = _paint(picture, corners[t] * size, colour)
        if events[t] != "h":
            place = np.array([across[t], down[t]]) * size
            picture = _paint(picture, _moved(outline, place, angle[t], radius[t] * size), shape_colour)
            picture = _paint(picture, _moved(_MARK, place, angle[t], radius[t] * size), mark_colour)
        if events[t] == "f":
            picture = 0.45 * picture + 0.55 * 255
        if difficulty == "degraded":
            picture = picture * (1 + others.normal(0, _FLICKER)) + others.normal(0, _NOISE, picture.shape)
        frames[t] = picture.round().clip(0, 255)
    return frames


def _distractor(
    random: np.random.Generator, shapes: list[np.ndarray], background: np.ndarray, num_frames: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """A small shape that goes one way: its corners in each frame, in shares of the picture, and its colour."""
    start, way = random.uniform(0.1, 0.9, 2), random.uniform(-0.5, 0.5, 2)
    angle, turn = random.uniform(0, 2 * math.pi), random.uniform(-2, 2)
    radius, growth = random.uniform(0.06, 0.1), random.uniform(0.6, 1.7)
    outline = shapes[random.integers(len(shapes))]
    lightness = background.mean()
    colour = (lightness + random.choice([-1, 1]) * random.uniform(40, 90) + random.uniform(-30, 30, 3)).clip(0, 255)
    course = np.linspace(-0.5, 0.5, num_frames)
    corners = [_moved(outline, (start + way * c) % 1, angle + turn * c, radius * growth**c) for c in course]
    return corners, colour.astype(np.float32)


def _course(random: np.random.Generator, num_frames: int) -> np.ndarray:
    """There and back once between -1 and 1, from any point of the way."""
    return np.cos(2 * np.pi * (np.arange(num_frames) + 0.5) / num_frames + random.uniform(0, 2 * np.pi))


def _events(random: np.random.Generator, num_frames: int, order: str) -> str:
    """What happens in each frame: "f" a flash, "h" the shape hides, "." neither; `order` is "fh", "hf" or empty."""
    text = "".join(event * (num_frames * 3 // 16) for event in order)
    start = int(random.integers(num_frames - len(text) + 1))
    return text.rjust(start + len(text), ".").ljust(num_frames, ".")


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners of a regular polygon of radius 1, or of a star with that inner radius, as (n, 2)."""
    radii = np.tile([1.0, inner], corners) if inner < 1 else np.ones(corners)
    turns = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(turns), np.sin(turns)], 1) * radii[:, None]


_CROSS = np.array([(1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35)])
_SHAPES: dict[str, list[np.ndarray]] = {
    "train": [_regular(3), _regular(4), _regular(6), _regular(40), _regular(3) * (1, 0.7), _regular(4) * (1, 0.65)],
    "test": [_regular(5), _regular(5, 0.5), np.concatenate([_CROSS, -_CROSS]), _regular(40) * (1, 0.75)],
}
_MARK = np.array([(0, -0.3), (0.9, -0.3), (0.9, 0.3), (0, 0.3)])  # a clock's hand shows every shape's angle


def _moved(outline: np.ndarray, place: np.ndarray, angle: float, radius: float) -> np.ndarray:
    """An outline turned (clockwise as one looks at it, for y points down), scaled and put in its place, in pixels."""
    cos, sin = math.cos(angle), math.sin(angle)
    return place + radius * outline @ np.array([[cos, sin], [-sin, cos]])


def _paint(picture: np.ndarray, outline: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The picture (size, size, 3) with the outline filled, its edge smooth."""
    size = len(picture)
    mask = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in outline * _OVERSAMPLE], fill=255)
    cover = np.asarray(mask.reduce(_OVERSAMPLE), np.float32)[..., None] / 255
    return picture + cover * (colour - picture)


def _colours(random: np.random.Generator, split: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cloudy background (size, size, 3), and the colours of shape and mark, well apart in lightness."""

    def colour(hue: float, light: float) -> np.ndarray:
        return 255 * np.array(colorsys.hls_to_rgb(hue % 1, light, random.uniform(0.3, 0.9)), np.float32)

    dark_first = bool(random.integers(2))
    lights = random.uniform((0.12, 0.66, 0.02), (0.3, 0.82, 0.18))
    if not dark_first:
        lights = 0.88 - lights
    hue = random.uniform(0, 0.5) + (0.5 if split == "test" else 0)
    cells = int(random.integers(3, 9))
    clouds = random.uniform(-24, 24, (cells, cells, 3)) + colour(random.uniform(), lights[0])
    picture = Image.fromarray(clouds.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32), colour(hue, lights[1]), colour(hue + 0.5, lights[2])


def _check_picture(size: int, num_frames: int) -> None:
    if size < 32 or size % 2 or num_frames < 16:
        raise ConfigError(f"size must be even and at least 32, num_frames at least 16; got {size} and {num_frames}")


def _check_difficulty(difficulty: str) -> None:
    if difficulty not in DIFFICULTIES:
        raise ConfigError(f"no difficulty is named {difficulty!r}: {did_you_mean(difficulty, DIFFICULTIES)}")


def _claim(root: Path, settings: dict[str, int | str]) -> None:
    """Write the set's settings into an empty root, or find the same ones there."""
    record = root / _RECORD
    if root.is_dir() and any(root.iterdir()):
        if not record.is_file() or json.loads(record.read_text()) != settings:
            raise ConfigError(f"{root} is not empty and holds no motion set of these settings; name a new folder")
        return
    root.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings))


def _write_clip(job: Job) -> None:
    """Draw and encode one clip; the file appears when it is whole."""
    path, name, split, index, size, num_frames, fps, seed, difficulty = job
    frames = draw_motion_clip(
        name, split=split, index=index, size=size, num_frames=num_frames, seed=seed, difficulty=difficulty
    )
    unfinished = path.with_suffix(".part")
    _encode(unfinished, frames, fps, difficulty)
    unfinished.replace(path)


def _encode(path: Path, frames: np.ndarray, fps: int, difficulty: Difficulty = "plain") -> None:
    """Write uint8 (T, H, W, 3) as mp4: H.264 where this PyAV has it, else MPEG-4."""
    try:
        av.codec.Codec("libx264", "w")
        codec = "libx264"
    except av.codec.codec.UnknownCodecError:
        codec = "mpeg4"
    options = _QUALITY[codec]["degraded" if difficulty == "degraded" else "plain"]
    with av.open(str(path), "w", format="mp4") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=Fraction(fps), options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
