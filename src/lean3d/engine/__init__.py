"""Training: the only room that knows about devices and ranks."""

from lean3d.engine.loop import FitResult, fit
from lean3d.engine.stop import Interrupted

__all__ = ["FitResult", "Interrupted", "fit"]
