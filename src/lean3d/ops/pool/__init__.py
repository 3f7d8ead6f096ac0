"""3D pooling at stride 1: the big view of the SmallBig unit."""

from lean3d.ops.pool.op import pool3d
from lean3d.ops.pool.reference import pool3d_reference

__all__ = ["pool3d", "pool3d_reference"]
