"""The runtimes that bench compares: each as ways to make one call of a net, at its best honest settings.

A runtime tries its ways (layouts, options) and the fastest of them stands for it; it runs in a process of its own, see
`lean3d.bench.worker`.

    eager         PyTorch: the net as the zoo has it, and from torch's own 3D layers, both in two layouts
    compile       `torch.compile` with one graph: the default, and with `freezing` in channels_last_3d
    onnxruntime   all graph optimisations; its threads spin while it computes and stop with the call
    openvino      LATENCY, one stream, f32
    fast          `lean3d.fast.compile`, frozen: it has its own weights, as a runtime that reads a file has
    machine       not a net: a large matrix product and a large copy, what everything else is held against
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lean3d import checkpoint
from lean3d.blocks.conv import Conv3d
from lean3d.blocks.smallbig import Pool3d
from lean3d.blocks.stem import SpatialMaxPool, TemporalMaxPool
from lean3d.errors import MissingDependencyError
from lean3d.models.c3d import ShrinkPool
from lean3d.ops import pool3d_reference

RUNTIMES = ("eager", "compile", "onnxruntime", "openvino", "fast")
TOLERANCE = 1e-4
"""Largest error that a runtime may have: max|y - reference| / max|reference|."""
MATRIX = 2048
"""Rows and columns of the machine's matrix product."""
COPY = 1 << 26
"""Float32 numbers in the machine's copy: 256 MiB."""

MODEL_FILE = "model.safetensors"
CLIP_FILE = "clip.npy"
ONNX_FILE = "model.onnx"

Call = Callable[[], np.ndarray]
"""One pass of the clip through the net: class scores `(1, num_classes)`."""
Ways = dict[str, Callable[[], Call]]
"""From a way's name to what prepares it; preparing may take minutes and raise anything."""


@dataclass(frozen=True)
class Task:
    """A net and a clip in a folder, and the number of threads to compute with."""

    folder: Path
    threads: int

    def model(self) -> nn.Module:
        """The net in eval mode, read anew: nobody else holds its weights."""
        return checkpoint.load(self.folder / MODEL_FILE).model.requires_grad_(False)

    def clip(self) -> np.ndarray:
        """`(1, C, T, H, W)`, float32."""
        return np.load(self.folder / CLIP_FILE)


def eager(task: Task) -> Ways:
    """PyTorch, layer by layer."""
    return {
        "as it stands": lambda: _in_torch(task, task.model()),
        "as it stands, channels_last_3d": lambda: _in_torch(task, task.model(), torch.channels_last_3d),
        "torch's layers": lambda: _in_torch(task, torch_layers(task.model())),
        "torch's layers, channels_last_3d": lambda: _in_torch(task, torch_layers(task.model()), torch.channels_last_3d),
    }


def compiled(task: Task) -> Ways:
    """`torch.compile`; a graph in pieces would be no fair form of it, so that is refused."""

    def compile_(model: nn.Module, freezing: bool) -> Callable[[Tensor], Tensor]:
        return torch.compile(model, fullgraph=True, options={"freezing": freezing})

    last = torch.channels_last_3d
    return {
        "default": lambda: _in_torch(task, task.model(), then=partial(compile_, freezing=False)),
        "freezing, channels_last_3d": lambda: _in_torch(task, task.model(), last, partial(compile_, freezing=True)),
        "torch's layers, freezing, channels_last_3d": lambda: _in_torch(
            task, torch_layers(task.model()), last, partial(compile_, freezing=True)
        ),
    }


def onnx_runtime(task: Task) -> Ways:
    """ONNX Runtime on the net's ONNX file."""

    def session() -> Call:
        ort = _optional("onnxruntime", "export")
        options = ort.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", "1")
        run = ort.InferenceSession(str(task.folder / ONNX_FILE), options, providers=["CPUExecutionProvider"])
        feed = {run.get_inputs()[0].name: task.clip()}
        return lambda: run.run(None, feed)[0]

    return {"all optimisations": session}


def openvino(task: Task) -> Ways:
    """OpenVINO on the net's ONNX file."""

    def request() -> Call:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": task.threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        run = _optional("openvino", "openvino").Core().compile_model(str(task.folder / ONNX_FILE), "CPU", settings)
        infer, clip = run.create_infer_request(), task.clip()
        return lambda: infer.infer(clip, share_inputs=True)[0]

    return {"latency, f32": request}


def fast(task: Task) -> Ways:
    """`lean3d.fast.compile`."""

    def program() -> Call:
        compile_ = importlib.import_module("lean3d.fast").compile
        clip = torch.from_numpy(task.clip())
        run = compile_(task.model(), clip, threads=task.threads, tolerance=TOLERANCE, quiet=True).freeze()
        return lambda: run(clip).numpy()

    return {"tolerance 1e-4": program}


def machine(task: Task) -> Ways:
    """What the machine can do at best: `sgemm` is 2 * MATRIX**3 operations, `copy` reads and writes 4 * COPY bytes."""

    def sgemm() -> Call:
        a, b, out = (torch.randn(MATRIX, MATRIX) for _ in range(3))
        return lambda: torch.mm(a, b, out=out).numpy()

    def copy_() -> Call:
        a, b = torch.zeros(COPY), torch.ones(COPY)
        return lambda: b.copy_(a).numpy()

    return {"sgemm": sgemm, "copy": copy_}


WAYS: dict[str, Callable[[Task], Ways]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "fast": fast,
    "machine": machine,
}


def torch_layers(model: nn.Module) -> nn.Module:
    """The same net and weights from `nn.Conv3d` and torch's max pooling, as anyone would write it down.

    It defines the answer, and it is what is exported: other runtimes know a convolution and a pooling for what they
    are, and have forms of their own for them.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv3d):
                child.__class__ = nn.Conv3d  # type: ignore[assignment]
            elif isinstance(child, Pool3d):
                child.__class__ = _TorchPool3d
            elif isinstance(child, SpatialMaxPool):
                setattr(parent, name, nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
            elif isinstance(child, TemporalMaxPool):
                setattr(parent, name, nn.MaxPool3d((2, 1, 1), ceil_mode=True))
            elif isinstance(child, ShrinkPool):
                setattr(parent, name, nn.MaxPool3d(child.window, ceil_mode=True))
    return model


class _TorchPool3d(Pool3d):
    """`Pool3d` by torch's own pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same, or 1 along the axes whose window is None."""
        return pool3d_reference(x, self.window, self.mode)


def _in_torch(
    task: Task,
    model: nn.Module,
    layout: torch.memory_format = torch.contiguous_format,
    then: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
) -> Call:
    """A model as a call, in a layout and, where asked, compiled."""
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    clip = torch.from_numpy(task.clip()).contiguous(memory_format=layout)
    run = then(model) if then is not None else model

    @torch.no_grad()
    def call() -> np.ndarray:
        return run(clip).numpy()

    return call


def _optional(package: str, extra: str) -> Any:
    """A package of an extra.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(package, extra) from error
