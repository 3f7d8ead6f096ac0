"""3D convolution by the fast algorithm F(m, r) of Winograd, axis by axis."""

from lean3d.ops.fast_conv.transforms import Transform, cook_toom

__all__ = ["Transform", "cook_toom"]
