"""The fast convolution as a native kernel, for inference: float32 on the CPU, bias, residual and ReLU in the same pass.

    conv = pack(weight, bias, stride=(1, 1, 1), padding=(1, 1, 1), algorithm="F(2x4x4)")
    y = conv(x, residual=shortcut, relu=True)

Weights are transformed once, in float64, and rounded once.

Besides stride 1 there is 2 in height and width, for 3x3 kernels by F(1x4x4): the even and the odd places of an axis
meet the even and the odd taps, each at stride 1, by F(4, 2); one of the two filters has a single tap. That makes 9
multiplications of 12 on an axis, 1.78 times fewer in the plane (docs/fast_algorithm.md).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fast_conv.transforms import cook_toom

ONCE, STRIDED = (1, 1, 1), (1, 2, 2)
"""The strides."""
TILES = {1: (1,), 3: (2, 4)}
"""Kernel along an axis -> the m of F(m, r) that are compiled; time may be direct too."""
MOST_TAPS = 16
"""The longest kernel in time that is computed directly within tiles of the plane."""

SMALL_WEIGHTS, LARGE_WEIGHTS = 2 << 20, 8 << 20
"""Bytes of transformed weights that stay in a second-level cache, and of those that are better read once than often."""


def name_of(tile: Sequence[int]) -> str:
    """(2, 4, 4) -> "F(2x4x4)"."""
    return f"F({'x'.join(map(str, tile))})"


def takes_tile(kernel: Sequence[int], tile: Sequence[int], stride: Sequence[int] = ONCE) -> bool:
    """Whether the kernel is compiled for these tiles; direct on all axes is not the fast algorithm, and isn't here."""
    (r, *plane), (m, *plane_tile) = kernel, tile
    if tuple(stride) == STRIDED:
        return plane == [3, 3] and list(tile) == [1, 4, 4] and r <= MOST_TAPS
    return (
        tuple(stride) == ONCE
        and (m == 1 or m in TILES.get(r, ()))
        and r <= MOST_TAPS
        and all(m in TILES.get(r, ()) for r, m in zip(plane, plane_tile, strict=True))
        and max(tile) > 1
    )


def algorithms(
    weight_shape: Sequence[int], *, stride: Sequence[int], padding: Sequence[int], groups: int = 1
) -> list[str]:
    """Names that `pack` takes for such a convolution, with square tiles in the plane; none without native kernels.

    Args:
        weight_shape: `(O, C / groups, K, R, S)`.
        stride, padding: in time, height, width.
        groups: as in `torch.nn.Conv3d`.
    """
    kernel = weight_shape[2:]
    if not native.available() or groups != 1:
        return []
    tiles = [tile for tile in itertools.product((1, 2, 4), repeat=3) if kernel[1] != kernel[2] or tile[1] == tile[2]]
    return [name_of(tile) for tile in tiles if takes_tile(kernel, tile, stride)]


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    groups: int = 1,
    algorithm: str,
) -> PackedFastConv:
    """Make a convolution of fixed weights.

    Args:
        weight: `(O, C, K, R, S)`, any floating dtype, on the CPU.
        bias: `(O,)` or None.
        stride: (1, 1, 1), or (1, 2, 2) for kernels of 3x3 in the plane.
        padding: with zeros, in time, height, width.
        groups: 1.
        algorithm: "F(2x4x4)": m of F(m, r) in time, height, width. m is 1 where the kernel is 1 long, 2 or 4 where it
            is 3; in time it may be 1 for kernels of up to 16 taps, which are then summed over directly. At stride
            (1, 2, 2): "F(1x4x4)".

    Raises:
        ConfigError: What `algorithms` doesn't list, or a bias of another length.
        BackendError: There are no native kernels.
    """
    match = re.fullmatch(r"F\((\d+)x(\d+)x(\d+)\)", algorithm)
    tile = tuple(map(int, match.groups())) if match else ()
    if groups != 1 or len(tile) != 3 or not takes_tile(weight.shape[2:], tile, stride):
        can = ", ".join(algorithms(weight.shape, stride=stride, padding=padding, groups=groups)) or "none"
        raise ConfigError(
            f"the native fast convolution can't compute a kernel {tuple(weight.shape[2:])} with stride {tuple(stride)} "
            f"and groups={groups} by {algorithm!r}; it can by: {can}"
        )
    mt, mh, mw = tile
    packed = pack_strided_weight(weight) if tuple(stride) == STRIDED else pack_weight(weight, tile)
    return PackedFastConv(packed, weight.shape, bias, padding, (mt, mh, mw), stride)


def packed_size(weight_shape: Sequence[int], algorithm: str, stride: Sequence[int] = ONCE) -> int:
    """About how many floats the weights are once they are transformed, tails of panels left out.

    Args:
        weight_shape: `(O, C, K, R, S)`.
        algorithm: as in `pack`.
        stride: in time, height, width.
    """
    o, c, *kernel = weight_shape
    tile = [int(m) for m in re.findall(r"\d+", algorithm)]
    if tuple(stride) == STRIDED and tile == [1, 4, 4]:
        return o * c * kernel[0] * 81
    return o * c * math.prod(r if m == 1 else m + r - 1 for m, r in zip(tile, kernel, strict=True))


def pack_weight(weight: Tensor, tile: Sequence[int]) -> Tensor:
    """Transformed weights as the kernel reads them: flat, in panels of output channels.

    `(positions, panels, K or 1, C, columns)`: K where the tile is 1 in time; zeros behind the last channel.

    Args:
        weight: `(O, C, K, R, S)`.
        tile: m of F(m, r) in time, height, width.
    """
    columns = native.kernels().gemm_packed_size(1, 1)
    matrices = [
        torch.eye(r, dtype=torch.float64) if m == 1 else cook_toom(m, r).tensors(torch.float64)[1]
        for m, r in zip(tile, weight.shape[2:], strict=True)
    ]
    gt, gh, gw = matrices
    o, c = weight.shape[:2]
    positions, taps = (len(gh) * len(gw), len(gt)) if tile[0] == 1 else (len(gt) * len(gh) * len(gw), 1)
    panels = -(-o // columns)
    packed = native.empty_for_weights(positions * panels * taps * c * columns)
    packed = packed.view(positions, panels, taps * c, columns)
    packed[:, -1].zero_()
    for i, part in enumerate(weight.detach().split(columns)):  # in parts: in float64 they are large
        u = torch.einsum("ockrs,tk,hr,ws->thwco", part.double(), gt, gh, gw)
        u = u.permute(1, 2, 0, 3, 4) if tile[0] == 1 else u
        packed[:, i, :, : len(part)] = u.reshape(positions, taps * c, len(part))
    return packed.flatten()


def halves() -> tuple[Tensor, Tensor]:
    """G of F(4, 2) for the even taps of a filter of three, `(5, 3)`, and for the odd one, `(4, 3)`, in float64.

    One tap is a filter of two whose last one is 0; so is its value at infinity, G's last row, which is left out.
    """
    _, g, _ = cook_toom(4, 2).tensors(torch.float64)
    even, odd = g.new_zeros(5, 3), g.new_zeros(4, 3)
    even[:, 0::2], odd[:, 1] = g, g[:4, 0]
    return even, odd


def pack_strided_weight(weight: Tensor) -> Tensor:
    """Like `pack_weight`, for stride (1, 2, 2) and the tile (1, 4, 4).

    At each of 5 x 5 positions `(panels, K, halves * C, columns)`: halves are the pairs of even or odd taps in height
    with even or odd ones in width that are not 0 there, 4 for most, 2 where one axis is at infinity, 1 where both are.

    Args:
        weight: `(O, C, K, 3, 3)`.
    """
    columns = native.kernels().gemm_packed_size(1, 1)
    o, c, taps = weight.shape[:3]
    panels = -(-o // columns)
    packed = native.empty_for_weights(81 * panels * taps * c * columns)
    positions = []
    start = 0
    for h, w in itertools.product(range(5), repeat=2):
        count = (2 if h < 4 else 1) * (2 if w < 4 else 1) * c
        size = panels * taps * count * columns
        positions.append((h, w, packed[start : start + size].view(panels, taps, count, columns)))
        positions[-1][2][-1].zero_()
        start += size
    for i, part in enumerate(weight.detach().split(columns)):
        u = [
            [torch.einsum("ockrs,hr,ws->hwkco", part.double(), gh, gw) for gw in halves()] for gh in halves()
        ]  # by halves
        for h, w, place in positions:
            there = [v[h, w] for row in u for v in row if h < len(v) and w < v.shape[1]]
            place[i, :, :, : len(part)] = torch.cat(there, 1)
    return packed


class PackedFastConv:
    """A convolution by the fast algorithm, its weights transformed and packed; made by `pack`."""

    def __init__(
        self,
        packed: Tensor,
        weight_shape: Sequence[int],
        bias: Tensor | None,
        padding: Triple,
        tile: Triple,
        stride: Triple = ONCE,
    ):
        self.weight_shape = tuple(weight_shape)
        self.padding, self.stride = tuple(padding), tuple(stride)
        self.tile = tile
        if bias is not None and tuple(bias.shape) != (weight_shape[0],):
            raise ConfigError(f"bias must be ({weight_shape[0]},), got {tuple(bias.shape)}")
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.columns = native.kernels().gemm_packed_size(1, 1)
        self.packed = packed
        self.time_out, _, self.time_in = cook_toom(tile[0], weight_shape[2]).tensors()

    def __repr__(self) -> str:
        stride = "" if self.stride == ONCE else f"stride={self.stride}, "
        return f"PackedFastConv({self.weight_shape}, {stride}padding={self.padding}, {name_of(self.tile)})"

    def out_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`."""
        t, h, w = (
            (size + 2 * p - r) // s + 1
            for size, p, r, s in zip(shape[2:], self.padding, self.weight_shape[2:], self.stride, strict=True)
        )
        return shape[0], self.weight_shape[0], t, h, w

    def __call__(
        self,
        x: Tensor,
        out: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        relu: bool = False,
        second: Tensor | None = None,
    ) -> Tensor:
        """The convolution, + bias, + residual, then ReLU.

        Args:
            x: `(N, C, T, H, W)`, float32 on the CPU, best in `torch.channels_last_3d`: copied otherwise.
            out: where the result goes: of its shape, in `torch.channels_last_3d`.
            residual: added before ReLU: like the result, or with one frame for all; may be `out`.
            relu: whether ReLU follows.
            second: `(N, C2, T, H, W)`, taken for concatenated to x along the channels.

        Returns:
            `(N, O, T', H', W')` in `torch.channels_last_3d`: `out` where it was given.

        Raises:
            ConfigError: Shapes, dtypes or layouts that don't fit.
        """
        shape = self.out_shape(x.shape)
        self._check(x, second, residual, out, shape)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if second is not None:
            second = second.contiguous(memory_format=torch.channels_last_3d)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last_3d)
        if out is None:
            out = torch.empty(shape, memory_format=torch.channels_last_3d)
        if out.numel() == 0:
            return out
        threads = torch.get_num_threads()
        block, shared = self._blocks(shape, threads)
        native.kernels().fast_conv(
            x.shape[0],
            tuple(x.shape[2:]),
            shape[2:],
            self.tile,
            self.weight_shape[2:],
            self.padding,
            (x.shape[1], 0 if second is None else second.shape[1]),
            shape[1],
            self.stride == STRIDED,
            block,
            shared,
            (native.address(x), native.address(second)),
            native.address(self.packed),
            native.address(self.time_in),
            native.address(self.time_out),
            native.address(self.bias),
            native.address(residual),
            residual is not None and residual.shape[2] != shape[2],
            relu,
            native.address(out),
            threads,
        )
        return out

    def _blocks(self, shape: Sequence[int], threads: int) -> tuple[tuple[int, int], bool]:
        """What is worked on at a time, see `FastConv` in cpu.h: tiles in time and of the plane; shared or not."""
        frames, height, width = (-(-s // m) for s, m in zip(shape[2:], self.tile, strict=True))
        tiles = height * width
        o, c, taps = self.weight_shape[:3]
        in_time, *plane = (m + 2 if m > 1 else 1 for m in self.tile)
        points = math.prod(plane) if self.stride == ONCE else 81
        weights = 4 * points * o * c * (taps if self.tile[0] == 1 else in_time)
        large = weights > LARGE_WEIGHTS
        # Few rows leave the cache room for the weights; where those don't fit, many rows make up for it.
        if points == 1:
            rows = 56
        elif points == 36 and 4 * points * o * c < SMALL_WEIGHTS:
            rows = 28
        else:
            rows = 112 if large else 56
        block_tiles = -(-tiles // max(1, round(tiles / rows)))
        blocks_in_time = -(-frames // max(1, rows // block_tiles))
        block_frames = -(-frames // blocks_in_time)
        blocks = shape[0] * blocks_in_time * -(-tiles // block_tiles)
        return (block_frames, block_tiles), large or (blocks < 4 * threads and blocks % threads != 0)

    def _check(
        self, x: Tensor, second: Tensor | None, residual: Tensor | None, out: Tensor | None, shape: Sequence[int]
    ) -> None:
        if self.columns != native.kernels().gemm_packed_size(1, 1):
            raise ConfigError("these weights were packed for another instruction set: pack them again after `use_isa`")
        if not native.takes(x, second, residual, out):
            raise ConfigError(f"the native fast convolution takes float32 on the CPU; got {x.dtype} on {x.device}")
        channels = x.shape[1] + (0 if second is None else second.shape[1])
        if x.ndim != 5 or channels != self.weight_shape[1] or min(shape[2:]) < 1:
            raise ConfigError(
                f"{self!r} takes (N, {self.weight_shape[1]}, T, H, W) no smaller than its kernel; got {tuple(x.shape)}"
                + (f" and {tuple(second.shape)}" if second is not None else "")
            )
        if second is not None and (second.shape[0], *second.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ConfigError(f"second must be like x {tuple(x.shape)} but for its channels; got {tuple(second.shape)}")
        if residual is not None and tuple(residual.shape) not in (tuple(shape), (*shape[:2], 1, *shape[3:])):
            raise ConfigError(f"residual must be {tuple(shape)}, or have one frame; got {tuple(residual.shape)}")
        if out is not None and (
            tuple(out.shape) != tuple(shape) or not out.is_contiguous(memory_format=torch.channels_last_3d)
        ):
            raise ConfigError(
                f"out must be {tuple(shape)} in torch.channels_last_3d; got {tuple(out.shape)}, strides {out.stride()}"
            )
