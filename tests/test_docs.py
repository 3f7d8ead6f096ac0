"""README.md and the pages in docs/: their numbers are counted anew, and all that they name exists."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from lean3d.bench import cost
from lean3d.bench.nets import find_nets
from lean3d.cli import VERBS, arguments, main
from lean3d.cli.arguments import Bench, Train, parse
from lean3d.models import list_models
from lean3d.recipes import list_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LARGE = re.compile(r"101|_nl|r2plus1d|smallbig50|x3d|csn|i3d|extra|tsm")
"""Nets that the other tests of costs count as well: left to the slow tests."""


class Row(NamedTuple):
    command: str
    numbers: dict[str, str]


def page_text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(page: Path) -> list[str]:
    """Everything that is set as code: lines of fenced blocks without their comments, and words in backticks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", page_text(page), re.M | re.S)
    lines = [line.split("  #")[0].strip() for block in fenced for line in block.splitlines()]
    plain = re.sub(r"^```.*?^```$", "", page_text(page), flags=re.M | re.S)
    return [line for line in lines if line] + [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", plain)]


def bench_rows() -> list[Row]:
    rows = []
    for page in PAGES:
        heads: list[str] = []
        for line in page_text(page).splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if cells and cells[0].startswith("`lean3d bench"):
                rows.append(Row(cells[0].strip("`"), dict(zip(heads[1:], cells[1:], strict=True))))
            elif cells and not set(line) <= set("|-:"):
                heads = cells
    return rows


ROWS = bench_rows()


@functools.cache
def measured(command: str) -> list[cost.Measured]:
    args = parse(Bench, shlex.split(command)[2:])
    assert args.cost
    nets = find_nets(args.nets, num_frames=args.num_frames, size=args.size, options=args.options)
    return cost.measure(nets, cost.parse_tiles(args.tiles))


def test_there_are_tables_to_check():
    assert len(ROWS) >= 40
    assert {"README.md", "baselines.md", "light3d.md", "smallbig.md", "zoo.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.command, marks=[pytest.mark.slow] * bool(LARGE.search(row.command))) for row in ROWS],
)
def test_numbers_are_counted_by_the_command_beside_them(row: Row):
    nets = measured(row.command)
    if len(nets) == 1:
        price = nets[0].cost
        numbers = (price.weights / 1e6, price.macs / 1e9, price.multiplications / 1e9)
        titles, cells = ("weights (M)", "GMACs", "fast (G)"), [f"{number:.2f}" for number in numbers]
    else:
        titles = ("fewer weights", "fewer MACs", "its MACs / fast", "fast / fast")
        cells = [f"{ratio:.2f}x" for ratio in cost.ratios(nets[0].cost, nets[1].cost)]
    assert [row.numbers[title] for title in titles] == cells


def test_counts_equal_the_published_ones():
    compared = 0
    for row in ROWS:
        for title in ("weights (M)", "GMACs"):
            published = row.numbers.get(f"published {title}", "-")
            if published != "-":
                assert row.numbers[title] == published, row.command
                compared += 1
    assert compared >= 2 * 9 + 2 * 9 + 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_models_recipes_and_files_that_are_named_exist(page: Path):
    model = re.compile(r"(c3d|c2d|i3d|r3d|r2plus1d|csn|x3d|tsm|slow|slowfast|smallbig)(_?\w+)?")
    for text in code(page):
        if model.fullmatch(text) and text != "smallbig":  # a recipe too
            assert text in list_models(), text
        for path in re.findall(r"\b(?:benchmarks|tests|docs)/[\w/.]+\w", text):
            assert (ROOT / path).is_file(), path
    for recipe in re.findall(r"\b(?:k400|sthv1|sthv2|ucf101|hmdb51|jester)-[\w-]+", page_text(page)):
        assert recipe in list_recipes(), recipe
    for link in re.findall(r"\]\(([\w./]+\.(?:md|png)|LICENSE)\)", page_text(page)):
        assert (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path):
    for text in code(page):
        if not text.startswith("lean3d "):
            continue
        _, verb, *words = shlex.split(text)
        assert verb in VERBS, text
        if not words:
            continue
        args = parse(getattr(arguments, verb.capitalize()), words)  # leaves where an option is unknown
        if isinstance(args, Train) and args.words:
            assert "/" in args.words[0] or args.words[0] in list_recipes(), text
        if isinstance(args, Bench) and args.nets != ("NET",):
            assert all(list_models(net) for net in args.nets), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page: Path):
    for text in code(page):
        if not text.startswith("pytest "):
            continue
        _, file, *rest = shlex.split(text)
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.M)
        for word in rest[1].split(" or ") if rest else [""]:
            assert any(word in name for name in names), text


def test_parity_is_that_of_the_kept_results():
    smallbig, baselines = (
        json.loads((ROOT / f"benchmarks/results/parity_{name}.txt").read_text().splitlines()[-1])
        for name in ("smallbig", "baselines")
    )
    worst = max(smallbig["max_relative_difference"].values())
    assert f"{worst:.1e} of the largest score" in " ".join(page_text(ROOT / "docs/smallbig.md").split())
    worst = max(value for model in baselines["results"].values() for value in model.values())
    assert f"{worst:.1e} of the largest score" in " ".join(page_text(ROOT / "docs/baselines.md").split())


def zoo_lines() -> list[str]:
    return [line for line in page_text(ROOT / "docs/zoo.md").splitlines() if line.startswith("|")]


def printed_zoo(capsys, pattern: str) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["models", pattern, "--markdown"])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_the_zoo_has_every_model(capsys):
    lines = zoo_lines()
    assert [line.split("`")[1] for line in lines[2:]] == list_models(), "write it anew: lean3d models --markdown"
    assert set(printed_zoo(capsys, "c3d*")) <= set(lines)
    assert set(lines) <= set(page_text(ROOT / "README.md").splitlines()), "the README has the same table"


@pytest.mark.slow
def test_the_zoo_is_current(capsys):
    assert zoo_lines() == printed_zoo(capsys, "*")


@pytest.mark.parametrize("name", ["runtimes", "smallbig_seconds"])
def test_times_are_those_of_the_kept_results(name: str):
    """What a script wrote to the page is what it kept: each net's milliseconds stand in its row."""
    kept = ROOT / f"benchmarks/results/{name}.json"
    part = page_text(ROOT / "docs/benchmarks.md").partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    assert kept.is_file() == bool(lines), f"write both anew: python benchmarks/{name}.py"
    for net in json.loads(kept.read_text())["nets"] if kept.is_file() else []:
        for threads in net["sgemm_gflops"]:
            (row, *_) = [line for line in lines if line[0] == net["name"] and threads in line[1:3]]
            for timing in net["timings"]:
                if str(timing["threads"]) == threads and "ms" in timing:
                    assert f"{timing['ms']:.0f}" in row[2:], (row, timing)
