"""3D pooling: the big view of the SmallBig unit, and what makes activations smaller."""

from lean3d.ops.pool.op import max_pool3d, pool3d
from lean3d.ops.pool.reference import pool3d_reference

__all__ = ["max_pool3d", "pool3d", "pool3d_reference"]
