"""A compiler for inference on a CPU: `compile(model, example)` gives the same function, fast.

net -> trace -> passes -> choose (measure, cache) -> plan
       graph    fold,     an algorithm for          packed weights, one piece of memory, a flat row of steps
                fuse      each operation

`compile_stream(net.stream())` is the same for a net's step on a stream.
"""

from lean3d.fast.compiler import CompiledModel, compile, device
from lean3d.fast.streaming import FastStream, compile_stream

__all__ = ["CompiledModel", "FastStream", "compile", "compile_stream", "device"]
