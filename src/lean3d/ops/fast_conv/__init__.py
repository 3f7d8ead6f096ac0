"""3D convolution by the fast algorithm F(m, r) of Winograd, axis by axis."""

from lean3d.ops.fast_conv.op import (
    auto_tile,
    choose_backend,
    fast_conv3d,
    prepare_weight,
    resolve_tile,
)
from lean3d.ops.fast_conv.reference import fast_conv3d_reference
from lean3d.ops.fast_conv.transforms import Transform, cook_toom

__all__ = [
    "Transform",
    "auto_tile",
    "choose_backend",
    "cook_toom",
    "fast_conv3d",
    "fast_conv3d_reference",
    "prepare_weight",
    "resolve_tile",
]
