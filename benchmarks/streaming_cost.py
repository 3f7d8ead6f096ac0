"""What a new frame costs on a stream, against recomputing the clip of the last frames at every frame.

    python benchmarks/streaming_cost.py [--threads 1] [--frames 16] [--rounds 3] [--models slow_r50]

Both are the same causal net with the same weights, as it is in PyTorch; and compiled, step against clip, by
`lean3d.fast`, which measures its algorithms when a net comes for the first time. First the outputs: after the first T
frames the stream's scores must be the clip net's on these frames, and at every result after that those of the clip net
on the whole stream so far, its head over the last T frames (1e-5 of the largest score). Then the times, in interleaved
rounds: a stream's mean time a frame over whole periods, and the clip net's on the last T frames, in its fastest layout.
It is CPU time, in which other programs' work doesn't count.

Recomputing T frames is the cheaper of two ways: it begins each clip with zeros in place of the frames before, so it
has the stream's outputs on the first clip alone. For the stream's outputs at every frame, a net without a state has to
recompute all frames that they depend on; that is timed too. Prints a table and one JSON line, and keeps the rows in
`benchmarks/results/streaming_cost.json`, beside those of other models that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lean3d
from lean3d import fast
from lean3d.fast import compile_stream
from lean3d.models import NetStream, VideoNet, create_model

T = 16
NETS: dict[str, dict[str, Any]] = {
    "c3d_light": {},
    "c3d_light, time never halved": {"halve_time_from": 6},
    "slow_r50": {},
}


def check_outputs(net: VideoNet, stream: NetStream, frames: Tensor) -> float:
    """The largest difference of scores, over the largest score."""
    with torch.inference_mode():
        features = net.stages(net.stem(frames))
        first_clip = net(frames[:, :, :T])
        scores, state = [], stream.init_state()
        for t in range(frames.shape[2]):
            y, state = stream.step(frames[:, :, t : t + 1], state)
            scores += [] if y is None else [y]
            if t == T - 1:
                worst = (y - first_clip).abs().max()
        for j, y in enumerate(scores):
            worst = max(worst, (y - net.head(features[:, :, max(0, j + 1 - stream.window) : j + 1])).abs().max())
        error = (worst / torch.stack(scores).abs().max()).item()
    if error > 1e-5 or len(scores) < 2:
        raise SystemExit(f"{net.spec['name']}: stream and clip differ by {error:.1e}")
    return error


def seconds_a_frame(stream: NetStream, frames: Tensor, warm_up: int) -> float:
    """CPU time, the mean over the frames behind the first `warm_up`."""
    state, start = stream.init_state(), 0.0
    for t in range(frames.shape[2]):
        if t == warm_up:
            start = time.process_time()
        _, state = stream.step(frames[:, :, t : t + 1], state)
    return (time.process_time() - start) / (frames.shape[2] - warm_up)


def seconds_a_clip(net: Callable[[Tensor], Tensor], clip: Tensor) -> float:
    """CPU time of one pass."""
    with torch.inference_mode():
        start = time.process_time()
        net(clip)
        return time.process_time() - start


def compare(title: str, arguments: dict[str, Any], num_frames: int, rounds: int) -> dict[str, Any]:
    """Outputs, then times, of one net."""
    torch.manual_seed(0)
    name = title.split(",")[0]
    net = create_model(name, num_classes=10, num_frames=T, causal=True, **arguments).eval()
    stream = net.stream()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm3d)):
        norm.running_mean.normal_(std=0.1), norm.running_var.uniform_(0.5, 1.5)
    size = net.input_spec.size
    warm_up = T
    num_frames = warm_up + -(-num_frames // stream.period) * stream.period
    frames = torch.randn(1, 3, num_frames, *size)
    error = check_outputs(net, stream, frames)
    needed = min(stream.receptive_field, 96)
    clip = frames[:, :, -T:].contiguous(memory_format=torch.channels_last_3d)
    whole = torch.randn(1, 3, needed, *size).contiguous(memory_format=torch.channels_last_3d)
    seconds_a_clip(net, clip)
    times: dict[str, list[float]] = {"frame": [], "clip": [], "whole": [seconds_a_clip(net, whole)]}
    for _ in range(rounds):
        times["frame"].append(seconds_a_frame(stream, frames, warm_up))
        times["clip"] += [seconds_a_clip(net, clip) for _ in range(2)]
    compiled_stream = compile_stream(stream, quiet=True)
    compiled_clip = fast.compile(net, clip, quiet=True)
    times |= {"fast frame": [], "fast clip": []}
    for _ in range(rounds):
        times["fast frame"].append(seconds_a_frame(compiled_stream, frames, warm_up))
        times["fast clip"] += [seconds_a_clip(compiled_clip, clip) for _ in range(2)]
    ms = {kind: statistics.median(values) * 1e3 for kind, values in times.items()}
    return {
        "model": title,
        "threads": torch.get_num_threads(),
        "input": [3, T, *size],
        "period": stream.period,
        "error": float(f"{error:.1e}"),
        "clip_ms": round(ms["clip"], 1),
        "frame_ms": round(ms["frame"], 2),
        "ratio": round(ms["clip"] / ms["frame"], 1),
        "fast_error": float(f"{compiled_stream.error:.1e}"),
        "fast_clip_ms": round(ms["fast clip"], 1),
        "fast_frame_ms": round(ms["fast frame"], 2),
        "fast_ratio": round(ms["fast clip"] / ms["fast frame"], 1),
        "needed_frames": needed,
        "needed_ms": round(ms["whole"], 1),
        "needed_ratio": round(ms["whole"] / ms["frame"], 1),
    }


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16, help="frames that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(NETS), choices=list(NETS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(title, NETS[title], args.frames, args.rounds) for title in args.models]
    table = Table(
        "causal net",
        f"clip of {T}, ms",
        "a frame, ms",
        "less work",
        "all frames needed, ms",
        "less work",
        "compiled: clip, ms",
        "a frame, ms",
        "less work",
        title=f"a new frame, {args.threads} threads",
    )
    for row in rows:
        clip, needed = f"{row['clip_ms']}", f"{row['needed_ms']} ({row['needed_frames']})"
        ratio, needed_ratio = f"{row['ratio']}x", f"{row['needed_ratio']}x"
        compiled = f"{row['fast_clip_ms']}", f"{row['fast_frame_ms']}", f"{row['fast_ratio']}x"
        table.add_row(row["model"], clip, f"{row['frame_ms']}", ratio, needed, needed_ratio, *compiled)
    Console().print(table)
    path = Path(__file__).parent / "results/streaming_cost.json"
    measured = {row["model"]: row for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    result = {
        "benchmark": "streaming_cost",
        "torch": torch.__version__,
        "lean3d": lean3d.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": list(({row["model"]: row for row in kept} | measured).values()),
    }
    print(json.dumps({**result, "rows": rows}))
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
