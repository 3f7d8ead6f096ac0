"""The fast algorithm in time alone, around a direct kernel in the plane, as a native kernel for inference: for stems,
whose kernels are large or strided in the plane and long in time. F(4, 5) needs 8 products for 4 frames, not 20.

    conv = pack(weight, bias, stride=(1, 2, 2), padding=(2, 3, 3), algorithm="F(4x1x1)")
    y = conv(x, relu=True)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fast_conv.transforms import cook_toom
from lean3d.ops.fused_conv.op import (
    MAX_TAPS,
    Geometry,
    check_algorithm,
    checked_tensors,
    pack_dense,
    packed_bias,
)

TILES = {f"F({m}x1x1)": m for m in (2, 4)}
TAPS = (3, 5)
"""Kernels in time that are compiled."""
MOST_CHANNELS = 16
"""Channels of x up to which this may pay: each input frame is transformed once for each tile that sees it."""


def algorithms(
    weight_shape: Sequence[int], *, stride: Sequence[int], padding: Sequence[int], groups: int = 1
) -> list[str]:
    """Names that `pack` takes for such a convolution; none without native kernels.

    Args:
        weight_shape: `(O, C / groups, K, R, S)`.
        stride, padding: in time, height, width.
        groups: as in `torch.nn.Conv3d`.
    """
    _, channels, taps, *plane = weight_shape
    can = taps in TAPS and plane != [1, 1] and max(plane) <= MAX_TAPS and stride[0] == 1 and min(stride) >= 1
    few = groups == 1 and channels <= MOST_CHANNELS and min(padding) >= 0
    return list(TILES) if native.available() and can and few else []


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    groups: int = 1,
    algorithm: str,
    shrink: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> PackedTimeConv:
    """Make a convolution of fixed weights.

    Args:
        weight: `(O, C, K, R, S)`, float32 on the CPU; K 3 or 5, C up to 16.
        bias: `(O,)` or None.
        stride: 1 in time, any in height and width.
        padding: with zeros, in time, height, width.
        groups: 1.
        algorithm: "F(2x1x1)" or "F(4x1x1)": frames of a tile.
        shrink: windows side by side in height and width, whose maxima are the result.
        ceil_mode: whether a last window that is not whole counts.

    Raises:
        ConfigError: What `algorithms` doesn't list, or a bias of another length.
        BackendError: There are no native kernels.
    """
    accepted = algorithms(weight.shape, stride=stride, padding=padding, groups=groups)
    check_algorithm(algorithm, accepted, weight, stride=stride, padding=padding, groups=groups)
    if min(shrink) < 1:
        raise ConfigError(f"shrink must be two windows of at least 1, got {shrink}")
    return PackedTimeConv(weight, bias, stride, padding, algorithm, shrink, ceil_mode)


class PackedTimeConv:
    """A convolution, transformed and packed; made by `pack`.

    Few outputs leave most of a vector empty: then neighbours along the width are one place with twice the outputs, of a
    kernel wider by the stride and of twice the stride.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Triple,
        padding: Triple,
        algorithm: str,
        shrink: tuple[int, int],
        ceil_mode: bool,
    ):
        self.shrink, self.ceil_mode = tuple(shrink), ceil_mode
        m = TILES[algorithm]
        self._geometry = Geometry(weight.shape, stride, padding, 1)
        self._bias = packed_bias(bias, weight.shape[0])
        at, g, bt = cook_toom(m, weight.shape[2]).tensors(torch.float64)
        self._time_out, self._time_in = at.float().contiguous(), bt.float().contiguous()
        self._columns = native.kernels().gemm_packed_size(1, 1)
        flat = torch.einsum("ockrs,pk->pocrs", weight.detach().double(), g)
        self._forms = [(self._geometry, _packed(flat))]
        outputs, (_, high, step), (*_, kw) = weight.shape[0], stride, weight.shape
        while 4 * outputs <= self._columns and step < kw:
            flat = torch.cat([F.pad(flat, (0, step)), F.pad(flat, (step, 0))], 1)
            outputs, step, kw = 2 * outputs, 2 * step, kw + step
            shape = (outputs, weight.shape[1], weight.shape[2], weight.shape[3], kw)
            self._forms.append((Geometry(shape, (1, high, step), padding, 1), _packed(flat)))

    def out_shape(self, shape: Sequence[int]) -> torch.Size:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`.

        Raises:
            ConfigError: Another number of channels, or x is smaller than the kernel and the windows.
        """
        *outer, h, w = self._geometry.out_shape(shape)
        up = [k - 1 if self.ceil_mode else 0 for k in self.shrink]
        left = [(size + more) // k for size, more, k in zip((h, w), up, self.shrink, strict=True)]
        if min(left) < 1:
            raise ConfigError(f"x {tuple(shape)} leaves {h} x {w} places, less than a window of {self.shrink}")
        return torch.Size((*outer, *left))

    def __call__(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """The convolution, + bias, + residual, then ReLU.

        Args:
            x: `(N, C, T, H, W)`, float32 on the CPU, best in `torch.channels_last_3d`: copied otherwise.
            out: where the result goes: of its shape, in `torch.channels_last_3d`; may be the residual, not x.
            residual: like the result; not with windows.
            relu: whether ReLU follows.

        Raises:
            ConfigError: Shapes, dtypes or layouts that don't fit.
        """
        if self._columns != native.kernels().gemm_packed_size(1, 1):
            raise ConfigError("these weights were packed for another instruction set: pack them again after `use_isa`")
        if residual is not None and self.shrink != (1, 1):
            raise ConfigError("a convolution with windows behind it takes no residual: add it before the maxima")
        x, out, residual = checked_tensors(x, out, residual, self.out_shape(x.shape))
        n, o, t, h, w = self._geometry.out_shape(x.shape)
        joined = max(i for i in range(len(self._forms)) if w % 2**i == 0)
        geometry, packed = self._forms[joined]
        bias = None if self._bias is None else self._bias.repeat(w)
        native.kernels().conv_in_time(
            native.address(x),
            native.address(packed),
            native.address(self._time_in),
            native.address(self._time_out),
            native.address(out),
            geometry.sizes(x.shape, (n, o << joined, t, h, w >> joined)),
            len(self._time_in),
            (*self.shrink, *out.shape[3:], w),
            native.address(bias),
            native.address(residual),
            relu,
            torch.get_num_threads(),
        )
        return out


def _packed(flat: Tensor) -> Tensor:
    """`(points, O, C, R, S)`, float64 -> panels of (R, S, C) x O for each point."""
    return torch.cat([pack_dense(weight[:, :, None].float()) for weight in flat])
