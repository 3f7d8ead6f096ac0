"""The native fast convolution against torch's in float64, on every instruction set of the machine."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from instruction_sets import each_isa
from lean3d.blocks import FastConv3d
from lean3d.errors import ConfigError
from lean3d.ops import native
from lean3d.ops.fast_conv import native_time
from lean3d.ops.fast_conv.native import PackedFastConv, algorithms, pack
from lean3d.ops.fast_conv.transforms import cook_toom

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native kernels are {native.absence()}")

ERROR = (1.5e-6, 3e-6, 6e-6, 1.2e-5)
"""Bound of max |y - reference| / max |reference| by the number of axes with F(4, 3): twice what is met here."""
ONCE = {"stride": (1, 1, 1), "padding": (1, 1, 1)}
IN_TIME = {1: (1,), 3: (1, 2, 4), 5: (1,)}
IN_PLANE = {1: (1,), 3: (2, 4)}
KERNELS = [(3, 1, 1), (1, 3, 3), (3, 3, 3), (5, 3, 3), (1, 1, 3), (3, 3, 1)]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def clips(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def blank(shape):
    """An output in which every place that isn't written stays NaN."""
    return torch.full(shape, float("nan")).contiguous(memory_format=torch.channels_last_3d)


def check(y, reference, tile):
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    error = (y.double() - reference).abs().max() / reference.abs().max()
    assert error < ERROR[tile.count(4)], f"tile {tile}: {error:.1e}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_on_odd_shapes(kernel, threads):
    draw = random.Random(sum(kernel))
    torch.manual_seed(0)
    for isa in each_isa():
        for tile in itertools.product(IN_TIME[kernel[0]], IN_PLANE[kernel[1]], IN_PLANE[kernel[2]]):
            if tile == (1, 1, 1):  # direct
                continue
            name = "F({}x{}x{})".format(*tile)
            padding = tuple(draw.randint(0, 2) for _ in kernel)
            sizes = [max(r - 2 * p, 1) + draw.choice((0, 1, 4, 9)) for r, p in zip(kernel, padding, strict=True)]
            n, c, o = draw.randint(1, 2), draw.randint(1, 40), draw.randint(1, 70)
            weight, x = torch.randn(o, c, *kernel), clips(n, c, *sizes)
            bias = torch.randn(o) if draw.random() < 0.7 else None
            conv = pack(weight, bias, padding=padding, algorithm=name)
            reference = F.conv3d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
            frames = draw.choice((None, reference.shape[2], 1))
            residual = None if frames is None else clips(n, o, frames, *reference.shape[3:])
            relu = draw.random() < 0.5
            if residual is not None:
                reference = reference + residual.double()
            y = conv(x, out := blank(conv.out_shape(x.shape)), residual=residual, relu=relu)
            assert y is out, isa
            check(y, reference.relu() if relu else reference, tile)


@pytest.mark.parametrize(
    ("kernel", "channels", "sizes"),
    [
        ((3, 1, 1), 130, (9, 13, 29)),
        ((1, 3, 3), 64, (3, 61, 40)),
        ((3, 3, 3), 48, (11, 35, 30)),
        ((3, 3, 3), 96, (2, 7, 7)),
    ],
)
def test_blocks_and_threads(kernel, channels, sizes, threads):
    """Several blocks and panels, some of them not whole."""
    torch.manual_seed(1)
    padding = tuple(r // 2 for r in kernel)
    weight, bias, x = (
        torch.randn(channels + 3, channels, *kernel),
        torch.randn(channels + 3),
        clips(1, channels, *sizes),
    )
    reference = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    for _ in each_isa():
        for name in algorithms(weight.shape, stride=(1, 1, 1), padding=padding):
            conv = pack(weight, bias, padding=padding, algorithm=name)
            check(conv(x, blank(reference.shape)), reference, conv.tile)


@pytest.mark.parametrize(
    ("frames_taps", "channels", "outputs", "size", "padding"),
    [(1, 1, 1, (3, 3), 0), (1, 7, 33, (14, 13), 1), (3, 40, 70, (15, 22), 2), (1, 64, 64, (28, 28), 1)],
)
def test_stride_two(frames_taps, channels, outputs, size, padding, threads):
    """Even and odd places apart, by F(4, 2): any channels and sizes, one input or two, in any blocks."""
    torch.manual_seed(5)
    padding = (frames_taps // 2, padding, padding)
    weight, bias = torch.randn(outputs, channels, frames_taps, 3, 3), torch.randn(outputs)
    x = clips(2, channels, 5, *size)
    reference = F.conv3d(x.double(), weight.double(), bias.double(), (1, 2, 2), padding)
    shortcut = clips(*reference.shape)
    for _ in each_isa():
        conv = pack(weight, bias, stride=(1, 2, 2), padding=padding, algorithm="F(1x4x4)")
        assert conv.out_shape(x.shape) == tuple(reference.shape)
        check(conv(x, blank(reference.shape)), reference, conv.tile)
        both = (reference + shortcut.double()).relu()
        check(conv(x, blank(reference.shape), residual=shortcut, relu=True), both, conv.tile)
        first, second = x[:, : channels // 2], x[:, channels // 2 :]
        if channels > 1:
            assert torch.equal(conv(first, second=second), conv(x))
        for block in (((1, 2), True), ((9, 99), False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PackedFastConv, "_blocks", lambda *_, block=block: block)
                check(conv(x, blank(reference.shape)), reference, conv.tile)


def test_stride_two_takes_nine_multiplications_exactly():
    """4 outputs at stride 2 from 9 places: y = A^T [(G even) * (B^T even) + (G odd) * (B^T odd)], in fractions."""
    f = cook_toom(4, 2)
    draw = random.Random(6)
    taps, places = ([Fraction(draw.randint(-9, 9)) for _ in range(n)] for n in (3, 9))

    def times(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    even = [a * b for a, b in zip(times(f.g, taps[0::2]), times(f.bt, places[0::2]), strict=True)]
    finite = [row[:4] for row in f.bt[:4]]  # what is behind the fourth place is not looked at
    assert all(row[4] == 0 for row in f.bt[:4])
    odd = [row[0] * taps[1] * b for row, b in zip(f.g[:4], times(finite, places[1::2]), strict=True)]
    assert f.g[4][0] == 0 and len(even) + len(odd) == 9
    sums = [a + b for a, b in zip(even, [*odd, Fraction(0)], strict=True)]
    assert times(f.at, sums) == [sum(places[2 * i + k] * taps[k] for k in range(3)) for i in range(4)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("block", [(1, 2), (2, 3), (9, 99)])
@pytest.mark.parametrize("algorithm", ["F(1x4x4)", "F(2x2x2)", "F(4x4x4)"])
def test_any_blocks_give_the_same(algorithm, block, shared, monkeypatch, threads):
    torch.manual_seed(2)
    weight, x = torch.randn(40, 20, 3, 3, 3), clips(1, 20, 7, 9, 10)
    conv = pack(weight, padding=(1, 1, 1), algorithm=algorithm)
    expected = conv(x)
    monkeypatch.setattr(PackedFastConv, "_blocks", lambda *_: (block, shared))
    assert torch.equal(conv(x, blank(expected.shape)), expected)


def test_two_inputs_are_one(threads):
    torch.manual_seed(3)
    for _, (kernel, name) in itertools.product(
        each_isa(), [((1, 3, 3), "F(1x4x4)"), ((3, 1, 1), "F(4x1x1)"), ((3, 3, 3), "F(2x4x4)")]
    ):
        weight, x, second = torch.randn(33, 50, *kernel), clips(2, 21, 5, 7, 9), clips(2, 29, 5, 7, 9)
        padding = tuple(r // 2 for r in kernel)
        conv = pack(weight, padding=padding, algorithm=name)
        assert torch.equal(conv(x, blank(conv.out_shape(x.shape)), second=second), conv(torch.cat([x, second], 1)))


def test_residual_may_be_the_output():
    weight, x = torch.randn(32, 32, 3, 3, 3), clips(1, 32, 4, 8, 8)
    conv = pack(weight, padding=(1, 1, 1), algorithm="F(4x4x4)")
    shortcut = clips(1, 32, 4, 8, 8)
    expected = conv(x, residual=shortcut.clone(), relu=True)
    assert conv(x, shortcut, residual=shortcut, relu=True) is shortcut
    assert torch.equal(shortcut, expected)


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (3, 3, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(kernel, bad):
    """It reaches all outputs that see it, NaN through ReLU, and no tile that does not."""
    padding = tuple(r // 2 for r in kernel)
    weight, x = torch.randn(16, 8, *kernel), clips(1, 8, 12, 12, 12)
    x[0, 3, 5, 5, 5] = bad
    expected = F.conv3d(x, weight, padding=padding)
    for name in algorithms(weight.shape, stride=(1, 1, 1), padding=padding):
        conv = pack(weight, padding=padding, algorithm=name)
        y = conv(x, relu=math.isnan(bad))
        assert not y[~expected.isfinite()].isfinite().any()
        touched = torch.zeros(12, 12, 12, dtype=torch.bool)
        slices = [slice((5 - p) // m * m if r > 1 else 5, ((5 + p) // m + 1) * m if r > 1 else 6)
                  for r, p, m in zip(kernel, padding, conv.tile, strict=True)]  # fmt: skip
        touched[tuple(slices)] = True
        assert y[0, :, ~touched].isfinite().all(), name


def test_layouts_of_inputs_are_taken_as_they_come():
    weight, x = torch.randn(8, 6, 1, 3, 3), torch.randn(1, 6, 4, 9, 9)
    conv = pack(weight.double(), padding=(0, 1, 1), algorithm="F(1x2x2)")
    check(
        conv(x, residual=torch.ones(1, 8, 4, 9, 9)),
        F.conv3d(x.double(), weight.double(), padding=(0, 1, 1)) + 1,
        (1, 2, 2),
    )
    assert conv(x[:0]).shape == (0, 8, 4, 9, 9)


def test_algorithms_are_what_pack_takes():
    assert algorithms((8, 4, 3, 1, 1), **ONCE) == ["F(2x1x1)", "F(4x1x1)"]
    assert algorithms((8, 4, 1, 3, 3), **ONCE) == ["F(1x2x2)", "F(1x4x4)"]
    assert algorithms((8, 4, 3, 3, 3), **ONCE) == [f"F({t}x{p}x{p})" for t in (1, 2, 4) for p in (2, 4)]
    for shape in [(8, 4, 1, 1, 1), (8, 4, 1, 5, 5), (8, 4, 17, 3, 3)]:
        assert algorithms(shape, **ONCE) == []
    assert algorithms((8, 4, 3, 3, 3), stride=(1, 2, 2), padding=(1, 1, 1)) == ["F(1x4x4)"]
    for shape, stride in [((8, 4, 3, 3, 3), (2, 2, 2)), ((8, 4, 1, 3, 3), (1, 2, 1)), ((8, 4, 1, 5, 5), (1, 2, 2))]:
        assert algorithms(shape, stride=stride, padding=(0, 1, 1)) == []
    assert algorithms((8, 4, 3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), groups=2) == []
    for name, settings in [("F(4x4)", {}), ("direct", {}), ("F(6x1x1)", {}), ("F(2x1x1)", {"stride": (2, 1, 1)})]:
        with pytest.raises(ConfigError, match=r"F\(2x1x1\), F\(4x1x1\)|none"):
            pack(torch.zeros(8, 4, 3, 1, 1), algorithm=name, **settings)


def test_what_does_not_fit_is_refused():
    conv = pack(torch.randn(8, 6, 1, 3, 3), algorithm="F(1x2x2)")
    x = clips(2, 6, 4, 9, 9)
    for call, said in [
        (lambda: conv(x.double()), "float32"),
        (lambda: conv(x[:, :5]), r"takes \(N, 6"),
        (lambda: conv(x[..., :2]), "no smaller than its kernel"),
        (lambda: conv(x[:, :3], second=x[:, :3, :2]), "second must be"),
        (lambda: conv(x, residual=x), "residual must be"),
        (lambda: conv(x, clips(2, 8, 4, 9, 9)), "out must be"),
        (lambda: conv(x, torch.empty(2, 8, 4, 7, 7)), "channels_last_3d"),
    ]:
        with pytest.raises(ConfigError, match=said):
            call()


def test_the_layer_runs_on_it():
    torch.manual_seed(4)
    layer = FastConv3d(16, 24, 3, padding=1).eval()
    x = clips(1, 16, 8, 12, 12)
    with torch.inference_mode():
        y = layer(x)
    assert native.last_backend("fast_conv3d") == "native"
    reference = F.conv3d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    check(y, reference, (4, 4, 4))


# ---- in time alone, around a direct kernel in the plane

STEMS = [
    # C, O, kernel, stride, padding, size
    (3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3), (9, 22, 24)),
    (3, 8, (5, 7, 7), (1, 2, 2), (0, 0, 1), (5, 21, 23)),
    (1, 3, (3, 7, 7), (1, 2, 2), (1, 3, 3), (1, 9, 48)),
    (3, 64, (3, 3, 3), (1, 1, 1), (1, 1, 1), (7, 13, 17)),
    (16, 33, (3, 3, 5), (1, 1, 3), (2, 0, 4), (4, 8, 19)),
    (5, 70, (5, 1, 3), (1, 1, 1), (1, 0, 1), (6, 4, 40)),
]


@pytest.mark.parametrize(("shrink", "ceil_mode"), [((1, 1), False), ((2, 2), False), ((2, 2), True), ((3, 5), True)])
@pytest.mark.parametrize(("c", "o", "kernel", "stride", "padding", "size"), STEMS)
def test_stems(c, o, kernel, stride, padding, size, shrink, ceil_mode, threads):
    torch.manual_seed(0)
    for isa in each_isa():
        weight, bias, x = torch.randn(o, c, *kernel), torch.randn(o), clips(2, c, *size)
        full = F.conv3d(x.double(), weight.double(), bias.double(), stride, padding)
        residual = clips(*full.shape) if shrink == (1, 1) and not ceil_mode else None
        reference = full if residual is None else full + residual.double()
        if shrink == (1, 1):
            reference = reference.relu()
        reference = F.max_pool3d(reference, (1, *shrink), ceil_mode=ceil_mode)
        shape = {"stride": stride, "padding": padding}
        for name in native_time.algorithms(weight.shape, **shape):
            conv = native_time.pack(weight, bias, **shape, algorithm=name, shrink=shrink, ceil_mode=ceil_mode)
            assert conv.out_shape(x.shape) == reference.shape
            out = blank(reference.shape)
            y = conv(x, out, residual=residual, relu=shrink == (1, 1))
            assert y is out, isa
            error = (y.double() - reference).abs().max() / reference.abs().max()
            assert error < (2e-5 if name == "F(4x1x1)" and kernel[0] == 5 else 5e-6), (isa, name)
            if residual is not None:
                in_place = residual.clone(memory_format=torch.preserve_format)
                assert torch.equal(conv(x, in_place, residual=in_place, relu=True), y)


def test_stems_refuse_what_they_can_not_do():
    weight = torch.randn(8, 3, 5, 7, 7)
    shape = {"stride": (1, 2, 2), "padding": (2, 3, 3)}
    assert native_time.algorithms(weight.shape, **shape) == ["F(2x1x1)", "F(4x1x1)"]
    assert native_time.algorithms((8, 17, 5, 7, 7), **shape) == []
    assert native_time.algorithms(weight.shape, stride=(2, 2, 2), padding=(2, 3, 3)) == []
    assert native_time.algorithms((8, 3, 5, 1, 1), stride=(1, 1, 1), padding=(2, 0, 0)) == []
    with pytest.raises(ConfigError, match=r"must be one of \['F\(2x1x1\)', 'F\(4x1x1\)'\]"):
        native_time.pack(weight, **shape, algorithm="direct")
    with pytest.raises(ConfigError, match="bias must be"):
        native_time.pack(weight, torch.zeros(3), **shape, algorithm="F(4x1x1)")
    conv = native_time.pack(weight, **shape, algorithm="F(4x1x1)", shrink=(2, 2))
    with pytest.raises(ConfigError, match="no residual"):
        conv(clips(1, 3, 4, 16, 16), residual=clips(1, 8, 4, 8, 8))
    with pytest.raises(ConfigError, match="less than a window"):
        conv(clips(1, 3, 4, 2, 16))
