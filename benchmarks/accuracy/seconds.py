"""Milliseconds of nets in `lean3d.fast`, apart from their trainings, and kept: a net is measured once on a machine.

All nets that are missing take turns, in another order in each round, one clip at a time. Their weights are random, with
what starts at zero, such as SmallBig's big view, drawn anew, so that the compiler leaves nothing out.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterable
from typing import Any

import peers  # noqa: F401  (registers its models)
import torch
from ledger import digest
from rich.console import Console
from studies import Row
from tasks import Places

from lean3d import fast
from lean3d.bench import machine
from lean3d.errors import ConfigError
from lean3d.models import VideoNet, model_from_config

ROUNDS = 15
FILE = "seconds.jsonl"


def net_key(row_config: dict[str, Any]) -> str:
    """A net and its clip; the classifier's classes don't matter."""
    return digest(row_config)[:16]


def read(places: Places) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What is measured, by net, processor and threads."""
    path = places.results / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {(m["net"], m["processor"], m["threads"]): m for m in map(json.loads, lines)}


def measure(wanted: Iterable[Row], places: Places, *, console: Console, rounds: int = ROUNDS) -> None:
    """Measure the nets of some rows with torch's number of threads, and add lines to `seconds.jsonl`."""
    here, threads = machine.describe(), torch.get_num_threads()
    known = read(places)
    compiled: dict[str, tuple[str, fast.CompiledModel, torch.Tensor]] = {}
    for row in wanted:
        model_config = row.config().model
        name = net_key(rows_model(row))
        if name in compiled or (name, here["processor"], threads) in known:
            continue
        try:
            net = _randomised(model_from_config(model_config, 10))
        except ConfigError as error:
            console.print(f"{row.net.label}: passed over: {error}", markup=False)
            continue
        spec = net.input_spec
        clip = torch.randn(1, spec.channels, spec.num_frames, *spec.size, generator=torch.Generator().manual_seed(0))
        console.print(f"{row.net.label}: compiling", markup=False)
        compiled[name] = (row.net.label, fast.compile(net, clip, quiet=True), clip)
    times: dict[str, list[float]] = {name: [] for name in compiled}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(compiled), len(compiled)):
            _, net, clip = compiled[name]
            start = time.perf_counter()
            net(clip)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    places.results.mkdir(parents=True, exist_ok=True)
    with (places.results / FILE).open("a", encoding="utf-8") as file:
        for name, taken in times.items():
            low, _, high = statistics.quantiles(taken, n=4)
            median = statistics.median(taken)
            line = {
                "net": name,
                "label": compiled[name][0],
                "processor": here["processor"],
                "threads": threads,
                "ms": round(1e3 * median, 3),
                "least_ms": round(1e3 * min(taken), 3),
                "spread": round((high - low) / 2 / median, 4),
                "rounds": rounds,
                "machine": here,
            }
            file.write(json.dumps(line) + "\n")
            console.print(f"{line['label']}: {line['ms']:.2f} ms, at least {line['least_ms']:.2f}", markup=False)


def rows_model(row: Row) -> dict[str, Any]:
    """What a row's milliseconds follow from."""
    model = row.config().model
    return {
        "name": model.name,
        "width": model.width,
        "options": dict(model.options),
        "clip": [model.in_channels, model.num_frames, *(model.size or ())],
    }


def _randomised(model: VideoNet) -> VideoNet:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not parameter.any():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()
