"""What lies in a run's folder, as a report wants it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lean3d.checkpoint import read_file
from lean3d.errors import CheckpointError, Lean3dError
from lean3d.models import model_from_spec
from lean3d.models.cost import Cost, cost


@dataclass(frozen=True)
class Run:
    """What lies in a run's folder; parts that are not there are None or empty."""

    folder: Path
    config: dict[str, Any] | None
    rows: list[dict[str, Any]]
    results: dict[str, Any] | None
    starts: list[dict[str, Any]]
    training_bad: int | None
    specs: list[dict[str, Any]]
    """The model, or those of an ensemble."""

    @property
    def name(self) -> str:
        """The model, with its width where that is not 1; an ensemble's are joined."""
        return " + ".join(map(_name, self.specs)) or self.folder.name

    @property
    def cost(self) -> Cost | None:
        """What the model costs, an ensemble all in all; None where that is not known, as of a model not in the zoo."""
        try:
            with torch.device("meta"):
                prices = [cost(model_from_spec(spec)) for spec in self.specs]
        except Lean3dError:
            return None
        if not prices:
            return None
        return Cost(
            weights=sum(price.weights for price in prices),
            macs=sum(price.macs for price in prices),
            multiplications=sum(price.multiplications for price in prices),
            layers=tuple(layer for price in prices for layer in price.layers),
        )

    def epochs(self, key: str) -> list[tuple[float, float]]:
        """A number's course, as points (epochs done, value)."""
        rows = [row for row in self.rows if row["kind"] == "epoch"]
        per_epoch = rows[0]["step"] / (rows[0]["epoch"] + 1) if rows else 1.0
        return [(row["step"] / per_epoch, row[key]) for row in rows if key in row]


def read_run(folder: str | Path) -> Run:
    """The files of a run's folder.

    Raises:
        CheckpointError: There is no such folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise CheckpointError(f"there is no run at {folder}")
    results = _json(folder / "results.json")
    specs = [member["model"] for member in tested(results)] if results else []
    if not specs and (folder / "model.safetensors").is_file():
        header, _ = read_file(folder / "model.safetensors")
        specs = [header["model"]] if header else []
    metrics = folder / "metrics.jsonl"
    rows = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a last line that a kill cut off
            break
    bad = folder / "bad_files.csv"
    return Run(
        folder=folder,
        config=_json(folder / "config.json"),
        rows=rows,
        results=results,
        starts=_json(folder / "environment.json") or [],
        training_bad=len(list(csv.reader(bad.read_text(encoding="utf-8").splitlines()))) - 1 if bad.is_file() else None,
        specs=specs,
    )


def tested(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints that a test was of: one, or an ensemble's."""
    return results.get("ensemble") or [results["checkpoint"]]


def _name(spec: dict[str, Any]) -> str:
    width = spec["arguments"].get("width", 1)
    return spec["name"] + ("" if width == 1 else f" (width {width:g})")


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}); write it anew, results.json with lean3d eval") from error
