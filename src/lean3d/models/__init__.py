"""The zoo. One file a family, one decorated function a model; importing a family's file registers its models."""

from lean3d.models import c3d, csn, i3d, light, non_local, r3d, resnet3d, slowfast, smallbig, tsm, x3d  # noqa: F401
from lean3d.models.cost import Cost, LayerCost, cost
from lean3d.models.registry import (
    VideoNet,
    create_model,
    list_models,
    model_arguments,
    model_from_config,
    model_from_spec,
    model_summary,
    register_model,
)
from lean3d.models.streaming import NetStream
from lean3d.models.weights_2d import LoadReport, load_2d_weights
from lean3d.models.weights_pytorchvideo import from_pytorchvideo

__all__ = [
    "Cost",
    "LayerCost",
    "LoadReport",
    "NetStream",
    "VideoNet",
    "cost",
    "create_model",
    "from_pytorchvideo",
    "list_models",
    "load_2d_weights",
    "model_arguments",
    "model_from_config",
    "model_from_spec",
    "model_summary",
    "register_model",
]
