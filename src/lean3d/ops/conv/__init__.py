"""3D convolution, with the kernels that a light 3D ConvNet is made of in forms that PyTorch serves well."""

from lean3d.ops.conv.op import conv3d
from lean3d.ops.conv.reference import conv3d_reference

__all__ = ["conv3d", "conv3d_reference"]
