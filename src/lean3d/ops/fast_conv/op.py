"""The operator `lean3d::fast_conv3d`, its gradients, and the backends that compute it.

All derivatives are fast convolutions themselves, of any order:

    of the input    a fast convolution of the gradient with the flipped weight      lean3d::fast_conv3d
    of the weight   a sum over tiles in the transformed domain                      lean3d::fast_conv3d_weight_gradient

and those of the latter are a fast convolution and its input's gradient. Nothing is kept for the backward pass but the
input and the weight: the transformed ones are several times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lean3d.errors import BackendError, ConfigError
from lean3d.ops import native
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fast_conv import native as kernels
from lean3d.ops.fast_conv.reference import (
    output_size,
    transform_weight,
    transformed_conv3d,
    weight_gradient_reference,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 2**26
"""Numbers in the transformed domain that the torch backend holds at a time; a batch that needs more is cut."""

Convolve = Callable[
    [Tensor, Tensor, Tensor | None, Sequence[int], Sequence[int], Sequence[int], Sequence[int], int], Tensor
]


@dataclass(frozen=True)
class Backend:
    """One way to compute the convolution."""

    absence: Callable[[], str]
    """Why it can't run in this installation; empty where it can."""
    accepts: Callable[[Tensor, Tensor, Sequence[int], int], bool]
    """Whether it computes this x, weight, tile and groups."""
    prepare: Callable[[Tensor, Sequence[int], int], Tensor]
    """weight, tile, groups -> the transformed weights, laid out as `convolve` wants them."""
    convolve: Convolve
    """x, prepared weights, bias, outputs, the weight's shape, tile, padding, groups -> y, a new tensor in
    `torch.channels_last_3d` and x's dtype."""


def _torch_convolve(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    outputs: Sequence[int],
    weight_shape: Sequence[int],
    tile: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`transformed_conv3d`, some clips at a time."""
    kernel = weight_shape[2:]
    at_once = _clips_at_once(outputs, kernel, tile, x.shape[1] + weight_shape[0])
    parts = [
        transformed_conv3d(part.to(u.dtype), u, outputs, kernel, tile, padding, groups) for part in x.split(at_once)
    ]
    y = torch.cat(parts)
    out = torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    return out.copy_(y if bias is None else y + bias.to(y.dtype)[:, None, None, None])


def _native_convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: Sequence[int],
    weight_shape: Sequence[int],
    tile: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    (pt, ph, pw), (mt, mh, mw) = padding, tile
    return kernels.PackedFastConv(packed, weight_shape, bias, (pt, ph, pw), (mt, mh, mw))(x)


def _clips_at_once(outputs: Sequence[int], kernel: Sequence[int], tile: Sequence[int], channels: int) -> int:
    return max(1, CHUNK // (_transformed_size(outputs, kernel, tile) * channels))


def _transformed_size(outputs: Sequence[int], kernel: Sequence[int], tile: Sequence[int]) -> int:
    """Numbers of one channel of one clip in the transformed domain; also, multiplications for one channel pair."""
    return math.prod(-(-size // m) * (m + r - 1) for size, r, m in zip(outputs, kernel, tile, strict=True))


BACKENDS: dict[str, Backend] = {
    "native": Backend(
        absence=native.absence,
        accepts=lambda x, weight, tile, groups: (
            native.takes(x, weight) and groups == 1 and kernels.takes_tile(weight.shape[2:], tile)
        ),
        prepare=lambda weight, tile, groups: kernels.pack_weight(weight, tile),
        convolve=_native_convolve,
    ),
    "torch": Backend(
        absence=lambda: "",
        accepts=lambda x, weight, tile, groups: True,
        prepare=lambda weight, tile, groups: transform_weight(weight.to(_working_dtype(weight)), tile),
        convolve=_torch_convolve,
    ),
}
"""All backends, the one to prefer first. This is the place where another one joins."""


def choose_backend(backend: str, x: Tensor, weight: Tensor, tile: Sequence[int], groups: int) -> str:
    """The backend that computes this convolution.

    Args:
        backend: "auto" for the first that can, or a name in `BACKENDS`.
        x, weight, tile, groups: as in `fast_conv3d`.

    Raises:
        ConfigError: An unknown backend.
        BackendError: One that can't run here or can't compute this.
    """
    if backend == "auto":
        return next(name for name, b in BACKENDS.items() if not b.absence() and b.accepts(x, weight, tile, groups))
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    reason = BACKENDS[backend].absence()
    if not reason and not BACKENDS[backend].accepts(x, weight, tile, groups):
        reason = (
            f"it does not compute x {tuple(x.shape)} {x.dtype} on {x.device.type}, "
            f"weight {tuple(weight.shape)}, tile {tuple(tile)}, groups={groups}"
        )
    if reason:
        raise BackendError(
            f"the backend {backend!r} was asked for and can't run: {reason}; backend='auto' takes another"
        )
    return backend


def auto_tile(outputs: Sequence[int], kernel: Sequence[int]) -> Triple:
    """A tile with few multiplications and small errors.

    Each axis takes the m of 1, 2 and 4 that needs the fewest multiplications for its size, the smaller one where they
    are equal, as long as m + r - 1 <= 6: beyond that rounding errors grow fast.

    Args:
        outputs, kernel: sizes in time, height, width.
    """
    mt, mh, mw = (
        min((m for m in (1, 2, 4) if m == 1 or m + r - 1 <= 6), key=lambda m: -(-size // m) * (m + r - 1))
        if r > 1
        else 1
        for size, r in zip(outputs, kernel, strict=True)
    )
    return mt, mh, mw


def fast_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: Triple | str = "auto",
    padding: Triple = (0, 0, 0),
    groups: int = 1,
    prepared: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """3D convolution at stride 1 and dilation 1 by the fast algorithm, forward and backward.

    Equal to `lean3d.ops.conv3d` but for rounding, which grows with the tile: docs/fast_algorithm.md has the figures.

    Args:
        x: `(N, C, T, H, W)`, float32 or float64. bfloat16 and float16 are computed in float32 and rounded once.
        weight: `(O, C / groups, K, R, S)`; where its dtype is another than x's (autocast), the wider one is used.
        bias: `(O,)` or None.
        tile: m of F(m, r) in time, height, width; 1 is direct on that axis; "auto" is `auto_tile`'s.
        padding: with zeros, in time, height, width.
        groups: as in `torch.nn.Conv3d`.
        prepared: what `prepare_weight` gave for this weight, tile, groups and backend; by default it is done here.
        backend: a name in `BACKENDS`, or "auto": the first that can. `lean3d.ops.native.last_backend`
            of "fast_conv3d" says which one ran.

    Returns:
        `(N, O, T', H', W')`, in `torch.channels_last_3d`.

    Raises:
        ConfigError: Shapes that don't fit together, an unknown dtype, tile or backend.
        BackendError: A backend that can't run.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"fast_conv3d takes float32, float64, bfloat16 or float16; got {x.dtype} and {weight.dtype}")
    tile = resolve_tile(tile, output_size(x.shape, weight.shape, padding, groups), weight.shape[2:])
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.lean3d.fast_conv3d(x, weight, bias, prepared, padding, groups, tile, backend)


def prepare_weight(weight: Tensor, *, tile: Sequence[int], groups: int = 1, backend: str) -> Tensor:
    """The transformed weight as a backend keeps it, for `fast_conv3d`'s `prepared`.

    Args:
        weight: `(O, C / groups, K, R, S)`, in the dtype in which `fast_conv3d` will compute.
        tile: m in time, height, width, as `resolve_tile` gives it.
        groups: as in `fast_conv3d`.
        backend: a name that `choose_backend` gave.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return BACKENDS[backend].prepare(weight, tile, groups)


def resolve_tile(tile: Triple | str, outputs: Sequence[int], kernel: Sequence[int]) -> Triple:
    """The tile in numbers, 1 on the axes whose kernel is 1 long.

    Raises:
        ConfigError: A tile that is not "auto" or m in time, height, width.
    """
    if isinstance(tile, str):
        if tile != "auto":
            raise ConfigError(f"a tile is 'auto' or m in time, height, width, such as (2, 4, 4); got {tile!r}")
        return auto_tile(outputs, kernel)
    if len(tile) != 3 or min(tile) < 1:
        raise ConfigError(f"a tile is 'auto' or m in time, height, width, such as (2, 4, 4); got {tuple(tile)}")
    mt, mh, mw = (m if r > 1 else 1 for m, r in zip(tile, kernel, strict=True))
    return mt, mh, mw


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "lean3d::fast_conv3d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? prepared, SymInt[] padding, SymInt groups, SymInt[] tile, "
    "str backend) -> Tensor",
)
def _fast_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor | None,
    padding: Sequence[int],
    groups: int,
    tile: Sequence[int],
    backend: str,
) -> Tensor:
    outputs = output_size(x.shape, weight.shape, padding, groups)
    name = choose_backend(backend, x, weight, tile, groups)
    if prepared is None:
        prepared = prepare_weight(weight, tile=tile, groups=groups, backend=name)
    with torch.autocast(x.device.type, enabled=False):  # which would narrow the products in the transformed domain
        y = BACKENDS[name].convolve(x, prepared, bias, outputs, weight.shape, tile, padding, groups)
    native.ran("fast_conv3d", name)
    return y


@_fast_conv3d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor | None,
    padding: Sequence[int],
    groups: int,
    tile: Sequence[int],
    backend: str,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *output_size(x.shape, weight.shape, padding, groups))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


@torch.library.custom_op(
    "lean3d::fast_conv3d_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor gradient, SymInt[] kernel, SymInt[] padding, SymInt groups, SymInt[] tile, str backend) "
    "-> Tensor",
)
def _weight_gradient(
    x: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tile: Sequence[int],
    backend: str,
) -> Tensor:
    dtype = _working_dtype(x)
    at_once = _clips_at_once(gradient.shape[2:], kernel, tile, x.shape[1] + gradient.shape[1])
    total = torch.zeros(gradient.shape[1], x.shape[1] // groups, *kernel, dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for part, part_gradient in zip(x.split(at_once), gradient.split(at_once), strict=True):
            total += weight_gradient_reference(part.to(dtype), part_gradient.to(dtype), kernel, tile, padding, groups)
    return total.to(x.dtype)


@_weight_gradient.register_fake
def _(
    x: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tile: Sequence[int],
    backend: str,
) -> Tensor:
    return x.new_empty(gradient.shape[1], x.shape[1] // groups, *kernel)


def _input_gradient(
    gradient: Tensor, weight: Tensor, padding: Sequence[int], groups: int, tile: Sequence[int], backend: str
) -> Tensor:
    """The transposed convolution: a convolution with the weight flipped in space and time, its channels exchanged."""
    o, kernel = weight.shape[0], weight.shape[2:]
    flipped = weight.flip(2, 3, 4).unflatten(0, (groups, o // groups)).transpose(1, 2).reshape(-1, o // groups, *kernel)
    border = [r - 1 - p for r, p in zip(kernel, padding, strict=True)]
    cut = [min(b, 0) for b in reversed(border) for _ in range(2)]  # outputs that saw nothing but padding
    if any(cut):
        gradient = F.pad(gradient, cut)
    border = [max(b, 0) for b in border]
    return torch.ops.lean3d.fast_conv3d(gradient, flipped, None, None, border, groups, tile, backend)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    padding, groups, tile, backend = ctx.settings
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(gradient, weight, padding, groups, tile, backend)
    if ctx.needs_input_grad[1]:
        dweight = torch.ops.lean3d.fast_conv3d_weight_gradient(
            x, gradient, weight.shape[2:], padding, groups, tile, backend
        )
    if ctx.needs_input_grad[2]:
        dbias = gradient.sum((0, 2, 3, 4))
    return dx, dweight, dbias, None, None, None, None, None


_fast_conv3d.register_autograd(_backward, setup_context=_keep)


def _keep_for_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gradient, _, *ctx.settings = inputs
    ctx.save_for_backward(x, gradient)


def _backward_of_weight_gradient(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
    x, gradient = ctx.saved_tensors
    padding, groups, tile, backend = ctx.settings
    dx = dgradient = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(gradient, dweight, padding, groups, tile, backend)
    if ctx.needs_input_grad[1]:
        dgradient = torch.ops.lean3d.fast_conv3d(x, dweight, None, None, padding, groups, tile, backend)
    return dx, dgradient, None, None, None, None, None


_weight_gradient.register_autograd(_backward_of_weight_gradient, setup_context=_keep_for_weight_gradient)


@register_flop_formula(torch.ops.lean3d.fast_conv3d)
def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Those of the direct form, as for any convolution: two for each multiply-accumulate."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.lean3d.fast_conv3d_weight_gradient)
def _flops_of_weight_gradient(
    x_shape: Sequence[int], gradient_shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    return 2 * gradient_shape[0] * math.prod(gradient_shape[2:]) * math.prod(out_shape)
