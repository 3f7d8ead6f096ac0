"""Every error that lean3d raises on purpose.

A caller who wants them all catches `Lean3dError`; each also is the builtin that fits, so plain Python habits work.

    Lean3dError
    ├── ConfigError (ValueError)         a setting or an argument is wrong: says what came and what is accepted
    │   ├── UnknownModelError (KeyError) no model of that name: names its neighbours
    │   ├── UnknownRecipeError (KeyError)
    │   └── StreamingError               a model can't run frame by frame as it is, or a frame doesn't fit its stream
    ├── DataError (ValueError)           labels, splits or annotation files don't fit together
    │   ├── DecodeError                  one file can't be decoded: carries `path` and `reason`
    │   └── TooManyBadFilesError         more than the allowed share of files was bad
    ├── CheckpointError (ValueError)     a checkpoint is missing, damaged or does not fit
    ├── TrainingError (RuntimeError)     a training can't go on: the loss is not finite, ...
    ├── BackendError (RuntimeError)      a backend that is asked for is not there
    └── MissingDependencyError (ImportError)  an optional package is missing: names the extra that brings it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Lean3dError(Exception):
    """Base of all errors below."""

    def __str__(self) -> str:  # KeyError would show its message in quotes
        return str(self.args[0]) if self.args else type(self).__name__


class ConfigError(Lean3dError, ValueError):
    """A setting or an argument is wrong."""


class UnknownModelError(ConfigError, KeyError):
    """No model is registered under that name."""


class UnknownRecipeError(ConfigError, KeyError):
    """No recipe is registered under that name."""


class StreamingError(ConfigError):
    """A model can't run frame by frame as it is, or a frame or a state doesn't fit its stream."""


class DataError(Lean3dError, ValueError):
    """Labels, splits or annotation files don't fit together."""


class DecodeError(DataError):
    """One file can't be decoded.

    Args:
        path: The file (or folder of frames).
        reason: A short phrase that stands in `bad_files.csv`, for example ``"no video stream (audio only)"``.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"can't decode {path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders, from a loader's worker to the trainer
        return type(self), (self.path, self.reason)


class TooManyBadFilesError(DataError):
    """More than the allowed share of the files could not be decoded."""


class CheckpointError(Lean3dError, ValueError):
    """A checkpoint is missing, damaged or does not fit what it is loaded into."""


class TrainingError(Lean3dError, RuntimeError):
    """A training can't go on."""


class MissingDependencyError(Lean3dError, ImportError):
    """An optional package is missing.

    Args:
        package: The package that could not be imported.
        extra: The extra of lean3d that brings it, as in ``pip install "lean3d[export]"``.
    """

    def __init__(self, package: str, extra: str):
        super().__init__(f'{package} is not installed; it comes with: pip install "lean3d[{extra}]"')
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.package, self.extra)


class BackendError(Lean3dError, RuntimeError):
    """A backend that is asked for is not there, or can't do what it is asked for."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: its nearest neighbours, or else all that is known.

    >>> did_you_mean("smalbig50", ["c3d", "smallbig50"])
    'did you mean smallbig50?'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are: {', '.join(known)}" if known else "none is known"
