"""Blocks against the formulas of their papers, written out plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lean3d.blocks import (
    Conv3d,
    FullySeparableBlock,
    SmallBigUnit,
    TemporalResidualGradient,
    basic,
    bottleneck,
    smallbig_basic,
    smallbig_bottleneck,
)
from lean3d.errors import ConfigError
from lean3d.ops import pool3d_reference


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BN statistics in float64, so that nothing is 0 or 1 by accident."""
    g = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=g, dtype=torch.float64) + 0.5
    return module.double()


def test_conv3d_has_the_weights_of_torch():
    ours, theirs = Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 3, 6, 6)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("expansion", [0.5, 1.0, 2.0])
def test_fully_separable_block_has_the_weights_of_the_paper(expansion):
    n, c, k, r, s = 16, 8, 3, 5, 7
    block = FullySeparableBlock(c, n, (k, r, s), expansion=expansion)
    a = int(expansion * n)
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv3d))
    assert weights == a * c * k + a * r * s + a * n
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv3d))


@pytest.mark.parametrize("stride", [1, 2, (2, 1, 1), (1, 2, 2), (1, 2, 1)])
def test_fully_separable_block_equals_its_three_convolutions(stride):
    block = randomise(FullySeparableBlock(4, 6, (3, 3, 5), stride=stride, expansion=0.5)).eval()
    x = torch.randn(2, 4, 5, 8, 7, dtype=torch.float64)
    st, sh, sw = (stride,) * 3 if isinstance(stride, int) else stride
    y = F.conv3d(x, block.temporal.weight, None, (st, 1, 1), (1, 0, 0))
    y = block.after_temporal[0](y).relu()
    y = F.conv3d(y, block.depthwise.weight, None, (1, sh, sw), (0, 1, 2), groups=3)
    y = block.after_depthwise[0](y).relu()
    y = block.after_pointwise[0](F.conv3d(y, block.pointwise.weight)).relu()
    assert_close(block(x), y)


def test_fully_separable_block_places_norm_and_activation_as_told():
    block = FullySeparableBlock(4, 4, norm=("pointwise",), activation=("temporal",))
    kinds = [
        [type(m).__name__ for m in part]
        for part in (block.after_temporal, block.after_depthwise, block.after_pointwise)
    ]
    assert kinds == [["ReLU"], [], ["BatchNorm3d"]]
    assert block.temporal.bias is not None and block.depthwise.bias is not None and block.pointwise.bias is None


@pytest.mark.parametrize("step", ["temporal", "depthwise", "pointwise"])
def test_a_step_of_a_fully_separable_block_has_a_big_view_through_its_own_weights(step):
    torch.manual_seed(0)
    block = FullySeparableBlock(4, 6, 3, stride=2, expansion=0.5, big_views={step: (3, 3, 3)})
    plain = FullySeparableBlock(4, 6, 3, stride=2, expansion=0.5)
    weights = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in block.parameters()) == weights + 2 * getattr(block, step).conv.out_channels
    unit = getattr(randomise(block).eval(), step)
    x = torch.randn(2, 4, 5, 8, 7, dtype=torch.float64)
    expected = x
    for name in ("temporal", "depthwise", "pointwise"):
        if name == step:
            view = F.max_pool3d(expected, 3, 1, 1)
            expected = (unit.bn(unit.conv(expected)) + unit.big_bn(unit.conv(view))).relu()
        else:
            expected = getattr(block, f"after_{name}")(getattr(block, name)(expected))
    assert_close(block(x), expected)


def test_a_fully_separable_block_starts_without_its_big_views():
    block = FullySeparableBlock(4, 6, big_views={"temporal": (3, 3, 3), "pointwise": (None, 3, 3)}).eval()
    x = torch.randn(2, 4, 5, 8, 7)
    y = block.temporal.bn(block.temporal.conv(x)).relu()
    y = block.after_depthwise(block.depthwise(y))
    assert_close(block(x), block.pointwise.bn(block.pointwise.conv(y)).relu())


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"expansion": 0},
        {"norm": ("first",)},
        {"activation": "temporal"},
        {"big_views": {"first": (3, 3, 3)}},
        {"big_views": {"temporal": (2, 3, 3)}},
        {"big_views": {"temporal": (3, 3, 3)}, "padding": 1},
        {"big_views": {"temporal": (3, 3, 3)}, "dilation": 2},
        {"big_views": {"temporal": (3, 3, 3)}, "norm": ("pointwise",)},
    ],
)
def test_fully_separable_block_refuses(arguments):
    with pytest.raises(ConfigError):
        FullySeparableBlock(4, 4, **arguments)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 4), t=st.integers(1, 9), size=st.integers(1, 5))
def test_temporal_residual_gradient_is_differences_and_mean(n, c, t, size):
    x = torch.randn(n, c, t, size, size, dtype=torch.float64)
    y = TemporalResidualGradient()(x)
    assert y.shape == x.shape
    for i in range(1, t):
        assert_close(y[:, :, i - 1], x[:, :, i] - x[:, :, i - 1])
    assert_close(y[:, :, -1], sum(x[:, :, i] for i in range(t)) / t)
    other = TemporalResidualGradient("mean_first")(x)
    assert torch.equal(other, torch.cat([y[:, :, -1:], y[:, :, :-1]], 2))


def test_temporal_residual_gradient_has_no_weights_and_passes_gradcheck():
    trg = TemporalResidualGradient()
    assert not list(trg.parameters())
    assert torch.autograd.gradcheck(trg, torch.randn(1, 2, 4, 2, 2, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ConfigError, match="mean_first"):
        TemporalResidualGradient("means_first")


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), ((1, 3, 3), 1), ((1, 3, 3), (1, 2, 2))])
@pytest.mark.parametrize("pool", [(3, 3, 3), (None, 3, 3), (None, 1, 1), (5, 5, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_smallbig_unit_is_its_formula(kernel, stride, pool, shared):
    unit = randomise(SmallBigUnit(4, 6, kernel, stride=stride, pool=pool, shared=shared)).eval()
    x = torch.randn(2, 4, 6, 8, 7, dtype=torch.float64)
    window = [x.shape[2] if pool[0] is None else pool[0], pool[1], pool[2]]
    pooled = F.max_pool3d(x, window, 1, [0 if pool[0] is None else pool[0] // 2, pool[1] // 2, pool[2] // 2])
    padding = [k // 2 for k in unit.conv.kernel_size]
    small = F.conv3d(x, unit.conv.weight, None, unit.conv.stride, padding)
    big_weight = (unit.conv if shared else unit.big_conv).weight
    big = F.conv3d(pooled, big_weight, None, unit.conv.stride, padding)
    assert_close(unit(x), unit.bn(small) + unit.big_bn(big))


@pytest.mark.parametrize("shape", [(2, 4, 6, 7, 5), (2, 4, 1, 7, 5), (2, 4, 6, 1, 1), (2, 1, 5, 4, 1), (3, 4, 1, 1, 6)])
@pytest.mark.parametrize("pool", [(3, 3, 3), (None, 3, 3), (None, None, None)])
@pytest.mark.parametrize("kernel", [1, (1, 3, 3), (3, 1, 1)])
def test_smallbig_unit_has_the_gradients_of_its_formula(kernel, pool, shape):
    """All gradients, in training mode: axes of length 1 have misled torch's batch norm about the memory layout."""
    unit = randomise(SmallBigUnit(shape[1], 6, kernel, pool=pool)).train()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=g, requires_grad=True)

    def formula(x):
        small = F.conv3d(x, unit.conv.weight, padding=unit.conv.padding)
        big = F.conv3d(pool3d_reference(x, pool), unit.conv.weight, padding=unit.conv.padding)
        norms = [
            F.batch_norm(z.contiguous(), None, None, bn.weight, bn.bias, True)
            for z, bn in ((small, unit.bn), (big, unit.big_bn))
        ]
        return norms[0] + norms[1]

    wanted = [x, unit.conv.weight, unit.bn.weight, unit.bn.bias, unit.big_bn.weight, unit.big_bn.bias]
    results = []
    for f in (unit, formula):
        y = f(x)
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        results.append([y, *torch.autograd.grad((y * weight).sum(), wanted)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


def test_smallbig_unit_starts_as_its_small_view_and_learns_the_big_one():
    unit = SmallBigUnit(4, 4, 1).train()
    x = torch.randn(2, 4, 4, 5, 5)
    assert_close(unit(x), unit.bn(unit.conv(x)))
    unit(x).square().sum().backward()
    assert unit.big_bn.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (5, 2, 9), (16, 8, 8)])
@pytest.mark.parametrize("block", [basic, bottleneck, smallbig_basic, smallbig_bottleneck])
def test_residual_blocks_take_any_length_and_size(block, shape):
    for stride in (1, 2):
        net = block(8, 4, 16, stride=stride)
        t, h, w = shape
        y = net.eval()(torch.randn(2, 8, t, h, w))
        assert y.shape == (2, 16, t, -(-h // stride), -(-w // stride))
