"""Weights packed once, and the kernels that take them: inference in float32 on a CPU, activations channels last.

    pack(...)             one convolution:  relu(conv(x) + bias + residual)
        "pointwise"       1x1x1, any stride
        "direct"          any dense kernel and stride: a product whose rows are places along the width; zeros around x
                          come with a copy of a strip in the cache, except in time, where taps are left out
        "depthwise"       one kernel a channel, any kernel and stride, vectorised over channels
    pack_stage_two(...)   a depthwise and a pointwise convolution, some rows at a time: stage two of the FSB; if asked
                          with a convolution in time before them, and a maximum over windows side by side behind
    pack_small_big(...)   conv(x) + conv(pool(x)) as one product over both halves' channels, pooled as it goes

All need the native kernels and `algorithms` names none without them; `reference.py` beside has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.op import pool3d
from lean3d.ops.pool.reference import Window, check_window

MAX_TAPS = 512
"""Places of a dense kernel that the kernels take, and rows (K * R) of a depthwise one are at most 64."""
MAX_WINDOW = 63
"""Largest size of a pooling window inside `PackedSmallBig`."""
MAX_SHRINK = 64
"""Places of a window at the end of `PackedStageTwo`, and frames of a kernel at its start."""


def algorithms(weight_shape: Sequence[int], *, stride: Triple, padding: Triple, groups: int = 1) -> list[str]:
    """The algorithms that compute this convolution natively, none where the native kernels are not there.

    Args:
        weight_shape: `(O, C / groups, K, R, S)`.
        stride, padding: in time, height, width.
        groups: 1, or as many as channels with `O == groups`; others have no algorithm here.
    """
    out_channels, per_group, kt, kh, kw = weight_shape
    if not native.available() or min(stride) < 1 or min(padding) < 0:
        return []
    if groups != 1:
        return ["depthwise"] if per_group == 1 and groups == out_channels and kt * kh <= 64 else []
    if kt * kh * kw > MAX_TAPS:
        return []
    return ["pointwise" if (kt, kh, kw) == (1, 1, 1) and tuple(padding) == (0, 0, 0) else "direct"]


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    groups: int = 1,
    algorithm: str,
) -> PackedConv:
    """A convolution ready to run.

    Args:
        weight: `(O, C / groups, K, R, S)`, normalisation folded in.
        bias: `(O,)` or None.
        stride, padding: in time, height, width.
        groups: as in `algorithms`.
        algorithm: one that `algorithms` names.

    Raises:
        BackendError: The native kernels are not there.
        ConfigError: Another algorithm, or a weight that is not float32 on the CPU.
    """
    accepted = algorithms(weight.shape, stride=stride, padding=padding, groups=groups)
    check_algorithm(algorithm, accepted, weight, stride=stride, padding=padding, groups=groups)
    return PackedConv(weight, bias, stride, padding, groups, algorithm)


def check_algorithm(
    algorithm: str, accepted: Sequence[str], weight: Tensor, *, stride: Triple, padding: Triple, groups: int
) -> None:
    """Refuse an algorithm that is not among the accepted ones for a convolution.

    Raises:
        BackendError: The native kernels are not there.
        ConfigError: It is another one.
    """
    native.kernels()
    if algorithm not in accepted:
        raise ConfigError(
            f"algorithm must be one of {accepted} for weight {tuple(weight.shape)}, stride {tuple(stride)}, "
            f"padding {tuple(padding)}, groups {groups}; got {algorithm!r}"
        )


class PackedConv:
    """`relu(conv(x) + bias + residual)`; made by `pack`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple, groups: int, algorithm: str
    ):
        self.algorithm = algorithm
        self._geometry = Geometry(weight.shape, stride, padding, groups)
        self._bias = packed_bias(bias, weight.shape[0], padded=algorithm == "depthwise")
        self._weight = (_pack_depthwise if algorithm == "depthwise" else pack_dense)(_checked(weight))
        # Few outputs leave most of a vector empty. Two neighbours along the width fill it better: as one place with
        # twice the outputs, a kernel wider by the stride, and twice the stride.
        self._pairs: PackedConv | None = None
        (_, _, step), kw = stride, weight.shape[4]
        if algorithm == "direct" and 4 * weight.shape[0] <= native.kernels().gemm_nr() and step < kw:
            wide = torch.cat([F.pad(weight, (0, step)), F.pad(weight, (step, 0))])
            twice = None if bias is None else bias.repeat(2)
            self._pairs = PackedConv(wide, twice, (*stride[:2], 2 * step), padding, groups, algorithm)

    def out_shape(self, shape: Sequence[int]) -> torch.Size:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`.

        Raises:
            ConfigError: Another number of channels, or x is smaller than the kernel.
        """
        return self._geometry.out_shape(shape)

    def __call__(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """The convolution of x.

        Args:
            x: `(N, C, T, H, W)`, float32 on the CPU; copied first where it is not in `torch.channels_last_3d`.
            out: what to write to and return, `(N, O, T', H', W')` in channels_last_3d; may be the residual, not x.
            residual: `(N, O, T', H', W')`, added before the ReLU; of length 1 in time the same at all times (not for
                "depthwise").
            relu: whether a ReLU follows.

        Raises:
            ConfigError: A tensor of another shape, type or layout.
        """
        n, o, _, h, w = shape = self.out_shape(x.shape)
        one_frame = residual is not None and residual.shape == (n, o, 1, h, w) != shape and native.takes(residual)
        if residual is None or not one_frame or self.algorithm == "depthwise":
            return self._run(x, out, residual, relu, None)
        offset = residual if self._bias is None else residual + self._bias[:, None, None, None]
        return self._run(x, out, None, relu, offset.contiguous(memory_format=torch.channels_last_3d))

    def _run(self, x: Tensor, out: Tensor | None, residual: Tensor | None, relu: bool, offset: Tensor | None) -> Tensor:
        """The same with an `offset` `(N, O, 1, H', W')` for all times in place of the bias."""
        x, out, residual = checked_tensors(x, out, residual, self.out_shape(x.shape))
        place = native.address
        end = (relu, torch.get_num_threads())
        if self.algorithm == "depthwise":
            native.kernels().conv_depthwise(
                place(x),
                place(self._weight),
                place(out),
                self._geometry.sizes(x.shape, out.shape),
                place(self._bias),
                place(residual),
                *end,
            )
        else:
            conv, shape = self, out.shape
            while conv._pairs is not None and shape[4] % 2 == 0:
                conv, shape = conv._pairs, torch.Size((shape[0], 2 * shape[1], *shape[2:4], shape[4] // 2))
            native.kernels().conv_direct(
                place(x),
                place(conv._weight),
                place(out),
                conv._geometry.sizes(x.shape, shape),
                place(conv._bias),
                place(offset),
                place(residual),
                *end,
            )
        native.ran("fused_conv", "native")
        return out


@dataclass(frozen=True)
class TemporalConv:
    """A convolution in time, `relu(conv(x) + bias)`.

    Args:
        weight: `(C, I, K, 1, 1)`, normalisation folded in.
        bias: `(C,)` or None.
        stride, padding: in time.
        relu: whether a ReLU follows.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0
    relu: bool = False


def pack_stage_two(
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    middle_relu: bool = True,
    temporal: TemporalConv | None = None,
    shrink: Triple = (1, 1, 1),
    ceil_mode: bool = False,
) -> PackedStageTwo:
    """A depthwise convolution, a ReLU and a pointwise convolution ready to run as one.

    Args:
        depthwise: `(C, 1, K, R, S)`, normalisation folded in.
        depthwise_bias: `(C,)` or None.
        pointwise: `(O, C, 1, 1, 1)`, normalisation folded in.
        bias: `(O,)` or None.
        stride, padding: of the depthwise convolution, in time, height, width.
        middle_relu: whether a ReLU stands between both.
        temporal: a convolution before them; the depthwise one is then flat: K 1, stride 1 and padding 0 in time. Made
            for few input channels: it is computed directly, some of it twice.
        shrink: windows side by side in time, height, width, up to 64 places, whose maxima are the result.
        ceil_mode: whether a last window that is not whole counts.

    Raises:
        BackendError: The native kernels are not there.
        ConfigError: Weights that do not fit together, or are not float32 on the CPU.
    """
    native.kernels()
    channels = depthwise.shape[0]
    fits = pointwise.shape[1:] == (channels, 1, 1, 1)
    if not fits or not algorithms(depthwise.shape, stride=stride, padding=padding, groups=channels):
        raise ConfigError(
            "stage two takes weights (C, 1, K, R, S), K * R up to 64, and (O, C, 1, 1, 1); "
            f"got {tuple(depthwise.shape)} and {tuple(pointwise.shape)}"
        )
    if temporal is not None:
        out_channels, _, frames, *plane = temporal.weight.shape
        if out_channels != channels or plane != [1, 1] or frames > MAX_SHRINK or temporal.stride < 1:
            raise ConfigError(
                f"stage two of {channels} channels takes a temporal weight ({channels}, I, K up to {MAX_SHRINK}, 1, 1) "
                f"at a positive stride; got {tuple(temporal.weight.shape)} at stride {temporal.stride}"
            )
        if (depthwise.shape[2], stride[0], padding[0]) != (1, 1, 0):
            raise ConfigError(
                "behind a convolution in time the depthwise one is flat: size 1, stride 1 and padding 0 in time; got "
                f"{(depthwise.shape[2], stride[0], padding[0])}"
            )
    if min(shrink) < 1 or math.prod(shrink) > MAX_SHRINK:
        raise ConfigError(f"shrink must be three positive sizes of at most {MAX_SHRINK} places; got {tuple(shrink)}")
    return PackedStageTwo(
        depthwise, depthwise_bias, pointwise, bias, stride, padding, middle_relu, temporal, shrink, ceil_mode
    )


class PackedStageTwo:
    """`max over windows of relu(pointwise(relu(depthwise(temporal(x)) + b1)) + b2 + residual)`; made by
    `pack_stage_two`. There is no residual where there are windows."""

    def __init__(
        self,
        depthwise: Tensor,
        depthwise_bias: Tensor | None,
        pointwise: Tensor,
        bias: Tensor | None,
        stride: Triple,
        padding: Triple,
        middle_relu: bool,
        temporal: TemporalConv | None,
        shrink: Triple,
        ceil_mode: bool,
    ):
        channels, out_channels = depthwise.shape[0], pointwise.shape[0]
        self._geometry = Geometry((out_channels, 1, *depthwise.shape[2:]), stride, padding, channels)
        self._middle_bias = packed_bias(depthwise_bias, channels, padded=True)
        self._bias = packed_bias(bias, out_channels)
        self._depthwise, self._pointwise = _pack_depthwise(_checked(depthwise)), pack_dense(_checked(pointwise))
        self._middle_relu = middle_relu
        self._shrink, self._ceil_mode = tuple(shrink), ceil_mode
        self._temporal: Geometry | None = None
        self._temporal_weight = self._temporal_bias = None
        self._temporal_relu = False
        if temporal is not None:
            along = (temporal.stride, 1, 1), (temporal.padding, 0, 0)
            self._temporal = Geometry(temporal.weight.shape, *along, 1)
            self._temporal_weight = pack_dense(_checked(temporal.weight))
            self._temporal_bias = packed_bias(temporal.bias, channels)
            self._temporal_relu = temporal.relu

    def out_shape(self, shape: Sequence[int]) -> torch.Size:
        """As `PackedConv.out_shape`."""
        return self._shrunk(self._geometry.out_shape(self._middle_shape(shape)))

    def __call__(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """As `PackedConv.__call__`."""
        middle = self._middle_shape(x.shape)
        places = self._geometry.out_shape(middle)
        x, out, residual = checked_tensors(x, out, residual, self._shrunk(places))
        if residual is not None and self._shrink != (1, 1, 1):
            raise ConfigError("stage two with a maximum behind it takes no residual")
        place = native.address
        in_time = (1, 1, 1, 1, 0)
        if self._temporal is not None:
            first = self._temporal
            in_time = (x.shape[2], x.shape[1], first.kernel[0], first.stride[0], first.padding[0])
        native.kernels().conv_stage_two(
            place(x),
            place(self._temporal_weight),
            place(self._temporal_bias),
            self._temporal_relu,
            in_time,
            place(self._depthwise),
            place(self._middle_bias),
            self._middle_relu,
            place(self._pointwise),
            place(out),
            self._geometry.sizes(middle, places),
            (*self._shrink, *out.shape[2:]),
            place(self._bias),
            place(residual),
            relu,
            torch.get_num_threads(),
        )
        native.ran("fused_conv", "native")
        return out

    def _middle_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """What the depthwise convolution gets."""
        return shape if self._temporal is None else self._temporal.out_shape(shape)

    def _shrunk(self, shape: torch.Size) -> torch.Size:
        up = self._ceil_mode
        sizes = [(size + (k - 1 if up else 0)) // k for size, k in zip(shape[2:], self._shrink, strict=True)]
        if min(sizes) < 1:
            raise ConfigError(f"windows of {self._shrink} don't fit into {tuple(shape[2:])}")
        return torch.Size((*shape[:2], *sizes))


def pack_small_big(
    small: Tensor,
    big: Tensor,
    bias: Tensor | None = None,
    *,
    window: Window,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
) -> PackedSmallBig:
    """A SmallBig unit (arXiv 2006.14582) ready to run.

    Args:
        small, big: `(O, C, 1, R, S)`: the weight with each view's normalisation folded in.
        bias: `(O,)` or None: the sum of both views'.
        window: the maximum's, odd sizes in time, height, width; None in time for the whole clip.
        stride, padding: of both convolutions, 1 and 0 in time.

    Raises:
        BackendError: The native kernels are not there.
        ConfigError: Weights, a window or strides of another form.
    """
    native.kernels()
    check_window(window, "max")
    if small.shape != big.shape or small.shape[2] != 1 or small.shape[3] > MAX_TAPS:
        raise ConfigError(
            f"a SmallBig unit takes two weights (O, C, 1, R, S); got {tuple(small.shape)} and {tuple(big.shape)}"
        )
    if stride[0] != 1 or padding[0] != 0 or min(stride) < 1 or min(padding) < 0:
        raise ConfigError(
            f"a SmallBig unit has stride 1 and padding 0 in time; got stride {tuple(stride)}, padding {tuple(padding)}"
        )
    if any(k is None for k in window[1:]) or any(k is not None and k > MAX_WINDOW for k in window):
        raise ConfigError(
            f"the window is three odd sizes up to {MAX_WINDOW}, or None in time for the whole clip; got {window}"
        )
    return PackedSmallBig(small, big, bias, window, stride, padding)


class PackedSmallBig:
    """`relu(conv(x, small) + conv(pool(x), big) + bias + residual)`; made by `pack_small_big`."""

    def __init__(
        self, small: Tensor, big: Tensor, bias: Tensor | None, window: Window, stride: Triple, padding: Triple
    ):
        self._window = window
        self._geometry = Geometry(small.shape, stride, padding, 1)
        if window[0] is None:
            # The big view has one time step: its product is computed once and the small one's adds it at all times.
            algorithm = algorithms(small.shape, stride=stride, padding=padding)[0]
            self._big = pack(big, bias, stride=stride, padding=padding, algorithm=algorithm)
            self._small = pack(small, stride=stride, padding=padding, algorithm=algorithm)
            return
        self._bias = packed_bias(bias, small.shape[0])
        most = native.kernels().small_big_channels()
        parts = zip(_checked(small).split(most, 1), _checked(big).split(most, 1), strict=True)
        self._weight = torch.cat([pack_dense(torch.cat(part, 1)) for part in parts])

    def out_shape(self, shape: Sequence[int]) -> torch.Size:
        """As `PackedConv.out_shape`."""
        return self._geometry.out_shape(shape)

    def __call__(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """As `PackedConv.__call__`."""
        x, out, residual = checked_tensors(x, out, residual, self.out_shape(x.shape))
        if self._window[0] is None:
            with torch.no_grad():
                return self._small._run(x, out, residual, relu, self._big(pool3d(x, self._window)))
        place = native.address
        native.kernels().conv_small_big(
            place(x),
            place(self._weight),
            place(out),
            self._geometry.sizes(x.shape, out.shape),
            self._window,
            place(self._bias),
            place(residual),
            relu,
            torch.get_num_threads(),
        )
        native.ran("fused_conv", "native")
        return out


class Geometry:
    """Sizes of a convolution: what its outputs have, what the kernels want to know."""

    def __init__(self, weight_shape: Sequence[int], stride: Triple, padding: Triple, groups: int):
        self.out_channels, self.channels = weight_shape[0], weight_shape[1] * groups
        self.kernel, self.stride, self.padding = tuple(weight_shape[2:]), tuple(stride), tuple(padding)

    def out_shape(self, shape: Sequence[int]) -> torch.Size:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`.

        Raises:
            ConfigError: Another number of channels, something empty, or x is smaller than the kernel.
        """
        if len(shape) != 5 or shape[1] != self.channels or min(shape) < 1:
            raise ConfigError(f"x must be (N, {self.channels}, T, H, W), nothing empty; got {tuple(shape)}")
        sizes = [
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip(shape[2:], self.kernel, self.stride, self.padding, strict=True)
        ]
        if min(sizes) < 1:
            raise ConfigError(f"x {tuple(shape)} is smaller than the kernel {self.kernel} at padding {self.padding}")
        return torch.Size((shape[0], self.out_channels, *sizes))

    def sizes(self, shape: Sequence[int], out_shape: Sequence[int]) -> tuple[int, ...]:
        """ConvShape of cpu.h."""
        n, c, t, h, w = shape
        return (n, t, h, w, c, *out_shape[2:], self.out_channels, *self.kernel, *self.stride, *self.padding)


def checked_tensors(
    x: Tensor, out: Tensor | None, residual: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, out and residual as the kernels take them."""
    if not native.takes(x, out, residual):
        native.kernels()
        raise ConfigError("packed convolutions take float32 tensors on the CPU: .float(), or run the net uncompiled")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if out is None:
        out = torch.empty(shape, memory_format=torch.channels_last_3d)
    elif out.shape != shape or not out.is_contiguous(memory_format=torch.channels_last_3d):
        raise ConfigError(f"out must be {tuple(shape)} in torch.channels_last_3d; got {tuple(out.shape)}")
    elif out.data_ptr() == x.data_ptr():
        raise ConfigError("out must not be x: outputs are written while inputs are still read")
    if residual is not None:
        if residual.shape != shape:
            raise ConfigError(f"residual must be {tuple(shape)}, as the result; got {tuple(residual.shape)}")
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    return x, out, residual


def _checked(weight: Tensor) -> Tensor:
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        raise ConfigError(f"weights must be float32 on the CPU; got {weight.dtype} on {weight.device}")
    return weight.detach()


def packed_bias(bias: Tensor | None, channels: int, padded: bool = False) -> Tensor | None:
    """A bias as the kernels take it.

    Args:
        bias: `(channels,)`, float32 on the CPU, or None.
        channels: how many there must be.
        padded: with zeros, to a multiple of 16.

    Raises:
        ConfigError: It is another tensor.
    """
    if bias is None:
        return None
    if bias.shape != (channels,):
        raise ConfigError(f"bias must be ({channels},); got {tuple(bias.shape)}")
    return F.pad(_checked(bias), (0, -channels % 16 if padded else 0)).contiguous()


def pack_dense(weight: Tensor) -> Tensor:
    """`(O, C, K, R, S)` -> panels of (K, R, S, C) x O."""
    out_channels = weight.shape[0]
    rows = math.prod(weight.shape[1:])
    by_rows = weight.permute(2, 3, 4, 1, 0).contiguous()
    kernels = native.kernels()
    packed = torch.empty(kernels.gemm_packed_size(rows, out_channels))
    kernels.gemm_pack(by_rows.data_ptr(), out_channels, 1, rows, out_channels, packed.data_ptr())
    return packed


def _pack_depthwise(weight: Tensor) -> Tensor:
    """`(C, 1, K, R, S)` -> `(K, R, S, C)`, C padded to a multiple of 16."""
    by_channels = weight[:, 0].permute(1, 2, 3, 0)
    return F.pad(by_channels, (0, -weight.shape[0] % 16)).contiguous()
