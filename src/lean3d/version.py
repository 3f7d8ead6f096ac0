"""The version of lean3d, in one place."""

__version__ = "0.1.0"
