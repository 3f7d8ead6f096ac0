"""Nets as users write them, whose dense 3D convolutions become Fully Separable Blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lean3d.blocks import FullySeparableBlock, convert_to_fsb
from lean3d.errors import ConfigError
from lean3d.models import create_model


def vgg():
    layers = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv3d(before, after, 3, padding="same"), nn.BatchNorm3d(after), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5))


class Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(after)
        self.conv2 = nn.Conv3d(after, after, 3, padding=2, dilation=2, groups=2, bias=False)
        self.norm2 = nn.BatchNorm3d(after)
        self.shortcut = nn.Conv3d(before, after, 1, stride)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet():
    stem = nn.Conv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3))
    return nn.Sequential(stem, Residual(8, 16, (2, 2, 2)), Residual(16, 16, 1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Conv3d(1, 8, 3, padding=1)
        self.down = nn.Conv3d(8, 16, 2, stride=2)
        self.up = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.out = nn.Conv3d(16, 2, 3, padding=1)

    def forward(self, x):
        x = self.inside(x).relu()
        return self.out(torch.cat((x, self.up(self.down(x).relu())), 1))


@pytest.mark.parametrize(
    ("build", "shape", "names", "left"),
    [
        (vgg, (2, 3, 8, 16, 16), ["0.0", "0.4", "0.8"], {}),
        (
            resnet,
            (2, 3, 5, 33, 32),
            ["0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"],
            {"1.shortcut": "pointwise", "2.shortcut": "pointwise"},
        ),
        (UNet, (2, 1, 4, 8, 8), ["inside", "down", "out"], {"up": "transposed"}),
    ],
)
def test_nets_keep_their_shapes_and_learn(build, shape, names, left):
    model = build()
    x = torch.randn(shape)
    before = model(x).shape
    report = convert_to_fsb(model, expansion=0.5, input_shape=shape)
    assert [done.name for done in report.converted] == names
    assert {kept.name: kept.reason for kept in report.left_alone} == left
    for name in names:
        assert isinstance(model.get_submodule(name), FullySeparableBlock)
    assert model(x).shape == before
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert report.weights_after == sum(p.numel() for p in model.parameters()) == report.cost_after.weights
    assert report.weights_after < report.weights_before
    assert report.cost_after.multiplications < report.cost_before.multiplications < report.cost_before.macs
    assert all(done.weights_after < done.weights_before for done in report.converted)
    assert f"{names[0]}: " in str(report) and "multiplications" in str(report)


def test_the_block_stands_where_the_convolution_stood():
    model = resnet().double().eval()
    convert_to_fsb(model, expansion=0.5)
    first, second = model[1].conv1, model[1].conv2
    assert (first.temporal.stride, first.depthwise.stride) == ((2, 1, 1), (1, 2, 2))
    assert (second.temporal.dilation, second.depthwise.dilation) == ((2, 1, 1), (1, 2, 2))
    assert (second.temporal.padding, second.depthwise.padding) == ((2, 0, 0), (0, 2, 2))
    assert (second.temporal.groups, second.depthwise.groups, second.pointwise.groups) == (2, 8, 2)
    assert first.pointwise.bias is None and len(first.after_pointwise) == 0
    assert model[0].pointwise.bias is not None
    assert not first.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.device("meta"):
        ghost = resnet()
    convert_to_fsb(ghost)
    assert {p.device.type for p in ghost.parameters()} == {"meta"}


@pytest.mark.parametrize("kernel", [(2, 3, 3), (3, 4, 2), (3, 3, 3)])
@pytest.mark.parametrize("dilation", [1, (1, 2, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name_keeps_every_place(kernel, dilation, padding):
    """A dense kernel made of the block's own is the same function, at the borders too."""
    model = nn.Sequential(nn.Conv3d(2, 2, kernel, padding=padding, dilation=dilation, bias=False))
    conv = model[0]
    convert_to_fsb(model, norm=(), activation=())
    block = next(m for m in model.modules() if isinstance(m, FullySeparableBlock))
    with torch.no_grad():
        along_time = block.temporal.weight[:, :, :, 0, 0].diagonal().T  # channel by channel
        block.temporal.weight *= torch.eye(2)[:, :, None, None, None]
        mix, plane = block.pointwise.weight.flatten(1), block.depthwise.weight[:, 0, 0]
        conv.weight.copy_(torch.einsum("nc,ct,chw->ncthw", mix, along_time, plane))
    x = torch.randn(1, 2, 5, 7, 8)
    torch.testing.assert_close(model(x), conv(x))


def test_where_chooses():
    by_pattern, by_function = vgg(), vgg()
    report = convert_to_fsb(by_pattern, where="0.[48]")
    assert [done.name for done in report.converted] == ["0.4", "0.8"]
    assert [(kept.name, kept.reason) for kept in report.left_alone] == [("0.0", "not chosen")]
    report = convert_to_fsb(by_function, where=lambda name, conv: conv.in_channels > 8)
    assert [done.name for done in report.converted] == ["0.8"]


def test_flat_kernels_are_left_alone_but_planar_ones_can_be_asked_for():
    model = create_model("slow_r50", width=0.125, num_classes=3)
    report = convert_to_fsb(model)
    assert not report.converted
    assert {kept.reason for kept in report.left_alone} == {"planar", "pointwise", "temporal"}
    report = convert_to_fsb(model, where="stages.3.*.units.1.conv", expansion=0.5)
    assert len(report.converted) == 3
    assert all(done.kernel == (1, 3, 3) for done in report.converted)
    assert model(torch.randn(1, 3, 2, 32, 32)).shape == (1, 3)


def test_a_shared_convolution_is_one_block():
    conv = nn.Conv3d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Conv3d(4, 4, 3, groups=4))
    report = convert_to_fsb(model)
    assert len(report.converted) == 1
    assert model[0] is model[2] is not conv
    assert report.left_alone[0].reason == "depthwise"


class Odd(nn.Conv3d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"), "part.1 pads with 'reflect'"),
        (nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 3)), "part.1 has parametrizations"),
        (Odd(4, 4, 3), "part.1 is a Odd"),
    ],
)
def test_what_does_not_carry_over_is_refused_by_name(conv, message):
    model = nn.Module()
    model.part = nn.Sequential(nn.Conv3d(4, 4, 3), conv)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        convert_to_fsb(model)
    assert isinstance(model.part[0], nn.Conv3d)
    report = convert_to_fsb(model, where=lambda name, conv: name != "part.1")
    assert [done.name for done in report.converted] == ["part.0"]


def test_a_bare_convolution_is_refused():
    with pytest.raises(ConfigError, match="itself a convolution"):
        convert_to_fsb(nn.Conv3d(4, 4, 3))


def test_a_net_without_shapes_is_refused():
    with pytest.raises(ConfigError, match="lazy modules"):
        convert_to_fsb(nn.Sequential(nn.LazyConv3d(4, 3)))
