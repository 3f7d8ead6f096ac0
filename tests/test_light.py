"""Light nets: what they weigh against the nets that they stand for, and the Temporal Residual Gradient's places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lean3d.blocks import (
    FullySeparableBlock,
    SmallBigUnit,
    TemporalResidualGradient,
    TRGPlaces,
    bottleneck,
    fsb_basic,
    fsb_bottleneck,
    trg_places,
)
from lean3d.errors import ConfigError
from lean3d.models import cost, create_model

LIGHT = ("c3d_light", "r3d_18_light", "slow_r50_light", "slowfast_r50_light")
SMALL = {"width": 0.125, "num_classes": 3, "num_frames": 8, "dropout": 0.0}


def counted(name, **arguments):
    with torch.device("meta"):
        return cost(create_model(name, **arguments))


# The paper's headline: against C3D 7.4 times fewer weights and 11.0 times less work, against SlowFast 2.3 and 3.6.
# Counted are whole nets with 400 classes at their own clip; work is the multiply-accumulates of the net that is
# compared with, against the light net's multiplications by the fast algorithm (F(2, r) or F(4, r), tiles rounded up).
@pytest.mark.parametrize(
    ("light", "full", "weights", "work"),
    [("c3d_light", "c3d", 7.4, 11.0), ("slowfast_r50_light", "slowfast_r50", 2.3, 3.6)],
)
def test_headline_counts(light, full, weights, work):
    small, large = counted(light), counted(full)
    assert large.weights / small.weights >= weights
    assert large.macs / small.multiplications >= work


def test_what_is_compared_with_is_the_papers():
    slowfast, c3d = counted("slowfast_r50"), counted("c3d")
    assert (f"{slowfast.weights / 1e6:.2f}", f"{slowfast.macs / 1e9:.2f}") == ("34.57", "50.31")
    assert f"{c3d.macs / 1e9:.2f}" == "38.50"


@pytest.mark.parametrize(("light", "full"), [("r3d_18_light", "r3d_18"), ("slow_r50_light", "slow_r50")])
def test_light_nets_are_light(light, full):
    small, large = counted(light), counted(full)
    assert small.weights * 2 < large.weights
    assert small.multiplications * 2 < large.multiplications


def test_a_light_bottleneck_at_a_quarter_is_the_bottleneck_with_a_depthwise_middle():
    light, full = fsb_bottleneck(64, 16, 64, time=3, expansion=0.25), bottleneck(64, 16, 64, time=3)
    (unit,) = light.units
    assert unit.temporal.weight.shape == full.units[0].conv.weight.shape
    assert unit.pointwise.weight.shape == full.units[2].conv.weight.shape
    assert unit.depthwise.weight.shape == (16, 1, 1, 3, 3)
    light.eval()
    x = torch.randn(1, 64, 4, 6, 6)
    assert torch.equal(light(x), (unit(x) + x).relu())


def test_a_light_basic_block_strides_in_time_too():
    block = fsb_basic(4, 8, 8, stride=2).eval()
    x = torch.randn(1, 4, 5, 7, 6)
    first, second = block.units
    assert block(x).shape == (1, 8, 3, 4, 3)
    assert torch.equal(block(x), (second(first(x).relu()) + block.shortcut(x)).relu())


def gradients(module):
    return [m for m in module.modules() if isinstance(m, TemporalResidualGradient)]


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("mode", ["replace", "beside"])
@pytest.mark.parametrize("trg", ["none", "input", "stage2", "blocks", "input, stage4, blocks"])
def test_the_gradient_sits_where_it_is_told(name, mode, trg):
    model = create_model(name, trg=trg, trg_mode=mode, **SMALL)
    plain = create_model(name, trg="none", **SMALL)
    pathways = 2 if "slowfast" in name else 1
    blocks = {"c3d_light": 8, "r3d_18_light": 8, "slow_r50_light": 16, "slowfast_r50_light": 32}[name]
    assert len(gradients(model.stem)) == pathways * ("input" in trg)
    assert len(gradients(model)) == pathways * (("input" in trg) + ("stage" in trg)) + blocks * ("blocks" in trg)
    assert all(module.beside == (mode == "beside") for module in gradients(model))
    weights = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert (weights[0] > weights[1]) == (mode == "beside" and trg != "none")
    loss = model(torch.randn(2, 3, 8, 32, 32)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_beside_keeps_the_frames_and_adds_the_gradient():
    x = torch.randn(1, 3, 5, 4, 4)
    both = TemporalResidualGradient(beside=True)(x)
    assert torch.equal(both, torch.cat((x, TemporalResidualGradient()(x)), 1))


def test_the_gradient_in_a_block_leaves_the_shortcut_alone():
    block = fsb_bottleneck(8, 4, 8, trg=TRGPlaces(frozenset({"blocks"}))).eval()
    (unit,) = block.units
    assert isinstance(unit, nn.Sequential) and isinstance(unit[1], FullySeparableBlock)
    x = torch.randn(1, 8, 4, 5, 5)
    assert torch.equal(block(x), (unit[1](TemporalResidualGradient()(x)) + x).relu())


def test_light_c3d_has_big_views_where_it_is_told():
    plain = create_model("c3d_light", **SMALL)
    model = create_model("c3d_light", big_view="temporal, pointwise", **SMALL)
    units = [m for m in model.modules() if isinstance(m, SmallBigUnit)]
    assert len(units) == 2 * 8 and cost(model).multiplications > cost(plain).multiplications
    x = torch.randn(2, 3, 8, 32, 32)
    model(x).square().sum().backward()
    assert all(unit.big_bn.weight.grad.abs().sum() > 0 for unit in units)
    with pytest.raises(ConfigError, match=r"big_view must be none or some of temporal, depthwise, pointwise.*'middle'"):
        create_model("c3d_light", big_view="middle", **SMALL)


def test_dense_c3d_takes_the_gradient_to_compare_with():
    plain, model = (create_model("c3d", trg=trg, **SMALL).eval() for trg in ("none", "input"))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 32, 32)
    assert torch.equal(model(x), plain(TemporalResidualGradient()(x)))


def test_light_c3d_with_a_dense_first_layer_takes_the_gradient_too():
    for trg, mode in (("none", "replace"), ("stage1", "beside")):
        model = create_model("c3d_light", stem="conv", trg=trg, trg_mode=mode, **SMALL)
        assert model(torch.randn(1, 3, 8, 32, 32)).shape == (1, 3)
        assert len(gradients(model.stages[0])) == (trg == "stage1")


@pytest.mark.parametrize("stem", ["separable", "conv"])
@pytest.mark.parametrize("shrink", ["pool", "stride"])
@pytest.mark.parametrize("layers, halve_time_from", [(8, 2), (8, 4), (5, 3), (5, 6)])
def test_light_c3d_shrinks_where_it_is_told(stem, shrink, layers, halve_time_from):
    model = create_model("c3d_light", stem=stem, shrink=shrink, layers=layers, halve_time_from=halve_time_from, **SMALL)
    blocks = [m for m in model.modules() if isinstance(m, FullySeparableBlock)]
    assert len(blocks) == layers - (stem == "conv")
    x, frames = torch.randn(2, 3, 8, 32, 48), 8
    for number, stage in enumerate(model.stages, 1):
        x = stage(x)
        frames = -(-frames // 2) if number >= halve_time_from else frames
        assert x.shape[2:] == (frames, -(-32 // 2**number), -(-48 // 2**number))
    x.square().sum().backward()
    assert all(p.grad is not None for p in model.stages.parameters())
    strided = any(block.depthwise.stride != (1, 1, 1) for block in blocks)
    assert strided == (shrink == "stride")


@pytest.mark.parametrize(
    ("argument", "value"), [("stem", "dense"), ("layers", 6), ("shrink", "max"), ("halve_time_from", 1)]
)
def test_light_c3d_refuses_what_it_has_not(argument, value):
    with pytest.raises(ConfigError, match=f"{argument} must be one of .*; got {value!r}"):
        create_model("c3d_light", **{argument: value})


@pytest.mark.parametrize(
    ("trg", "mode", "message"),
    [("stage5", "replace", "input, stage1, .*stage4, blocks.*got 'stage5'"), ("input", "add", "replace or beside")],
)
def test_unknown_places_are_refused(trg, mode, message):
    with pytest.raises(ConfigError, match=message):
        trg_places(trg, mode, 4)
