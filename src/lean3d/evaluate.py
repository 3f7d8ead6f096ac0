"""Testing: every video of a split, all its views averaged, and what can be said about the answers.

    loader -> views (N, V, C, T, h, w) -> model -> softmax -> mean over V -> Scores -> Results -> results.json, pictures

`collect_scores` is one process's part; `Scores.merge` joins the parts of several, and `results_from_scores` counts.
An ensemble is the mean of several models' scores (`Scores.average`), each model on clips as it wants them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lean3d import checkpoint as checkpoints
from lean3d import fast as compiler
from lean3d.config import DataConfig, ViewsConfig, from_dict, to_dict
from lean3d.data.dataset import BadFile, BadFileLog
from lean3d.data.loader import Batch, test_loader
from lean3d.data.manifest import Clip, Manifest, read_manifest
from lean3d.data.transforms import normalize
from lean3d.errors import ConfigError, DataError, TrainingError
from lean3d.version import __version__

Split = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Scores:
    """What a model says about some videos.

    Attributes:
        indices: int64 (N,), places in the data set.
        labels: int64 (N,), -1 where there is none.
        probabilities: float32 (N, K), the mean of the softmax over a video's views.
        bad: The files that could not be decoded; they have no row.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    probabilities: torch.Tensor
    bad: tuple[BadFile, ...] = ()

    @classmethod
    def merge(cls, parts: Sequence[Scores]) -> Scores:
        """The parts of several processes as one, in the data set's order; a video that comes twice counts once."""
        indices = torch.cat([part.indices for part in parts])
        indices, places = _first_places(indices)
        return cls(
            indices,
            torch.cat([part.labels for part in parts])[places],
            torch.cat([part.probabilities for part in parts])[places],
            tuple(dict.fromkeys(file for part in parts for file in part.bad)),
        )

    @classmethod
    def average(cls, models: Sequence[Scores]) -> Scores:
        """The mean of several models' probabilities, for the videos that each of them has; rows in order of index."""
        common = set.intersection(*(set(model.indices.tolist()) for model in models))
        ordered = [model.indices.argsort() for model in models]
        kept = [
            order[[index in common for index in model.indices[order].tolist()]]
            for model, order in zip(models, ordered, strict=True)
        ]
        return cls(
            models[0].indices[kept[0]],
            models[0].labels[kept[0]],
            torch.stack([model.probabilities[rows] for model, rows in zip(models, kept, strict=True)]).mean(0),
            tuple(dict.fromkeys(file for model in models for file in model.bad)),
        )


@dataclass(frozen=True)
class Results:
    """The outcome of a test. Accuracies are shares in [0, 1] of the videos that have a label and could be decoded.

    Attributes:
        classes: Names of the K classes.
        scores: What the numbers were counted from.
        top1: Share of videos whose label has the highest probability.
        top5: Share of videos whose label is among the five highest; None with five classes or fewer.
        mean_class_accuracy: Mean of the classes' accuracies, over the classes that have a video.
        per_class: Accuracy of each class, None where it has no video.
        loss: Mean of -log(probability of the label).
        confusion: int64 (K, K), videos by true class (row) and predicted class (column).
    """

    classes: tuple[str, ...]
    scores: Scores
    top1: float
    top5: float | None
    mean_class_accuracy: float
    per_class: tuple[float | None, ...]
    loss: float
    confusion: torch.Tensor

    @property
    def num_videos(self) -> int:
        """Videos that the accuracies are shares of."""
        return int(self.confusion.sum())

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """Files that could not be decoded and are in no accuracy."""
        return self.scores.bad

    def metrics(self) -> dict[str, float]:
        """The numbers by name, with the count of bad files beside them; top5 only where it says something."""
        numbers: dict[str, float] = {"top1": self.top1}
        if self.top5 is not None:
            numbers["top5"] = self.top5
        numbers |= {"mean_class_accuracy": self.mean_class_accuracy, "loss": self.loss}
        return numbers | {"videos": self.num_videos, "bad_files": len(self.bad)}

    def table(self) -> Table:
        """The metrics and each class's accuracy, for a terminal."""
        table = Table("class", "videos", "accuracy", title=str(self), title_justify="left")
        for name, videos, accuracy in zip(self.classes, self.confusion.sum(1).tolist(), self.per_class, strict=True):
            table.add_row(name, str(videos), "-" if accuracy is None else f"{accuracy:.3f}")
        return table

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.4f}"
        bad = f"; {len(self.bad)} could not be decoded" if self.bad else ""
        return f"top-1 {self.top1:.4f}{top5}, mean class {self.mean_class_accuracy:.4f}, {self.num_videos} videos{bad}"


def evaluate(
    model: torch.nn.Module,
    loader: Iterable[Batch],
    classes: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    quiet: bool = True,
) -> Results:
    """Test a model in this process.

    Args:
        model: Has an `input_spec`; gives logits (N, K). It runs in eval mode and is left in the modes it came in.
        loader: See `data.loader.test_loader`.
        classes: Names of the K classes.
        device: Where the model is.
        precision: bf16 and fp16 are mixed precision.
        quiet: No progress bar.

    Returns:
        The metrics, with everything they were counted from.

    Raises:
        DataError: No video has a label and can be decoded.
        TrainingError: The model's scores are not finite.
    """
    scores = collect_scores(model, loader, len(classes), device=device, precision=precision, quiet=quiet)
    return results_from_scores(scores, classes)


@torch.no_grad()
def collect_scores(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    *,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    clips_at_once: int = 16,
    fast: bool = False,
    bad_files: BadFileLog | None = None,
    quiet: bool = True,
) -> Scores:
    """Run a model over the videos of this process; arguments as in `evaluate`.

    Args:
        num_classes: K.
        clips_at_once: Largest number of clips in one pass through the model, however many views a video has.
        fast: Compile the model for this machine's CPU, see `lean3d.fast.compile`; then clips go through one by one.
        bad_files: Counts the bad files too, and raises TooManyBadFilesError as soon as they are too many.
    """
    device = torch.device(device)
    indices, labels, probabilities = [], [], [torch.empty(0, num_classes)]
    bad: list[BadFile] = []
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with _eval_mode(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        forward = compiler.compile(model, quiet=True) if fast else model
        for batch in _progress(batches, "testing", quiet):
            bad += batch.bad
            if bad_files is not None:
                bad_files.add(batch.bad)
            if not len(batch.clips):
                continue
            views = batch.clips.flatten(0, 1)  # (N * V, C, T, h, w)
            parts = []
            for chunk in views.split(1 if fast else clips_at_once):
                logits = forward(normalize(chunk.to(device), model.input_spec))  # type: ignore[arg-type]
                parts.append(logits.float().softmax(-1).cpu())
            indices.append(batch.indices)
            labels.append(batch.labels)
            probabilities.append(torch.cat(parts).unflatten(0, batch.clips.shape[:2]).mean(1))
    none = torch.empty(0, dtype=torch.int64)
    return Scores(torch.cat([none, *indices]), torch.cat([none, *labels]), torch.cat(probabilities), tuple(bad))


def results_from_scores(scores: Scores, classes: Sequence[str]) -> Results:
    """Count accuracies; see `Results`.

    Raises:
        DataError: No video has a label and can be decoded.
        TrainingError: A score is not finite.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix  # slow to load

    if not scores.probabilities.isfinite().all():
        raise TrainingError(
            "the model's scores are not finite: its weights are damaged, or numbers overflow in fp16 "
            "(then try --precision fp32 or bf16)"
        )
    labelled = scores.labels >= 0
    labels, probabilities = scores.labels[labelled], scores.probabilities[labelled]
    if not len(labels):
        raise DataError(
            f"there is nothing to count: of {len(labelled) + len(scores.bad)} videos {len(scores.bad)} can't be "
            f"decoded and {len(labelled)} have no label"
        )
    num_classes = len(classes)
    confusion = multiclass_confusion_matrix(probabilities.argmax(1), labels, num_classes)
    videos = confusion.sum(1)
    hits = confusion.diagonal()
    top5 = None
    if num_classes > 5:
        top5 = float(multiclass_accuracy(probabilities, labels, num_classes, top_k=5, average="micro"))
    return Results(
        classes=tuple(classes),
        scores=scores,
        top1=float(hits.sum() / videos.sum()),
        top5=top5,
        mean_class_accuracy=float((hits / videos)[videos > 0].mean()),
        per_class=tuple(h / n if n else None for h, n in zip(hits.tolist(), videos.tolist(), strict=True)),
        loss=float(-probabilities[torch.arange(len(labels)), labels].clamp(min=1e-12).log().mean()),
        confusion=confusion,
    )


def run(
    checkpoint: str | Path,
    others: Sequence[str | Path] = (),
    *,
    data: Mapping[str, Any] | None = None,
    split: Split | None = None,
    views: ViewsConfig | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    fast: bool = False,
    out: str | Path | None = None,
    command: str | None = None,
    quiet: bool = False,
) -> Results:
    """Test a checkpoint on its recipe's data, or on other data, and write down how it did.

    With `others` it is an ensemble that is tested: the mean of all checkpoints' scores, each on clips of its own
    length, distance and size. Data and views are the first one's.

    Writes into `out`: `results.json` (the metrics, every video's scores, and what is needed to repeat the test; of an
    ensemble also each checkpoint's own metrics), `per_class.csv`, `confusion.png`.

    Args:
        checkpoint: A `.safetensors` file of lean3d, or a run folder.
        others: Further ones, of the same classes in any order.
        data: Fields of `DataConfig` that differ from the recipe's, for example ``{"root": "other/videos"}``.
        split: What to test on; default: test where there is such a split, else val.
        views: Clips and crops of each video; default: the recipe's.
        batch_size: Largest number of videos loaded at once.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto".
        precision: bf16 and fp16 are mixed precision.
        fast: Compile the models for this machine's CPU, see `lean3d.fast.compile`.
        out: The folder to write into; default: see `results_folder`.
        command: What was typed; default: this process's arguments.
        quiet: No progress bar.

    Returns:
        The metrics, with everything they were counted from.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ConfigError: A field of `data` is unknown, the checkpoint has no recipe and `data` has no root, the
            checkpoints have different classes, or `fast` is asked for off the CPU or in another precision than fp32.
        DataError: The split is empty, or has classes that the model does not know.
        TooManyBadFilesError: More files than `max_bad_share` can't be decoded.
    """
    members = [checkpoints.load(path) for path in (checkpoint, *others)]
    first = members[0]
    classes, recipe = first.classes, first.recipe
    for member in members[1:]:
        if differences := class_differences(classes, member.classes):
            raise ConfigError(
                f"an ensemble needs models of the same classes: against {first.path}, {member.path} {differences}"
            )
    views = views or (recipe.test if recipe else ViewsConfig())
    config, manifest, split, clips = clips_to_test(first, data or {}, split)

    if fast and precision != "fp32":
        raise ConfigError(f"fast computes in fp32, got precision {precision}: leave one of them out")
    where = compiler.device(device) if fast else checkpoints.device(device)
    parts = []
    for member in members:
        spec = member.model.input_spec
        scores = collect_scores(
            member.model.to(where),
            test_loader(clips, config, spec, views, batch_size=batch_size, pin_memory=where.type == "cuda"),
            len(classes),
            device=where,
            precision=precision,
            fast=fast,
            bad_files=BadFileLog(len(clips), config.max_bad_share),
            quiet=quiet,
        )
        columns = [member.classes.index(name) for name in classes]
        parts.append(dataclasses.replace(scores, probabilities=scores.probabilities[:, columns]))
    results = results_from_scores(Scores.average(parts) if others else parts[0], classes)

    about: dict[str, Any] = {
        "command": command or shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checkpoint": describe_checkpoint(first),
        "data": describe_data(config, manifest, split),
        "views": to_dict(views),
        "precision": precision,
        "fast": fast,
        "device": str(where),
        "versions": versions(),
    }
    if others:
        about["ensemble"] = [
            {**describe_checkpoint(member), "metrics": results_from_scores(scores, classes).metrics()}
            for member, scores in zip(members, parts, strict=True)
        ]
    folder = Path(out) if out is not None else results_folder(first.path, others)
    write_results(folder, results, [clip.path for clip in clips], about)
    return results


def clips_to_test(
    checkpoint: checkpoints.Checkpoint, data: Mapping[str, Any], split: Split | None
) -> tuple[DataConfig, Manifest, Split, tuple[Clip, ...]]:
    """The videos to test a model on, with its own labels.

    Args:
        checkpoint: The model.
        data: Fields of `DataConfig` that differ from its recipe's.
        split: Default: test where there is such a split, else val.

    Raises:
        ConfigError: A field is unknown, or the checkpoint has no recipe and `data` no root.
        DataError: The split is empty, or has classes that the model does not know.
    """
    config = _data_config(checkpoint.recipe.data if checkpoint.recipe else None, data)
    manifest = read_manifest(config)
    split, clips = _select(manifest, split)
    return config, manifest, split, _relabel(clips, manifest.classes, checkpoint.classes)


def describe_data(config: DataConfig, manifest: Manifest, split: Split) -> dict[str, Any]:
    """What was tested on, as plain JSON data."""
    return {"config": to_dict(config), "split": split, "digest": manifest.digest(), "source": manifest.source}


def results_folder(checkpoint: Path, others: Sequence[str | Path] = ()) -> Path:
    """Where results go by default: beside the checkpoint's file; those of an ensemble in a folder `ensemble` there."""
    return checkpoint.parent / "ensemble" if others else checkpoint.parent


def write_results(folder: str | Path, results: Results, paths: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write `results.json`, `per_class.csv` and `confusion.png`.

    Args:
        folder: Made where it is missing.
        results: What was found.
        paths: The file at each place of the data set, which `Scores.indices` point to.
        about: What is needed to repeat the test; stands first in the JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes, scores = results.classes, results.scores
    per_class = [
        {"class": name, "videos": videos, "accuracy": accuracy}
        for name, videos, accuracy in zip(classes, results.confusion.sum(1).tolist(), results.per_class, strict=True)
    ]
    best_scores, best_classes = (part.tolist() for part in scores.probabilities.topk(min(5, len(classes)), dim=1))
    rows = zip(scores.indices.tolist(), scores.labels.tolist(), best_scores, best_classes, strict=True)
    videos = [
        {
            "path": paths[index],
            "label": classes[label] if label >= 0 else None,
            "top": [{"label": classes[c], "score": round(p, 6)} for p, c in zip(values, numbers, strict=True)],
        }
        for index, label, values, numbers in rows
    ]
    content = {
        "format": 1,
        **about,
        "metrics": results.metrics(),
        "classes": list(classes),
        "per_class": per_class,
        "confusion": results.confusion.tolist(),
        "bad_files": [file._asdict() for file in results.bad],
        "videos": videos,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["class", "videos", "accuracy"])
        writer.writeheader()
        writer.writerows(per_class)
    draw_confusion(folder / "confusion.png", results.confusion, classes)


def draw_confusion(path: str | Path, confusion: torch.Tensor, classes: Sequence[str]) -> None:
    """Write a picture of a confusion matrix: colours are shares of the true class, numbers are videos.

    Up to 20 classes the cells carry numbers, up to 100 every class is named, beyond that every second or third one.

    Args:
        path: The PNG file.
        confusion: int64 (K, K), by true class (row) and predicted class (column).
        classes: Names of the K classes.
    """
    from matplotlib.figure import Figure  # only where a picture is wanted

    count = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    cell = 0.55 if count <= 20 else 0.2 if count <= 100 else 0.1  # inches
    side = max(3.5, cell * count)
    names = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
    figure = Figure(figsize=(side + 2.5, side + 2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 20:
        for row, column in (confusion > 0).nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=colour, fontsize=8)
    step = 1 + (count - 1) // 100
    ticks = list(range(0, count, step))
    size = 9 if count <= 20 else 6
    axes.set_xticks(ticks, names[::step], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, names[::step], fontsize=size, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / side), label="share of the true class")
    figure.savefig(path, dpi=120)


def _data_config(base: DataConfig | None, changes: Mapping[str, Any]) -> DataConfig:
    if base is None and not changes.get("root"):
        raise ConfigError("the checkpoint does not say which data it was trained on: give a folder or annotation file")
    return from_dict(DataConfig, {**to_dict(base or DataConfig()), **changes}, "data.")


def _select(manifest: Manifest, split: Split | None) -> tuple[Split, tuple[Clip, ...]]:
    """The split's name and clips; without a name test, else val."""
    if split is None:
        split = "test" if manifest.select("test") else "val"
    clips = manifest.clips if split == "all" else manifest.select(split)
    if not clips:
        has = ", ".join(sorted({clip.split for clip in manifest.clips}))
        raise DataError(f"{manifest.source} has no clips in the split {split}; it has: {has} (or try --split all)")
    return split, clips


def _relabel(clips: Sequence[Clip], classes: Sequence[str], known: Sequence[str]) -> tuple[Clip, ...]:
    """The clips with the model's labels, which go by the classes' names; a data set need not have every class."""
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise DataError(f"the model has no class {', '.join(unknown[:5])}; its classes are {', '.join(known[:20])}")
    place = {label: known.index(name) for label, name in enumerate(classes)}
    return tuple(dataclasses.replace(clip, label=place.get(clip.label, -1)) for clip in clips)


def class_differences(classes: Sequence[str], others: Sequence[str]) -> str:
    """What the others lack and have, as "lacks a, b and has c"; empty where they are the same, in any order."""
    lacks = [name for name in classes if name not in others]
    more = [name for name in others if name not in classes]
    return " and ".join(
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("lacks", lacks), ("has", more))
        if names
    )


def describe_checkpoint(member: checkpoints.Checkpoint) -> dict[str, Any]:
    """Which model was tested, as plain JSON data."""
    return {
        "path": str(member.path.resolve()),
        "sha256": _sha256(member.path),
        "model": member.metadata["model"],
    }


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _first_places(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different values in rising order, and a place of each."""
    order = indices.argsort(stable=True)
    ordered = indices[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first], order[first]


def _progress(batches: Iterable[Batch], what: str, quiet: bool) -> Iterator[Batch]:
    total = len(batches) if isinstance(batches, Sized) else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True) as progress:
        yield from progress.track(batches, total=total, description=what)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of lean3d and of what its numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "av", "numpy")}
    return {"lean3d": __version__, "python": platform.python_version(), **packages}
