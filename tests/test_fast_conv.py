"""The fast algorithm against exact arithmetic and against torch's convolution: outputs, gradients, caches, errors."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lean3d.blocks import Conv3d, FastConv3d, use_fast_convs
from lean3d.blocks.counting import count, fast_multiplications
from lean3d.errors import BackendError, ConfigError
from lean3d.models import create_model
from lean3d.ops import native
from lean3d.ops.fast_conv import (
    auto_tile,
    choose_backend,
    cook_toom,
    fast_conv3d,
    fast_conv3d_reference,
    prepare_weight,
)
from lean3d.ops.fast_conv import op as fast_op


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize(("m", "r"), [*itertools.product(range(2, 7), range(2, 8)), (1, 1), (1, 3), (4, 1), (9, 9)])
def test_transforms_give_the_correlation_exactly(m, r):
    f = cook_toom(m, r)
    assert (len(f.at), len(f.at[0])) == (m, f.n)
    assert (len(f.g), len(f.g[0])) == (f.n, r)
    assert (len(f.bt), len(f.bt[0])) == (f.n, f.n)
    draw = random.Random(0)
    for _ in range(5):
        taps, inputs = ([Fraction(draw.randint(-9, 9)) for _ in range(size)] for size in (r, f.n))
        products = [a * b for a, b in zip(times(f.g, taps), times(f.bt, inputs), strict=True)]
        assert times(f.at, products) == [sum(inputs[i + j] * taps[j] for j in range(r)) for i in range(m)]


@pytest.mark.parametrize(("m", "r"), [*itertools.product(range(1, 7), range(1, 8))])
def test_transforms_of_data_are_exact_in_floats(m, r):
    f = cook_toom(m, r)
    for x in itertools.chain(*f.at, *f.bt):
        assert x.denominator & (x.denominator - 1) == 0
        assert Fraction(torch.tensor(float(x), dtype=torch.float32).item()) == x


# As printed by Lavin & Gray, arXiv 1509.09308
F23 = (
    [[1, 1, 1, 0], [0, 1, -1, -1]],
    [["1", "0", "0"], ["1/2", "1/2", "1/2"], ["1/2", "-1/2", "1/2"], ["0", "0", "1"]],
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
)
F43 = (
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    [
        ["1/4", "0", "0"],
        ["-1/6", "-1/6", "-1/6"],
        ["-1/6", "1/6", "-1/6"],
        ["1/24", "1/12", "1/6"],
        ["1/24", "-1/12", "1/6"],
        ["0", "0", "1"],
    ],
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
)


@pytest.mark.parametrize(("m", "known", "scale"), [(2, F23, 1), (4, F43, Fraction(3, 4))])
def test_transforms_are_the_published_ones_with_scaled_points(m, known, scale):
    """Points times a number: powers of it for each output, tap and input, and a factor for each product."""
    f = cook_toom(m, 3)
    at, g, bt = ([[Fraction(x) for x in row] for row in matrix] for matrix in known)
    for i in range(f.n):
        ours = ([row[i] for row in f.at], f.g[i], f.bt[i])
        theirs = ([row[i] for row in at], g[i], bt[i])
        product = Fraction(1)
        for mine, published, sign in zip(ours, theirs, (1, 1, -1), strict=True):
            scaled = [x * scale ** (sign * j) for j, x in enumerate(published)]
            first = next(j for j, x in enumerate(scaled) if x)
            factor = mine[first] / scaled[first]
            assert list(mine) == [factor * x for x in scaled]
            product *= factor
        assert product == 1


def test_transforms_as_tensors():
    f = cook_toom(4, 3)
    assert cook_toom(4, 3) is f
    at, g, bt = f.tensors(torch.float64)
    assert (at.shape, g.shape, bt.shape) == ((4, 6), (6, 3), (6, 6))
    assert g.dtype == torch.float64
    assert g[3, 1].item() == float(cook_toom(4, 3).g[3][1]) != 0
    assert [x.dtype for x in f.tensors()] == [torch.float32] * 3
    with pytest.raises(ConfigError, match=r"1 or more; got F\(0, 3\)"):
        cook_toom(0, 3)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(f, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, seed=1).to(y.dtype))


# kernel, tile, padding, groups (of 8 channels): 1D, 2D, nested, mixed, direct axes, padding beyond the kernel's
CONVOLUTIONS = [
    ((3, 1, 1), (2, 1, 1), (1, 0, 0), 1),
    ((3, 1, 1), (4, 1, 1), (1, 0, 0), 2),
    ((5, 1, 1), (6, 1, 1), (0, 0, 0), 1),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1),
    ((1, 3, 3), (1, 4, 4), (0, 1, 1), 8),
    ((1, 3, 3), (4, 4, 4), (2, 1, 1), 8),
    ((1, 5, 2), (1, 2, 6), (0, 4, 3), 4),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), 1),
    ((3, 3, 3), (2, 4, 4), (1, 1, 1), 1),
    ((3, 3, 3), (4, 4, 4), (1, 1, 1), 2),
    ((3, 3, 3), (1, 4, 4), (1, 1, 1), 4),
    ((3, 3, 3), (4, 1, 1), (0, 2, 5), 8),
    ((2, 4, 3), (3, 2, 6), (1, 0, 2), 2),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1),
    ((1, 1, 1), (1, 1, 1), (1, 0, 1), 1),
]


@pytest.mark.parametrize("form", [fast_conv3d, fast_conv3d_reference])
@pytest.mark.parametrize(("kernel", "tile", "padding", "groups"), CONVOLUTIONS)
def test_it_equals_the_direct_form_forward_and_backward(kernel, tile, padding, groups, form):
    x, weight, bias = draw(2, 8, 5, 7, 9), draw(16, 8 // groups, *kernel), draw(16)
    ours = outputs_and_gradients(lambda *a: form(*a, tile=tile, padding=padding, groups=groups), x, weight, bias)
    direct = outputs_and_gradients(lambda *a: F.conv3d(*a, 1, padding, 1, groups), x, weight, bias)
    for mine, theirs in zip(ours, direct, strict=True):
        assert (mine - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_equals_the_direct_form_for_any_shape(data):
    triple = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)  # noqa: E731
    kernel, padding, tile = data.draw(triple(1, 4)), data.draw(triple(0, 3)), data.draw(triple(1, 6))
    sizes = [data.draw(st.integers(max(1, r - 2 * p), 9)) for r, p in zip(kernel, padding, strict=True)]
    groups, per_group, out_per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
    batch = data.draw(st.integers(0, 2))
    x = draw(batch, groups * per_group, *sizes)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = draw(groups * out_per_group, per_group, *kernel)
    ours = outputs_and_gradients(lambda *a: fast_conv3d(*a, tile=tile, padding=padding, groups=groups), x, weight)
    assert native.last_backend("fast_conv3d") == "torch"  # kernels for float64 there are none
    direct = outputs_and_gradients(lambda *a: F.conv3d(*a, None, 1, padding, 1, groups), x, weight)
    for mine, theirs in zip(ours, direct, strict=True):
        assert mine.shape == theirs.shape
        if mine.numel():
            assert (mine - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@pytest.mark.parametrize(
    ("kernel", "tile", "padding", "groups"),
    [((3, 3, 3), (2, 4, 4), (1, 1, 1), 1), ((3, 1, 1), (4, 1, 1), (3, 0, 0), 2), ((1, 2, 3), (1, 2, 2), (0, 0, 1), 4)],
)
def test_derivatives_of_first_and_second_order(kernel, tile, padding, groups):
    tensors = [draw(1, 4, 3, 3, 4), draw(4, 4 // groups, *kernel), draw(4)]
    for t in tensors:
        t.requires_grad_()
    f = lambda *a: fast_conv3d(*a, tile=tile, padding=padding, groups=groups)  # noqa: E731
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


@pytest.mark.parametrize("with_bias", [True, False])
def test_operators_pass_opcheck(with_bias):
    x, weight, bias = (t.requires_grad_() for t in (draw(2, 4, 3, 4, 5), draw(4, 2, 3, 3, 3), draw(4)))
    gradient = draw(2, 4, 3, 4, 5).requires_grad_()
    shared = ([1, 1, 1], 2, [2, 4, 4], "auto")
    prepared = prepare_weight(weight, tile=(2, 4, 4), groups=2, backend="torch")
    for u in (None, prepared):
        torch.library.opcheck(torch.ops.lean3d.fast_conv3d, (x, weight, bias if with_bias else None, u, *shared))
    torch.library.opcheck(torch.ops.lean3d.fast_conv3d_weight_gradient, (x, gradient, [3, 3, 3], *shared))


@pytest.mark.parametrize("size", [(4, 6, 6), (3, 5, 7), (1, 1, 1)])
def test_outputs_keep_channels_innermost(size):
    y = fast_conv3d(draw(2, 8, *size), draw(4, 8, 3, 3, 3), padding=(1, 1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.absence() or "there"))


# Three times what benchmarks/fast_conv_error.py finds for 64 channels
@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize(("tile", "bound"), [((2, 2, 2), 1.2e-6), ((2, 4, 4), 6e-6), ((4, 4, 4), 1.5e-5)])
def test_rounding_in_float32_is_what_the_tile_costs(tile, bound, backend):
    x, weight = draw(1, 64, 8, 12, 12).relu(), draw(32, 64, 3, 3, 3)
    settings = {"tile": tile, "padding": (1, 1, 1), "backend": backend}
    ours = outputs_and_gradients(lambda *a: fast_conv3d(*a, **settings), x.float(), weight.float())
    assert native.last_backend("fast_conv3d") == backend
    exact = outputs_and_gradients(lambda *a: F.conv3d(*a, None, 1, 1), x.float().double(), weight.float().double())
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


def test_a_batch_in_parts_is_the_batch(monkeypatch):
    x, weight = draw(5, 4, 4, 6, 6), draw(4, 4, 3, 3, 3)
    whole = outputs_and_gradients(lambda *a: fast_conv3d(*a, padding=(1, 1, 1)), x, weight)
    monkeypatch.setattr(fast_op, "CHUNK", 2 * 8 * fast_op._transformed_size((4, 6, 6), (3, 3, 3), (2, 4, 4)))
    calls = []
    kept = fast_op.transformed_conv3d
    monkeypatch.setattr(fast_op, "transformed_conv3d", lambda x, *a: calls.append(len(x)) or kept(x, *a))
    parts = outputs_and_gradients(lambda *a: fast_conv3d(*a, tile=(2, 4, 4), padding=(1, 1, 1)), x, weight)
    assert calls == [2, 2, 1] * 2  # forward, and the input's gradient
    for mine, theirs in zip(parts, whole, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x, weight = draw(1, 8, 4, 8, 8).to(dtype), draw(8, 8, 3, 3, 3).to(dtype)
    y = fast_conv3d(x, weight, tile=(2, 4, 4), padding=(1, 1, 1))
    exact = F.conv3d(x.double(), weight.double(), padding=1)
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_leaves_the_transformed_domain_in_float32():
    conv = FastConv3d(8, 8, 3, padding=1)
    x = draw(1, 8, 4, 8, 8, dtype=torch.float32)
    for mode in (True, False):
        conv.train(mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x.bfloat16())
            y.sum().backward()
        assert y.dtype == torch.float32
        exact = F.conv3d(x.bfloat16().double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_auto_tiles():
    assert auto_tile((16, 56, 56), (3, 3, 3)) == (4, 4, 4)
    assert auto_tile((16, 56, 56), (3, 1, 1)) == (4, 1, 1)
    assert auto_tile((16, 56, 56), (1, 3, 3)) == (1, 4, 4)
    assert auto_tile((1, 2, 7), (3, 3, 3)) == (1, 2, 4)
    assert auto_tile((8, 8, 8), (5, 7, 1)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": (2, 0, 2)}, "got \\(2, 0, 2\\)"),
        ({"tile": "large"}, "got 'large'"),
        ({"padding": (0, 0, -1)}, "0 or more"),
        ({"groups": 3}, "groups=3"),
        ({"backend": "cuda"}, "one of native, torch"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        fast_conv3d(draw(1, 4, 4, 4, 4), draw(4, 4, 3, 3, 3), **settings)


def test_wrong_tensors_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"does not fit into \(2, 4, 4\)"):
        fast_conv3d(draw(1, 4, 2, 4, 4), draw(4, 4, 3, 3, 3))
    with pytest.raises(ConfigError, match=r"got \(4, 4, 4, 4\)"):
        fast_conv3d(draw(4, 4, 4, 4), draw(4, 4, 3, 3, 3))
    with pytest.raises(ConfigError, match=r"got torch\.int64"):
        fast_conv3d(draw(1, 4, 4, 4, 4).long(), draw(4, 4, 3, 3, 3).long())


def test_a_backend_that_is_asked_for_and_absent_raises(monkeypatch):
    kept = fast_op.BACKENDS["torch"]
    absent = fast_op.Backend(lambda: "not built", kept.accepts, kept.prepare, kept.convolve)
    picky = fast_op.Backend(kept.absence, lambda *_: False, kept.prepare, kept.convolve)
    monkeypatch.setattr(fast_op, "BACKENDS", {"absent": absent, "picky": picky, "torch": kept})
    x, weight = draw(1, 4, 4, 4, 4), draw(4, 4, 3, 3, 3)
    with pytest.raises(BackendError, match="not built"):
        fast_conv3d(x, weight, backend="absent")
    with pytest.raises(BackendError, match=r"does not compute x \(1, 4, 4, 4, 4\)"):
        fast_conv3d(x, weight, backend="picky")
    assert choose_backend("auto", x, weight, (2, 4, 4), 1) == "torch"


def test_a_backend_that_joins_runs_forward_and_backward(monkeypatch):
    kept, asked = fast_op.BACKENDS["torch"], []
    other = fast_op.Backend(
        kept.absence, lambda *_: True, kept.prepare, lambda *a: asked.append(1) or kept.convolve(*a)
    )
    monkeypatch.setattr(fast_op, "BACKENDS", {"other": other, "torch": kept})
    outputs_and_gradients(lambda *a: fast_conv3d(*a), draw(1, 4, 4, 4, 4), draw(4, 4, 3, 3, 3))
    assert len(asked) == 2
    assert native.last_backend("fast_conv3d") == "other"


EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of its own
SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "groups": 4, "bias": False},
    {"kernel_size": (1, 3, 3), "padding": "same", "groups": 8},
    pytest.param({"kernel_size": (2, 3, 4), "padding": "same"}, marks=EVEN),
    {"kernel_size": (2, 3, 3), "padding": "valid"},
    {"kernel_size": 3, "padding": (1, 2, 0), "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_stands_in_for_torchs(settings, training):
    theirs = nn.Conv3d(8, 8, **settings, dtype=torch.float64).train(training)
    mine = FastConv3d(8, 8, **settings, dtype=torch.float64).train(training)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    x = draw(2, 8, 4, 6, 5)
    for ours, direct in zip(outputs_and_gradients(mine, x), outputs_and_gradients(theirs, x), strict=True):
        assert_close(ours, direct, rtol=1e-10, atol=1e-10)
    mine(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for ours, direct in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_close(ours.grad, direct.grad, rtol=1e-10, atol=1e-10)


def test_the_layer_refuses_what_the_algorithm_does_not_do():
    with pytest.raises(ConfigError, match=r"stride 1; got stride \(1, 2, 2\)"):
        FastConv3d(4, 4, 3, stride=(1, 2, 2))
    with pytest.raises(ConfigError, match="dilation 1; got dilation 2"):
        FastConv3d(4, 4, 3, dilation=2)
    with pytest.raises(ConfigError, match="got 'small'"):
        FastConv3d(4, 4, 3, tile="small")


@pytest.fixture
def prepared_weights(monkeypatch):
    """The weights that were transformed."""
    made = []
    kept = fast_op.transform_weight
    monkeypatch.setattr(fast_op, "transform_weight", lambda w, tile: made.append(tile) or kept(w, tile))
    return made


def test_weights_are_transformed_once_in_eval_mode(prepared_weights):
    conv, x = FastConv3d(4, 4, 3, padding=1, tile=(2, 4, 4), dtype=torch.float64), draw(1, 4, 4, 6, 6)
    conv.eval()
    y = conv(x)
    with torch.inference_mode():
        conv(x)
    assert torch.equal(conv(x), y)
    assert prepared_weights == [(2, 4, 4)]
    conv.tile = (4, 4, 4)
    conv(x)
    assert prepared_weights == [(2, 4, 4), (4, 4, 4)]
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert copy.deepcopy(conv)._prepared is None
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    assert buffer.getbuffer().nbytes < 8000  # 432 weights, and not their 216 * 16 transformed ones
    assert conv.train()._prepared is None
    conv(x)
    assert len(prepared_weights) == 3
    assert conv._prepared is None


def step(optimizer):
    def change(conv):
        kept = optimizer(conv.parameters())
        conv.weight.grad, conv.bias.grad = torch.ones_like(conv.weight), torch.ones_like(conv.bias)
        kept.step()

    return change


def write_in_place(conv):
    with torch.no_grad():
        conv.weight.mul_(1.5)


def average_into(conv):
    torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)(
        [conv.weight.detach()], [torch.ones_like(conv.weight)], torch.tensor(1)
    )


def replace(conv):
    conv.weight = nn.Parameter(torch.ones_like(conv.weight))


def load(assign):
    other = FastConv3d(4, 4, 3, padding=1).state_dict()
    return lambda conv: conv.load_state_dict(other, assign=assign)


CHANGES = {
    "sgd": step(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "sgd foreach": step(lambda p: torch.optim.SGD(p, lr=0.1, foreach=True)),
    "adamw": step(lambda p: torch.optim.AdamW(p, lr=0.1)),
    "adam fused": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "load_state_dict": load(False),
    "load_state_dict assign": load(True),
    "in place": write_in_place,
    "average": average_into,
    "replaced": replace,
    "to bfloat16 and back": lambda conv: conv.bfloat16().float(),
    "data and train": lambda conv: (conv.weight.data.mul_(2), conv.train().eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_stale_after_the_weight_changed(change):  # by whichever backend runs
    conv, x = FastConv3d(4, 4, 3, padding=1).eval(), draw(1, 4, 4, 6, 6, dtype=torch.float32)
    before = conv(x)
    assert conv._prepared is not None
    change(conv)
    after = conv(x)
    assert_close(after, F.conv3d(x, conv.weight, conv.bias, padding=1), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3
    assert conv._prepared is not None


def test_a_cache_made_in_inference_mode_serves_gradients():
    conv, x = FastConv3d(4, 4, 3, padding=1, dtype=torch.float64).eval(), draw(1, 4, 4, 6, 6)
    with torch.inference_mode():
        conv(x)
    ours = outputs_and_gradients(conv, x)
    direct = outputs_and_gradients(lambda t: F.conv3d(t, conv.weight, conv.bias, padding=1), x)
    for mine, theirs in zip(ours, direct, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_layer_exports():
    conv, x = FastConv3d(4, 4, 3, padding=1).eval(), draw(1, 4, 4, 6, 6, dtype=torch.float32)
    exported = torch.export.export(conv, (x,))
    assert_close(exported.module()(x), conv(x))
    assert any(node.target is torch.ops.lean3d.fast_conv3d.default for node in exported.graph.nodes)


def test_eligible_convolutions_of_a_net_are_replaced():
    model = create_model("c3d_light", width=0.125, num_classes=3)
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    replaced = use_fast_convs(model, tile=2)
    assert len(replaced) == 16  # each of the eight blocks' temporal and depthwise steps, no pointwise one
    assert all(isinstance(model.get_submodule(name), FastConv3d) for name in replaced)
    assert model.get_submodule(replaced[0]).tile == (2, 2, 2)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    x = draw(1, 3, 8, 32, 32, dtype=torch.float32)
    assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_others_are_left_alone():
    shared = nn.Conv3d(4, 4, 3)
    model = nn.Sequential(
        shared,
        shared,
        nn.Conv3d(4, 4, 3, stride=2),
        nn.Conv3d(4, 4, 3, dilation=2),
        Conv3d(4, 4, 1),
        nn.ConvTranspose3d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 3)),
        FastConv3d(4, 4, 3),
    )
    assert use_fast_convs(model) == ("0",)
    assert model[0] is model[1]
    assert model[0].weight is shared.weight
    with pytest.raises(ConfigError, match=r"nn\.Sequential"):
        use_fast_convs(shared)


def losses(model, steps):
    """Of a training on clips of two classes that differ in the sign of their motion."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(8, 3, 1, 32, 40, generator=generator).to(next(model.parameters()).dtype)
    clips = torch.stack([frames[..., 0, :, t : t + 32] for t in range(8)], 2)
    clips[4:] = clips[4:].flip(2)
    labels = torch.arange(8) // 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.slow
def test_training_follows_the_plain_nets_loss():
    torch.manual_seed(0)
    plain = create_model("c3d_light", width=0.125, num_classes=2, dropout=0.0).double().train()
    fast = copy.deepcopy(plain)
    assert len(use_fast_convs(fast)) == 16
    expected = losses(plain, 8)
    assert expected[-1] < 0.5 * expected[0]
    assert_close(losses(fast, 8), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kernel", "tile", "size"),
    [((3, 3, 3), (2, 4, 4), (8, 14, 14)), ((3, 1, 1), (4, 1, 1), (7, 6, 6)), ((1, 3, 3), (1, 2, 2), (4, 9, 9))],
)
def test_counts_are_those_of_the_tile(kernel, tile, size):
    padding = tuple(r // 2 for r in kernel)
    direct, fast = nn.Conv3d(4, 6, kernel, padding=padding), FastConv3d(4, 6, kernel, padding=padding, tile=tile)
    (one,), (other,) = count(direct, (2, 4, *size)).layers, count(fast, (2, 4, *size)).layers
    assert (one.macs, one.kernel, one.weights) == (other.macs, other.kernel, other.weights)
    assert other.multiplications == 2 * 4 * 6 * fast_op._transformed_size(size, kernel, tile)
    assert other.kind == "FastConv3d"
    expected, algorithm = fast_multiplications(size, kernel, [False] * 3, tuple({m for m in tile if m > 1}))
    if len({m for m in tile if m > 1}) == 1:
        assert (other.multiplications, other.algorithm) == (2 * 4 * 6 * expected, algorithm)
    assert other.algorithm.startswith("F(")


def test_the_operator_multiplies_as_often_as_is_counted():
    """The products in the transformed domain, seen by torch's counter inside of the operator."""
    x, weight = draw(2, 4, 5, 9, 6), draw(6, 4, 3, 3, 3)
    prepared = prepare_weight(weight, tile=(2, 4, 4), backend="torch")
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default and args[0].shape[0] == 4 * 6 * 6:
                products.append(args[0].shape.numel() * args[1].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch():
        fast_op._torch_convolve(x, prepared, None, (5, 9, 6), weight.shape, (2, 4, 4), (1, 1, 1), 1)
    assert products == [2 * 4 * 6 * fast_op._transformed_size((5, 9, 6), (3, 3, 3), (2, 4, 4))]


def test_the_documented_errors_are_the_measured_ones():
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks/results/fast_conv_error.json").read_text())["rows"]
    measured = {}
    for row in rows:
        if "dx" in row:  # stride 1
            measured.setdefault((row["kernel"], row["form"]), []).append(row)
    expected = []
    for (kernel, form), found in measured.items():
        r, m = ([int(x) for x in text.split("x")] for text in (kernel, form.split()[0].replace("direct", "1x1x1")))
        fewer = math.prod(m) * math.prod(r) / math.prod(a + b - 1 for a, b in zip(m, r, strict=True))
        cells = [f"{row['output']:.1e}" for row in found]
        cells += [f"{max(row[name] for row in found):.1e}" for name in ("dx", "dweight")]
        expected.append([kernel, form, "1" if form == "direct" else f"{fewer:.2f}", *cells])
    lines = (root / "docs/fast_algorithm.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [cells for cells in table if len(cells) == 8][2:] == expected
    strided = [[r["kernel"], r["form"], str(r["channels"]), f"{r['output']:.1e}"] for r in rows if "dx" not in r]
    assert strided and all(cells in table for cells in strided)
