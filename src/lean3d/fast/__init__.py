"""A compiler for inference on a CPU: `compile(model, example)` gives the same function, fast.

net -> trace -> passes -> choose (measure, cache) -> plan
       graph    fold,     an algorithm for          packed weights, one piece of memory, a flat row of steps
                fuse      each operation
"""

from lean3d.fast.compiler import CompiledModel, compile, device

__all__ = ["CompiledModel", "compile", "device"]
