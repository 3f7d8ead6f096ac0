"""What `lean3d train --dry-run` shows: all that a training would do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lean3d.cli.show import MANY_CLASSES, out
from lean3d.config import WHOLE_FRAME, AugmentConfig, InitConfig, InputSpec, OptimConfig, TrainConfig, to_json
from lean3d.errors import ConfigError
from lean3d.recipes import describe_recipe, list_recipes

if TYPE_CHECKING:
    from lean3d.data.manifest import Manifest


def plan(config: TrainConfig) -> None:
    """Print the config, the data, the model with its cost, and the course of the training and its test.

    Without data (`data.root` is empty) all but the counts is shown, and what to bring.

    Raises:
        ConfigError: The training would not start.
    """
    import torch

    from lean3d.data.annotations import EXPECTED, PUBLISHED_CLASSES
    from lean3d.data.manifest import read_manifest
    from lean3d.data.transforms import TestTransform, TrainTransform
    from lean3d.engine import setup
    from lean3d.engine.distill import Teachers
    from lean3d.models import model_arguments, model_from_config
    from lean3d.models.cost import cost

    data, optim, test = config.data, config.optim, config.test
    manifest = read_manifest(data) if data.root else None
    if manifest is not None:
        num_classes = len(manifest.classes)
    else:
        num_classes = PUBLISHED_CLASSES.get(data.format) or model_arguments(config.model.name)["num_classes"]
    sure = manifest is not None or data.format in PUBLISHED_CLASSES
    with torch.device("meta"):
        model = model_from_config(config.model, num_classes)
    setup.check(config, config.run.devices * config.run.num_nodes)
    price, spec = cost(model), model.input_spec
    TestTransform(spec, test.num_crops, test.crop_area)  # refuses what can't be
    if manifest is not None:
        there = [path for path in optim.teachers if Path(path).exists()]
        Teachers(there, spec, manifest.classes, torch.device("cpu"))
    flips = _flips(config.augment)
    if manifest is not None:
        exchanged = TrainTransform(config.augment, spec, manifest.classes).labels_flipped
        pairs = sum(other > label for label, other in enumerate(exchanged or ()))
        flips = (
            "no flips" if exchanged is None else f"flips, which exchange {pairs} pairs of labels" if pairs else "flips"
        )

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    known = config.recipe in list_recipes()
    table.add_row("recipe", config.recipe + (f": {describe_recipe(config.recipe)}" if known else ""))
    where = f"[red]missing[/red]: needed is {EXPECTED.get(data.format, EXPECTED['folders'])}"
    table.add_row("data", escape(manifest.source) if manifest is not None else where)
    fast = f"{price.multiplications / 1e9:.3g} G multiplications with the fast algorithm"
    table.add_row(
        "model",
        f"{config.model.name}{'' if sure else ', counted'} for {num_classes} classes, {price.weights / 1e6:.3g}M "
        f"weights, {price.macs / 1e9:.3g} GMACs a clip ({fast})",
    )
    table.add_row("start", _start(config.init))
    table.add_row("clip", _clip(spec, data.sampling))
    table.add_row("augment", _augment(config.augment, flips))
    table.add_row("optimizer", _optimizer(optim))
    if optim.teachers:
        table.add_row("teachers", f"{', '.join(map(_file, optim.teachers))}; {optim.teachers_share:g} of the loss")
    steps = None
    if manifest is not None:
        labelled = sum(clip.label >= 0 for clip in manifest.select("train"))
        steps = labelled // optim.batch_size
    table.add_row("steps", _steps(steps, optim, config.run.max_minutes))
    table.add_row(
        "test",
        f"{test.num_clips} clips x {test.num_crops} crops of each video, {spec.size[0]} x {spec.size[1]} pixels, "
        "the mean of their scores: what lean3d eval does by default",
    )
    table.add_row("run folder", escape(str(setup.run_folder(config))))
    out.print("[bold]config[/bold]")
    out.print(to_json(config), markup=False)
    out.print()
    if manifest is not None:
        out.print(_counts(manifest))
        out.print()
    out.print(table)
    if steps == 0:
        raise ConfigError(
            f"the training split has {labelled} labelled clips, less than one batch of {optim.batch_size}; "
            "choose a smaller --optim.batch-size"
        )
    if manifest is None:
        out.print(
            f"\nThis was a dry run without data. Bring them, to see how many clips and steps there are: lean3d train "
            f"{shlex.quote(config.recipe)} path/to/data --dry-run",
            style="yellow",
        )
    else:
        out.print("\nThis was a dry run: nothing is written. Leave --dry-run out to train.", style="green")


def _counts(manifest: Manifest) -> Table:
    """Clips by class and split."""
    table = Table("class", "train", "val", "test", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = {split: [0] * len(manifest.classes) for split in ("train", "val", "test")}
    for clip in manifest.clips:
        if clip.label >= 0:
            counts[clip.split][clip.label] += 1
    for label, name in list(enumerate(manifest.classes))[:MANY_CLASSES]:
        table.add_row(name, *(str(counts[split][label]) for split in counts))
    if len(manifest.classes) > MANY_CLASSES:
        table.add_row(f"... and {len(manifest.classes) - MANY_CLASSES} more classes")
    table.add_section()
    table.add_row(f"all {len(manifest.classes)}", *(str(sum(counts[split])) for split in counts), style="bold")
    return table


def _start(init: InitConfig) -> str:
    start = "fresh weights" if init.weights is None else _file(init.weights)
    if init.train == "head":
        return f"{start}; the classifier alone learns"
    if init.train == "staged":
        return f"{start}; the classifier learns first, one stage more every {init.stage_epochs} epochs"
    return start


def _file(path: str) -> str:
    return escape(path) + ("" if Path(path).exists() else " [red](missing)[/red]")


def _clip(spec: InputSpec, sampling: str) -> str:
    frames = (
        f"one frame from each of {spec.num_frames} equal parts of the video"
        if sampling == "segments"
        else f"{spec.num_frames} frames, {spec.sampling_rate} apart in the video"
    )
    left, top, right, bottom = (f"{side:.0%}" for side in spec.region)
    part = f", from {left} to {right} of the width and {top} to {bottom} of the height"
    return (
        f"{frames}, {spec.size[0]} x {spec.size[1]} pixels, {'grey' if spec.channels == 1 else 'RGB'}"
        f"{'' if spec.region == WHOLE_FRAME else part}"
    )


def _flips(augment: AugmentConfig) -> str:
    return {"on": "flips", "off": "no flips", "auto": "flips as the classes' names allow"}[augment.flip]


def _augment(augment: AugmentConfig, flips: str) -> str:
    crops = {
        "multi_scale": f"multi-scale crops, {', '.join(f'{scale:g}' for scale in augment.scales)} of the short side",
        "random_resized": f"random crops of {augment.area[0]:g} to {augment.area[1]:g} of the frame",
        "random": "crops at random places",
        "center": "centre crops",
    }[augment.crop]
    parts = [crops, flips]
    for value, words in (
        (augment.speed, "faster or slower by up to"),
        (augment.time_shift, "earlier or later by up to"),
        (augment.color_jitter, "colour jitter"),
        (augment.rand_augment, "RandAugment operations"),
        (augment.erasing, "erasing"),
        (augment.mixup, "mixup"),
        (augment.cutmix, "cutmix"),
    ):
        if value:
            parts.append(f"{words} {value:g}")
    return ", ".join(parts)


def _optimizer(optim: OptimConfig) -> str:
    name = "SGD with Nesterov's momentum" if optim.name == "sgd" else "AdamW, first beta"
    parts = [
        f"{name} {optim.momentum:g}",
        f"learning rate {optim.lr:g} falling along a cosine to 0",
        f"{optim.warmup_epochs:g} epochs of warm-up" if optim.warmup_epochs else "no warm-up",
        f"weight decay {optim.weight_decay:g}",
    ]
    for value, words in (
        (optim.clip_norm, "gradients clipped at"),
        (optim.label_smoothing, "label smoothing"),
        (optim.ema, "moving average of weights"),
        (optim.precise_bn, "batches for precise BN:"),
    ):
        if value:
            parts.append(f"{words} {value:g}")
    return ", ".join(parts)


def _steps(steps: int | None, optim: OptimConfig, max_minutes: float) -> str:
    end = f", fewer to end within {max_minutes:g} minutes" if max_minutes else ""
    if steps is None:
        return f"{optim.epochs} epochs of batches of {optim.batch_size} clips{end}"
    each = f"{steps} an epoch of {optim.batch_size} clips each, {optim.epochs} epochs"
    return f"{each}, {steps * optim.epochs} in all{end}"
