"""Any net's dense 3D convolutions, turned into Fully Separable Blocks (arXiv 1905.13388)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from lean3d.blocks.conv import Conv3d
from lean3d.blocks.counting import Cost, count
from lean3d.blocks.fsb import FullySeparableBlock
from lean3d.errors import ConfigError

Where = str | Callable[[str, nn.Conv3d], bool]


@dataclass(frozen=True)
class Converted:
    """A convolution that is a Fully Separable Block now."""

    name: str
    """The module's name."""
    kernel: tuple[int, ...]
    """Kernel size in time, height, width."""
    weights_before: int
    weights_after: int


@dataclass(frozen=True)
class LeftAlone:
    """A 3D convolution that is as it was."""

    name: str
    """The module's name."""
    reason: str
    """Why."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_to_fsb` did; `print` shows it as a table."""

    converted: tuple[Converted, ...]
    left_alone: tuple[LeftAlone, ...]
    weights_before: int
    """All parameters of the net."""
    weights_after: int
    cost_before: Cost | None
    """Work before, where an input shape was given."""
    cost_after: Cost | None

    def __str__(self) -> str:
        lines = [f"weights {self.weights_before:,} -> {self.weights_after:,}"]
        if self.cost_before and self.cost_after:
            before, after = self.cost_before, self.cost_after
            lines.append(f"MACs {before.macs:,} -> {after.macs:,}")
            lines.append(
                f"multiplications by the fast algorithm {before.multiplications:,} -> {after.multiplications:,}"
            )
        for done in self.converted:
            kernel = "x".join(map(str, done.kernel))
            lines.append(f"  {done.name}: {kernel}, weights {done.weights_before:,} -> {done.weights_after:,}")
        lines += [f"  {left.name}: left alone ({left.reason})" for left in self.left_alone]
        return "\n".join(lines)


def convert_to_fsb(
    model: nn.Module,
    *,
    expansion: float = 1.0,
    where: Where | None = None,
    norm: Collection[str] = ("temporal", "depthwise"),
    activation: Collection[str] = ("temporal", "depthwise"),
    input_shape: Sequence[int] | None = None,
) -> ConversionReport:
    """Replace the dense 3D convolutions of a net, ours or anyone's, by Fully Separable Blocks with fresh weights.

    Stride, padding ("same" too, also where that is one more at the end), dilation and groups carry over, and so do
    device, dtype and training mode, so the net's shapes stay what they were. The block's last step has neither
    normalisation nor activation: those that follow the convolution in the net now follow the block. It has a bias
    where the convolution had one.

    The new weights are not fitted to the old ones: train the net.

    Args:
        model: the net, changed in place.
        expansion: alpha of the blocks.
        where: which convolutions: a pattern on their names, such as ``"layer4.*"``, or a function of name and
            module. By default all that span time and plane (K x R x S, K > 1); those in the plane alone (1 x R x S)
            are converted where they are asked for so. Pointwise, temporal and depthwise kernels have nothing to take
            apart and are always left alone; so are transposed convolutions.
        norm, activation: the steps with batch normalisation and with ReLU, as in `FullySeparableBlock`.
        input_shape: of the net's input; then the report has the work before and after.

    Raises:
        ConfigError: A chosen convolution can't be taken over as it is; names it and says why. The net is unchanged.
    """
    if isinstance(model, nn.Conv3d):
        raise ConfigError("the net is itself a convolution, which can't be replaced in place: put it in nn.Sequential")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ConfigError("the net has lazy modules, whose shapes aren't known yet: run it once before")
    replacements: dict[int, nn.Module] = {}
    converted, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.ConvTranspose3d):
            left.append(LeftAlone(name, "transposed"))
        if not isinstance(module, nn.Conv3d):
            continue
        reason = _reason_to_leave(name, module, where)
        if reason:
            left.append(LeftAlone(name, reason))
            continue
        _refuse_what_does_not_carry_over(name, module)
        block = replacements[id(module)] = _separable(module, expansion, norm, activation)
        converted.append(Converted(name, module.kernel_size, _weights(module), _weights(block)))

    weights_before = _weights(model)
    cost_before = count(model, input_shape) if input_shape else None
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[child_name] = replacements[id(child)]
    return ConversionReport(
        tuple(converted),
        tuple(left),
        weights_before,
        _weights(model),
        cost_before,
        count(model, input_shape) if input_shape else None,
    )


def _reason_to_leave(name: str, conv: nn.Conv3d, where: Where | None) -> str | None:
    k, r, s = conv.kernel_size
    if r * s == 1:
        return "pointwise" if k == 1 else "temporal"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "depthwise"
    if where is None:
        return "planar" if k == 1 else None
    chosen = fnmatch.fnmatchcase(name, where) if isinstance(where, str) else where(name, conv)
    return None if chosen else "not chosen"


def _refuse_what_does_not_carry_over(name: str, conv: nn.Conv3d) -> None:
    problem = None
    if conv.padding_mode != "zeros":
        problem = f"pads with {conv.padding_mode!r}, a FullySeparableBlock with zeros"
    elif parametrize.is_parametrized(conv) or conv._forward_pre_hooks or conv._forward_hooks:
        problem = "has parametrizations or hooks (weight norm, pruning, ...): remove them before"
    elif type(conv).forward not in (nn.Conv3d.forward, Conv3d.forward):
        problem = f"is a {type(conv).__name__}, whose forward is not that of nn.Conv3d"
    if problem:
        raise ConfigError(f"{name} {problem}; or leave it out with where=lambda name, conv: name != {name!r}")


def _separable(conv: nn.Conv3d, expansion: float, norm: Collection[str], activation: Collection[str]) -> nn.Module:
    padding, uneven = _padding(conv)
    with torch.device(conv.weight.device):
        block: nn.Module = FullySeparableBlock(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            expansion=expansion,
            norm=norm,
            activation=activation,
            bias=conv.bias is not None,
        )
    if uneven:
        block = nn.Sequential(nn.ConstantPad3d(uneven, 0.0), block)
    return block.to(conv.weight.dtype).train(conv.training)


def _padding(conv: nn.Conv3d) -> tuple[tuple[int, int, int], tuple[int, int, int, int, int, int] | None]:
    """Padding on both sides in time, height, width; and, where the sides differ, all of it in `F.pad`'s order."""
    if not isinstance(conv.padding, str):
        return conv.padding, None  # type: ignore[return-value]
    if conv.padding == "valid":
        return (0, 0, 0), None
    total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if all(n % 2 == 0 for n in total):
        return (total[0] // 2, total[1] // 2, total[2] // 2), None
    (t0, t1), (h0, h1), (w0, w1) = ((n // 2, n - n // 2) for n in total)
    return (0, 0, 0), (w0, w1, h0, h1, t0, t1)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
