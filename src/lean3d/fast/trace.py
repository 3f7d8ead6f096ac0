"""A net run once on tensors without numbers, and written down as a `Graph`.

The net runs on the meta device under a `TorchFunctionMode`, which sees every function of torch that it calls. So all of
Python works in it: conditions on shapes, loops, unpacking. Layers whose meaning is known are written down as one
operation; what is not known is written down as the call that it is, and later made as it is.

What can't be written down as a row of calls (a branch on numbers, random numbers, writing into a part of a tensor)
makes the module around it one call: it runs as it is, inside of a net that else is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lean3d.blocks import CausalConv3d, Conv3d, FastConv3d, Pool3d, TemporalResidualGradient
from lean3d.blocks.stem import SpatialMaxPool, TemporalMaxPool
from lean3d.blocks.streaming import sliding_max
from lean3d.errors import ConfigError
from lean3d.fast.clock import clock
from lean3d.fast.graph import Affine, Call, Concat, Conv, Elementwise, Gradient, Graph, MaxPool, Op, Value
from lean3d.models.c3d import ShrinkPool
from lean3d.ops.conv.reference import Triple

CONVOLUTIONS: list[Any] = [nn.Conv3d.forward, Conv3d.forward, FastConv3d.forward]
"""The forwards that compute what `torch.nn.Conv3d` does."""

RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "poisson", "exponential")
"""Parts of the names of functions whose result is another one each time."""

PURE_IN_PLACE = {"add_": torch.add, "mul_": torch.mul, "sub_": torch.sub, "div_": torch.div}
PURE_IN_PLACE |= {
    f"__i{name}__": function
    for name, function in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub), ("truediv", torch.div))
}
PURE_IN_PLACE |= {"relu_": torch.relu, "sigmoid_": torch.sigmoid}
"""Functions that write into their first argument, and those that don't and else do the same."""

ASKS = {
    *("__get__", "__len__", "__hash__", "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "storage_offset", "has_names"),
}
"""What may be asked of a tensor without seeing its numbers."""

Emit = Callable[["_Recorder", Any, Sequence[Any]], Any]


class _OpaqueError(Exception):
    """The module of this name has to run as it is."""

    def __init__(self, module: str):
        self.module = module


def trace(model: nn.Module, example: Sequence[Tensor]) -> Graph:
    """Write down what a net does with tensors of these shapes.

    Args:
        model: in eval mode.
        example: the tensors that it takes.

    Raises:
        ConfigError: Some part of the net is in training mode, or the net doesn't take these tensors.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ConfigError(f"{name or 'the model'} is in training mode: call model.eval() before fast.compile")
    opaque: set[str] = set()
    while "" not in opaque:
        try:
            return _Recorder(model, opaque).run(example)
        except _OpaqueError as error:
            opaque.add(error.module)
        except (RuntimeError, NotImplementedError):  # something that the meta device can't do
            break
    with torch.no_grad():  # a net that tells all its mistakes itself
        result = model(*example)
    inputs = [Value(tuple(x.shape), x.dtype) for x in example]
    result = tree_map_only(Tensor, lambda y: Value(tuple(y.shape), y.dtype), result)
    graph = Graph(inputs, [], result, [""], frozenset(opaque | {""}))
    graph.ops.append(Call(inputs, graph.results(), model, tuple(inputs), {}, type(model).__name__, sources=[0]))
    return graph


class Stopwatch(TorchFunctionMode):
    """The seconds of each event of a net's run, as `Graph.events` counts them.

    Args:
        model: the net; run it inside of the context.
        graph: what `trace` gave.
    """

    def __init__(self, model: nn.Module, graph: Graph):
        super().__init__()
        self.seconds: list[float] = []
        self._model, self._opaque = model, graph.opaque
        self._inside, self._begin, self._now = 0, 0.0, clock()
        self._handles: list[Any] = []

    def __enter__(self) -> Stopwatch:
        for name, module in self._model.named_modules():
            if name in self._opaque or _is_leaf(module):
                self._handles.append(module.register_forward_pre_hook(self._before, prepend=True))
                self._handles.append(module.register_forward_hook(self._after))
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*problem)

    def _before(self, *_: Any) -> None:
        self._inside += 1
        if self._inside == 1:
            self._begin = self._now()

    def _after(self, *_: Any) -> None:
        self._inside -= 1
        if not self._inside:
            self.seconds.append(self._now() - self._begin)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        begin = self._now()
        output = func(*args, **(kwargs or {}))
        self.seconds.append(self._now() - begin)
        return output


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, opaque: set[str]):
        super().__init__()
        self.model, self.opaque = model, opaque
        self.values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # stand-in -> Value
        self.constants: dict[int, Tensor] = {}  # id of a stand-in -> what it stands for
        self.kept: list[Tensor] = []  # stand-ins of constants, so that their ids stay theirs
        self.ops: list[Op] = []
        self.events: list[str] = []
        self.path: list[str] = [""]
        self.inside = 0  # modules around that are written down as one

    # ---- the run

    def run(self, example: Sequence[Tensor]) -> Graph:
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        opaque = tuple(f"{name}." for name in self.opaque)
        stand_ins = {name: self._stand_in(x) for name, x in state.items() if not name.startswith(opaque)}
        args = [torch.empty_like(x, device="meta") for x in example]
        inputs = [self._new_value(x) for x in args]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            for name in self.opaque:
                module = self.model.get_submodule(name)
                forward = module.forward
                module.__dict__["forward"] = self._for_real(forward)
                stack.callback(_restore, module, forward)
            stack.enter_context(self)
            result = torch.func.functional_call(self.model, stand_ins, tuple(args))
        result = tree_map_only(Tensor, self._value_of, result)
        graph = Graph(inputs, self.ops, result, self.events, frozenset(self.opaque))
        graph.drop_unused()
        return graph

    def _stand_in(self, tensor: Tensor) -> Tensor:
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        self.constants[id(meta)] = tensor.detach()
        self.kept.append(meta)
        return meta

    def _for_real(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What is not understood may look at numbers: it runs on some, with its own weights, to learn its shapes."""

        def real(x: Tensor) -> Tensor:
            known = self.constants.get(id(x))
            if known is not None or not x.is_meta:
                return x if known is None else known
            return torch.randn(x.shape, dtype=x.dtype) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
            return tree_map_only(Tensor, lambda y: torch.empty_like(y, device="meta"), forward(*args, **kwargs))

        return run

    def _hooks(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            leaf = name in self.opaque or _is_leaf(module)
            yield module.register_forward_pre_hook(self._before(name, leaf), with_kwargs=True, prepend=True)
            yield module.register_forward_hook(self._after(leaf), with_kwargs=True)

    def _before(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.path.append(name)
            self.inside += leaf

        return hook

    def _after(self, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self.inside -= leaf
            if leaf and not self.inside:
                self.events.append(self.path[-1])
                with self.paused():
                    output = self._module(module, args, kwargs, output)
            self.path.pop()
            return output

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        self.events.append(self.path[-1])
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        depends = any(x in self.values for x in tensors)
        if any(part in name for part in RANDOM) and kwargs.get("training", name != "dropout"):
            raise _OpaqueError(self.path[-1])
        if not depends:
            return self._constant(func, args, kwargs, tensors)
        if func in (Tensor.__setitem__, Tensor.copy_) or "out" in kwargs:
            raise _OpaqueError(self.path[-1])
        in_place = name if name in PURE_IN_PLACE else "relu_" if name == "relu" and kwargs.get("inplace") else ""
        if in_place:
            return self._in_place(PURE_IN_PLACE[in_place], args, kwargs)
        if (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True:
            raise _OpaqueError(self.path[-1])
        try:
            output = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
                raise _OpaqueError(self.path[-1]) from None
            raise
        if not any(isinstance(y, Tensor) for y in tree_flatten(output)[0]):
            if name not in ASKS:
                raise _OpaqueError(self.path[-1])
            return output
        emit = _FUNCTIONS.get(func)
        if emit is not None:
            value = emit(self, _bound(func, args, kwargs), [output])
            if value is not None:
                return self._bind(output, value)
        return self._call(func, resolve_name(func) or name, args, kwargs, output)

    # ---- writing down

    def emit(self, op: Op) -> Value:
        """Append an operation with one output."""
        op.sources.append(len(self.events) - 1)
        self.ops.append(op)
        return op.output

    def value(self, x: Any) -> Value | None:
        """What a tensor stands for; None for what does not depend on the input."""
        return self.values.get(x) if isinstance(x, Tensor) else None

    def constant(self, x: Any) -> Tensor | None:
        """The numbers of a tensor that does not depend on the input; None for other things."""
        if not isinstance(x, Tensor) or x in self.values:
            return None
        return self.constants.get(id(x), None if x.is_meta else x)

    def _new_value(self, x: Tensor) -> Value:
        value = self.values[x] = Value(tuple(x.shape), x.dtype)
        return value

    def _value_of(self, x: Tensor) -> Value:
        if x not in self.values:
            raise ConfigError("the net returns a tensor that doesn't depend on its input: there is nothing to compile")
        return self.values[x]

    def _bind(self, output: Tensor, value: Value) -> Tensor:
        self.values[output] = value
        return output

    def _module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hooked = len(module._forward_hooks) + len(module._forward_pre_hooks) > 2  # more than ours
        emit = None if hooked or self.path[-1] in self.opaque else _MODULES.get(type(module))
        if emit is not None and len(args) == 1 and not kwargs and self.value(args[0]) is not None:
            value = emit(self, module, [args[0], output])
            if value is not None:
                return self._rebind(output, value) if output is args[0] else self._bind(output, value)
        return self._call(module, type(module).__name__, args, kwargs, output)

    def _call(self, function: Any, name: str, args: Any, kwargs: Any, output: Any) -> Any:
        inputs: list[Value] = []

        def to_value(x: Tensor) -> Any:
            value = self.values.get(x)
            if value is not None:
                inputs.append(value)
                return value
            constant = self.constant(x)
            if constant is None:
                raise _OpaqueError(self.path[-1])
            return constant.detach().clone()

        args, kwargs = tree_map_only(Tensor, to_value, (args, kwargs))
        # the result may be, or share memory with, an argument: as tensors of their own they get their own values
        output = tree_map_only(Tensor, lambda y: y.view_as(y) if y in self.values else y, output)
        outputs = [self._new_value(y) for y in tree_flatten(output)[0] if isinstance(y, Tensor)]
        self.ops.append(Call(inputs, outputs, function, args, kwargs, name, sources=[len(self.events) - 1]))
        return output

    def _in_place(self, pure: Any, args: Any, kwargs: Any) -> Tensor:
        target = args[0]
        value = self.values.get(target)
        if value is None or kwargs.keys() - {"inplace"}:
            raise _OpaqueError(self.path[-1])
        with self.paused():
            output = pure(*args)
        if output.shape != target.shape or output.dtype != target.dtype:
            raise _OpaqueError(self.path[-1])
        emit = _FUNCTIONS.get(pure)
        new = emit(self, list(args), [output]) if emit else None
        if new is None:
            result = self._call(pure, pure.__name__, args, {}, output)
            new = self.values[result]
        return self._rebind(target, new)

    def _rebind(self, target: Tensor, value: Value) -> Tensor:
        """Let a tensor that was written into stand for its new numbers; nobody else may see the old ones' memory."""
        if self.values[target] is value:
            return target
        storage = target.untyped_storage()._cdata
        if any(x is not target and x.untyped_storage()._cdata == storage for x in list(self.values)):
            raise _OpaqueError(self.path[-1])
        self.values[target] = value
        return target

    def _constant(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A function of constants: done with their numbers too."""
        output = func(*args, **kwargs)
        if not any(isinstance(y, Tensor) for y in tree_flatten(output)[0]):
            return output
        if any(self.constant(x) is None for x in tensors):
            raise _OpaqueError(self.path[-1])
        device = {"device": torch.device("cpu")} if "device" in kwargs and kwargs["device"] is not None else {}
        real_args, real_kwargs = tree_map_only(Tensor, self.constant, (args, {**kwargs, **device}))
        real = func(*real_args, **real_kwargs)
        for stand_in, number in zip(tree_flatten(output)[0], tree_flatten(real)[0], strict=True):
            if isinstance(stand_in, Tensor) and stand_in.is_meta:
                self.constants[id(stand_in)] = number
                self.kept.append(stand_in)
        return output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Functions called here are not written down."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def _restore(module: nn.Module, forward: Any) -> None:
    del module.__dict__["forward"]
    if module.forward != forward:  # it was the instance's own
        module.__dict__["forward"] = forward


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is written down as one: it is PyTorch's, or known, with nothing hooked on."""
    home = type(module).__module__
    if home.startswith("torch.nn.") and not home.startswith("torch.nn.utils"):
        return not isinstance(module, _CONTAINERS)
    return type(module) in _MODULES and not (module._forward_hooks or module._forward_pre_hooks)


def _bound(func: Any, args: Any, kwargs: Any) -> Any:
    """Positional arguments, with keywords behind them in a dictionary where there are some."""
    return [*args, kwargs] if kwargs else list(args)


# ---- modules whose meaning is known: (recorder, module, [input, output]) -> value


def _conv(recorder: _Recorder, module: nn.Conv3d, tensors: Sequence[Any]) -> Value | None:
    x, y = recorder.value(tensors[0]), tensors[1]
    weight = recorder.constant(module.weight)
    bias = recorder.constant(module.bias)
    if (
        x is None
        or weight is None
        or (module.bias is not None and bias is None)
        or type(module).forward not in CONVOLUTIONS
    ):
        return None
    padding = _symmetric(module.padding, module.kernel_size, module.dilation)
    if padding is None or module.padding_mode != "zeros":
        return None
    return _emit_conv(recorder, x, y, weight, bias, module.stride, padding, module.dilation, module.groups)


def _causal_conv(recorder: _Recorder, module: CausalConv3d, tensors: Sequence[Any]) -> Value | None:
    """With frames of zeros before the first, where that isn't what a convolution pads with."""
    x, weight = recorder.value(tensors[0]), recorder.constant(module.weight)
    if x is None or weight is None or type(module).forward is not CausalConv3d.forward:
        return None
    if tuple(module.dilation) != (1, 1, 1) or len(x.shape) != 5 or x.dtype != torch.float32:
        return None
    before, behind = module.time_padding()
    padding = module.padding
    if before != behind:
        n, c, t, h, w = x.shape
        padded = Value((n, c, before + t + behind, h, w), x.dtype)
        where = (0, 0, 0, 0, before, behind)
        source = len(recorder.events) - 1
        recorder.ops.append(Call([x], [padded], F.pad, (x, where), {}, "torch.nn.functional.pad", sources=[source]))
        x, padding = padded, (0, *module.padding[1:])  # type: ignore[assignment]
    bias = recorder.constant(module.bias)
    return _emit_conv(recorder, x, tensors[1], weight, bias, module.stride, padding, module.dilation, module.groups)


def _emit_conv(
    recorder: _Recorder,
    x: Value,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Value | None:
    if tuple(dilation) != (1, 1, 1) or len(x.shape) != 5 or x.dtype != torch.float32:
        return None
    out = Value(tuple(y.shape), y.dtype)
    bias = None if bias is None else bias.clone()
    return recorder.emit(Conv([x], [out], weight, bias, tuple(stride), tuple(padding), groups))


def _symmetric(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Triple | None:
    if padding == "valid":
        return (0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return None if any(n % 2 for n in total) else (total[0] // 2, total[1] // 2, total[2] // 2)
    return tuple(padding)  # type: ignore[return-value]


def _batch_norm(recorder: _Recorder, module: nn.BatchNorm3d, tensors: Sequence[Any]) -> Value | None:
    x = recorder.value(tensors[0])
    mean, var = recorder.constant(module.running_mean), recorder.constant(module.running_var)
    if x is None or mean is None or var is None or x.dtype != torch.float32:
        return None
    scale = (var.double() + module.eps).rsqrt()
    shift = -mean.double() * scale
    weight, bias = recorder.constant(module.weight), recorder.constant(module.bias)
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    if bias is not None:
        shift = shift + bias.double()
    return recorder.emit(Affine([x], [Value(x.shape, x.dtype)], scale, shift))


def _linear(recorder: _Recorder, module: nn.Linear, tensors: Sequence[Any]) -> Value | None:
    x, weight, bias = (recorder.value(tensors[0]), *map(recorder.constant, (module.weight, module.bias)))
    if x is None or weight is None or (module.bias is not None and bias is None):
        return None
    args = (x, weight.clone(), None if bias is None else bias.clone())
    out = Value(tuple(tensors[1].shape), tensors[1].dtype)
    return recorder.emit(Call([x], [out], F.linear, args, {}, "Linear"))


def _same(recorder: _Recorder, module: Any, tensors: Sequence[Any]) -> Value | None:
    return recorder.value(tensors[0])


def _elementwise(function: str) -> Emit:
    def emit(recorder: _Recorder, module: Any, tensors: Sequence[Any]) -> Value | None:
        x = recorder.value(tensors[0])
        return None if x is None else recorder.emit(Elementwise([x], [Value(x.shape, x.dtype)], function))

    return emit


def _pool(recorder: _Recorder, module: Pool3d, tensors: Sequence[Any]) -> Value | None:
    x = recorder.value(tensors[0])
    if x is None or module.mode != "max":
        return None
    window, (t, h, w) = module.window, (0 if k is None else k // 2 for k in module.window)
    out = Value(tuple(tensors[1].shape), x.dtype)
    if module.horizon is None:
        return recorder.emit(MaxPool([x], [out], window, (1, 1, 1), (t, h, w)))
    if window[1:] != (1, 1):
        plane = Value((*x.shape[:3], *out.shape[3:]), x.dtype)
        x = recorder.emit(MaxPool([x], [plane], (1, *window[1:]), (1, 1, 1), (0, h, w)))
    return recorder.emit(Call([x], [out], sliding_max, (x, module.horizon), {}, "sliding_max"))


def _shrinking(recorder: _Recorder, module: nn.Module, tensors: Sequence[Any]) -> Value | None:
    x, y = recorder.value(tensors[0]), tensors[1]
    if x is None:
        return None
    kernel: Triple
    if isinstance(module, SpatialMaxPool):
        kernel, stride, padding = (1, 3, 3), (1, 2, 2), (0, 1, 1)
    else:
        kernel = (2, 1, 1) if isinstance(module, TemporalMaxPool) else module.window  # type: ignore[assignment]
        stride, padding = kernel, (0, 0, 0)
    return recorder.emit(MaxPool([x], [Value(tuple(y.shape), y.dtype)], kernel, stride, padding))


def _gradient(recorder: _Recorder, module: TemporalResidualGradient, tensors: Sequence[Any]) -> Value | None:
    x, y = recorder.value(tensors[0]), tensors[1]
    of_clip = module.horizon is None or (module.waits and x is not None and x.shape[2] <= module.horizon)
    if x is None or x.dtype != torch.float32 or not of_clip:
        return None
    out = Value(tuple(y.shape), y.dtype)
    return recorder.emit(Gradient([x], [out], module.order == "mean_first", module.beside))


_MODULES: dict[type, Any] = {
    nn.Conv3d: _conv,
    Conv3d: _conv,
    CausalConv3d: _causal_conv,
    FastConv3d: _conv,
    nn.BatchNorm3d: _batch_norm,
    nn.Linear: _linear,
    nn.ReLU: _elementwise("relu"),
    nn.SiLU: _elementwise("silu"),
    nn.Sigmoid: _elementwise("sigmoid"),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout3d: _same,
    Pool3d: _pool,
    TemporalResidualGradient: _gradient,
    **dict.fromkeys((SpatialMaxPool, TemporalMaxPool, ShrinkPool), _shrinking),
}


# ---- functions whose meaning is known: (recorder, arguments, [output]) -> value, or None where this call is another


def _unary(function: str) -> Emit:
    def emit(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
        x = recorder.value(args[0])
        return None if x is None else recorder.emit(Elementwise([x], [Value(x.shape, x.dtype)], function))

    return emit


def _binary(function: str) -> Emit:
    def emit(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
        values = [recorder.value(x) for x in args]
        if len(values) != 2 or values[0] is None or values[1] is None or values[0].dtype != values[1].dtype:
            return None
        out = Value(tuple(outputs[0].shape), outputs[0].dtype)
        return recorder.emit(Elementwise([values[0], values[1]], [out], function))

    return emit


def _contiguous(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
    x = recorder.value(args[0])
    return x if x is not None and len(x.shape) == 5 else None


def _concat(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
    tensors, *rest = args
    dim = rest[0] if rest else 0
    values = [recorder.value(x) for x in tensors]
    if dim in (1, {"dim": 1}) and all(v is not None and len(v.shape) == 5 for v in values):
        return recorder.emit(Concat(values, [Value(tuple(outputs[0].shape), outputs[0].dtype)]))  # type: ignore[arg-type]
    return None


def _functional_conv(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = (
        dict(zip(names, args, strict=False))
        if not isinstance(args[-1], dict)
        else {**dict(zip(names, args[:-1], strict=False)), **args[-1]}
    )
    x, weight, bias = recorder.value(given["input"]), recorder.constant(given["weight"]), given.get("bias")
    if x is None or weight is None or (bias is not None and recorder.constant(bias) is None):
        return None
    stride, padding, dilation = (
        (v,) * 3 if isinstance(v, int) else v
        for v in (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
    )
    padding = _symmetric(padding, weight.shape[2:], dilation)
    if padding is None:
        return None
    groups = given.get("groups", 1)
    return _emit_conv(recorder, x, outputs[0], weight, recorder.constant(bias), stride, padding, dilation, groups)


def _functional_max_pool(recorder: _Recorder, args: Any, outputs: Sequence[Any]) -> Value | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    plain, extra = (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})
    given = {**dict(zip(names, plain, strict=False)), **extra}
    x = recorder.value(given["input"])
    if x is None or len(x.shape) != 5 or given.get("return_indices") or given.get("dilation", 1) not in (1, (1, 1, 1)):
        return None
    kernel = _triple(given["kernel_size"])
    stride = _triple(given.get("stride") or kernel)
    out = Value(tuple(outputs[0].shape), outputs[0].dtype)
    return recorder.emit(MaxPool([x], [out], kernel, stride, _triple(given.get("padding", 0))))


def _triple(value: Any) -> Triple:
    return (value, value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


_FUNCTIONS: dict[Any, Emit] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _unary("relu")),
    **dict.fromkeys((F.silu,), _unary("silu")),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _unary("sigmoid")),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _binary("add")),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _binary("mul")),
    Tensor.contiguous: _contiguous,
    torch.cat: _concat,
    **dict.fromkeys((F.conv3d, torch.conv3d), _functional_conv),
    F.max_pool3d: _functional_max_pool,
}
