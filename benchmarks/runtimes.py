"""The nets that lean3d is measured by, in every runtime, on one and two threads.

    python benchmarks/runtimes.py [--rounds 7] [--threads 1,2] [--runtimes eager,...] [--out FOLDER] [--quick]

What `lean3d bench` does with six nets at their own clip sizes; see there for how it measures. Prints tables, a Markdown
table for docs/benchmarks.md and one JSON line, and keeps the latter and a picture as runtimes.json and runtimes.png in
`benchmarks/results/`. ONNX Runtime and OpenVINO come with the extras export and openvino. torch.compile takes most of
the time, and less of it the second time, since it keeps what it compiled. --quick: tiny clips, one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lean3d.bench import seconds, show
from lean3d.bench.nets import find_nets

NETS = ("c3d", "c3d_light", "smallbig23", "smallbig50", "slow_r50", "slowfast_r50_light")
RESULTS = Path(__file__).parent / "results"


def arguments(text: str | None, argv: Sequence[str] | None, runtimes: Sequence[str]) -> argparse.Namespace:
    """What the scripts that time nets have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=seconds.ROUNDS)
    parser.add_argument("--threads", type=seconds.parse_threads, default=(1, 2))
    parser.add_argument("--runtimes", type=seconds.parse_runtimes, default=tuple(runtimes))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def time_nets(names: Sequence[str], args: argparse.Namespace) -> seconds.Report:
    """The nets at their own sizes, or at tiny ones."""
    nets = find_nets(names, **({"num_frames": 16, "size": (48, 48)} if args.quick else {}))
    rounds = 1 if args.quick else args.rounds
    return seconds.measure(nets, runtimes=args.runtimes, threads=args.threads, rounds=rounds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, keep."""
    args = arguments(__doc__, argv, seconds.RUNTIMES)
    report = time_nets(NETS, args)
    show.tables(report, Console())
    show.write(report, args.out, "runtimes")
    print(f"\n{show.markdown(report)}\n\n{report.to_json()}")


if __name__ == "__main__":
    main()
