"""lean3d: video recognition with light 3D ConvNets."""

from lean3d.version import __version__

__all__ = ["__version__"]
