"""SmallBigNet's blocks and nets by name, and what each name stands for."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lean3d.blocks import BlockPlan, ConvBN, SmallBigExtra, SmallBigUnit, block_plan, smallbig_bottleneck
from lean3d.errors import ConfigError
from lean3d.models import cost, create_model, model_from_spec

SMALL = {"width": 0.125, "num_classes": 5, "num_frames": 4}


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("a", BlockPlan()),
        ("b", BlockPlan(time=3)),
        ("c", BlockPlan((None, (3, 3, 3), None))),
        ("e", BlockPlan(((3, 3, 3), (3, 3, 3), (None, 3, 3)))),
        ("f", BlockPlan(((3, 3, 3), (3, 3, 3), (None, 3, 3)), extra=True)),
        ("-, 3x3x3, -", BlockPlan((None, (3, 3, 3), None))),
        ("1x3x3,3x1x1,Tx1x1", BlockPlan(((1, 3, 3), (3, 1, 1), (None, 1, 1)))),
        ("5 x 5 x 5, -, T x H x W + extra", BlockPlan(((5, 5, 5), None, (None, None, None)), extra=True)),
    ],
)
def test_plans_from_text(text, plan):
    assert block_plan(text) == plan


def test_plans_of_basic_blocks_have_two_windows():
    assert block_plan("-, Tx3x3", 2) == BlockPlan((None, (None, 3, 3)))
    with pytest.raises(ConfigError, match="2 windows such as '3x3x3, Tx3x3'"):
        block_plan("e", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g", "one of the letters a, b"),
        ("3x3x3", "3 windows"),
        ("-, 2x3x3, -", "odd sizes"),
        ("-, Hx3x3, -", "odd sizes"),
        ("-, 3x3, -", "odd sizes"),
        ("-, -, - + more", "3 windows"),
    ],
)
def test_plans_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        block_plan(text)


def units(model, stage):
    return [type(unit) for unit in model.stages[stage][0].units]


def test_a_net_has_the_units_that_its_block_names():
    assert units(create_model("smallbig23", **SMALL), 1) == [SmallBigUnit] * 3
    one = create_model("smallbig23", block="c", stages="res4,res5", **SMALL)
    assert [units(one, stage) for stage in (0, 1)] == [[ConvBN] * 3] * 2
    assert [units(one, stage) for stage in (2, 3)] == [[ConvBN, SmallBigUnit, ConvBN]] * 2
    every = create_model("smallbig23", stages="res2, res3, res4, res5", **SMALL)
    assert units(every, 0) == [SmallBigUnit] * 3
    assert units(create_model("smallbig18", block="-, Tx3x3", **SMALL), 3) == [ConvBN, SmallBigUnit]
    with pytest.raises(ConfigError, match="stages must be some of res2"):
        create_model("smallbig23", stages="res6", **SMALL)


def test_blocks_a_and_b_are_the_baselines():
    clip = torch.randn(1, 3, 4, 32, 32)
    for block, name in (("a", "c2d_r50"), ("b", "slow_r50")):
        model = create_model("smallbig50", block=block, stages="res4, res5", **SMALL).eval()
        baseline = create_model(name, **SMALL).eval()
        baseline.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(clip), baseline(clip))


@pytest.mark.parametrize("window", ["1x3x3", "3x1x1", "3x3x3", "5x5x5", "Tx1x1", "Tx3x3", "TxHxW"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("shared", [True, False])
def test_every_window_runs_and_learns_at_any_length(window, pooling, shared):
    model = create_model(
        "smallbig23", block=f"{window}, {window}, {window}", pooling=pooling, shared=shared, stages="res5", **SMALL
    )
    model.head.dropout.p = 0.0
    for module in model.modules():
        if isinstance(module, SmallBigUnit):
            nn.init.constant_(module.big_bn.weight, 0.5)
    for frames in (1, 4, 5):
        assert model(torch.randn(2, 3, frames, 48, 40)).shape == (2, 5)
    model(torch.randn(2, 3, 4, 48, 40)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_views_that_share_no_convolution_have_their_own_weights():
    def weights(**arguments):
        with torch.device("meta"):
            return cost(create_model("smallbig50", **arguments)).weights

    big_convs = sum(
        module.conv.weight.numel()
        for module in create_model("smallbig50").modules()
        if isinstance(module, SmallBigUnit)
    )
    assert weights(shared=False) - weights() == big_convs


def test_the_attention_is_its_formula():
    extra = SmallBigExtra(8).eval()
    torch.manual_seed(0)
    for tensor in (extra.expand.bn.weight, extra.expand.bn.bias, extra.expand.bn.running_mean):
        nn.init.normal_(tensor)
    x = torch.randn(2, 8, 3, 5, 4)
    narrow = F.conv3d(x, extra.reduce.weight)
    gate = F.conv3d(F.adaptive_max_pool3d(x, 1), extra.reduce.weight).sigmoid()
    expected = x + extra.expand.bn(F.conv3d(narrow * gate, extra.expand.conv.weight))
    assert extra.reduce.weight.shape[:2] == (2, 8)
    assert_close(extra(x), expected)
    assert torch.equal(SmallBigExtra(8)(x), x)


def test_the_attention_stands_before_block_and_shortcut():
    torch.manual_seed(0)
    block = smallbig_bottleneck(8, 4, 16, stride=2, extra=True).eval()
    nn.init.normal_(block.before.expand.bn.weight)
    x = torch.randn(1, 8, 4, 6, 6)
    without = smallbig_bottleneck(8, 4, 16, stride=2).eval()
    without.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("before.")})
    assert_close(block(x), without(block.before(x)))


def test_arguments_are_plain_and_rebuild_the_net():
    model = create_model("smallbig23", block="-, 3x3x3, Tx1x1 + extra", pooling="average", shared=False, **SMALL)
    again = model_from_spec(json.loads(json.dumps(model.spec)))
    again.load_state_dict(model.state_dict())
    clip = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(model.eval()(clip), again.eval()(clip))


@pytest.mark.parametrize(
    ("name", "options", "sees"),
    [
        ("smallbig18", {}, False),
        ("smallbig23", {}, False),
        ("smallbig50_extra", {}, False),
        ("smallbig23", {"pooling": "average", "shared": False}, False),
        ("smallbig18", {"trg": "input"}, True),
        ("smallbig18", {"trg": "stage2"}, True),
        ("smallbig23", {"block": "b"}, True),
        ("slow_r18", {}, True),
    ],
)
def test_units_alone_do_not_see_the_direction_of_time(name, options, sees):
    torch.manual_seed(0)
    net = create_model(name, **{**SMALL, "num_frames": 8}, dropout=0.0, **options).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the big view's begin at zero
    clips = torch.randn(2, 3, 8, 64, 64, dtype=torch.float64)
    with torch.no_grad():  # as in training, since the first running statistics would let the scores explode
        forwards = net(clips)
        backwards = net(clips.flip(2))
        mixed = net(clips[:, :, [3, 0, 6, 1, 7, 4, 2, 5]])
    assert not torch.allclose(forwards, mixed, rtol=1e-3)
    assert torch.allclose(forwards, backwards, rtol=1e-6, atol=1e-9) is not sees


def test_a_gradient_in_every_block_is_refused():
    with pytest.raises(ConfigError, match="none, input or a stage"):
        create_model("smallbig18", **SMALL, trg="blocks")
