"""What the command prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lean3d.data_tools.check import Health
    from lean3d.evaluate import Results

MANY_CLASSES = 20
"""Tables of more classes than this are shortened."""
WIDE = 110
"""A terminal of so many columns has room for descriptions beside numbers."""

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def results(results: Results, split: str) -> None:
    """A test: the numbers, the classes (of many the worst), the bad files."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_row("split", split)
    table.add_row("top-1", f"{results.top1:.4f}")
    table.add_row("top-5", "-" if results.top5 is None else f"{results.top5:.4f}")
    table.add_row("mean class accuracy", f"{results.mean_class_accuracy:.4f}")
    table.add_row("videos", str(results.num_videos))
    table.add_row("bad files", Text(str(len(results.bad)), style="red" if results.bad else ""))
    out.print(table)
    columns = zip(results.classes, results.confusion.sum(1).tolist(), results.per_class, strict=True)
    rows = [(name, videos, accuracy) for name, videos, accuracy in columns if accuracy is not None]
    shown = sorted(rows, key=lambda row: row[2])[:MANY_CLASSES] if len(rows) > MANY_CLASSES else rows
    classes = Table("class", "videos", "accuracy", box=None, pad_edge=False, header_style="bold")
    for column in classes.columns[1:]:
        column.justify = "right"
    for name, videos, accuracy in shown:
        classes.add_row(name, str(videos), f"{accuracy:.3f}")
    out.print()
    out.print(classes)
    if len(shown) < len(rows):
        out.print(f"the {len(shown)} worst of {len(rows)} classes; all are in per_class.csv", style="dim")
    for file in results.bad[:5]:
        out.print(f"bad: {file.path}: {file.reason}", style="red", soft_wrap=True, markup=False)
    if len(results.bad) > 5:
        out.print(f"... and {len(results.bad) - 5} more bad files; all are in results.json", style="red")


def health(health: Health) -> None:
    """A checked data set: kinds of files, labels (of many the rarest), problems, notes."""
    totals = health.totals()
    table = Table("codec", "size", "files", "frames/s", "frames", "keyframe every", box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    kinds = health.kinds()
    for kind in kinds[:MANY_CLASSES]:
        size = f"{kind['width']} x {kind['height']}"
        ranges = (_range(kind[name]) for name in ("fps", "num_frames", "keyframe_interval"))
        table.add_row(kind["codec"], size, str(kind["files"]), *ranges)
    out.print(table)
    if len(kinds) > MANY_CLASSES:
        out.print(f"and {len(kinds) - MANY_CLASSES} rarer kinds", style="dim")
    if health.manifest.classes:
        rows = health.labels()
        rare = sorted(rows, key=lambda row: row["train"])[:MANY_CLASSES] if len(rows) > MANY_CLASSES else rows
        labels = Table("class", "train", "val", "test", box=None, header_style="bold")
        for column in labels.columns[1:]:
            column.justify = "right"
        for row in rare:
            labels.add_row(Text(row["class"] or "not labelled"), *(str(row[s]) for s in ("train", "val", "test")))
        out.print()
        out.print(labels)
        if len(rare) < len(rows):
            out.print(f"the {len(rare)} rarest of {len(rows)} classes; all are in the page", style="dim")
    for finding in health.findings:
        style = "bold red" if finding.problem else "bold"
        out.print()
        out.print(
            Text(f"{'problem' if finding.problem else 'note'}: {finding.kind}: {len(finding.notes)}", style=style)
        )
        for files, note in list(zip(finding.cases, finding.notes, strict=True))[:5]:
            out.print(Text(f"  {' = '.join(files)}{': ' if files else ''}{note}"), soft_wrap=True)
        if len(finding.notes) > 5:
            out.print(f"  ... and {len(finding.notes) - 5} more, all in the page and in check.json", style="dim")
        out.print(Padding(Text(finding.text, style="dim"), (0, 0, 0, 2)))
    out.print(
        f"\n{totals['files']:.0f} files, {totals['bad']:.0f} bad, {totals['seconds'] / 60:.1f} minutes, "
        f"{totals['bytes'] / 1e6:.1f} MB: " + ("[green]healthy[/green]" if health.healthy else "[red]not healthy[/red]")
    )


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)
    return low if low == high else f"{low} to {high}"


class ModelRow(NamedTuple):
    """A model as it stands in the zoo's table: weights in millions, the others in billions."""

    name: str
    clip: str
    weights: str
    gmacs: str
    fast: str
    summary: str


def model_row(name: str) -> ModelRow:
    """A model with its default arguments, counted."""
    import torch

    from lean3d.models import create_model, model_summary
    from lean3d.models.cost import cost

    with torch.device("meta"):
        model = create_model(name)
    price, spec = cost(model), model.input_spec
    clip = f"{spec.num_frames} x {spec.size[0]}x{spec.size[1]}"
    weights, gmacs, fast = (f"{n:.2f}" for n in (price.weights / 1e6, price.macs / 1e9, price.multiplications / 1e9))
    return ModelRow(name, clip, weights, gmacs, fast, model_summary(name))


def models(rows: Sequence[ModelRow]) -> None:
    """The zoo. In a narrow terminal each description stands under its model's numbers."""
    wide = out.width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", style="cyan", no_wrap=True)
    for title in ("frames x size", "weights (M)", "GMACs", "fast (G)"):
        table.add_column(title, justify="right", no_wrap=True)
    if wide:
        table.add_column("what it is", overflow="fold")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    else:
        for row in rows:
            table.add_row(*row[:-1])
        lines = out.render_lines(table, pad=False)
        for line, summary in zip(lines, ["", *(row.summary for row in rows)], strict=True):
            out.print(Text("".join(segment.text for segment in line).rstrip()), style="bold" if not summary else "")
            if summary:
                out.print(Padding(Text(summary, style="dim"), (0, 0, 0, 2)))
    out.print(
        "\nFor one clip and the default number of classes. GMACs: multiply-accumulates. fast: multiplications with the "
        "fast algorithms (F(4, 3) in time, F(4x4, 3x3) in the plane), where they save any.",
        style="dim",
    )


def markdown(rows: Sequence[ModelRow]) -> None:
    """The zoo as a Markdown table."""
    print("| model | frames x size | weights (M) | GMACs | fast (G) | what it is |")
    print("|---|---|--:|--:|--:|---|")
    for row in rows:
        print(f"| `{row.name}` | {' | '.join(row[1:])} |")


def pairs(title: str, value: str, rows: Iterable[tuple[str, str]]) -> None:
    """A table of two columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, style="cyan", no_wrap=True)
    table.add_column(value, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)
