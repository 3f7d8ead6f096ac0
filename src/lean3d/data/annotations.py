"""The ways in which labels of clips are written down: class folders, CSV, and the layouts of known data sets.

Each format has a function from (root, config) to `Annotations`: clips as they are written, with nothing decided about
splits yet (that is `lean3d.data.manifest`). `FORMATS` has them all, in the order in which "auto" tries them.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lean3d.config import DataConfig
from lean3d.data.readers import PICTURES
from lean3d.data.shards import is_address
from lean3d.errors import DataError

VIDEOS = frozenset(
    {
        ".3gp",
        ".asf",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    }
)
"""File name endings of videos."""

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""How the three splits are called, in lower case."""


@dataclass(frozen=True)
class Row:
    """A clip as it is written down."""

    path: str
    """Relative to `Annotations.base`, or absolute."""
    label: str | None
    """Its class; None where it is kept secret, as in test sets of challenges."""
    split: str | None = None
    """train, val or test, where it is written."""
    group: str = ""
    """Clips of equal group belong together; an empty one is a group of its own."""


@dataclass(frozen=True)
class Annotations:
    """What a format's function has found."""

    rows: tuple[Row, ...]
    base: Path
    """The folder that relative paths start from."""
    source: str
    """The files or the folder where this is written."""
    classes: tuple[str, ...] | None = None
    """All classes in their published order; None: those of the rows, sorted."""
    own_groups: bool = False
    """Whether the user named the groups, so that a written split which tears one apart is a mistake."""


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that has `clip2` before `clip10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def as_split(word: str, where: str) -> str | None:
    """train, val or test for any of their names; None for an empty word."""
    if not word.strip():
        return None
    if word.strip().lower() not in SPLITS:
        raise DataError(f"{where}: unknown split {word!r}; use train, val or test")
    return SPLITS[word.strip().lower()]


def read_annotations(config: DataConfig) -> Annotations:
    """All clips that are written down at `config.root`.

    Raises:
        DataError: The root is missing, its format can't be told, or the annotations are damaged.
    """
    if not config.root:
        raise DataError("no data: give a folder of class folders or an annotation file (data.root)")
    root = Path(config.root).expanduser().absolute()
    if not root.exists():
        raise DataError(f"{config.root} does not exist (data.root)")
    if config.format != "auto":
        found = FORMATS[config.format](root, config)
        if found is None:
            raise DataError(f"{root} is not in the format {config.format}: expected {EXPECTED[config.format]}")
        return found
    for read in FORMATS.values():
        if (found := read(root, config)) is not None:
            return found
    looked = "\n".join(f"  {name}: {text}" for name, text in EXPECTED.items())
    columns = f" (a file with the columns {', '.join(_header(root))})" if _header(root) else ""
    raise DataError(f"no labelled clips at {root}{columns}; looked for\n{looked}")


def find_videos(folder: str | Path) -> list[Path]:
    """Every video in a folder, at any depth: files that are named like videos, and folders of pictures.

    Pictures beside or above videos are taken for covers, not for frames.

    Returns:
        Paths, sorted; `[folder]` where the folder itself is a video in pictures.
    """
    folder = Path(folder)
    shown = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    files = [path for path in shown if path.is_file()]
    videos = {path for path in files if path.suffix.lower() in VIDEOS}
    pictures = {path.parent for path in files if path.suffix.lower() in PICTURES}
    above = {parent for path in videos | pictures for parent in path.parents}
    return sorted(videos | (pictures - above))


# Class folders


def read_folders(root: Path, config: DataConfig) -> Annotations | None:
    """`root/[split/]class/**/clip`, where a clip is a video file or a folder of pictures."""
    if not root.is_dir():
        return None
    folders = _folders(root)
    splits = {folder: SPLITS[folder.name.lower()] for folder in folders if folder.name.lower() in SPLITS}
    rows: list[Row] = []
    if "train" in splits.values():
        for folder, split in splits.items():
            for kind in _folders(folder):
                rows += [Row(str(clip.relative_to(root)), kind.name, split) for clip in _clips(kind)]
    else:
        for kind in folders:
            rows += [Row(str(clip.relative_to(root)), kind.name) for clip in _clips(kind)]
    if not rows:
        return None
    if config.groups:
        rows = _with_groups(rows, config.groups, root)
    return Annotations(tuple(rows), root, str(root), own_groups=bool(config.groups))


def _folders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return sorted((f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(hidden)), key=lambda f: f.name)


def _clips(folder: Path) -> Iterator[Path]:
    """Clips below a class folder, at any depth."""
    seen = set()
    for place, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")) and real not in seen)
        seen.add(real)
        shown = sorted(name for name in files if not name.startswith("."))
        videos = [Path(place, name) for name in shown if Path(name).suffix.lower() in VIDEOS]
        yield from videos
        if not videos and Path(place) != folder and any(Path(name).suffix.lower() in PICTURES for name in shown):
            inner.clear()
            yield Path(place)


def _with_groups(rows: list[Row], groups: str, root: Path) -> list[Row]:
    path = next((p for p in (Path(groups), root / groups) if p.is_file()), None)
    if path is None:
        raise DataError(f"{groups} does not exist (data.groups), neither here nor in {root}")
    table = {line[0].strip(): line[1].strip() for line in _lines(path) if len(line) > 1 and line[0].strip()}
    grouped, hits = [], 0
    for row in rows:
        name = Path(row.path)
        key = next((k for k in (name.as_posix(), name.name, name.stem) if k in table), None)
        hits += key is not None
        grouped.append(Row(row.path, row.label, row.split, table[key] if key is not None else ""))
    if not hits:
        raise DataError(f"{path} names none of the clips in {root}: its first column must hold file names or stems")
    return grouped


# Tables


def read_csv(root: Path, config: DataConfig) -> Annotations | None:
    """A table with the columns `path` and `config.label_column`, and perhaps `split` and `config.group_column`."""
    tables: dict[Path, str | None] = {root: None}
    if root.is_dir():
        fitting = [p for p in sorted(root.glob("*.csv")) if {"path", config.label_column} <= set(_header(p))]
        by_split = _by_split(root, (".csv",))
        tables = {path: by_split.get(path) for path in fitting}
        if not tables or (len(tables) > 1 and None in tables.values()):
            return None
    elif config.format == "auto" and "path" not in _header(root):
        return None
    rows: list[Row] = []
    for path, split in tables.items():
        rows += _table_rows(path, config, split if len(tables) > 1 else None)
    if not rows:
        values = "; ".join(f"{name}: {', '.join(_values(tables, name)[:8])}" for name in config.where)
        raise DataError(f"no row of {root} fits data.where {config.where}; there is {values or 'no row at all'}")
    source = str(root if len(tables) > 1 else next(iter(tables)))
    if config.videos and is_address(config.videos):
        rows = [replace(row, path=f"{config.videos.rstrip('/')}/{row.path}") for row in rows]
    base = _base(config, root if root.is_dir() else root.parent)
    return Annotations(tuple(rows), base, source, own_groups=any(row.group for row in rows))


def _table_rows(path: Path, config: DataConfig, split: str | None) -> Iterator[Row]:
    header = _header(path)
    wanted = {"path": "", config.label_column: " (data.label_column)"} | dict.fromkeys(config.where, " (data.where)")
    if config.group_column != DataConfig.group_column:
        wanted[config.group_column] = " (data.group_column)"
    for name, setting in wanted.items():
        if name not in header:
            raise DataError(f"{path} has no column {name!r}{setting}; its columns are {', '.join(header)}")
    for cells in _lines(path)[1:]:
        line = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if line.get("path") and all(line.get(name) == value for name, value in config.where.items()):
            label, group = line.get(config.label_column), line.get(config.group_column, "")
            yield Row(line["path"], label or None, split or as_split(line.get("split", ""), str(path)), group)


def _values(tables: Iterable[Path], column: str) -> list[str]:
    return sorted({cells[_header(path).index(column)] for path in tables for cells in _lines(path)[1:] if cells})


def _lines(path: Path) -> list[list[str]]:
    """The cells of a table whose cells are parted by commas, semicolons or tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as text: {error}") from error
    first = text.partition("\n")[0]
    return list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count)))


def _header(path: Path) -> list[str]:
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(65536)
    return [cell.strip() for cell in next(csv.reader([first], delimiter=max(",;\t", key=first.count)), [])]


def _base(config: DataConfig, folder: Path) -> Path:
    return Path(config.videos).expanduser().absolute() if config.videos else folder


# Kinetics


def read_kinetics(root: Path, config: DataConfig) -> Annotations | None:
    """Lists of `path label`, or Kinetics' own tables of `label,youtube_id,time_start,time_end,split`."""
    files = {root: None} if root.is_file() else _by_split(root, (".csv", ".txt", ".list"))
    if root.is_file() and root.suffix.lower() not in (".csv", ".txt", ".list"):
        return None
    rows: list[Row] = []
    names: tuple[str, ...] | None = None
    official = False
    for path, split in files.items():
        header = _header(path)
        if "youtube_id" in header:
            official = True
            rows += _kinetics_table(path, header, split)
            continue
        entries = _list_entries(path)
        if entries is None:
            return None
        names = names or _class_names(path.parent, [label for _, label in entries])
        rows += [Row(clip, names[int(label)] if names else label, split) for clip, label in entries]
    if not rows:
        return None
    base = _base(config, root if root.is_dir() else root.parent)
    found = _located(rows, base, [".mp4", ".mkv", ".webm", ".avi", ""]) if official else rows
    return Annotations(tuple(found), base, str(root), names)


def _kinetics_table(path: Path, header: list[str], split: str | None) -> Iterator[Row]:
    for cells in _lines(path)[1:]:
        line = dict(zip(header, cells, strict=False))
        if not line.get("youtube_id"):
            continue
        try:
            start, end = (round(float(line[key])) for key in ("time_start", "time_end"))
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: expected numbers in time_start and time_end, got {line}") from error
        clip = f"{line['youtube_id']}_{start:06d}_{end:06d}"
        own = split or as_split(line.get("split", ""), str(path))
        yield Row(clip, line.get("label") or None, own, line["youtube_id"])


def _list_entries(path: Path) -> list[tuple[str, str]] | None:
    """Pairs of path and label in a list, or None if it is no such list."""
    entries = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(.+?)\s*[\s,]\s*([^\s,]+)\s*", line)
        if match is None:
            return None
        clip, label = match.groups()
        counted = re.fullmatch(r"(.+?)[\s,]+\d+", clip)  # folders of frames: path, number of frames, label
        if counted and Path(clip).suffix.lower() not in VIDEOS:
            clip = counted[1]
        if not label.isdigit() and Path(clip).suffix.lower() not in VIDEOS:
            return None
        entries.append((clip, label))
    return entries


def _class_names(folder: Path, labels: Sequence[str]) -> tuple[str, ...] | None:
    """The classes' names beside lists that only number them."""
    if not all(label.isdigit() for label in labels):
        return None
    for path in sorted(folder.glob("*.txt")):
        if re.search(r"label_?map|^labels|^classes|class_?names", path.name.lower()):
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
            if max(map(int, labels)) < len(names):
                return names
    return None


def _by_split(folder: Path, endings: tuple[str, ...]) -> dict[Path, str]:
    """Annotation files in a folder whose names say train, val or test."""
    files = {}
    for path in sorted(folder.iterdir()):
        words = re.split(r"[^a-z]+", path.stem.lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), None)
        if path.is_file() and path.suffix.lower() in endings and split:
            files[path] = split
    return files


# Something-Something and Jester


def read_something(root: Path, config: DataConfig) -> Annotations | None:
    """Something-Something: JSON with `id` and `template` (V2), or CSV with `id;template` (V1)."""
    folder = root if root.is_dir() else root.parent
    files = _by_split(folder, (".json",)) or _named(_by_split(folder, (".csv",)), "something", config)
    if not files or (root.is_file() and root not in files):
        return None
    return _numbered_clips(files, folder, config)


def read_jester(root: Path, config: DataConfig) -> Annotations | None:
    """Jester: CSV with `id;label`."""
    folder = root if root.is_dir() else root.parent
    files = _named(_by_split(folder, (".csv",)), "jester", config)
    if not files or (root.is_file() and root not in files):
        return None
    return _numbered_clips(files, folder, config)


def _named(files: dict[Path, str], format: str, config: DataConfig) -> dict[Path, str]:
    """Those of the files whose names say that they are of this format; all, if the user says so."""
    return {path: split for path, split in files.items() if config.format == format or format in path.name.lower()}


def _numbered_clips(files: dict[Path, str], folder: Path, config: DataConfig) -> Annotations | None:
    rows: list[Row] = []
    for path, split in files.items():
        if path.suffix.lower() == ".json":
            entries = _json(path)
            if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
                return None
            pairs: Iterable[tuple[str, str]] = (
                (str(entry["id"]), entry.get("template") or entry.get("label") or "") for entry in entries
            )
        else:
            pairs = ((line[0].strip(), "".join(line[1:2])) for line in _lines(path) if line and line[0].strip())
        rows += [Row(clip, re.sub(r"[\[\]]", "", label).strip() or None, split) for clip, label in pairs]
    if not rows:
        return None
    base = _base(config, folder)
    located = _located(rows, base, [".webm", ".mp4", ".avi", ".mkv", ""])
    return Annotations(tuple(located), base, str(folder), _published_classes(folder, rows))


def _published_classes(folder: Path, rows: list[Row]) -> tuple[str, ...] | None:
    """The order of classes in a file of labels, if there is one and it has all that are used."""
    for path in sorted(folder.glob("*labels*")):
        if path.suffix.lower() == ".json":
            numbers = _json(path)
            names = sorted(numbers, key=lambda name: int(numbers[name])) if isinstance(numbers, dict) else numbers
        else:
            names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        names = [re.sub(r"[\[\]]", "", name) for name in names]
        unknown = {row.label for row in rows if row.label is not None} - set(names)
        if unknown:
            raise DataError(f"{path} does not have the label {min(unknown)!r}, which clips have")
        return tuple(names)
    return None


def _json(path: Path) -> list | dict:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


# UCF101 and HMDB51


def read_ucf101(root: Path, config: DataConfig) -> Annotations | None:
    """UCF101: classInd.txt, trainlist0N.txt with numbered labels, testlist0N.txt without."""
    folder = _with_file(root, "classInd.txt")
    if folder is None:
        return None
    classes = tuple(line.split()[1] for line in (folder / "classInd.txt").read_text().splitlines() if line.strip())
    rows = []
    for split in ("train", "test"):
        for line in _fold_file(folder / f"{split}list{config.fold:02d}.txt").read_text().splitlines():
            if line.strip():
                clip = line.split()[0]
                kind, _, name = clip.rpartition("/")
                if kind not in classes:
                    raise DataError(f"{folder}: the class of {clip} is not in classInd.txt")
                source = re.search(r"_(g\d+)_c\d+", name)
                rows.append(Row(clip, kind, split, f"{kind} {source[1]}" if source else ""))
    base = _base(config, root if root.is_dir() else root.parent)
    return Annotations(tuple(_located(rows, base, _ENDINGS)), base, str(folder), classes)


def read_hmdb51(root: Path, config: DataConfig) -> Annotations | None:
    """HMDB51: for each class a file `<class>_test_split<N>.txt` with lines `file.avi 0|1|2` (unused, train, test)."""
    folder = _with_file(root, "*_test_split[123].txt")
    if folder is None:
        return None
    rows = []
    for path in sorted(folder.glob("*_test_split1.txt")):
        kind = path.name.removesuffix("_test_split1.txt")
        for line in _fold_file(folder / f"{kind}_test_split{config.fold}.txt").read_text().splitlines():
            if line.strip():
                clip, part = line.rsplit(None, 1)
                if part in ("1", "2"):
                    film, found, _ = clip.partition(f"_{kind}_")
                    rows.append(Row(f"{kind}/{clip}", kind, "train" if part == "1" else "test", film if found else ""))
    base = _base(config, root if root.is_dir() else root.parent)
    return Annotations(tuple(_located(rows, base, _ENDINGS)), base, str(folder))


_ENDINGS = [None, ".mp4", ".webm", ".mkv", ""]


def _with_file(root: Path, pattern: str) -> Path | None:
    """The folder that holds such a file: the root (or the file itself) or a folder in it."""
    if root.is_file():
        return root.parent if root.match(pattern) else None
    return next((folder for folder in (root, *_folders(root)) if any(folder.glob(pattern))), None)


def _fold_file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} does not exist; data.fold must be 1, 2 or 3 and the published lists complete")
    return path


def _located(rows: list[Row], base: Path, endings: Sequence[str | None]) -> list[Row]:
    """Rows with the paths under which most of a sample of them is found.

    Published lists don't say where their files lie: maybe in folders of the split, the class or both, perhaps encoded
    anew, perhaps as folders of frames. `endings` are tried in turn; None is the ending that is written.
    """
    sample = rows[:: max(len(rows) // 50, 1)]
    inner = [folder.name for folder in _folders(base)] if base.is_dir() else []
    prefixes = ["", *(inner if len(inner) <= 20 else [])]
    options = [
        (prefix, middle, ending)
        for prefix in prefixes
        for middle in ("", "{split}", "{label}", "{split}/{label}")
        for ending in endings
    ]

    def place(row: Row, option: tuple[str, str, str | None]) -> str:
        prefix, middle, ending = option
        path = row.path if ending is None else f"{row.path.removesuffix('.avi')}{ending}"
        return str(Path(prefix, middle.format(split=row.split or "", label=row.label or ""), path))

    best = max(options, key=lambda option: sum(Path(base, place(r, option)).exists() for r in sample))
    return [Row(place(row, best), row.label, row.split, row.group) for row in rows]


FORMATS: dict[str, Callable[[Path, DataConfig], Annotations | None]] = {
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
    "something": read_something,
    "jester": read_jester,
    "csv": read_csv,
    "kinetics": read_kinetics,
    "folders": read_folders,
}

EXPECTED = {
    "folders": "a folder for each class with videos (or folders of pictures) in it, perhaps below train/, val/, test/",
    "csv": "a .csv with the columns path and label, perhaps split and group (see data.label-column)",
    "kinetics": "train, val and test lists of 'path label', or Kinetics' .csv with label,youtube_id,...",
    "something": "Something-Something's train, validation and test .json (V2) or .csv (V1)",
    "jester": "jester-v1-train.csv and its siblings",
    "ucf101": "classInd.txt with trainlist01.txt and testlist01.txt",
    "hmdb51": "<class>_test_split1.txt for each class",
}

PUBLISHED_CLASSES = {"kinetics": 400, "something": 174, "jester": 27, "ucf101": 101, "hmdb51": 51}
"""Classes of the data sets of those formats (of Kinetics the first, of Something-Something both versions)."""
