"""The same pooling, axis by axis and with channels innermost in memory.

`max_pool3d` on a contiguous tensor runs at about 1 % of the speed of a copy. The native kernel (cpu.cpp) needs two to
three copies' time, forward; backward each input collects from the windows that chose it. Without it, in plain PyTorch:

    a gradient, a stride    `max_pool3d` in `torch.channels_last_3d`, whose inner loop over channels is vectorised
    else                    one axis after another, each a maximum over shifted slices: k + k + k taps for k * k * k
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.reference import Mode, Window, check_window, pool3d_reference

MOST_PLACES = 1 << 16
"""Windows with more places than this have a gradient in plain PyTorch only."""


def pool3d(x: Tensor, window: Window, mode: Mode = "max") -> Tensor:
    """Pooling at stride 1, equal to `pool3d_reference` to the bit for maxima, gradients and ties included.

    Args:
        x: `(N, C, T, H, W)`; NaN wins a maximum, as in torch.
        window: odd sizes in time, height, width; None for a whole axis, which then has length 1 in the result.
        mode: "max" or "average".

    Raises:
        ConfigError: A window with even sizes.
    """
    check_window(window, mode)
    if mode == "max" and native.takes(x):
        kernel = tuple(size if k is None else k for k, size in zip(window, x.shape[2:], strict=True))
        padding = tuple(0 if k is None else k // 2 for k in window)
        return max_pool3d(x, kernel, padding=padding)  # type: ignore[arg-type]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if mode == "average" or (x.requires_grad and torch.is_grad_enabled()):
        return pool3d_reference(x, window, mode)
    for dim, k in zip((2, 3, 4), window, strict=True):  # whole axes shrink x: they come first
        if k is None:
            x = x.amax(dim, keepdim=True)
    for dim, k in zip((2, 3, 4), window, strict=True):
        if k is not None:
            x = _max_along(x, dim, k // 2)
    return x


def max_pool3d(
    x: Tensor,
    window: Triple,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    *,
    ceil_mode: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.max_pool3d`, equal to the bit, gradients, ties and NaN included.

    Args:
        x: `(N, C, T, H, W)`; copied where it is not in `torch.channels_last_3d`.
        window, stride, padding: in time, height, width; padding at most half the window, with what never wins.
        ceil_mode: whether a last window that is not whole counts.
        out: where the result goes: of its shape, in `torch.channels_last_3d`. Not where a gradient is wanted.

    Returns:
        `(N, C, T', H', W')`, in `torch.channels_last_3d`.

    Raises:
        ConfigError: The window doesn't fit, or `out` is not like the result.
    """
    if not native.takes(x, out):
        native.ran("max_pool3d", "torch")
        x = x.contiguous(memory_format=torch.channels_last_3d)
        y = F.max_pool3d(x, window, stride, padding, ceil_mode=ceil_mode)
        return y if out is None else out.copy_(y)
    native.ran("max_pool3d", "native")
    if x.requires_grad and torch.is_grad_enabled() and math.prod(window) <= MOST_PLACES:
        return _max_pool3d_with_places(x, list(window), list(stride), list(padding), ceil_mode)[0]
    if out is None:
        return _max_pool3d(x, list(window), list(stride), list(padding), ceil_mode)
    _forward(x, window, stride, padding, ceil_mode, out, None)
    return out


def _max_along(x: Tensor, dim: int, radius: int) -> Tensor:
    """Maximum over `2 * radius + 1` places along one axis: `radius` times the maximum over three neighbours."""
    n = x.shape[dim]
    for _ in range(min(radius, n - 1)):
        y = torch.empty_like(x)
        first, last = y.narrow(dim, 0, n - 1), y.narrow(dim, 1, n - 1)
        torch.maximum(x.narrow(dim, 0, n - 1), x.narrow(dim, 1, n - 1), out=first)
        y.select(dim, n - 1).copy_(x.select(dim, n - 1))
        torch.maximum(last, x.narrow(dim, 0, n - 1), out=last)
        x = y
    return x


# ---- the native kernel, as operators of PyTorch's: torch.compile keeps them whole, autograd knows their gradient


def _out_shape(x: Tensor, window: Any, stride: Any, padding: Any, ceil_mode: bool) -> tuple[int, ...]:
    sizes = []
    for n, k, s, p in zip(x.shape[2:], window, stride, padding, strict=True):
        if not (0 <= p <= k // 2 and s > 0):
            raise ConfigError(
                f"a pooling's stride is positive and its padding at most half its window; got {(k, s, p)}"
            )
        size = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (size - 1) * s >= n + p:  # the last window has to begin inside
            size -= 1
        if size < 1:
            raise ConfigError(f"a pooling window of {tuple(window)} doesn't fit into {tuple(x.shape[2:])}")
        sizes.append(size)
    return (*x.shape[:2], *sizes)


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)


def _axes(x: Any, y: Any, window: Any, stride: Any, padding: Any) -> list[tuple[int, ...]]:
    return list(zip(x[2:], y[2:], window, stride, padding, strict=True))


def _forward(
    x: Tensor, window: Any, stride: Any, padding: Any, ceil_mode: bool, out: Tensor | None, place: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    shape = _out_shape(x, window, stride, padding, ceil_mode)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if out is None:
        out = _empty(x, shape, x.dtype)
    elif out.shape != shape or not out.is_contiguous(memory_format=torch.channels_last_3d):
        raise ConfigError(f"out must be {shape} in torch.channels_last_3d, got {tuple(out.shape)}, {out.stride()}")
    places = None if place is None else _empty(x, shape, place)
    native.kernels().max_pool(
        *x.shape[:2],
        *_axes(x.shape, shape, window, stride, padding),
        *map(native.address, (x, out, places)),
        0 if places is None else places.itemsize,
        torch.get_num_threads(),
    )
    return out, places


def _place_type(window: Any) -> torch.dtype:
    return torch.uint8 if math.prod(window) <= 256 else torch.uint16


@torch.library.custom_op("lean3d::max_pool3d", mutates_args=(), device_types="cpu")
def _max_pool3d(x: Tensor, window: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> Tensor:
    return _forward(x, window, stride, padding, ceil_mode, None, None)[0]


@_max_pool3d.register_fake
def _(x: Tensor, window: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> Tensor:
    return _empty(x, _out_shape(x, window, stride, padding, ceil_mode), x.dtype)


@torch.library.custom_op("lean3d::max_pool3d_with_places", mutates_args=(), device_types="cpu")
def _max_pool3d_with_places(
    x: Tensor, window: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """The result, and for each of its places that of its maximum in the window."""
    y, places = _forward(x, window, stride, padding, ceil_mode, None, _place_type(window))
    assert places is not None
    return y, places


@_max_pool3d_with_places.register_fake
def _(x: Tensor, window: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    shape = _out_shape(x, window, stride, padding, ceil_mode)
    return _empty(x, shape, x.dtype), _empty(x, shape, _place_type(window))


@torch.library.custom_op("lean3d::max_pool3d_backward", mutates_args=(), device_types="cpu")
def _max_pool3d_backward(
    gradient: Tensor, places: Tensor, size: list[int], window: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """The gradient of the input, `size` in time, height, width."""
    gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
    dx = _empty(gradient, (*gradient.shape[:2], *size), gradient.dtype)
    native.kernels().max_pool_backward(
        *gradient.shape[:2],
        *_axes(dx.shape, gradient.shape, window, stride, padding),
        *map(native.address, (gradient, places)),
        places.itemsize,
        native.address(dx),
        torch.get_num_threads(),
    )
    return dx


@_max_pool3d_backward.register_fake
def _(
    gradient: Tensor, places: Tensor, size: list[int], window: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return _empty(gradient, (*gradient.shape[:2], *size), gradient.dtype)


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.settings, _ = inputs
    ctx.size = list(x.shape[2:])
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_gradient(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    return _max_pool3d_backward(gradient, places, ctx.size, *ctx.settings), None, None, None, None


_max_pool3d_with_places.register_autograd(_pool_gradient, setup_context=_keep_places)
