"""What was measured, kept on disk: one JSON file for each machine, number of threads and version.

    layers    an operation's shape -> algorithm -> [seconds, error]
    nets      a net's shapes and weights -> the algorithms chosen, and what they were found to be

A file that can't be read or written is no reason to stop: it is left out, with a warning. Writers replace it as a
whole, so that a reader never sees half of one; of two who write at a time the later one's file holds both, but for
what the other measured in between, which is measured again when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import platformdirs
import torch

from lean3d.ops import native
from lean3d.version import __version__

FORMAT = 2
MOST_NETS = 100
"""Nets that a file remembers, the latest ones."""


def machine(threads: int) -> dict[str, Any]:
    """All beside the shape that times depend on."""
    library = native.kernels().__file__ if native.available() else None
    stat = Path(library).stat() if library else None
    return {
        "processor": _processor(),
        "instructions": native.kernels().isa() if stat else torch.backends.cpu.get_cpu_capability(),
        "native": [stat.st_size, int(stat.st_mtime)] if stat else None,
        "threads": threads,
        "lean3d": __version__,
        "torch": torch.__version__,
    }


class Cache:
    """Measurements of one machine and number of threads.

    Args:
        folder: where the files are; by default `LEAN3D_CACHE` of the environment, or the user's cache.
        threads: those that were measured with.
    """

    def __init__(self, folder: str | Path | None, threads: int):
        self.machine = machine(threads)
        home = folder or os.environ.get("LEAN3D_CACHE") or Path(platformdirs.user_cache_dir("lean3d")) / "fast"
        key = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(home) / f"{key}.json"
        self.layers: dict[str, dict[str, list[float]]] = {}
        self.nets: dict[str, dict[str, Any]] = {}
        self.layers, self.nets = self._read()

    def write(self) -> None:
        """Put everything onto the disk, together with what others have written meanwhile."""
        layers, nets = self._read()
        for key, found in self.layers.items():
            layers[key] = {**layers.get(key, {}), **found}
        nets = {**{k: v for k, v in nets.items() if k not in self.nets}, **self.nets}
        nets = dict(list(nets.items())[-MOST_NETS:])
        content = {"format": FORMAT, "machine": self.machine, "layers": layers, "nets": nets}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file)
                Path(temporary).replace(self.path)
            except BaseException:
                Path(temporary).unlink()
                raise
        except OSError as error:
            warnings.warn(f"fast.compile measures again next time: can't write {self.path} ({error})", stacklevel=2)

    def _read(self) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, Any]]]:
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            layers = {
                key: {name: [float(seconds), float(error)] for name, (seconds, error) in found.items()}
                for key, found in content["layers"].items()
            }
            return layers, {key: dict(net) for key, net in content["nets"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            warnings.warn(f"fast.compile leaves out {self.path}, which can't be read ({problem})", stacklevel=2)
        return {}, {}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
