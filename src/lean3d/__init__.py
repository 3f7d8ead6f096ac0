"""lean3d: video recognition with light 3D ConvNets.

>>> import lean3d
>>> net = lean3d.create_model("c3d_light", num_classes=10, width=0.25)       # a fresh net: an `nn.Module`
>>> lean3d.load_model("runs/mine").predict("clip.mp4").overall.labels        # doctest: +SKIP

What stands in `__all__` is the public face; everything else may move between versions. PyTorch is loaded when the first
of these names is used, so that `import lean3d` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lean3d.errors import Lean3dError
from lean3d.version import __version__

if TYPE_CHECKING:
    from lean3d.models import create_model, list_models
    from lean3d.predict import Prediction, VideoPrediction, load_model

__all__ = [
    "Lean3dError",
    "Prediction",
    "VideoPrediction",
    "__version__",
    "create_model",
    "list_models",
    "load_model",
]

_HOMES = {
    "Prediction": "lean3d.predict",
    "VideoPrediction": "lean3d.predict",
    "create_model": "lean3d.models",
    "list_models": "lean3d.models",
    "load_model": "lean3d.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lean3d' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
