"""The page: what a run's files say, section by section, as HTML without any outside part."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from lean3d.errors import CheckpointError, ConfigError, DecodeError
from lean3d.report.charts import line_chart
from lean3d.report.clips import Video, choose, data_uri, is_right, small_mp4
from lean3d.report.run import Run, read_run, tested
from lean3d.version import __version__

CELLS = 30
"""A confusion matrix of more classes is a picture, not a table."""
ROWS = 15
"""Classes that are shown before one asks for all."""


def write_report(
    run: str | Path, out: str | Path | None = None, *, compare: Sequence[str | Path] = (), clips: int = 24
) -> Path:
    """Write the page about a run.

    Args:
        run: A run's folder, or a folder that `lean3d eval --out` wrote. What is missing in it is left out of the page.
        out: The HTML file; default: ``report.html`` in that folder.
        compare: Folders of other runs, tested on the same videos, that are shown beside it.
        clips: Videos in the gallery, at most.

    Returns:
        The file.

    Raises:
        CheckpointError: There is neither a training nor a test in the folder, or a file in it is damaged.
        ConfigError: A run to compare with has not been tested.
    """
    main = read_run(run)
    if main.results is None and not main.rows:
        raise CheckpointError(
            f"{main.folder} holds neither metrics.jsonl (of a training) nor results.json (of a test); name a run's "
            "folder, or test one first: lean3d eval RUN"
        )
    others = [read_run(folder) for folder in compare]
    for other in others:
        if main.results is None or other.results is None:
            untested = main if main.results is None else other
            raise ConfigError(f"there is no test to compare in {untested.folder}: lean3d eval {untested.folder}")
    sections = [
        _head(main),
        _comparison(main, others) if others else "",
        _curves(main, others),
        _confusion(main),
        _per_class(main),
        _gallery(main, others, clips),
        _bad_files(main),
        _repeat(main),
    ]
    style = resources.files("lean3d.report").joinpath("style.css").read_text(encoding="utf-8")
    title = f"{main.name}: {_percent(main.results['metrics']['top1'])}" if main.results else main.name
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><main>{''.join(sections)}"
        f'<p class="muted">Written by lean3d {__version__}.</p></main><script>{_SCRIPT}</script></body></html>\n'
    )
    path = Path(out) if out is not None else main.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _head(run: Run) -> str:
    data = (run.results or {}).get("data", {}).get("config") or (run.config or {}).get("data") or {}
    facts = []
    if run.results:
        metrics = run.results["metrics"]
        videos, bad = metrics["videos"], metrics["bad_files"]
        right = round(metrics["top1"] * videos)
        note = f"{right} of {videos} videos"
        note += f"; {bad} more could not be decoded" if bad else "; all files could be decoded"
        facts.append(_fact("top-1 accuracy", _percent(metrics["top1"]), note, main=True))
        if "top5" in metrics:
            facts.append(_fact("top-5 accuracy", _percent(metrics["top5"])))
        facts.append(_fact("mean class accuracy", _percent(metrics["mean_class_accuracy"])))
    elif points := run.epochs("val_top1"):
        best = max(value for _, value in points)
        facts.append(_fact("best validation top-1", _percent(best), "not tested yet", main=True))
    if price := run.cost:
        facts.append(_fact("weights", _count(price.weights)))
        note = f"{_count(price.multiplications)} multiplications with the fast algorithm"
        facts.append(_fact("MACs of one clip", _count(price.macs), note))
    if run.training_bad is not None:
        facts.append(_fact("bad files in training", str(run.training_bad), "skipped, counted and named"))
    split = f", split {run.results['data']['split']}" if run.results else ""
    hint = ""
    if run.results is None:
        command = f"lean3d eval {shlex.quote(str(run.folder))}"
        hint = f"<p>This run has not been tested. Type <code>{escape(command)}</code>, then write the report anew.</p>"
    return (
        f'<header><h1>{escape(run.name)}</h1><p class="muted">on {escape(str(data.get("root") or "unknown data"))}'
        f'{escape(split)}</p><dl class="facts">{"".join(facts)}</dl>{hint}</header>'
    )


def _fact(name: str, value: str, note: str = "", *, main: bool = False) -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f"<div{' class=main' if main else ''}><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _comparison(main: Run, others: Sequence[Run]) -> str:
    rows = []
    chance = _chance(main)
    for run in (main, *others):
        metrics, price = (run.results or {})["metrics"], run.cost
        bar = _bar(metrics["top1"], f'<i style="--chance:{chance:.4f}"></i>')
        numbers = (_count(price.weights), _count(price.macs)) if price else ("-", "-")
        cells = "".join(f'<td class="number">{cell}</td>' for cell in (_percent(metrics["top1"]), *numbers))
        rows.append(f'<tr><th scope="row">{escape(run.name)}</th>{bar}{cells}</tr>')
    heads = table_head("model", "", "#top-1", "#weights", "#MACs")
    return (
        f'<section><h2>Side by side</h2><div class="wide"><table class="rows"><caption>Top-1 on the same videos. The '
        f"dashed line is chance, {_percent(chance)}.</caption>{heads}<tbody>{''.join(rows)}</tbody></table></div>"
        "</section>"
    )


def _curves(main: Run, others: Sequence[Run]) -> str:
    loss = {"training": main.epochs("loss"), "validation": main.epochs("val_loss")}
    names = [main.name, *(run.name for run in others)]
    accuracy = {name: run.epochs("val_top1") for name, run in zip(names, (main, *others), strict=True)}
    if not others:
        accuracy = {"top-1": main.epochs("val_top1"), "top-5": main.epochs("val_top5")}
    mark = _chance(main) if main.results else None
    charts = line_chart("loss" + (f" of {main.name}" if others else ""), loss, "epochs", bottom=0.0)
    charts += line_chart("validation accuracy", accuracy, "epochs", bottom=0.0, top=1.0, mark=mark)
    return f'<section><h2>Training</h2><div class="charts">{charts}</div></section>' if charts else ""


def _confusion(run: Run) -> str:
    if run.results is None:
        return ""
    classes, matrix = run.results["classes"], run.results["confusion"]
    parts = ['<section><h2>What is taken for what</h2><div class="beside">']
    mistakes = [
        (count, classes[true], classes[said])
        for true, row in enumerate(matrix)
        for said, count in enumerate(row)
        if count and true != said
    ]
    if len(classes) <= CELLS:
        parts.append(_matrix(classes, matrix))
    elif (picture := run.folder / "confusion.png").is_file():
        uri = data_uri(picture.read_bytes(), "image/png")
        words = f"Confusion matrix of {len(classes)} classes; the most frequent mistakes are listed below."
        parts.append(f'<figure><img src="{uri}" alt="{words}"></figure>')
    if mistakes:
        worst = sorted(mistakes, key=lambda mistake: -mistake[0])[:8]
        lines = "".join(
            f"<li>{count}&times; <b>{escape(true)}</b> taken for {escape(said)}</li>" for count, true, said in worst
        )
        parts.append(f"<div>Most frequent mistakes:<ul>{lines}</ul></div>")
    else:
        parts.append("<p>There is no mistake.</p>")
    return "".join(parts) + "</div></section>"


def _matrix(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in classes)
    body = []
    for name, row in zip(classes, matrix, strict=True):
        total = max(1, sum(row))
        cells = []
        for said, count in zip(classes, row, strict=True):
            share = count / total
            kind = "zero" if not count else "dark" if share > 0.5 else ""
            title = escape(f"{name} taken for {said}: {count}" if said != name else f"{name}, right: {count}")
            cells.append(f'<td class="{kind}" style="--share:{share:.3f}" title="{title}">{count}</td>')
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide"><table class="confusion"><caption>Rows: the true class. Columns: the prediction. Numbers '
        f"are videos.</caption><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _per_class(run: Run) -> str:
    if run.results is None:
        return ""
    rows = []
    for entry, counts in zip(run.results["per_class"], run.results["confusion"], strict=True):
        if entry["accuracy"] is None:
            continue
        others = [both for both in zip(counts, run.results["classes"], strict=True) if both[1] != entry["class"]]
        count, name = max(others, default=(0, ""))
        most = f"{escape(name)} ({count})" if count else '<span class="muted">-</span>'
        row = (
            f'<tr><th scope="row">{escape(entry["class"])}</th><td class="number">{entry["videos"]}</td>'
            f'<td class="number">{_percent(entry["accuracy"])}</td>'
            f"{_bar(entry['accuracy'])}<td>{most}</td></tr>"
        )
        rows.append((entry["accuracy"], row))
    ordered = [row for _, row in sorted(rows, key=lambda entry: entry[0])]
    parts = ["<section><h2>Each class, the hardest first</h2>", _class_table(ordered[:ROWS])]
    if len(ordered) > ROWS:
        rest = _class_table(ordered[ROWS:])
        parts.append(f"<details><summary>The other {len(ordered) - ROWS} classes</summary>{rest}</details>")
    return "".join(parts) + "</section>"


def _class_table(rows: Sequence[str]) -> str:
    heads = table_head("class", "#videos", "#accuracy", "", "most often taken for")
    return f'<div class="wide"><table class="rows classes">{heads}<tbody>{"".join(rows)}</tbody></table></div>'


def table_head(*names: str) -> str:
    """A table's head; columns whose name begins with # hold numbers, a column without a name holds bars."""
    cells = []
    for name in names:
        kind = "number" if name.startswith("#") else "bar" if not name else ""
        cells.append(f'<th scope="col" class="{kind}">{name.removeprefix("#")}</th>')
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _bar(share: float, more: str = "") -> str:
    """A picture of a number that stands beside it."""
    return f'<td class="bar" aria-hidden="true"><span style="--share:{share:.4f}"></span>{more}</td>'


def _gallery(main: Run, others: Sequence[Run], count: int) -> str:
    videos = choose(main.results["videos"], count) if main.results else []
    if not videos:
        return ""
    template = main.results["data"]["config"]["frame_template"] if main.results else "{:05d}.jpg"
    said = [(run.name, {video["path"]: video["top"][0] for video in (run.results or {})["videos"]}) for run in others]
    cards = []
    for video in videos:
        rivals = [(name, tops[video["path"]]) for name, tops in said if video["path"] in tops]
        cards.append(_card(main.name, video, rivals, template))
    wrong = sum(not is_right(video) for video in videos)
    what = f"{wrong} wrong and {len(videos) - wrong} right" if wrong else f"{len(videos)}, all right"
    return (
        f'<section><div class="head"><h2>Clips</h2><button id="pause" type="button">pause all</button></div>'
        f'<p class="muted">{what}; wrong ones first, the surest of them leading. Long videos show their middle.</p>'
        f'<ul class="gallery">{"".join(cards)}</ul></section>'
    )


def _card(name: str, video: Video, rivals: Sequence[tuple[str, dict[str, Any]]], template: str) -> str:
    top, label, right = video["top"][0], video["label"], is_right(video)
    words = f"Clip of {label}, predicted {top['label']}"
    try:
        uri = data_uri(small_mp4(video["path"], template), "video/mp4")
        picture = f'<video autoplay muted loop playsinline src="{uri}" aria-label="{escape(words)}"></video>'
    except DecodeError as error:
        picture = f'<div class="gone">can\'t be shown: {escape(error.reason)}</div>'
    lines = [f"<dt>label</dt><dd><b>{escape(label)}</b></dd>"]
    kind, sign = ("good", "right") if right else ("bad", "wrong")
    who = escape(name) if rivals else "prediction"
    lines.append(f'<dt>{who}</dt><dd class="{kind}">{escape(top["label"])} {top["score"]:.2f}, {sign}</dd>')
    for rival, answer in rivals:
        kind, sign = ("good", "right") if answer["label"] == label else ("bad", "wrong")
        lines.append(
            f'<dt>{escape(rival)}</dt><dd class="{kind}">{escape(answer["label"])} {answer["score"]:.2f}, {sign}</dd>'
        )
    path = escape(video["path"])
    return f'<li class="{"right" if right else "wrong"}" title="{path}">{picture}<dl>{"".join(lines)}</dl></li>'


def _bad_files(run: Run) -> str:
    bad = run.results["bad_files"] if run.results else []
    if not bad:
        return ""
    rows = "".join(f"<tr><td>{escape(file['path'])}</td><td>{escape(file['reason'])}</td></tr>" for file in bad[:100])
    more = f"<p>and {len(bad) - 100} more, all in results.json</p>" if len(bad) > 100 else ""
    return (
        f"<section><h2>Files that could not be decoded: {len(bad)}</h2><p>They are in no accuracy above.</p>"
        f'<div class="wide"><table class="rows">{table_head("file", "reason")}<tbody>{rows}</tbody></table></div>{more}'
        "</section>"
    )


def _repeat(run: Run) -> str:
    commands = [_plain_command(start["command"]) for start in run.starts]
    if run.results:
        commands.append(_plain_command(run.results["command"]))
    commands = list(dict.fromkeys(commands))
    parts = ["<section><h2>How to repeat it</h2>"]
    if commands:
        parts.append(f"<pre>{escape(chr(10).join(commands))}</pre>")
    versions = {}
    if run.starts:
        start = run.starts[-1]
        versions = {name: start[name] for name in ("lean3d", "commit", "python")} | start["packages"]
    elif run.results:
        versions = run.results["versions"]
    if versions:
        text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        parts.append(f"<p>Versions: {escape(text)}.</p>")
    if run.results:
        digest = run.results["data"]["digest"]
        files = ", ".join(f"<code>{member['sha256'][:16]}</code>" for member in tested(run.results))
        views = run.results["views"]
        parts.append(
            f"<p>Test: {views['num_clips']} clips x {views['num_crops']} crops of each video, on "
            f"{escape(run.results['device'])}, {escape(run.results['precision'])}, {escape(run.results['date'])}. "
            f"Digest of the data's list <code>{digest[:16]}</code>, of the model's file "
            f"{files}.</p>"
        )
    if run.config:
        text = escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>All settings of the training</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"


def _plain_command(command: str) -> str:
    """A command as one types it: `lean3d` without the path that it lies at."""
    words = shlex.split(command)
    if words and (Path(words[0]).stem == "lean3d" or words[0].endswith("lean3d/__main__.py")):
        words[0] = "lean3d"
    return shlex.join(words)


def _chance(run: Run) -> float:
    return 1 / len((run.results or {})["classes"])


def _count(number: int) -> str:
    """A large number in three digits: 38.5 G, 2.36 M."""
    unit, size = ("G", 1e9) if number >= 1e8 else ("M", 1e6)
    return f"{number / size:.3g} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


_SCRIPT = """
const clips = [...document.querySelectorAll("video")], button = document.getElementById("pause");
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
function show(playing) {
  clips.forEach(clip => playing ? clip.play() : clip.pause());
  if (button) button.textContent = playing ? "pause all" : "play all";
}
if (button) button.onclick = () => show(clips.every(clip => clip.paused));
if (still) { clips.forEach(clip => { clip.autoplay = false; clip.controls = true; }); show(false); }
"""
