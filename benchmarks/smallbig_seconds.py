"""SmallBig, Non-local, SlowOnly and C2D at equal depth: seconds, not GFLOPs.

    python benchmarks/smallbig_seconds.py [--rounds 5] [--threads 1,2] [--out FOLDER] [--quick]

50-layer nets on 8 frames of 224 x 224, in three forms: PyTorch with torch's own layers, as the nets are usually written
down; PyTorch with lean3d's layers; and compiled by `lean3d.fast`. The latter two take turns in rounds, see `lean3d
bench`; the first is the best of a few calls just before. Prints a table and one JSON line; keeps the line as
`benchmarks/results/smallbig_seconds.json`, a picture as `docs/images/smallbig_seconds.png`, and the numbers in
docs/benchmarks.md, or the first two in another folder (--out). --quick: tiny clips, one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lean3d.bench import show
from lean3d.bench.seconds import Report
from runtimes import arguments, keep, measured_on, time_nets

NETS = ("c2d_r50", "slow_r50", "smallbig50", "i3d_r50_nl", "slow_r50_nl")
FORMS = {"torch's layers": "#c9c9c9", "lean3d's layers": "#8c8c8c", "fast": "#2a9d64"}


def numbers(report: Report, net: str, threads: int) -> dict[str, float | None]:
    """Milliseconds of a net in each form; None where it could not be timed."""
    found = next(entry for entry in report.nets if entry.net.name == net)
    eager, fast = found.find("eager", threads), found.find("fast", threads)
    literal = eager.ways["torch's layers"] if eager else None
    return {
        "torch's layers": literal * 1e3 if isinstance(literal, float) else None,
        "lean3d's layers": eager.median * 1e3 if eager else None,
        "fast": fast.median * 1e3 if fast else None,
    }


def rows(report: Report) -> list[list[str]]:
    """A row for each net and number of threads."""
    found = []
    for entry in report.nets:
        for threads in entry.sgemm:
            times = numbers(report, entry.net.name, threads).values()
            cells = ["-" if time is None else f"{time:.0f}" for time in times]
            found.append([f"`{entry.net.name}`", f"{entry.macs / 1e9:.1f}", str(threads), *cells])
    return found


def draw(report: Report, path: Path) -> None:
    """GMACs on the left; seconds, one panel a number of threads, beside them."""
    threads = list(report.nets[0].sgemm)
    names = [entry.net.name for entry in report.nets]
    figure = Figure(figsize=(4 + 4 * len(threads), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    work, *panels = figure.subplots(1, 1 + len(threads), width_ratios=[0.7, *[1] * len(threads)])
    places = range(len(names))
    bars = work.barh(places, [entry.macs / 1e9 for entry in report.nets], color="#6a9fcf")
    work.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    work.set_title("work: GMACs a clip", fontsize=9)
    work.set_yticks(places, names, fontsize=9)
    for panel, number in zip(panels, threads, strict=True):
        times = [numbers(report, name, number) for name in names]
        for place, (form, colour) in enumerate(FORMS.items()):
            heights = [(time[form] or 0) / 1e3 for time in times]
            bars = panel.barh([p + 0.27 * (place - 1) for p in places], heights, 0.25, color=colour, label=form)
            panel.bar_label(bars, [f"{height:.2f}" if height else "-" for height in heights], fontsize=7, padding=2)
        panel.set_title(f"time: seconds a clip, {number} thread{'s' * (number > 1)}", fontsize=9)
        panel.set_yticks(places, [""] * len(names))
    for panel in (work, *panels):
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, keep."""
    args = arguments(__doc__, argv, ("eager", "fast"))
    report = time_nets(NETS, args, "smallbig_seconds")
    titles = ["net", "GMACs", "threads", *(f"{form}, ms" for form in FORMS)]
    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for name, *cells in rows(report):
        table.add_row(name.strip("`"), *cells)
    console = Console()
    console.print(table)
    console.print(show.machine_line(report), soft_wrap=True)
    for entry in report.nets:
        for line in show.remarks(entry):
            console.print(f"{entry.net.name}: {line}", style="dim", soft_wrap=True, markup=False)
    paragraphs = [show.markdown_table(titles, rows(report)), measured_on(report)]
    keep("smallbig_seconds", args.out, partial(draw, report), *paragraphs)
    print(report.to_json())


if __name__ == "__main__":
    main()
