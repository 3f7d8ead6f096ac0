"""Make the tables and pictures of docs/accuracy.md from the kept JSON lines.

    python benchmarks/accuracy/tables.py            # rewrites the part of the page between its marks, and its pictures

A cell is the mean over seeds, and with three seeds or more their standard deviation. A result that the ledger doesn't
vouch for stops it: its test clips were read otherwise than once.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rows
import run
import seconds
import studies
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from probes import PROBES
from studies import TABLES, Net, Row, Table
from tasks import Places

from lean3d.errors import DataError

ROOT = Path(__file__).parents[2]
MARKS = ("<!-- tables -->", "<!-- /tables -->")
NEAR = 0.9
"""Share of the final accuracy on val whose first epoch is counted."""
ENOUGH = 3
"""Seeds from which on a spread is given."""
CEILING = 0.95
"""The papers' claims are looked at where the heavy net is below this."""
CHANCE = 2
"""And apart from that where it is above this many times what guessing gives."""

PAIRS = (
    ("C3D", "light C3D", 7.4, 11.0, 3.0),
    ("C3D", "light C3D + TRG", 7.4, 11.0, 3.0),
    ("C3D", "recipe's net", 7.4, 11.0, 3.0),
    ("SlowFast", "light SlowFast", 2.3, 3.6, 6.3),
    ("SlowFast", "light SlowFast + TRG", 2.3, 3.6, 6.3),
)
"""Heavy net, light net, and the paper's claim: times fewer weights, times less work, points of top-1."""

PEERS = ("peers", "peers-fight")
"""Tables whose tasks are shown side by side."""

Result = rows.Result
Lines = list[str]


@dataclass(frozen=True)
class Kept:
    """What there is, and where."""

    results: dict[str, Result]
    milliseconds: dict[str, float]
    """By net and clip."""

    def of(self, row: Row) -> Result | None:
        """A row's result; None where there is none yet."""
        result = self.results.get(rows.key(row))
        return result if result is None or not row.tested or "test" in result else None


def read(folder: Path, *, threads: int = 2) -> Kept:
    """All results, each looked up in the ledger.

    Raises:
        DataError: A result says what the ledger doesn't.
    """
    store = rows.Store(folder)
    results = store.read()
    for name, result in results.items():
        if "test" in result and not store.ledger.check(name, result["test"]):
            raise DataError(f"the ledger in {folder} does not vouch for the test of row {name} ({result['net']})")
    measured = seconds.read(Places(folder, folder, folder))
    return Kept(results, {net: m["ms"] for (net, _, number), m in measured.items() if number == threads})


def page_part(kept: Kept, pictures: Path, tables: Collection[Table] = TABLES.values()) -> str:
    """The generated part of the page; pictures are written to a folder beside it."""
    parts: Lines = []
    waiting: Lines = []
    for table in tables:
        wanted = table.rows()
        done = [(row, result) for row in wanted if (result := kept.of(row)) is not None]
        if len({(row.net.label, row.trick.label) for row, _ in done}) > 1:  # there is something to compare
            parts += [f"### {table.question}", "", _state(table, len(done), len(wanted)), ""]
            parts += _choices(done) if table.choice else _answers(table, done, kept, pictures)
        if len(done) < len(wanted):
            left = [row for row in wanted if kept.of(row) is None]
            waiting.append(
                f"| `{table.name}` | {table.question} | {len(wanted)} | {len(done)} | "
                f"{run.hours(left, kept.results):.0f} |"
            )
    parts = [*_against_peers(kept, tables, pictures), *parts]
    claims = _claims(kept, tables)
    if claims:
        parts = ["### The paper's claims, as far as there are rows", "", *claims, "", *parts]
    if waiting:
        parts += [
            "### Not yet",
            "",
            "| table | question | rows | done | processor hours left |",
            "|---|---|--:|--:|--:|",
        ]
        parts += [*waiting, ""]
    return "\n".join(parts).rstrip() + "\n"


def _state(table: Table, done: int, wanted: int) -> str:
    what = "all rows" if done == wanted else f"{done} of {wanted} rows so far"
    return f"`python benchmarks/accuracy/run.py {table.name}`; {what}."


# ---- nets by shares


def _answers(table: Table, done: Sequence[tuple[Row, Result]], kept: Kept, pictures: Path) -> Lines:
    """For each task: accuracies, what nets rely on, the course of training, confusions, pictures."""
    parts: Lines = []
    for task in dict.fromkeys(row.task.name for row, _ in done):
        here = [(row, result) for row, result in done if row.task.name == task]
        shares = sorted({row.share for row, _ in here})
        nets = [net for net in table.nets if any(row.net == net for row, _ in here)]
        videos = here[0][1]["test"]["videos"]
        parts += [
            f"**{task}**, top-1 on {videos} test clips by share of the training clips (at 0.9, {videos} clips alone "
            f"make {math.sqrt(0.09 / videos):.3f} of standard error)",
            "",
        ]
        heads = ["net", "width", "weights (M)", "fast (G)", "ms", *(f"{share} %" for share in shares)]
        lines = []
        for net in nets:
            own = [(row, result) for row, result in here if row.net == net]
            cells = [_cell(r["test"]["top1"] for row, r in own if row.share == share) for share in shares]
            lines.append([net.label, *_price(own[0], kept), *cells])
        parts += _markdown(heads, lines)
        top = max(shares)
        parts += _relies_on(nets, [(row, r) for row, r in here if row.share == top], top)
        parts += _confusions([r for row, r in here if row.share == top], top)
        picture = _picture(table, task, nets, here, kept, pictures)
        if picture:
            parts += [f"![{table.question}, {task}]({picture})", ""]
    return parts


def _price(one: tuple[Row, Result], kept: Kept) -> list[str]:
    row, result = one
    return [
        f"{studies.width_of(row.net):g}",
        f"{result['weights'] / 1e6:.3f}",
        f"{result['multiplications'] / 1e9:.3f}",
        _ms(_milliseconds(row, kept)),
    ]


def _milliseconds(row: Row, kept: Kept) -> float | None:
    return kept.milliseconds.get(seconds.net_key(seconds.rows_model(row)))


def _ms(measured: float | None) -> str:
    return "-" if measured is None else f"{measured:.2f}"


def _relies_on(nets: Sequence[Net], here: Sequence[tuple[Row, Result]], share: int) -> Lines:
    """Accuracy under the probes, and epochs to most of the final accuracy."""
    heads = ["net", "as it is", *PROBES, f"epochs to {NEAR:.0%}"]
    lines = []
    for net in nets:
        own = [result for row, result in here if row.net == net]
        if own:
            cells = [_cell(r["test"]["top1"] for r in own)]
            cells += [_cell(r["test"]["probes"][probe] for r in own) for probe in PROBES]
            lines.append([net.label, *cells, _cell((epochs_to(r["val_top1_by_epoch"]) for r in own), digits=0)])
    title = f"The same at {share} % with the test clips changed, and epochs until {NEAR:.0%} of the final val accuracy"
    return [title, "", *_markdown(heads, lines)]


def epochs_to(course: Sequence[float], share: float = NEAR) -> int:
    """The first epoch, from 1, whose accuracy is at least this share of the last epoch's."""
    return next(number for number, top1 in enumerate(course, 1) if top1 >= share * course[-1])


def _confusions(results: Sequence[Result], share: int, most: int = 5) -> Lines:
    """What the net that is best on val takes for what, over its seeds."""
    by_net: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_net[result["net"]].append(result)
    if not by_net:
        return []
    best = max(by_net, key=lambda net: statistics.mean(r["val"]["top1"] for r in by_net[net]))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for result in by_net[best]:
        names = result["test"]["classes"]
        for true, line in zip(names, result["test"]["confusion"], strict=True):
            for guess, number in zip(names, line, strict=True):
                if guess != true and number:
                    counts[true, guess] += number
    if not counts:
        return []
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    said = ", ".join(f"{true} as {guess} ({number})" for (true, guess), number in worst)
    return [f"Most confused at {share} % by {best}, the best on val: {said}.", ""]


def _picture(
    table: Table,
    task: str,
    nets: Sequence[Net],
    here: Sequence[tuple[Row, Result]],
    kept: Kept,
    folder: Path,
) -> str | None:
    """Accuracy over training clips, multiplications and milliseconds; a path from the page, or None for one net."""
    if len(nets) < 2:
        return None
    shares = sorted({row.share for row, _ in here})
    timed = all(seconds.net_key(seconds.rows_model(row)) in kept.milliseconds for row, _ in here)
    views: list[tuple[str, Callable[[Row, Result], float]]] = []
    if len(shares) > 1:
        views.append(("training clips", lambda row, result: result["clips"]["train"]))
    views.append((f"multiplications (G), {max(shares)} % of the clips", lambda row, r: r["multiplications"] / 1e9))
    if timed:
        views.append(
            (
                f"ms in lean3d.fast, {max(shares)} % of the clips",
                lambda row, r: kept.milliseconds[seconds.net_key(seconds.rows_model(row))],
            )
        )
    figure = Figure(figsize=(5.2 * len(views), 4.4), layout="constrained")
    for place, (label, across) in enumerate(views, 1):
        axes = figure.add_subplot(1, len(views), place)
        for number, net in enumerate(nets):
            points: dict[float, list[float]] = defaultdict(list)
            for row, result in here:
                if row.net == net and (label == "training clips" or row.share == max(shares)):
                    points[across(row, result)].append(result["test"]["top1"])
            _points(axes, points, net.label, number)
        axes.set(xlabel=label, ylabel="top-1, test")
        _logarithmic(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return _keep(figure, folder, f"accuracy-{table.name}-{task}.png")


def _points(axes: Axes, points: dict[float, list[float]], label: str, number: int) -> None:
    """A net's means and spreads over x; its color and marker are those of its number."""
    xs = sorted(points)
    means = [statistics.mean(points[x]) for x in xs]
    spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
    marker = "osD^vPX*"[number // 10 % 8]
    axes.errorbar(xs, means, spread, label=label, marker=marker, capsize=3, color=f"C{number % 10}")


def _keep(figure: Figure, folder: Path, name: str) -> str:
    """Write a picture; a path from the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=80, metadata={"Software": None})
    return f"{folder.name}/{name}"


def _logarithmic(axes: Axes) -> None:
    """Plain numbers, few enough that they don't lie over each other."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


# ---- what a user would pick


def _against_peers(kept: Kept, tables: Iterable[Table], folder: Path) -> Lines:
    """All tasks side by side, at the share of the clips that most nets were run on: accuracy, milliseconds."""
    top1: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    ms: dict[str, float | None] = {}
    nets_at: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in (row for table in tables if table.name in PEERS for row in table.rows()):
        if (result := kept.of(row)) is not None:
            label, task, share = row.net.label, row.task.name, row.share
            top1[label, task, share].append(result["test"]["top1"])
            nets_at[task][share].add(label)
            ms[label] = _milliseconds(row, kept)
    if len(ms) < 2:
        return []
    places = [(task, max(shares, key=lambda share: len(shares[share]))) for task, shares in nets_at.items()]
    figure = Figure(figsize=(3.4 * len(places), 3.8), layout="constrained")
    for column, (task, share) in enumerate(places, 1):
        axes = figure.add_subplot(1, len(places), column)
        for number, (label, across) in enumerate(ms.items()):
            if across is not None and (label, task, share) in top1:
                _points(axes, {across: top1[label, task, share]}, label, number)
        axes.set(xlabel="ms a clip, lean3d.fast", ylim=(0, 1), title=f"{task}, {share} % of the clips")
        _logarithmic(axes)
    figure.axes[0].set_ylabel("top-1, test")
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    heads = ["net", "ms", *(f"{task}, {share} %" for task, share in places)]
    lines = [
        [label, _ms(across), *(_cell(top1.get((label, *place), [])) for place in places)]
        for label, across in ms.items()
    ]
    title = "What a user would pick: all tasks side by side"
    picture = f"![{title}: accuracy over milliseconds]({_keep(figure, folder, 'accuracy-against-peers.png')})"
    return [f"### {title}", "", *_markdown(heads, lines), picture, ""]


# ---- variants to choose from, and claims


def _choices(done: Sequence[tuple[Row, Result]]) -> Lines:
    """What each trick changes on val, paired by net, task, share and seed."""
    first = done[0][0].trick.label if done else ""
    by_trick: dict[str, dict[tuple[str, str, int, int], float]] = defaultdict(dict)
    for row, result in done:
        by_trick[row.trick.label][row.net.label, row.task.name, row.share, row.seed] = result["val"]["top1"]
    nets = list(dict.fromkeys(row.net.label for row, _ in done))

    def change(trick: str, net: str | None) -> str:
        if trick == first:
            return "0"
        pairs = [
            100 * (value - by_trick[first][place])
            for place, value in by_trick[trick].items()
            if net in (None, place[0]) and place in by_trick[first]
        ]
        return _cell(pairs, digits=1, signed=True)

    heads = ["change", *nets, "all"]
    lines = [[trick, *(change(trick, net) for net in (*nets, None))] for trick in by_trick]
    if len(nets) > len(by_trick):  # a page is high rather than wide
        heads, *lines = [list(line) for line in zip(heads, *lines, strict=True)]
        heads[0] = "net"
    return [f"Points of top-1 on val against `{first}`", "", *_markdown(heads, lines)]


def _claims(kept: Kept, tables: Iterable[Table]) -> Lines:
    """Heavy against light: how many times less, and points of accuracy where the heavy net is below the ceiling."""
    found: dict[str, dict[tuple[str, int, int], Result]] = defaultdict(dict)
    for row in (row for table in tables for row in table.rows()):
        result = kept.of(row)
        if result is not None and row.tested and row.trick.label == "light":
            found[row.net.label][row.task.name, row.share, row.seed] = result
    lines = []
    for heavy, light, weights, work, points in PAIRS:
        both = sorted(set(found[heavy]) & set(found[light]))
        by_place: dict[tuple[str, int], list[tuple[Result, Result]]] = defaultdict(list)
        for place in both:
            by_place[place[:2]].append((found[heavy][place], found[light][place]))
        gains, gains_of_learned, where = [], [], []
        for (task, share), pairs in by_place.items():
            tops = [[result["test"]["top1"] for result in pair] for pair in pairs]
            mean = statistics.mean(top for top, _ in tops)
            if mean >= CEILING:
                continue
            gain = 100 * statistics.mean(other - one for one, other in tops)
            gains.append(gain)
            if mean >= CHANCE / len(pairs[0][0]["test"]["classes"]):
                gains_of_learned.append(gain)
            where.append(f"{task} {share} % {gain:+.1f} ({len(pairs)})")
        if not gains:
            continue
        one, other = by_place[both[0][:2]][0]
        lines.append(
            [
                f"{heavy} / {light}",
                f"{one['weights'] / other['weights']:.1f}x ({weights}x)",
                f"{one['macs'] / other['multiplications']:.1f}x ({work}x)",
                f"{statistics.mean(gains):+.1f} (+{points})",
                f"{statistics.mean(gains_of_learned):+.1f}" if gains_of_learned else "-",
                ", ".join(where),
            ]
        )
    if not lines:
        return []
    heads = [
        *("heavy / light", "fewer weights (claim)", "its MACs / fast (claim)", "points (claim)"),
        *("where the heavy net learned", "points by task and share (seeds)"),
    ]
    return [
        f"Mean over tasks and shares where the heavy net is below {CEILING:.0%}, at equal width; and over those of "
        f"them where it has at least {CHANCE} times what guessing gives, since to be ahead of a net that did not learn "
        "says little.",
        "",
        *_markdown(heads, lines),
    ]


# ---- text


def _cell(values: Iterable[float], *, digits: int = 3, signed: bool = False) -> str:
    """A mean, its spread where there are enough values, else how many there are."""
    values = list(values)
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    if len(values) >= ENOUGH:
        return f"{mean} ± {statistics.stdev(values):.{digits}f}"
    return f"{mean} ({len(values)})"


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Lines:
    return [
        "| " + " | ".join(heads) + " |",
        "|---|" + "--:|" * (len(heads) - 1),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


def write(page: Path, part: str) -> None:
    """Put the generated part between the page's marks.

    Raises:
        DataError: The page lacks them.
    """
    text = page.read_text(encoding="utf-8")
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise DataError(f"{page} has no part between {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n\n{part}\n{MARKS[1]}{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None, tables: Collection[Table] = TABLES.values()) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--threads", type=int, default=2, help="of the milliseconds that are shown")
    args = parser.parse_args(words)
    write(args.page, page_part(read(args.results, threads=args.threads), args.page.parent / "images", tables))


if __name__ == "__main__":
    main()
