"""The fast convolution in plain PyTorch: the answer, and how it comes about, for any tile.

An axis with r taps is computed by F(m, r) of its own, and axes nest: F(2, 3) in time around F(4x4, 3x3) in the plane is
the tile (2, 4, 4). Each tile of inputs, (m + r - 1) places long on each axis, becomes as many numbers per channel;
at each of these points the channels are mixed by a matrix product, and the inverse gives the tile of outputs:

    x (N, C, T, H, W)              pad, cut into overlapping tiles, B^T along each axis
      -> (points, tiles, C)        at each point (tiles, C) @ (C, O), the weights having been through G
      -> (points, tiles, O)        A^T along each axis, tiles side by side
      -> y (N, O, T', H', W')

m = 1 on an axis is the direct form there: its transforms are copies. The functions are made of differentiable
operators, so their gradients run through the transposed matrices: the algorithm's, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fast_conv.transforms import Transform, cook_toom


def fast_conv3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: Triple,
    padding: Triple = (0, 0, 0),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d` at stride 1 and dilation 1, by F(m, r) along each axis.

    Args:
        x: `(N, C, T, H, W)`, float32 or float64.
        weight: `(O, C / groups, K, R, S)`.
        bias: `(O,)` or None.
        tile: m in time, height, width, each 1 or more; 1: direct on that axis.
        padding: with zeros, in time, height, width.
        groups: as in `torch.nn.Conv3d`.

    Returns:
        `(N, O, T', H', W')`.

    Raises:
        ConfigError: Shapes that don't fit together, or an empty output.
    """
    outputs = output_size(x.shape, weight.shape, padding, groups)
    y = transformed_conv3d(x, transform_weight(weight, tile), outputs, weight.shape[2:], tile, padding, groups)
    return y if bias is None else y + bias[:, None, None, None]


def output_size(shape: Sequence[int], weight_shape: Sequence[int], padding: Sequence[int], groups: int) -> Triple:
    """T', H', W' of the convolution.

    Raises:
        ConfigError: Shapes that don't fit together, or an empty output.
    """
    if len(shape) != 5 or len(weight_shape) != 5:
        raise ConfigError(
            f"fast_conv3d takes x (N, C, T, H, W) and weight (O, C / groups, K, R, S); "
            f"got {tuple(shape)} and {tuple(weight_shape)}"
        )
    if groups < 1 or shape[1] != weight_shape[1] * groups or weight_shape[0] % groups:
        raise ConfigError(
            f"x has {shape[1]} channels, and weight {tuple(weight_shape)} with groups={groups} takes "
            f"{weight_shape[1] * groups} to {weight_shape[0]}: x's channels must equal the former, groups divide both"
        )
    t, h, w = (size + 2 * p - r + 1 for size, p, r in zip(shape[2:], padding, weight_shape[2:], strict=True))
    if min(t, h, w) < 1 or min(padding) < 0:
        raise ConfigError(
            f"a kernel of {tuple(weight_shape[2:])} does not fit into {tuple(shape[2:])} with padding "
            f"{tuple(padding)}: the padding must be 0 or more, and the kernel no larger than the padded input"
        )
    return t, h, w


def transform_weight(weight: Tensor, tile: Sequence[int]) -> Tensor:
    """G along each axis: `(O, C / groups, K, R, S)` -> `(points, O, C / groups)`, time first among the points."""
    u = weight.permute(2, 3, 4, 0, 1)
    for axis, f in enumerate(_transforms(tile, weight.shape[2:])):
        if _changes(f):
            u = _along(f.tensors(weight.dtype, weight.device)[1], u, axis)
        else:
            u = u.expand(*(f.n if i == axis else -1 for i in range(5)))
    return u.flatten(0, 2)


def transformed_conv3d(
    x: Tensor,
    u: Tensor,
    outputs: Sequence[int],
    kernel: Sequence[int],
    tile: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution by weights that `transform_weight` gave.

    Args:
        x: `(N, C, T, H, W)`.
        u: `(points, O, C / groups)`.
        outputs, kernel: sizes in time, height, width.
        tile, padding, groups: as in `fast_conv3d_reference`.
    """
    transforms = _transforms(tile, kernel)
    v = _input_tiles(x, transforms, padding, outputs)  # (nt, nh, nw, N, tiles of T, of H, of W, C)
    flat = v.flatten(3, 6).flatten(0, 2).unflatten(2, (groups, -1))  # (points, tiles, groups, C / groups)
    u = u.unflatten(1, (groups, -1))  # (points, groups, O / groups, C / groups)
    if u.shape[3] == 1:  # one channel a group: nothing to sum
        y = flat * u.squeeze(3).unsqueeze(1)
    else:
        y = (flat.transpose(1, 2) @ u.transpose(2, 3)).transpose(1, 2)
    y = y.reshape(*v.shape[:7], u.shape[1] * u.shape[2])
    for axis, f in enumerate(transforms):
        if f.m * f.r > 1:
            y = _along(f.tensors(x.dtype, x.device)[0], y, axis)
    y = y.permute(3, 4, 0, 5, 1, 6, 2, 7)  # (N, tiles of T, mt, tiles of H, mh, tiles of W, mw, O)
    y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    t, h, w = outputs
    return y[:, :t, :h, :w].movedim(-1, 1)


def weight_gradient_reference(
    x: Tensor, gradient: Tensor, kernel: Sequence[int], tile: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Gradient of the weight, in the transformed domain: G^T of sum over tiles of (A gradient) (B^T x).

    As many products as the convolution has: m + r - 1 on an axis for each tile.

    Args:
        x: `(N, C, T, H, W)`, the convolution's input.
        gradient: `(N, O, T', H', W')`, of its output.
        kernel: K, R, S.
        tile, padding, groups: as in `fast_conv3d_reference`.

    Returns:
        `(O, C / groups, K, R, S)`.
    """
    transforms = _transforms(tile, kernel)
    outputs = gradient.shape[2:]
    v = _input_tiles(x, transforms, padding, outputs).flatten(3, 6).flatten(0, 2)
    dy = _output_tiles(gradient, transforms).flatten(3, 6).flatten(0, 2)
    du = torch.einsum("plgo,plgc->pgoc", dy.unflatten(2, (groups, -1)), v.unflatten(2, (groups, -1))).flatten(1, 2)
    du = du.unflatten(0, tuple(f.n for f in transforms))  # (nt, nh, nw, O, C / groups)
    for axis, f in enumerate(transforms):
        if f.m * f.r > 1:
            du = _along(f.tensors(x.dtype, x.device)[1].T, du, axis)
    return du.permute(3, 4, 0, 1, 2)


def _transforms(tile: Sequence[int], kernel: Sequence[int]) -> list[Transform]:
    """F(m, r) of each axis."""
    if len(tile) != 3 or min(tile) < 1:
        raise ConfigError(f"a tile is m in time, height, width, each 1 or more, such as (2, 4, 4); got {tuple(tile)}")
    return [cook_toom(m, r) for m, r in zip(tile, kernel, strict=True)]


def _changes(f: Transform) -> bool:
    """Whether B^T and G are more than copies."""
    return f.m > 1 and f.r > 1


def _along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """The matrix `(a, b)` times the axis of x that has length b, for all else."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    y = torch.bmm(matrix.expand(before.numel(), -1, -1), x.reshape(before.numel(), x.shape[axis], after.numel()))
    return y.reshape(*before, len(matrix), *after)


def _windows(
    x: Tensor, transforms: Sequence[Transform], matrices: Sequence[Tensor | None], sizes: Sequence[int]
) -> Tensor:
    """Cut x `(N, C, T, H, W)` into windows of `sizes`, m apart, and multiply them by the matrix of each axis."""
    x = x.movedim(1, -1)
    for axis in (2, 1, 0):  # the last one first, so that the points come out in the order time, height, width
        x = x.unfold(axis - 4, sizes[axis], transforms[axis].m).movedim(-1, 0)
        if (matrix := matrices[axis]) is not None:
            x = _along(matrix, x, 0)
    return x


def _input_tiles(x: Tensor, transforms: Sequence[Transform], padding: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """B^T of every tile of inputs: `(N, C, T, H, W)` -> `(nt, nh, nw, N, tiles of T, of H, of W, C)`.

    Last tiles may lie partly outside; there they see zeros.
    """
    border = []
    for f, p, size in zip(reversed(transforms), reversed(padding), reversed(outputs), strict=True):
        border += [p, p + -size % f.m]
    matrices = [f.tensors(x.dtype, x.device)[2] if _changes(f) else None for f in transforms]
    return _windows(F.pad(x, border), transforms, matrices, [f.n for f in transforms])


def _output_tiles(gradient: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """A of every tile of an output's gradient: `(N, O, T', H', W')` -> `(nt, nh, nw, N, tiles of T, of H, of W, O)`."""
    border = []
    for f, size in zip(reversed(transforms), reversed(gradient.shape[2:]), strict=True):
        border += [0, -size % f.m]
    matrices = [f.tensors(gradient.dtype, gradient.device)[0].T if f.m * f.r > 1 else None for f in transforms]
    return _windows(F.pad(gradient, border), transforms, matrices, [f.m for f in transforms])
