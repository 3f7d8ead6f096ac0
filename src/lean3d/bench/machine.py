"""The machine and the software that numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from lean3d.version import __version__

PACKAGES = ("numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


def describe() -> dict[str, Any]:
    """Processor, cores, how many processes wanted them in the last minute, system, versions, as plain JSON data.

    None for a package that is not there.
    """
    onednn = re.search(r"MKL-DNN (v[\d.]+)", torch.__config__.show())
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lean3d": __version__,
        "torch": torch.__version__,
        "oneDNN": onednn[1] if onednn else None,
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
