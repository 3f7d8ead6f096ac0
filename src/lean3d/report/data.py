"""The page about a data set, from the check.json that `lean3d data check` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from lean3d.errors import CheckpointError
from lean3d.report.page import table_head
from lean3d.version import __version__

ROWS = 200
"""Rows of a table, and cases of a finding, that the page lists; all are in manifest.csv and check.json."""


def write_data_page(folder: str | Path) -> Path:
    """Write ``index.html`` beside a check.json: findings with pictures, kinds of files, labels. It needs no other file.

    Args:
        folder: Where `lean3d data check` wrote.

    Returns:
        The file.

    Raises:
        CheckpointError: There is no check.json, or it is damaged.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} has no whole check.json ({error}); write it: lean3d data check DIR") from error
    problems = [finding for finding in content["findings"] if finding["problem"]]
    notes = [finding for finding in content["findings"] if not finding["problem"]]
    sections = [
        _head(content, problems),
        *(_finding(finding, content["thumbnails"]) for finding in (*problems, *notes)),
        _kinds(content["kinds"]),
        _labels(content["labels"]),
        _samples(content["samples"], content["thumbnails"]),
    ]
    style = resources.files("lean3d.report").joinpath("style.css").read_text(encoding="utf-8")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content['source'])}</title><style>{style}</style></head><body><main>{''.join(sections)}"
        f'<p class="muted">Written by lean3d {__version__} from a check of {escape(content["date"])}.</p>'
        f"</main></body></html>\n"
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _head(content: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> str:
    totals = content["totals"]
    cases = sum(len(finding["notes"]) for finding in problems)
    verdict = "healthy" if content["healthy"] else f"{cases} problem{'s' if cases > 1 else ''}"
    kinds = "; ".join(f"{len(finding['notes'])} {finding['kind']}" for finding in problems)
    facts = [
        ("health", verdict, kinds or "nothing that a training would suffer from", True),
        ("files", f"{totals['files']:.0f}", f"{totals['bad']:.0f} can't be decoded", False),
        ("length", _hours(totals["seconds"]), f"{totals['frames']:.0f} frames", False),
        ("size", _bytes(totals["bytes"]), "", False),
        ("classes", str(sum(1 for row in content["labels"] if row["class"])), "", False),
    ]
    cells = "".join(
        f"<div{' class=main' if main else ''}><dt>{name}</dt>"
        f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note, main in facts
    )
    return (
        f'<header><h1>{escape(Path(content["source"]).name)}</h1><p class="muted">{escape(content["source"])}, every '
        f'file decoded in {content["seconds"]:.0f} s</p><dl class="facts">{cells}</dl></header>'
    )


def _finding(finding: Mapping[str, Any], thumbnails: Mapping[str, str]) -> str:
    kind = "bad" if finding["problem"] else "muted"
    word = "problem" if finding["problem"] else "note"
    cases = list(zip(finding["cases"], finding["notes"], strict=True))
    parts = [
        f'<section><h2>{escape(finding["kind"].capitalize())}: {len(cases)} <span class="{kind}">({word})</span></h2>',
        f"<p>{escape(finding['text'])}</p>",
    ]
    pictured = [(path, note) for files, note in cases for path in files if path in thumbnails]
    if pictured:
        parts.append(f'<ul class="gallery">{"".join(_card(path, note, thumbnails) for path, note in pictured)}</ul>')
    rows = []
    for files, note in cases[:ROWS]:
        names = "<br>".join(f"<code>{escape(path)}</code>" for path in files)
        rows.append(
            f"<tr><td>{names}</td><td>{escape(note)}</td></tr>" if files else f"<tr><td>{escape(note)}</td></tr>"
        )
    more = f"<p>and {len(cases) - ROWS} more, all in check.json</p>" if len(cases) > ROWS else ""
    table = f'<div class="wide"><table class="rows"><tbody>{"".join(rows)}</tbody></table></div>{more}'
    if len(rows) > 10:
        table = f"<details><summary>all {len(cases)}</summary>{table}</details>"
    return "".join(parts) + table + "</section>"


def _card(path: str, note: str, thumbnails: Mapping[str, str]) -> str:
    return (
        f'<li title="{escape(path)}"><img class="still" src="data:image/jpeg;base64,{thumbnails[path]}" '
        f'alt="the middle frame of {escape(Path(path).name)}"><dl><dt>{escape(note)}</dt>'
        f"<dd>{escape(Path(path).name)}</dd></dl></li>"
    )


def _kinds(kinds: Sequence[Mapping[str, Any]]) -> str:
    if not kinds:
        return ""
    heads = table_head(
        "codec", "size", "#files", "#frames/s", "#frames", "#keyframe every", "#variable rate", "#turned by the player"
    )
    rows = "".join(
        f"<tr><td>{escape(kind['codec'])}</td><td>{kind['width']} x {kind['height']}</td>"
        + "".join(f'<td class="number">{cell}</td>' for cell in (
            kind["files"], _span(kind["fps"]), _span(kind["num_frames"]), _span(kind["keyframe_interval"]),
            kind["variable_rate"], kind["rotated"],
        ))
        + "</tr>"
        for kind in kinds[:ROWS]
    )  # fmt: skip
    return (
        '<section><h2>What lies there</h2><div class="wide"><table class="rows">'
        f"{heads}<tbody>{rows}</tbody></table></div></section>"
    )


def _labels(labels: Sequence[Mapping[str, Any]]) -> str:
    most = max((row["train"] + row["val"] + row["test"] for row in labels), default=0)
    if not most:
        return ""
    rows = []
    for row in labels[:ROWS]:
        numbers = "".join(f'<td class="number">{row[split]}</td>' for split in ("train", "val", "test"))
        share = (row["train"] + row["val"] + row["test"]) / most
        bar = f'<td class="bar" aria-hidden="true"><span style="--share:{share:.4f}"></span></td>'
        rows.append(f'<tr><th scope="row">{escape(row["class"] or "not labelled")}</th>{numbers}{bar}</tr>')
    more = f"<p>and {len(labels) - ROWS} more, all in check.json</p>" if len(labels) > ROWS else ""
    return (
        '<section><h2>Labels</h2><div class="wide"><table class="rows classes">'
        f"{table_head('class', '#train', '#val', '#test', '')}<tbody>{''.join(rows)}</tbody></table></div>{more}"
        "</section>"
    )


def _samples(samples: Sequence[Sequence[str]], thumbnails: Mapping[str, str]) -> str:
    cards = "".join(_card(path, label, thumbnails) for path, label in samples if path in thumbnails)
    return f'<section><h2>One clip of each class</h2><ul class="gallery">{cards}</ul></section>' if cards else ""


def _span(values: Sequence[float]) -> str:
    """A range of numbers in few digits: "25", or "24 to 30"."""
    low, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)
    return low if low == high else f"{low} to {high}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _bytes(number: float) -> str:
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9)) if number >= s), ("MB", 1e6))
    return f"{number / size:.3g} {unit}"
