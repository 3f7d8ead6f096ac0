"""What stands before the first step: the run's folder, the processes, the data's list, the initial weights."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import datetime
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed import is_torchelastic_launched

from lean3d.checkpoint import fill_model, load_pickle, read_file, take_normalisation
from lean3d.config import RunConfig, TrainConfig, from_json, to_json
from lean3d.data.manifest import Manifest
from lean3d.engine.distributed import shard
from lean3d.errors import CheckpointError, ConfigError, DataError, TrainingError
from lean3d.models import VideoNet, load_2d_weights

CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.csv"
DIGEST_FILE = "manifest.sha256"

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


def run_folder(config: TrainConfig) -> Path:
    """Where a new run goes: `run.out`, or ``runs/RECIPE-MODEL-DATE``.

    Raises:
        ConfigError: A run is there already.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = Path(config.run.out or Path("runs") / f"{config.recipe}-{config.model.name}-{now}")
    if (run / CONFIG_FILE).exists():
        raise ConfigError(
            f"there is a run in {run} already: go on with it by lean3d train --resume {run}, or choose another folder "
            f"with --run.out"
        )
    return run


def goes_on(config: TrainConfig) -> bool:
    """Whether this is a training that torchrun started anew, after a process failed or machines came or went.

    With ``torchrun --max-restarts`` the same command is typed once and run often: where its run has begun, with the
    same settings, it is gone on with.

    Raises:
        ConfigError: torchrun may start the processes anew, and they would not find their run or each other again.
    """
    if not is_torchelastic_launched() or not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return False
    # Else the addresses of dead processes stay in the store that the new ones look for each other in, which then fail
    # or wait for ever (https://github.com/pytorch/pytorch/issues/135712).
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "torchrun with --max-restarts keeps addresses of dead processes, with which processes that it starts anew "
            "may hang: type TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts ..."
        )
    if not config.run.out:
        raise ConfigError("torchrun with --max-restarts needs a folder to go on in after a restart: type --run.out DIR")
    run = Path(config.run.out)
    return (run / CONFIG_FILE).is_file() and read_run_config(run) == config


def check_same_data(digests: Sequence[str], counts: Sequence[int]) -> None:
    """See that all processes have found the same clips with the same labels and splits.

    Args:
        digests: Every process's `Manifest.digest`.
        counts: How many clips each has found.

    Raises:
        DataError: Names the processes that differ from the first.
    """
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        found = ", ".join(f"process {rank} {counts[rank]}" for rank in others[:5])
        raise DataError(
            f"the processes have not the same data: process 0 has found {counts[0]} clips, {found}, or with other "
            f"labels or splits. Copy the data set to every machine, or put it where all see it"
        )


def read_run_config(run: Path) -> TrainConfig:
    """The config in a run's folder, with that folder as `run.out`, wherever it lies by now.

    Raises:
        CheckpointError: There is no run.
    """
    file = run / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"there is no run to go on with in {run}: it has no {CONFIG_FILE}")
    config = from_json(TrainConfig, file.read_text(encoding="utf-8"))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(run)))


def write_run_config(run: Path, config: TrainConfig) -> None:
    """Make the run's folder with its config."""
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_FILE).write_text(to_json(config) + "\n", encoding="utf-8")


def check(config: TrainConfig, world: int) -> None:
    """Refuse settings that don't fit together before anything costs time.

    Raises:
        ConfigError: Says what came, what is accepted, what to type.
    """
    optim, init, run = config.optim, config.init, config.run
    for name, value, least in (
        ("optim.epochs", optim.epochs, 1),
        ("optim.accumulate", optim.accumulate, 1),
        ("optim.batch-size", optim.batch_size, 1),
        ("optim.warmup-epochs", optim.warmup_epochs, 0),
        ("optim.clip-norm", optim.clip_norm, 0),
        ("optim.precise-bn", optim.precise_bn, 0),
        ("init.stage-epochs", init.stage_epochs, 1),
        ("run.save-minutes", run.save_minutes, 0),
        ("run.max-minutes", run.max_minutes, 0),
        ("run.seed", run.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    if optim.lr <= 0:
        raise ConfigError(f"--optim.lr must be above 0, got {optim.lr}")
    if not 0 <= optim.label_smoothing < 1:
        raise ConfigError(f"--optim.label-smoothing must be at least 0 and less than 1, got {optim.label_smoothing}")
    if not 0 < optim.teachers_share <= 1:
        raise ConfigError(f"--optim.teachers-share must be above 0 and at most 1, got {optim.teachers_share}")
    if run.strategy == "fsdp" and init.train != "all":
        raise ConfigError(
            f"--run.strategy fsdp trains whole models only, got --init.train {init.train}; type --run.strategy ddp"
        )
    if run.strategy == "fsdp" and run.precision == "fp16":
        raise ConfigError("--run.strategy fsdp goes with --run.precision bf16 or fp32, not with fp16")
    parts = world * optim.accumulate
    if optim.batch_size % parts:
        raise ConfigError(
            f"--optim.batch-size {optim.batch_size} can't be shared by {world} processes in {optim.accumulate} parts "
            f"each: it must be a multiple of {parts}; type --optim.batch-size {-(-optim.batch_size // parts) * parts}"
        )


def make_fabric(run: RunConfig) -> Fabric:
    """The processes and devices of a training, not yet started.

    Under torchrun its processes are taken as they are. Else several devices mean several processes that this one
    starts and waits for.

    Raises:
        ConfigError: The machine has no such accelerator, or not as many devices.
    """
    devices, nodes = run.devices, run.num_nodes
    accelerator = run.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif nodes > 1:
        raise ConfigError(
            f"--run.num-nodes {nodes} needs torchrun on each machine: torchrun --nnodes {nodes} --nproc-per-node "
            f"{devices} --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m lean3d train ..."
        )
    if devices < 1 or devices > available.get(accelerator, devices):
        has = available.get(accelerator, 1)
        raise ConfigError(f"--run.devices {devices} with --run.accelerator {accelerator}: this machine has {has}")
    if run.precision == "fp16" and accelerator == "cpu":
        raise ConfigError("--run.precision fp16 needs a GPU; on a CPU type --run.precision bf16 or fp32")
    strategy: DDPStrategy | ModelParallelStrategy | str = "auto"
    if run.strategy == "fsdp" and not is_torchelastic_launched():
        raise ConfigError(
            "--run.strategy fsdp needs torchrun: torchrun --nproc-per-node "
            f"{max(2, devices)} -m lean3d train ...; in one process there is nothing to spread"
        )
    if run.strategy == "fsdp" and devices * nodes > 1:
        strategy = ModelParallelStrategy(
            lambda model, mesh: shard(model, mesh["data_parallel"]),
            data_parallel_size=devices * nodes,
            tensor_parallel_size=1,
        )
    elif devices * nodes > 1 or is_torchelastic_launched():
        strategy = DDPStrategy(start_method="popen" if is_torchelastic_launched() else "spawn")
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=PRECISIONS[run.precision],
    )


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next allocation; nothing where libc isn't glibc.

    A step on a CPU allocates and frees its activations, tens of MB each. glibc gives so large blocks back to the
    system at once and fetches them anew, zeroed page by page, which may cost a third of the step (mallopt(3):
    M_MMAP_MAX = 0 takes them from the heap, M_TRIM_THRESHOLD = -1 keeps the heap).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 64 * 2**20)  # the heap grows in few, large pieces


def write_manifest(run: Path, manifest: Manifest) -> None:
    """Keep the list of clips in the run's folder, and its digest."""
    manifest.to_csv(run / MANIFEST_FILE)
    (run / DIGEST_FILE).write_text(manifest.digest() + "\n", encoding="utf-8")


def check_manifest(run: Path, manifest: Manifest) -> None:
    """See that the data are those that the run began with.

    Raises:
        DataError: Says what is new, gone, or changed.
    """
    file = run / DIGEST_FILE
    if not file.is_file() or file.read_text(encoding="utf-8").strip() == manifest.digest():
        return
    now_file = run / f"{MANIFEST_FILE}.now"
    manifest.to_csv(now_file)
    before, now = _csv_rows(run / MANIFEST_FILE), _csv_rows(now_file)
    now_file.unlink()
    gone, new = list((before - now).elements()), list((now - before).elements())
    changes = [f"{len(rows)} {what}, as {rows[0]}" for what, rows in (("gone", gone), ("new", new)) if rows]
    raise DataError(
        f"the data have changed since the run in {run} began, so going on would not give what it would have given: "
        f"of its {sum(before.values())} clips {'; '.join(changes) or 'the order or the classes changed'}. Put them "
        f"back as {MANIFEST_FILE} lists them, or start a new run with --init.weights {run}"
    )


def load_initial_weights(model: VideoNet, path: str | Path, classes: tuple[str, ...]) -> str:
    """Start a model from a lean3d checkpoint or from a 2D ResNet's state dict, which is inflated.

    With a checkpoint's weights comes the mean and deviation of pixels that they were trained with.

    Args:
        model: Filled in place.
        path: A checkpoint of lean3d or its run's folder; or ``.safetensors``, ``.pth``, ``.pt`` with a 2D state dict.
        classes: The training's classes. The classifier is taken over only from a model of the same classes.

    Returns:
        What was loaded and what stays fresh, in one line.

    Raises:
        CheckpointError: The file is missing, damaged, or of a model that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in (".pth", ".pt"):
        return f"initial weights from {path}: {load_2d_weights(model, _state_dict(load_pickle(path)))}"
    header, tensors = read_file(path)
    if header is None:
        return f"initial weights from {path}: {load_2d_weights(model, _state_dict(tensors))}"
    fresh = ""
    if tuple(header["classes"]) != classes:
        fresh = f"; the classifier is fresh, since that model has {len(header['classes'])} other classes"
        tensors |= {name: value for name, value in model.state_dict().items() if name.startswith("head.linear.")}
    try:
        fill_model(model, tensors, path)
    except CheckpointError as error:
        raise CheckpointError(
            f"--init.weights {path} holds {header['model']['name']} with {header['model']['arguments']}, and the "
            f"training wants {model.spec['name']} with {model.spec['arguments']}: {error}"
        ) from error
    take_normalisation(model, header)
    return f"initial weights from {path}{fresh}"


def step_seed(*words: int) -> int:
    """A seed that follows from some numbers of at least 0; neighbours give unrelated seeds."""
    import numpy as np

    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_finite(model: VideoNet, step: int, lr: float) -> None:
    """Refuse weights that are no numbers, before they are saved.

    Raises:
        TrainingError: Names the step and what to try.
    """
    total = torch.stack([parameter.detach().float().sum() for parameter in model.parameters()]).sum()
    if not torch.isfinite(total):
        raise not_finite(step, "weights", lr)


def not_finite(step: int, what: str, lr: float) -> TrainingError:
    """The error for a loss or weights that became infinite or no number."""
    return TrainingError(
        f"the {what} became infinite or no number in step {step} (learning rate {lr:.3g}). Checkpoints from before are "
        f"untouched. Try a lower --optim.lr (as {lr / 10:.1g}), --optim.clip-norm 1, a longer --optim.warmup-epochs, "
        f"or --run.precision fp32"
    )


def _state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in a checkpoint of another program."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _csv_rows(path: Path) -> Counter[str]:
    """The clips in a manifest, with paths from their common folder, so that a move is no change."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    common = os.path.commonpath([Path(row["path"]).parent for row in rows]) if rows else ""
    return Counter(",".join([os.path.relpath(row.pop("path"), common), *row.values()]) for row in rows)
