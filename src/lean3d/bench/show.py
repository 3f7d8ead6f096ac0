"""A report of `seconds` for people: tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lean3d.bench.seconds import Lead, NetReport, Report, Timing, leads

GAINS = ("fast against", "threads", "best other", "gain", "over eager", "over eager with torch's layers")
COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#d98f4e",
    "onnxruntime": "#6a9fcf",
    "openvino": "#7c6bb0",
    "fast": "#2a9d64",
}


def tables(report: Report, console: Console) -> None:
    """Print everything."""
    for net in report.nets:
        console.print(net_table(net))
        for line in remarks(net):
            console.print(line, style="dim", soft_wrap=True, markup=False)
        console.print()
    gains = leads(report)
    if gains:
        console.print(lead_table(gains))
        console.print()
    console.print(machine_line(report), soft_wrap=True)
    console.print(
        f"\nOne clip at a time, float32, {report.rounds} rounds in which each runtime computes in turn. ms: the median "
        "call. spread: half the distance of the quartiles. of sgemm: operations of the direct form (2 x MACs) by time, "
        "as a share of the machine's matrix product. MiB: peak of a call, weights included. error: the largest, of the "
        "largest score, against float64.",
        style="dim",
    )


def write(report: Report, folder: str | Path, name: str = "bench") -> tuple[Path, Path]:
    """Write a report as one line of JSON and as a picture.

    Args:
        folder: It is made where it is missing.
        name: Of both files, without their suffixes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    line, picture = folder / f"{name}.json", folder / f"{name}.png"
    line.write_text(report.to_json() + "\n", encoding="utf-8")
    draw(report, picture)
    return line, picture


def net_table(report: NetReport) -> Table:
    """A row for each runtime and number of threads."""
    _, _, frames, height, width = report.net.clip
    title = f"{report.net.name}  {frames} x {height}x{width}, {report.macs / 1e9:.2f} GMACs"
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
    table.add_column("runtime", style="cyan", no_wrap=True)
    for name in ("threads", "ms", "least", "spread", "to eager", "of sgemm", "MiB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for timing in report.timings:
        if not timing.reason:
            table.add_row(timing.runtime, str(timing.threads), *_numbers(report, timing))
    return table


def remarks(report: NetReport) -> list[str]:
    """The way that each runtime took, and why others were not timed."""
    lines = []
    for timing in report.timings:
        threads = f"{timing.runtime}, {timing.threads} thread{'s' * (timing.threads > 1)}"
        if timing.reason:
            lines.append(f"{threads}: not timed: {timing.reason}")
        elif len(timing.ways) > 1:
            lines.append(f"{threads}: {timing.way}")
    return lines


def machine_line(report: Report) -> str:
    """What the machine does at best: the median over the nets of what was measured beside each."""
    threads = report.nets[0].sgemm
    parts = []
    for number in threads:
        sgemm = statistics.median(net.sgemm[number] for net in report.nets) / 1e9
        copy = statistics.median(net.copy[number] for net in report.nets) / 1e9
        parts.append(f"{number} thread{'s' * (number > 1)}: sgemm {sgemm:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    return "; ".join(parts)


def lead_table(gains: Sequence[Lead]) -> Table:
    """What a runtime gains on each net, and in the geometric mean."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in GAINS:
        table.add_column(title, justify="left" if title == GAINS[0] else "right")
    for row in gain_rows(gains):
        table.add_row(*row)
    return table


def gain_rows(gains: Sequence[Lead]) -> list[list[str]]:
    """The cells under `GAINS`; the geometric mean comes last."""
    rows = []
    for lead in gains:
        numbers = (lead.over_peer, lead.over_eager, lead.over_literal)
        cells = ["-" if number is None else f"{number:.2f}x" for number in numbers]
        rows.append([lead.net, str(lead.threads), lead.peer, *cells])
    mean = statistics.geometric_mean(lead.over_peer for lead in gains)
    return [*rows, ["geometric mean", "", "", f"{mean:.2f}x", "", ""]]


def markdown(report: Report) -> str:
    """Milliseconds as a Markdown table: a row for each net and number of threads, a column for each runtime."""
    names = [timing.runtime for timing in report.nets[0].timings]
    runtimes = list(dict.fromkeys(names))
    rows = []
    for net in report.nets:
        for threads in net.sgemm:
            found = [net.find(runtime, threads) for runtime in runtimes]
            cells = ["-" if timing is None else f"{timing.median * 1e3:.0f}" for timing in found]
            rows.append([f"`{net.net.name}`", str(threads), *cells])
    return markdown_table(["ms a clip", "threads", *runtimes], rows)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def draw(report: Report, path: Path) -> None:
    """Bars of milliseconds: a panel for each net and number of threads, each with its own scale.

    Args:
        path: The file to write, PNG or SVG by its suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = list(report.nets[0].sgemm)
    figure = Figure(figsize=(max(5.0, 2.5 * len(report.nets)), 2.6 * len(threads)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(threads), len(report.nets), squeeze=False)
    for row, number in zip(panels, threads, strict=True):
        for panel, net in zip(row, report.nets, strict=True):
            timings = [timing for timing in net.timings if timing.threads == number]
            times = [0.0 if timing.reason else timing.median * 1e3 for timing in timings]
            names = [timing.runtime for timing in timings]
            bars = panel.bar(names, times, color=[COLOURS[name] for name in names])
            panel.bar_label(bars, [f"{time:.0f}" if time else "-" for time in times], fontsize=8)
            panel.set_title(f"{net.net.name}, {number} thread{'s' * (number > 1)}", fontsize=9)
            panel.tick_params(axis="x", labelrotation=35, labelsize=8)
            panel.tick_params(axis="y", labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(y=0.15)
        row[0].set_ylabel("ms a clip", fontsize=8)
    figure.savefig(path, dpi=110)


def _numbers(report: NetReport, timing: Timing) -> tuple[str, ...]:
    eager = report.find("eager", timing.threads)
    return (
        f"{timing.median * 1e3:.1f}",
        f"{timing.least * 1e3:.1f}",
        f"{timing.spread:.0%}",
        f"{eager.median / timing.median:.2f}x" if eager else "-",
        f"{report.rate(timing):.2f}",
        "-" if timing.memory is None else f"{timing.memory / 2**20:.0f}",
        f"{timing.error:.0e}",
    )
