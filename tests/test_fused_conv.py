"""Packed convolutions against plain PyTorch in float64, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.fused_conv import (
    TemporalConv,
    algorithms,
    conv_reference,
    pack,
    pack_small_big,
    pack_stage_two,
    small_big_reference,
    stage_two_reference,
)

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native kernels are {native.absence()}")


def instruction_sets() -> list[str]:
    if not native.available():
        return ["none"]
    kernels, best, found = native.kernels(), native.kernels().isa(), []
    for name in ("generic", "avx2", "avx512", "neon"):
        try:
            kernels.use_isa(name)
            found.append(name)
        except ValueError:
            pass
    kernels.use_isa(best)
    return found


@pytest.fixture(params=instruction_sets())
def isa(request):
    """Each instruction set of this machine in turn."""
    kernels = native.kernels()
    best = kernels.isa()
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(best)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tensor(generator: torch.Generator, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


def blank(shape: torch.Size) -> torch.Tensor:
    """An output in which every place that isn't written stays NaN."""
    return torch.full(shape, float("nan")).contiguous(memory_format=torch.channels_last_3d)


def double(*values):
    return [None if v is None else v.double() for v in values]


def check(ours: torch.Tensor, reference: torch.Tensor, terms: int) -> None:
    """Float32 sums of `terms` products of normal numbers, one after another: they err by about terms / 2^24."""
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5 + 2e-7 * terms)


def run(packed, x, generator, residual, relu):
    """The packed operator with and without an output of its own, a residual or none; and the residual."""
    shape = packed.out_shape(x.shape)
    addend = tensor(generator, *shape) if residual else None
    out = blank(shape)
    y = packed(x, out, residual=addend, relu=relu)
    assert y is out
    assert native.last_backend("fused_conv") == "native"
    if addend is not None:
        in_place = addend.clone(memory_format=torch.preserve_format)
        assert torch.equal(packed(x, in_place, residual=in_place, relu=relu), y)
    return y, addend


def compare_conv(x_shape, o, kernel, stride, padding, groups, bias, residual, relu, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = x_shape[1]
    x, weight = tensor(g, *x_shape), torch.randn(o, c // groups, *kernel, generator=g)
    b = torch.randn(o, generator=g) if bias else None
    (algorithm,) = algorithms(weight.shape, stride=stride, padding=padding, groups=groups)
    packed = pack(weight, b, stride=stride, padding=padding, groups=groups, algorithm=algorithm)
    y, addend = run(packed, x, g, residual, relu)
    xd, wd, bd, rd = double(x, weight, b, addend)
    reference = conv_reference(xd, wd, bd, stride=stride, padding=padding, groups=groups, residual=rd, relu=relu)
    check(y, reference, weight[0].numel())


LAYERS = [
    # x, O, kernel, stride, padding: the zoo's kernels, narrow
    ((2, 64, 3, 9, 14), 40, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 1040, 2, 4, 5), 33, (1, 1, 1), (1, 2, 2), (0, 0, 0)),
    ((2, 130, 5, 9, 30), 140, (1, 1, 1), (2, 2, 2), (0, 0, 0)),
    ((1, 256, 3, 20, 31), 129, (1, 1, 1), (1, 2, 3), (0, 0, 0)),
    ((2, 64, 4, 5, 9), 128, (3, 1, 1), (2, 2, 1), (1, 0, 0)),
    ((1, 24, 5, 14, 14), 64, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((2, 48, 3, 7, 7), 70, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 16, 3, 15, 13), 32, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((1, 40, 6, 7, 7), 36, (3, 1, 1), (1, 1, 1), (1, 0, 0)),
    ((2, 20, 9, 5, 5), 40, (7, 1, 1), (4, 1, 1), (3, 0, 0)),
    ((1, 3, 2, 40, 37), 64, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    ((1, 3, 6, 20, 22), 8, (5, 7, 7), (1, 2, 2), (2, 3, 3)),
    ((1, 3, 3, 9, 48), 3, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    ((2, 8, 3, 7, 14), 8, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 1, 5, 16, 18), 45, (3, 5, 5), (1, 1, 1), (1, 2, 2)),
    ((2, 3, 4, 12, 12), 64, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((1, 32, 5, 7, 7), 48, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 1024, 1, 6, 5), 34, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 6, 2, 3, 3), 5, (1, 3, 1), (1, 1, 1), (2, 2, 0)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "x".join(map(str, layer[2])))
def test_dense_layers_of_the_zoo(layer, isa, threads):
    compare_conv(*layer, groups=1, bias=True, residual=True, relu=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "x".join(map(str, layer[2])))
def test_a_residual_of_one_frame_is_added_at_all_times(layer, bias, isa):
    shape, o, kernel, stride, padding = layer
    g = torch.Generator().manual_seed(5)
    x, weight = tensor(g, *shape), torch.randn(o, shape[1], *kernel, generator=g)
    b = torch.randn(o, generator=g) if bias else None
    (algorithm,) = algorithms(weight.shape, stride=stride, padding=padding)
    packed = pack(weight, b, stride=stride, padding=padding, algorithm=algorithm)
    n, _, _, h, w = packed.out_shape(x.shape)
    frame = tensor(g, n, o, 1, h, w)
    out = blank(packed.out_shape(x.shape))
    packed(x, out, residual=frame, relu=True)
    xd, wd, bd, fd = double(x, weight, b, frame)
    check(out, conv_reference(xd, wd, bd, stride=stride, padding=padding, residual=fd, relu=True), weight[0].numel())


DEPTHWISE = [
    ((2, 37, 3, 9, 11), (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 64, 2, 14, 15), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((1, 24, 7, 5, 6), (5, 1, 1), (1, 1, 1), (2, 0, 0)),
    ((1, 18, 5, 9, 9), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    ((1, 9, 1, 12, 30), (1, 7, 7), (1, 1, 1), (0, 3, 3)),
    ((1, 16, 2, 2, 1), (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 5, 2, 6, 7), (1, 2, 4), (1, 1, 3), (0, 1, 2)),
]


@pytest.mark.parametrize("layer", DEPTHWISE, ids=lambda layer: "x".join(map(str, layer[1])))
def test_depthwise_layers_of_the_zoo(layer, isa, threads):
    shape, kernel, stride, padding = layer
    compare_conv(shape, shape[1], kernel, stride, padding, groups=shape[1], bias=True, residual=True, relu=True)


sizes = st.integers(1, 12)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_convolution(data):
    depthwise = data.draw(st.booleans(), "depthwise")
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), "kernel")
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * 3), "stride")
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 3), "padding")
    c, o = data.draw(st.integers(1, 40), "c"), data.draw(st.integers(1, 70), "o")
    volume = [data.draw(st.integers(max(1, k - 2 * p), 20), "size") for k, p in zip(kernel, padding, strict=True)]
    isa = data.draw(st.sampled_from(instruction_sets()), "isa")
    flags = [data.draw(st.booleans(), name) for name in ("bias", "residual", "relu")]
    n, seed = data.draw(st.integers(1, 2), "n"), data.draw(st.integers(0, 999), "seed")
    best = native.kernels().isa()
    native.kernels().use_isa(isa)
    try:
        compare_conv(
            (n, c, *volume), c if depthwise else o, kernel, stride, padding, c if depthwise else 1, *flags, seed
        )
    finally:
        native.kernels().use_isa(best)


STAGES = [
    ((1, 64, 2, 14, 14), 64, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((2, 40, 3, 7, 7), 70, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 33, 2, 15, 30), 17, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((1, 20, 5, 6, 6), 8, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((1, 1024, 1, 3, 5), 40, (1, 5, 5), (1, 1, 1), (0, 2, 2)),
]


@pytest.mark.parametrize("layer", STAGES)
@pytest.mark.parametrize("options", [(True, True, True), (False, False, False)])
def test_stage_two(layer, options, isa, threads):
    shape, o, kernel, stride, padding = layer
    middle_relu, residual, relu = options
    g = torch.Generator().manual_seed(1)
    c = shape[1]
    x, depthwise = tensor(g, *shape), torch.randn(c, 1, *kernel, generator=g)
    pointwise, b1, b2 = (
        torch.randn(o, c, 1, 1, 1, generator=g),
        torch.randn(c, generator=g),
        torch.randn(o, generator=g),
    )
    geometry = {"stride": stride, "padding": padding, "middle_relu": middle_relu}
    packed = pack_stage_two(depthwise, b1, pointwise, b2, **geometry)
    y, addend = run(packed, x, g, residual, relu)
    xd, dw, b1d, pw, b2d, rd = double(x, depthwise, b1, pointwise, b2, addend)
    reference = stage_two_reference(xd, dw, b1d, pw, b2d, **geometry, residual=rd, relu=relu)
    check(y, reference, c * kernel[0] * kernel[1] * kernel[2])


BLOCKS = [
    # x, C, O, kernel in time, its stride and padding, plane kernel, stride, padding, windows
    ((1, 3, 6, 20, 18), 32, 64, 3, 1, 1, (3, 3), (1, 1), (1, 1), (1, 2, 2)),
    ((2, 3, 5, 9, 13), 40, 33, 3, 1, 1, (3, 3), (1, 1), (1, 1), (2, 2, 2)),
    ((1, 5, 7, 12, 30), 16, 20, 5, 2, 2, (3, 3), (2, 2), (1, 1), (1, 1, 1)),
    ((1, 2, 4, 11, 8), 9, 5, 2, 1, 0, (5, 3), (1, 2), (2, 0), (3, 2, 3)),
    ((1, 4, 1, 33, 3), 17, 8, 3, 1, 1, (3, 3), (1, 1), (1, 1), (1, 4, 1)),
    ((1, 1, 3, 2, 2), 8, 8, 1, 1, 0, (1, 1), (1, 1), (0, 0), (1, 1, 2)),
]


@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("layer", BLOCKS)
def test_stage_two_with_what_stands_around_it(layer, ceil_mode, temporal, isa, threads):
    shape, c, o, frames, step, pad, plane, stride, padding, shrink = layer
    g = torch.Generator().manual_seed(4)
    if not temporal:
        shape = (shape[0], c, *shape[2:])
    x, depthwise = tensor(g, *shape), torch.randn(c, 1, 1, *plane, generator=g)
    first, b0 = torch.randn(c, shape[1], frames, 1, 1, generator=g), torch.randn(c, generator=g)
    pointwise, b1, b2 = (
        torch.randn(o, c, 1, 1, 1, generator=g),
        torch.randn(c, generator=g),
        torch.randn(o, generator=g),
    )
    geometry = {"stride": (1, *stride), "padding": (0, *padding), "shrink": shrink, "ceil_mode": ceil_mode}
    packed = pack_stage_two(
        depthwise,
        b1,
        pointwise,
        b2,
        **geometry,
        temporal=TemporalConv(first, b0, step, pad, True) if temporal else None,
    )
    y, _ = run(packed, x, g, False, True)
    xd, fd, b0d, dw, b1d, pw, b2d = double(x, first, b0, depthwise, b1, pointwise, b2)
    if temporal:
        xd = conv_reference(xd, fd, b0d, stride=(step, 1, 1), padding=(pad, 0, 0), relu=True)
    reference = stage_two_reference(xd, dw, b1d, pw, b2d, **geometry, relu=True)
    check(y, reference, c * plane[0] * plane[1] * (frames * shape[1] if temporal else 1))


UNITS = [
    # x, O, kernel, stride, window
    ((1, 64, 4, 14, 14), 40, 1, 1, (3, 3, 3)),
    ((2, 24, 3, 7, 7), 36, 1, 1, (3, 3, 3)),
    ((1, 300, 5, 7, 6), 35, 1, 1, (3, 3, 3)),
    ((1, 140, 3, 9, 9), 64, 3, 1, (3, 3, 3)),
    ((2, 17, 2, 11, 8), 33, 3, 2, (3, 3, 3)),
    ((1, 20, 7, 9, 9), 8, 3, 1, (5, 3, 7)),
    ((1, 20, 1, 2, 1), 8, 3, 1, (3, 3, 3)),
    ((1, 9, 6, 5, 5), 12, 1, 1, (1, 1, 1)),
    ((2, 40, 5, 7, 7), 70, 1, 1, (None, 3, 3)),
    ((2, 24, 3, 13, 9), 40, 3, 2, (None, 3, 3)),
    ((2, 24, 3, 7, 7), 40, 3, 1, (None, 1, 1)),
]


@pytest.mark.parametrize("layer", UNITS)
@pytest.mark.parametrize(("residual", "relu"), [(True, True), (False, False)])
def test_small_big(layer, residual, relu, isa, threads):
    shape, o, kernel, step, window = layer
    g = torch.Generator().manual_seed(2)
    x = tensor(g, *shape)
    small, big = (torch.randn(o, shape[1], 1, kernel, kernel, generator=g) for _ in range(2))
    bias = torch.randn(o, generator=g)
    geometry = {"window": window, "stride": (1, step, step), "padding": (0, kernel // 2, kernel // 2)}
    packed = pack_small_big(small, big, bias, **geometry)
    y, addend = run(packed, x, g, residual, relu)
    xd, sd, bd, biasd, rd = double(x, small, big, bias, addend)
    check(y, small_big_reference(xd, sd, bd, biasd, **geometry, residual=rd, relu=relu), 2 * small[0].numel())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_torch_takes_it(value, isa):
    g = torch.Generator().manual_seed(3)
    x = tensor(g, 1, 20, 4, 9, 9)
    x[0, 3, 1, 2, 4] = value
    dense, depthwise = torch.randn(33, 20, 1, 3, 3, generator=g), torch.randn(20, 1, 1, 3, 3, generator=g)
    pointwise = dense[:, :, :, :1, :1].contiguous()
    around = {"padding": (0, 1, 1)}
    pairs = [
        (pack(dense, **around, algorithm="direct")(x), conv_reference(x, dense, **around)),
        (
            pack(depthwise, **around, groups=20, algorithm="depthwise")(x, relu=True),
            conv_reference(x, depthwise, **around, groups=20, relu=True),
        ),
        (
            pack_stage_two(depthwise, None, pointwise, **around)(x),
            stage_two_reference(x, depthwise, None, pointwise, **around),
        ),
        (
            pack_small_big(dense, dense, window=(3, 3, 3), **around)(x),
            small_big_reference(x, dense, dense, window=(3, 3, 3), **around),
        ),
    ]
    for ours, reference in pairs:
        assert (~reference.isfinite()).any()
        assert_close(ours, reference, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_other_layouts_are_copied():
    x, weight = torch.randn(1, 8, 3, 6, 6), torch.randn(16, 8, 1, 3, 3)
    packed = pack(weight, padding=(0, 1, 1), algorithm="direct")
    assert_close(packed(x), conv_reference(x, weight, padding=(0, 1, 1)), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    weight = torch.randn(16, 8, 1, 3, 3)
    packed = pack(weight, algorithm="direct")
    x = torch.randn(1, 8, 2, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    assert algorithms((16, 4, 1, 3, 3), stride=(1, 1, 1), padding=(0, 0, 0), groups=2) == []
    with pytest.raises(ConfigError, match="algorithm must be one of"):
        pack(weight, algorithm="pointwise")
    with pytest.raises(ConfigError, match="float32"):
        pack(weight.double(), algorithm="direct")
    with pytest.raises(ConfigError, match="float32"):
        packed(x.double())
    with pytest.raises(ConfigError, match=r"\(N, 8, T, H, W\)"):
        packed(x[:, :4])
    with pytest.raises(ConfigError, match="smaller than the kernel"):
        packed(x[:, :, :, :2])
    with pytest.raises(ConfigError, match="out must be"):
        packed(x, torch.empty(1, 16, 2, 4, 4))
    with pytest.raises(ConfigError, match="residual must be"):
        packed(x, residual=torch.empty(1, 16, 2, 4, 3))
    square = torch.randn(8, 8, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    with pytest.raises(ConfigError, match="not be x"):
        pack(square, algorithm="pointwise")(x, x)
    with pytest.raises(ConfigError, match="window"):
        pack_small_big(weight, weight, window=(3, None, None))
    with pytest.raises(ConfigError, match="two weights"):
        pack_small_big(weight, weight[:8], window=(3, 3, 3))
    with pytest.raises(ConfigError, match="in time"):
        pack_small_big(weight, weight, window=(3, 3, 3), stride=(2, 1, 1))
    with pytest.raises(ConfigError, match="stage two takes"):
        pack_stage_two(weight, None, square)
    flat = torch.randn(8, 1, 1, 3, 3)
    with pytest.raises(ConfigError, match="temporal weight"):
        pack_stage_two(flat, None, square, temporal=TemporalConv(weight))
    with pytest.raises(ConfigError, match="is flat"):
        pack_stage_two(flat, None, square, stride=(2, 1, 1), temporal=TemporalConv(square))
    with pytest.raises(ConfigError, match="shrink must be"):
        pack_stage_two(flat, None, square, shrink=(5, 5, 5))
    shrinking = pack_stage_two(flat, None, square, padding=(0, 1, 1), shrink=(1, 2, 2))
    with pytest.raises(ConfigError, match="no residual"):
        shrinking(x, residual=shrinking(x))
    with pytest.raises(ConfigError, match="don't fit"):
        shrinking(x[:, :, :, :1])
