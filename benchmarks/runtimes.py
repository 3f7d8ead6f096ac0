"""The nets that lean3d is measured by, in every runtime, on one and two threads.

    python benchmarks/runtimes.py [--rounds 5] [--threads 1,2] [--runtimes eager,...] [--out FOLDER] [--quick]

What `lean3d bench` does with six nets at their own clip sizes; docs/benchmarks.md says how it measures. Prints tables
and one JSON line; keeps the line as `benchmarks/results/runtimes.json`, a picture as `docs/images/runtimes.png`, and
the numbers in docs/benchmarks.md, or the first two in another folder (--out). ONNX Runtime and OpenVINO come with the
extras export and openvino. torch.compile takes most of the time the first time, and keeps what it compiled. --quick:
tiny clips, one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from lean3d.bench import seconds, show
from lean3d.bench.nets import find_nets

NETS = ("c3d", "c3d_light", "smallbig23", "smallbig50", "slow_r50", "slowfast_r50_light")
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def arguments(text: str | None, argv: Sequence[str] | None, runtimes: Sequence[str]) -> argparse.Namespace:
    """What the scripts that time nets have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=seconds.ROUNDS)
    parser.add_argument("--threads", type=seconds.parse_threads, default=(1, 2))
    parser.add_argument("--runtimes", type=seconds.parse_runtimes, default=tuple(runtimes))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def time_nets(names: Sequence[str], args: argparse.Namespace, name: str) -> seconds.Report:
    """The nets at their own sizes, or at tiny ones; after each the JSON file has all so far."""
    nets = find_nets(names, **({"num_frames": 16, "size": (48, 48)} if args.quick else {}))
    rounds = 1 if args.quick else args.rounds

    def write(report: seconds.Report) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(report.to_json() + "\n", encoding="utf-8")

    return seconds.measure(nets, runtimes=args.runtimes, threads=args.threads, rounds=rounds, after_net=write)


def measured_on(report: seconds.Report) -> str:
    """The machine, for the docs."""
    it = report.machine
    return (
        f"Measured on {it['cores']} cores of an {it['processor']} ({it['instructions']}) with torch {it['torch']}, "
        f"ONNX Runtime {it['onnxruntime']} and OpenVINO {it['openvino']}, in {report.rounds} rounds. "
        f"Beside the nets, {show.machine_line(report)}."
    )


def keep(name: str, out: Path, draw: Callable[[Path], None], *paragraphs: str) -> None:
    """Draw the picture; where these are the project's own results, also the docs' part between its two marks."""
    own = out == RESULTS
    draw((DOCS / "images" if own else out) / f"{name}.png")
    if own:
        page = DOCS / "benchmarks.md"
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        text = "\n\n".join(paragraphs)
        page.write_text(f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, keep."""
    args = arguments(__doc__, argv, seconds.RUNTIMES)
    report = time_nets(NETS, args, "runtimes")
    show.tables(report, Console())
    paragraphs = [show.markdown(report)]
    if gains := seconds.leads(report):
        paragraphs.append(show.markdown_table(show.GAINS, show.gain_rows(gains)))
    keep("runtimes", args.out, partial(show.draw, report), *paragraphs, measured_on(report))
    print(report.to_json())


if __name__ == "__main__":
    main()
