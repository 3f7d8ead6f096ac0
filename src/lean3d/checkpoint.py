"""A file <-> a model: one safetensors file that carries its own model, and beside it the state of a training.

    RUN/model.safetensors                           the model to use
    RUN/checkpoints/step-00000123/model.safetensors the weights as they were trained up to step 123
                                  state.pt          optimizer, moving average, counters: what a resume needs

The file's header has one entry, ``lean3d``, that holds JSON: a format number, the model's name and arguments, its input
spec, the labels, the recipe, the version of lean3d, metrics. Whatever is written appears under its final name
only when it is whole, so a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lean3d.config import InputSpec, TrainConfig, from_dict
from lean3d.errors import CheckpointError, ConfigError, UnknownModelError
from lean3d.models import VideoNet, model_from_spec
from lean3d.version import __version__

FORMAT = 1
"""The number of the header's layout; a reader refuses files with a greater one."""

HEADER = "lean3d"
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A model that was read from a file."""

    model: VideoNet
    """In eval mode, on the CPU."""
    classes: tuple[str, ...]
    """The label of each output, in order."""
    recipe: TrainConfig | None
    """What the model was trained with; None where the file does not say."""
    metadata: dict[str, Any]
    """The whole header: ``format``, ``model``, ``input``, ``classes``, ``recipe``, ``version``, ``metrics``."""
    path: Path
    """The file."""


def save_model(
    path: str | Path,
    model: VideoNet,
    classes: Sequence[str],
    recipe: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a model with all that is needed to build and use it again.

    Args:
        path: The file to write; its folder is made where it is missing.
        model: A model of the zoo (it has `spec` and `input_spec`), in any mode, on any device.
        classes: The label of each output, in order.
        recipe: The `TrainConfig` it was trained with, as `config.to_dict` gives it; ``{}`` for none.
        extra: Further plain JSON for the header, as ``{"metrics": {"top1": 0.97}}``.

    Returns:
        The path.

    Raises:
        CheckpointError: It can't be written, as on a full disk; a file that was there stays.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "model": model.spec,
        "input": asdict(model.input_spec),
        "classes": list(classes),
        "recipe": recipe,
        "version": __version__,
        "metrics": {},
        **(extra or {}),
    }
    # A safetensors file can't hold two names for one memory, nor strides: clones have neither.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        save_file(tensors, temporary, {HEADER: json.dumps(header)})
    return path


def load(path: str | Path) -> Checkpoint:
    """The model in a checkpoint, built anew and filled with its weights.

    Args:
        path: A ``.safetensors`` file that lean3d wrote, or a folder with a ``model.safetensors`` (a run).

    Raises:
        CheckpointError: Nothing is there; the file is damaged, foreign or of a newer lean3d; the model is not known.
    """
    path = _model_file(Path(path))
    header, tensors = read_file(path)
    if header is None:
        raise CheckpointError(
            f"{path} holds weights but not lean3d's header, so nobody knows their model. Weights of a 2D ResNet can "
            f"start a training: lean3d train --init.weights {path}"
        )
    missing = [key for key in ("format", "model", "classes") if key not in header]
    if missing:
        raise CheckpointError(f"{path}: the header lacks {', '.join(missing)}; write the file anew with save_model")
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, written by lean3d {header.get('version', '?')}; this lean3d "
            f"{__version__} reads up to {FORMAT}. Update it: pip install -U lean3d"
        )
    try:
        model = model_from_spec(header["model"])
        if "input" in header:  # weights that others trained may want another mean and deviation
            model.input_spec = from_dict(InputSpec, header["input"], "input.")
    except UnknownModelError as error:
        raise CheckpointError(
            f"{path} holds a model that this lean3d does not have ({error}). It was written by lean3d "
            f"{header.get('version', '?')}; if you registered the model yourself, import its module first"
        ) from error
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its model can't be built by lean3d {__version__}: {error}") from error
    fill_model(model, tensors, path)
    recipe = header.get("recipe")
    try:
        config = from_dict(TrainConfig, recipe) if recipe else None
    except ConfigError as error:
        raise CheckpointError(f"{path}: its recipe can't be read by lean3d {__version__}: {error}") from error
    return Checkpoint(model.eval(), tuple(header["classes"]), config, header, path)


def read_file(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The header and the tensors of a safetensors file, without building a model.

    Returns:
        lean3d's header, or None where another program wrote the file, and the tensors by name.

    Raises:
        CheckpointError: The file is missing, empty, cut off, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}{_neighbours(path)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): its copy or download failed; fetch it again")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): it is cut off or of another kind; copy it again, or "
            f"use an older checkpoint of the run"
        ) from error
    if text is None:
        return None, tensors
    try:
        return json.loads(text), tensors
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); the file is damaged") from error


def save_training_state(
    run: str | Path,
    step: int,
    model: VideoNet,
    state: dict[str, Any],
    classes: Sequence[str],
    recipe: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``run/checkpoints/step-XXXXXXXX`` whole or not at all, and remove all but the newest `keep`.

    Args:
        run: The run's folder.
        step: Optimizer steps done.
        model: The model as it is trained.
        state: Everything else that a resume needs: tensors, numbers, strings, and lists and dicts of them.
        classes, recipe: As in `save_model`.
        keep: How many checkpoints stay.

    Returns:
        The folder that was written. A folder of that step that is there already is left as it is: a training is
        a function of its seed, so it holds the same.

    Raises:
        CheckpointError: It can't be written, as on a full disk; older ones stay.
    """
    parent = Path(run) / FOLDER
    folder = parent / f"step-{step:08d}"
    if folder not in _step_folders(parent):
        _remove_folder(folder)
        temporary = parent / f".step-{step:08d}.{os.getpid()}"
        _remove_folder(temporary)
        save_model(temporary / MODEL_FILE, model, classes, recipe)
        with _replacing(temporary / STATE_FILE) as file:
            torch.save({"step": step, **state}, file)
        temporary.rename(folder)
        _sync(parent)
    newest = _step_folders(parent)[-keep:]
    for other in [*parent.glob("step-*"), *parent.glob(".step-*")]:  # a dot: left by a kill during the writing
        if other not in newest:
            _remove_folder(other)
    return folder


def latest_training_state(run: str | Path) -> Path | None:
    """The newest whole checkpoint folder of a run, or None where there is none yet."""
    folders = _step_folders(Path(run) / FOLDER)
    return folders[-1] if folders else None


def load_training_state(folder: str | Path, model: VideoNet) -> dict[str, Any]:
    """Fill `model` with the weights and the pixels' normalisation of a checkpoint folder, and give back its state.

    Raises:
        CheckpointError: The folder lacks a file, a file is damaged, or the weights are those of another model.
    """
    folder = Path(folder)
    try:
        header, tensors = read_file(folder / MODEL_FILE)
        state = load_pickle(folder / STATE_FILE)
    except CheckpointError as error:
        before = [other for other in _step_folders(folder.parent) if other.name < folder.name]
        run = folder.parent.parent
        offer = (
            f"The one before it, {before[-1].name}, is there: remove the damaged one (rm -r {folder}), and "
            f"lean3d train --resume {run} goes on from it"
            if before
            else f"There is none before it; start a new run, perhaps with --init.weights {run}"
        )
        raise CheckpointError(f"the checkpoint {folder} is damaged: {error}. {offer}") from error
    fill_model(model, tensors, folder / MODEL_FILE)
    take_normalisation(model, header or {})
    return state


def take_normalisation(model: VideoNet, header: dict[str, Any]) -> None:
    """Give `model` the mean and deviation of pixels that a checkpoint's weights were trained with.

    Args:
        model: Its `input_spec` changes; it has the channels of the checkpoint's model.
        header: Of the checkpoint, as `read_file` gives it; without an input spec nothing changes.
    """
    if "input" in header:
        spec = from_dict(InputSpec, header["input"], "input.")
        model.input_spec = replace(model.input_spec, mean=spec.mean, std=spec.std)


def load_pickle(path: str | Path) -> dict[str, Any]:
    """The dict in a file that `torch.save` wrote, on the CPU. Only tensors and plain values are let in, never code.

    Raises:
        CheckpointError: The file is missing, damaged, holds other things, or is no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file at {path}{_neighbours(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} can't be read ({reason}): it is damaged, or holds more than tensors and plain values"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors (a state dict)")
    return content


def fill_model(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Strict loading: every tensor of the model, and no other.

    Raises:
        CheckpointError: Names what is missing, unknown or of another shape, and the file `path` it came from.
    """
    own = model.state_dict()
    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has {name}, which the model does not know" for name in tensors if name not in own]
    problems += [
        f"has {name} as {tuple(tensors[name].shape)}, the model as {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit the model: it {'; it '.join(problems[:5])}{more}. The file is damaged, or the model "
            f"has changed since; use the lean3d that wrote it"
        )
    model.load_state_dict(tensors)


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    file = path / MODEL_FILE
    if not file.is_file() and (newest := latest_training_state(path)):
        raise CheckpointError(
            f"the training in {path} has not finished an epoch, so there is no {MODEL_FILE} yet; go on with "
            f"lean3d train --resume {path}, or use the unfinished {newest / MODEL_FILE}"
        )
    return file


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))[:5]
    return f"; in that folder: {', '.join(found)}" if found else "; no other checkpoint is in that folder"


def _step_folders(parent: Path) -> list[Path]:
    """Whole checkpoint folders, oldest first."""
    return sorted(
        folder
        for folder in parent.glob("step-*")
        if (folder / MODEL_FILE).is_file() and (folder / STATE_FILE).is_file()
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, put in the place of `path` at the end, once its bytes are on the disk.

    Raises:
        CheckpointError: The disk is full, or it can't be written for another reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what this user's files have; safetensors would make it private
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise CheckpointError(
            f"{path} can't be written ({str(error).splitlines()[0]}). What was written before is whole: see that there "
            f"is room on the disk, then go on from it with lean3d train --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def device(name: str) -> torch.device:
    """Where a loaded model goes: "cpu", "cuda", "cuda:1", "mps", or "auto", the best that there is."""
    if name != "auto":
        return torch.device(name)
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return best or torch.device("cpu")
