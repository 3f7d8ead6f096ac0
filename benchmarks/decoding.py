"""Clips and whole videos decoded a second: lean3d's reader, TorchCodec and decord, on the same files in one process.

    python benchmarks/decoding.py [--rounds 5] [--video FILE] [--files DIR]

Makes its own files of 300 frames of 340 x 256 pixels, 10 s at 30 frames a second, with each frame's number burnt into
the pixels: H.264 as libx264 encodes it by default, H.264 with a keyframe every 12 frames, VP9, AV1, MJPEG. The pictures
are made (drifting textures, noise, a cut every 75 frames), or those of --video.

First the frames: each library must give the frames with the wanted numbers, for clips and for the whole, also of a
variable frame rate; whether their pixels are those of lean3d's own full decode is told. Then the times, each library in
turn, in another order in each round: a clip is 8 frames, every 8th, from a random place, of a file that is opened for
it as a data set opens it; a whole video is all of its frames. All have one decoding thread (decord's runs beside the
one that asks; pinned to one core, as loaders' workers share them, decord is up to a hundred times slower). Ratios are
medians over all rounds, each of two times from the same round.

TorchCodec and decord are left out, with the reason, where they can't be imported or can't decode a file. Prints a table
and one JSON line, and writes `benchmarks/results/decoding.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import lean3d
from lean3d.data.readers import open_video

COUNT, HEIGHT, WIDTH, FPS = 300, 256, 340, 30
BITS = 9
SQUARE = 16
STEP, LENGTH = 8, 8

# name: encoder, ending, pixel format, options
FILES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "H.264": ("libx264", "mp4", "yuv420p", {}),
    "H.264, keyframe every 12": ("libx264", "mp4", "yuv420p", {"g": "12"}),
    "VP9": ("libvpx-vp9", "webm", "yuv420p", {"cpu-used": "5", "crf": "32", "b:v": "0"}),
    "AV1": ("libsvtav1", "mkv", "yuv420p", {"preset": "9", "crf": "32", "svtav1-params": "rc=0"}),
    "MJPEG": ("mjpeg", "avi", "yuvj420p", {"q": "4"}),
}
UNEVEN = "H.264, variable rate"  # only checked

Decode = Callable[[Path, Sequence[int]], np.ndarray]


def made_pictures() -> np.ndarray:
    """uint8 (T, H, W, 3): two textures that drift over each other, a little noise, and a cut every 75 frames."""
    rng = np.random.default_rng(0)
    frames = np.empty((COUNT, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(COUNT):
        if t % 75 == 0:
            layers = []
            for cell in (64, 12):
                coarse = torch.tensor(rng.uniform(0, 255, (1, 3, 2 * HEIGHT // cell + 4, 2 * WIDTH // cell + 4)))
                layers.append(
                    torch.nn.functional.interpolate(coarse, scale_factor=cell, mode="bilinear")[0].permute(1, 2, 0)
                )
            speed = rng.uniform(-2.5, 2.5, (2, 2))
        moved = []
        for layer, (dy, dx) in zip(layers, speed, strict=True):
            top, left = (round(64 + 40 + speed_ * (t % 75)) % 200 for speed_ in (dy, dx))
            moved.append(layer[top : top + HEIGHT, left : left + WIDTH].numpy())
        mixed = 0.7 * moved[0] + 0.3 * moved[1] + rng.normal(0, 2, (HEIGHT, WIDTH, 3))
        frames[t] = mixed.clip(0, 255)
    return frames


def pictures_of(path: Path) -> np.ndarray:
    """The first frames of a video, scaled; forth and back again where it has fewer."""
    with open_video(path) as video:
        there = [*range(video.num_frames), *range(video.num_frames - 2, 0, -1)]
        return video.get_frames([there[i % len(there)] for i in range(COUNT)], size=(HEIGHT, WIDTH)).numpy()


def burn_numbers(frames: np.ndarray) -> None:
    for number, frame in enumerate(frames):
        for bit in range(BITS):
            frame[-SQUARE:, SQUARE * bit : SQUARE * (bit + 1)] = 255 * (number >> bit & 1)


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers that are burnt into frames."""
    strip = frames[:, -SQUARE + 4 : -4, : SQUARE * BITS, 1].reshape(len(frames), SQUARE - 8, BITS, SQUARE)
    return ((strip[..., 4:-4].mean((1, 3)) > 127) * 2 ** np.arange(BITS)).sum(1).tolist()


def encode(path: Path, frames: np.ndarray, codec: str, pix_fmt: str, options: dict[str, str], uneven: bool) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if codec == "mjpeg":
            stream.bit_rate = 6_000_000
        if uneven:
            stream.codec_context.time_base = Fraction(1, 1000)
        stamps = np.cumsum(np.random.default_rng(0).integers(5, 90, len(frames))) if uneven else range(len(frames))
        for stamp, picture in zip(stamps, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000 if uneven else FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ours(path: Path, indices: Sequence[int]) -> np.ndarray:
    with open_video(path) as video:
        return video.get_frames(indices).numpy()


def torchcodec() -> Decode:
    decoders = importlib.import_module("torchcodec.decoders")

    def decode(path: Path, indices: Sequence[int]) -> np.ndarray:
        video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        return video.get_frames_at(list(indices)).data.numpy()

    return decode


def torchcodec_approximate() -> Decode:
    decoders = importlib.import_module("torchcodec.decoders")

    def decode(path: Path, indices: Sequence[int]) -> np.ndarray:
        video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        return video.get_frames_at(list(indices)).data.numpy()

    return decode


def decord() -> Decode:
    library = importlib.import_module("decord")
    library.logging.set_level(library.logging.QUIET)

    def decode(path: Path, indices: Sequence[int]) -> np.ndarray:
        return library.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()

    return decode


def clips(seed: int, count: int) -> list[range]:
    """Frames of clips that start anywhere."""
    rng = random.Random(seed)
    starts = [rng.randrange(COUNT - STEP * (LENGTH - 1)) for _ in range(count)]
    return [range(start, start + STEP * LENGTH - (STEP - 1), STEP) for start in starts]


def check(decode: Decode, path: Path, full: np.ndarray) -> tuple[str, bool]:
    """What is wrong with a library's frames ("" if nothing), and whether their pixels are those of `full`."""
    same = True
    for indices in [range(COUNT), *clips(0, 6)]:
        try:
            frames = decode(path, indices)
        except Exception as error:  # whatever another library raises
            lines = [line for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {lines[0][:100] if lines else ''}", False
        if numbers_in(frames) != list(indices):
            return "gives other frames than those asked for", False
        same &= np.array_equal(frames, full[indices])
    return "", same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=6, help="clips of each file and library in a round")
    parser.add_argument("--video", type=Path, help="take the pictures of this file")
    parser.add_argument("--files", type=Path, help="keep the encoded files here, and use those that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing: dict[str, str] = {}
    libraries: dict[str, Decode] = {"lean3d": ours}
    makers = {"torchcodec": torchcodec, "torchcodec, approximate": torchcodec_approximate, "decord": decord}
    for name, make in makers.items():
        try:
            libraries[name] = make()
        except Exception as error:  # whatever an import raises
            missing[name] = str(error).splitlines()[0]
    with tempfile.TemporaryDirectory() as scratch:
        files = make_files(args.files or Path(scratch), args.video, missing)
        rows, uneven = measure(files, libraries, args.rounds, args.clips)
    report(rows, uneven, missing, libraries, args)


def make_files(folder: Path, video: Path | None, missing: dict[str, str]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    frames = None
    files = {}
    for name, (codec, ending, pix_fmt, options) in {**FILES, UNEVEN: FILES["H.264"]}.items():
        path = folder / f"{''.join(c for c in name if c.isalnum())}.{ending}"
        if not path.exists():
            try:
                av.codec.Codec(codec, "w")
            except av.FFmpegError:
                missing[name] = f"PyAV has no encoder {codec}"
                continue
            if frames is None:
                frames = made_pictures() if video is None else pictures_of(video)
                burn_numbers(frames)
            encode(path, frames, codec, pix_fmt, options, uneven=name == UNEVEN)
        files[name] = path
    return files


def measure(
    files: dict[str, Path], libraries: dict[str, Decode], rounds: int, count: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each file that was timed, and what each library makes of a variable rate."""
    able: dict[str, list[str]] = {}
    rows = []
    uneven: dict[str, str] = {}
    for file, path in files.items():
        full = ours(path, range(COUNT))
        if numbers_in(full) != list(range(COUNT)):
            raise SystemExit(f"{file}: lean3d's full decode has other frames than were encoded")
        found = {name: check(decode, path, full) for name, decode in libraries.items()}
        if found["lean3d"] != ("", True):
            raise SystemExit(f"{file}: lean3d's clips differ from its full decode")
        if file == UNEVEN:
            uneven = {name: wrong or "right" for name, (wrong, _) in found.items()}
            continue
        able[file] = [name for name, (wrong, _) in found.items() if not wrong]
        rows.append(
            {
                "file": file,
                "bytes": path.stat().st_size,
                "left_out": {name: wrong for name, (wrong, _) in found.items() if wrong},
                "same_pixels": {name: same for name, (wrong, same) in found.items() if not wrong},
            }
        )
    times: dict[tuple[str, str, str], list[float]] = {}
    for turn in range(rounds):
        for row in rows:
            file = row["file"]
            names = able[file]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                for kind, wanted in (("clip", clips(1, count)), ("whole", [range(COUNT)])):
                    began = time.perf_counter()
                    for indices in wanted:
                        libraries[name](files[file], indices)
                    seconds = (time.perf_counter() - began) / len(wanted)
                    times.setdefault((file, name, kind), []).append(seconds)
    for row in rows:
        for kind in ("clip", "whole"):
            own = times[row["file"], "lean3d", kind]
            row[f"{kind}_ms"], row[f"{kind}_ratio"] = {}, {}
            for name in able[row["file"]]:
                seconds = times[row["file"], name, kind]
                ratios = [other / one for one, other in zip(own, seconds, strict=True)]
                row[f"{kind}_ms"][name] = round(1000 * statistics.median(seconds), 2)
                row[f"{kind}_ratio"][name] = round(statistics.median(ratios), 3)
    return rows, uneven


def report(
    rows: list[dict[str, Any]],
    uneven: dict[str, str],
    missing: dict[str, str],
    libraries: dict[str, Decode],
    args: argparse.Namespace,
) -> None:
    others = [name for name in libraries if name != "lean3d"]
    table = Table("file", "", "lean3d, a second", *(f"lean3d against {name}" for name in others))
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for row in rows:
        for kind in ("clip", "whole"):
            of = row[f"{kind}_ratio"]
            for name in others:
                ratios[name] += [of[name]] if name in of else []
            shown = (f"{of[name]:.2f}x" if name in of else "can't" for name in others)
            table.add_row(row["file"], kind, f"{1000 / row[f'{kind}_ms']['lean3d']:.1f}", *shown)
    means = {name: round(math.prod(all_) ** (1 / len(all_)), 3) for name, all_ in ratios.items() if all_}
    table.add_row("geometric mean", "", "", *(f"{means[name]:.2f}x" if name in means else "" for name in others))
    Console().print(table)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    for name, verdict in uneven.items():
        print(f"variable rate: {name}: {verdict}")
    result = {
        "benchmark": "decoding",
        "lean3d": lean3d.__version__,
        "av": av.__version__,
        "versions": {
            name: getattr(importlib.import_module(name), "__version__", "?") for name in others if "," not in name
        },
        "cpu": platform.processor() or platform.machine(),
        "pictures": "made" if args.video is None else args.video.name,
        "rounds": args.rounds,
        "clips": args.clips,
        "geometric_mean": means,
        "worst": {name: min(all_) for name, all_ in ratios.items() if all_},
        "variable_rate": uneven,
        "left_out": missing,
        "rows": rows,
    }
    print(json.dumps(result))
    path = Path(__file__).parent / "results/decoding.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [other for other in kept if other["pictures"] != result["pictures"]]
    path.write_text(json.dumps([*kept, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
