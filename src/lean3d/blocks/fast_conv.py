"""Convolution by the fast algorithm F(m, r): as a layer, and in the place of a net's other convolutions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from lean3d.blocks.conv import Conv3d, triple
from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple
from lean3d.ops.fast_conv import choose_backend, fast_conv3d, prepare_weight, resolve_tile
from lean3d.ops.fast_conv.reference import output_size

_steps = 0
"""Steps of all optimizers so far: fused ones change parameters without counting up their versions."""


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Prepared(NamedTuple):
    """A transformed weight, and what it was made of."""

    weight: Tensor
    made_for: tuple[Any, ...]
    value: Tensor


class FastConv3d(Conv3d):
    """`torch.nn.Conv3d` at stride 1 and dilation 1, computed by the fast algorithm (Lavin & Gray, CVPR 2016).

    Parameters, state dict and results are those of `torch.nn.Conv3d` and `lean3d.blocks.Conv3d`, but for rounding:
    docs/fast_algorithm.md says how much for each tile. Gradients are computed by the algorithm as well.

    In eval mode the weight is transformed once and kept until it changes (in place, by an optimizer, by loading, by a
    move to another device or dtype). What is kept is `(m + r - 1) / r` times the weight's size per axis and is no part
    of the state dict. PyTorch does not note changes through `weight.data`: after one call `train` and `eval` again.

    Args:
        in_channels, out_channels, kernel_size, padding, groups, bias, padding_mode, device, dtype: as in
            `torch.nn.Conv3d`; any kernel, any padding.
        stride, dilation: 1.
        tile: m of F(m, r) in time, height, width, or one number for all; 1 is direct on that axis. "auto" chooses
            for each input's size: few multiplications, small errors (`lean3d.ops.fast_conv.auto_tile`).

    Raises:
        ConfigError: A stride or a dilation above 1; a tile with an m below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple | str = 0,
        dilation: int | Triple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tile: int | Triple | str = "auto",
    ):
        for name, value in (("stride", stride), ("dilation", dilation)):
            if triple(value) != (1, 1, 1):
                raise ConfigError(f"FastConv3d computes {name} 1; got {name} {value}: use lean3d.blocks.Conv3d")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.tile = triple(tile) if isinstance(tile, int) else tile
        resolve_tile(self.tile, (1, 1, 1), self.kernel_size)  # refuses what is no tile
        self._prepared: _Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`, in `torch.channels_last_3d`."""
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))  # under autocast the weight is the wider one
        w0, w1, h0, h1, t0, t1 = self._reversed_padding_repeated_twice
        padding = (t0, h0, w0)
        if self.padding_mode != "zeros" or padding != (t1, h1, w1):  # even kernels with padding="same"
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0, 0)
        tile = resolve_tile(
            self.tile, output_size(x.shape, self.weight.shape, padding, self.groups), self.weight.shape[2:]
        )
        prepared = self._prepare(x, tile)
        return fast_conv3d(x, self.weight, self.bias, tile=tile, padding=padding, groups=self.groups, prepared=prepared)

    def _prepare(self, x: Tensor, tile: Triple) -> Tensor | None:
        """The transformed weight: kept in eval mode, None where the operator is to make it."""
        weight = self.weight
        if self.training or torch.compiler.is_compiling() or weight.is_meta or type(x) is not Tensor:
            return None  # what a tracer's tensors give is of no use later
        if weight.is_inference():
            return None  # has no version to tell that it changed
        backend = choose_backend("auto", x, weight, tile, self.groups)
        made_for = (_steps, weight._version, weight.data_ptr(), weight.device, x.dtype, tile, backend)
        kept = self._prepared
        if kept is not None and kept.weight is weight and kept.made_for == made_for:
            return kept.value
        value = prepare_weight(weight.to(x.dtype), tile=tile, groups=self.groups, backend=backend)
        self._prepared = _Prepared(weight, made_for, value)
        return value

    def train(self, mode: bool = True) -> FastConv3d:
        """As in `torch.nn.Module`; training mode drops the transformed weight."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> FastConv3d:
        self._prepared = None  # a move swaps the data below the same parameter
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the transformed weight."""
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{super().extra_repr()}, tile={self.tile}"


def use_fast_convs(model: nn.Module, *, tile: int | Triple | str = "auto") -> tuple[str, ...]:
    """Replace a net's 3D convolutions by `FastConv3d`, with the same parameters, where the algorithm applies.

    It applies at stride 1 and dilation 1 to kernels longer than 1 on some axis. Other convolutions, those with hooks or
    parametrizations, and subclasses with a forward of their own are left alone. Optimizers that hold the parameters
    stay valid, and so do checkpoints, in both directions.

    Args:
        model: the net, changed in place; give `copy.deepcopy(model)` to keep it.
        tile: as in `FastConv3d`.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ConfigError: A tile with an m below 1; the net is itself a convolution.
    """
    if isinstance(model, nn.Conv3d):
        raise ConfigError("the net is itself a convolution, which can't be replaced in place: put it in nn.Sequential")
    names, replacements = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d) and _applies(module):
            names.append(name)
            replacements[id(module)] = _fast(module, tile)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[child_name] = replacements[id(child)]
    return tuple(names)


def _applies(conv: nn.Conv3d) -> bool:
    altered = parametrize.is_parametrized(conv) or conv._forward_pre_hooks or conv._forward_hooks
    plain = type(conv) in (nn.Conv3d, Conv3d) and not altered
    return plain and conv.stride == conv.dilation == (1, 1, 1) and max(conv.kernel_size) > 1


def _fast(conv: nn.Conv3d, tile: int | Triple | str) -> FastConv3d:
    fast = FastConv3d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,  # type: ignore[arg-type]
        device="meta",
        tile=tile,
    )
    fast.weight, fast.bias = conv.weight, conv.bias
    return fast.train(conv.training)
