"""Weights, multiply-accumulates and multiplications, against torch's counter, the papers' tables, and a real count."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lean3d.blocks import FullySeparableBlock
from lean3d.blocks.counting import count, fast_multiplications
from lean3d.errors import ConfigError
from lean3d.models import cost, create_model, list_models


def on_meta(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


@pytest.mark.parametrize("name", list_models())
def test_macs_are_those_of_torchs_counter(name):
    model = on_meta(name).eval()
    spec = model.input_spec
    clip = torch.empty(1, spec.channels, spec.num_frames, *spec.size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip)
    counted = cost(model)
    assert counted.macs * 2 == counter.get_total_flops()
    assert counted.macs == sum(layer.macs for layer in counted.layers)
    assert counted.weights == sum(p.numel() for p in model.parameters())
    assert counted.multiplications <= counted.macs


# The published nets at 224 x 224 and 400 classes: weights in millions, GMACs of one clip.
PUBLISHED = [
    ("c2d_r50", 8, "24.33", "32.70"),
    ("slow_r50", 8, "32.45", "41.74"),
    ("smallbig23", 8, "11.37", "26.53"),
    ("smallbig50", 8, "24.37", "51.97"),
    ("smallbig50", 16, "24.37", "103.26"),
    ("slow_r50_extra", 8, "39.95", "49.14"),
    ("smallbig50_extra", 8, "32.29", "62.66"),
    ("smallbig101", 8, "43.41", "105.25"),
    ("smallbig101", 32, "43.41", "416.36"),
]


@pytest.mark.parametrize(("name", "num_frames", "weights", "gmacs"), PUBLISHED)
def test_published_costs_to_the_printed_digits(name, num_frames, weights, gmacs):
    counted = cost(on_meta(name, num_frames=num_frames))
    assert f"{counted.weights / 1e6:.2f}" == weights
    assert f"{counted.macs / 1e9:.2f}" == gmacs


@pytest.mark.parametrize(
    ("expansion", "weights", "work", "work_f2"), [(0.5, 12.9, 15.0, 13.1), (0.75, 8.6, 10.0, 8.7), (1.0, 6.4, 7.5, 6.6)]
)
def test_light_c3d_against_c3d_convolution_by_convolution(expansion, weights, work, work_f2):
    def convolutions(counted):
        return [layer for layer in counted.layers if layer.kind == "Conv3d"]

    dense = convolutions(cost(on_meta("c3d")))
    light_model = on_meta("c3d_light", expansion=expansion)
    light, light_f2 = convolutions(cost(light_model)), convolutions(cost(light_model, tiles=(2,)))

    assert len(dense) == 8
    dense_weights, light_weights = (sum(layer.weights for layer in layers) for layers in (dense, light))
    dense_macs = sum(layer.macs for layer in dense)
    assert round(dense_weights / light_weights, 1) == weights
    assert round(dense_macs / sum(layer.multiplications for layer in light), 1) == work
    assert round(dense_macs / sum(layer.multiplications for layer in light_f2), 1) == work_f2


def test_a_shared_convolution_counts_as_often_as_it_runs():
    model = on_meta("smallbig23")
    layers = {layer.name: layer for layer in cost(model).layers}
    frames, plane = 8, 14 * 14
    middle, last = layers["stages.2.1.units.1.conv"], layers["stages.2.1.units.2.conv"]
    assert middle.macs == 2 * frames * plane * middle.weights  # both views on all frames
    assert last.macs == (frames + 1) * plane * last.weights  # the big view is one time step


def test_layers_say_their_algorithm():
    block = FullySeparableBlock(8, 8, 3, stride=(1, 2, 2))
    temporal, depthwise, pointwise = count(block, (1, 8, 8, 16, 16)).layers
    assert (temporal.algorithm, depthwise.algorithm, pointwise.algorithm) == ("F(4, 3)", "direct", "direct")
    assert temporal.multiplications * 2 == temporal.macs
    assert depthwise.multiplications == depthwise.macs == 8 * 8 * 8 * 8 * 9
    (dense,) = count(nn.Conv3d(4, 4, 3, padding=1), (1, 4, 8, 8, 8)).layers
    assert dense.algorithm == "F(4x4x4, 3x3x3)"
    assert dense.multiplications * 8 == dense.macs
    (transposed,) = count(nn.ConvTranspose3d(4, 4, 2, stride=2), (1, 4, 2, 4, 4)).layers
    assert transposed.macs == transposed.multiplications == 4 * 4 * 8 * 2 * 4 * 4


def test_matrix_products_outside_of_layers_are_counted():
    class Attention(nn.Module):
        def forward(self, x):
            x = x.flatten(2)
            return torch.softmax(x.transpose(1, 2) @ x, -1)

    counted = count(nn.Sequential(Attention()), (2, 3, 2, 2, 2))
    assert counted.macs == counted.multiplications == 2 * 8 * 8 * 3
    assert [(layer.name, layer.kind, layer.weights) for layer in counted.layers] == [("0", "Attention", 0)]


def test_counting_leaves_the_model_alone():
    model = create_model("c3d_light", width=0.125, num_classes=3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost(model)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_printed_cost_is_a_table():
    lines = str(cost(on_meta("c3d_light"))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "F(4x4, 3x3)" in lines[2]
    assert lines[-1].split()[0] == "total"


def test_errors_say_what_to_give():
    with pytest.raises(ConfigError, match="give input_shape"):
        cost(nn.Conv3d(3, 4, 3))
    with pytest.raises(ConfigError, match="above 1"):
        cost(on_meta("c3d"), tiles=(1,))


class Counted(float):
    """A number that counts the products it takes part in."""

    products = 0

    def __mul__(self, other):
        Counted.products += 1
        return Counted(float(self) * float(other))


def toom_cook(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices A, G, B of F(m, r): y = A ((G g) * (B d)), by interpolation at m + r - 2 points and infinity.

    A product of polynomials is found from its values; the transposed map is the correlation that a filter computes.
    """
    points = [Fraction(p) for p in (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))][: m + r - 2]
    n = m + r - 1

    def values(size):
        rows = [[p**j for j in range(size)] for p in points]
        return np.array([*rows, [Fraction(0)] * (size - 1) + [Fraction(1)]], dtype=object)

    square = values(n).astype(float)
    return values(m).T.astype(float), values(r).astype(float), np.linalg.inv(square).T


def winograd(x: np.ndarray, kernel: np.ndarray, tile: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """A correlation without padding, tile by tile, one channel; and the multiplications of its middle step."""
    sizes = [n - r + 1 for n, r in zip(x.shape, kernel.shape, strict=True)]
    matrices = [toom_cook(m, r) for m, r in zip(tile, kernel.shape, strict=True)]
    counts = [-(-n // m) for n, m in zip(sizes, tile, strict=True)]
    padded = np.pad(x, [(0, c * m + r - 1 - n) for c, m, r, n in zip(counts, tile, kernel.shape, x.shape, strict=True)])
    y = np.zeros([c * m for c, m in zip(counts, tile, strict=True)])

    def along_axes(tensor, which):
        for axis, triple in enumerate(matrices):
            tensor = np.moveaxis(np.tensordot(triple[which], tensor, (1, axis)), 0, axis)
        return tensor

    g = along_axes(kernel, 1)
    Counted.products = 0
    for place in itertools.product(*map(range, counts)):
        start = [p * m for p, m in zip(place, tile, strict=True)]
        window = tuple(slice(s, s + m + r - 1) for s, m, r in zip(start, tile, kernel.shape, strict=True))
        d = along_axes(padded[window], 2)
        product = np.array([float(Counted(a) * b) for a, b in zip(g.ravel(), d.ravel(), strict=True)]).reshape(g.shape)
        y[tuple(slice(s, s + m) for s, m in zip(start, tile, strict=True))] = along_axes(product, 0)
    return y[tuple(slice(n) for n in sizes)], Counted.products


@pytest.mark.parametrize(
    ("outputs", "kernel", "tiles"),
    [
        ((8,), (3,), (2,)),
        ((8,), (3,), (4,)),
        ((7,), (3,), (2, 4)),
        ((2,), (3,), (2, 4)),
        ((1,), (3,), (2, 4)),
        ((6,), (5,), (4,)),
        ((7, 7), (3, 3), (2, 4)),
        ((5, 6), (3, 3), (2, 4)),
        ((2, 7, 5), (3, 3, 3), (2, 4)),
        ((4, 1, 3), (3, 3, 1), (4,)),
    ],
)
def test_the_formula_counts_what_the_algorithm_multiplies(outputs, kernel, tiles):
    generator = np.random.default_rng(0)
    x = generator.normal(size=[n + r - 1 for n, r in zip(outputs, kernel, strict=True)])
    weight = generator.normal(size=kernel)
    expected = nn.functional.conv3d(
        torch.from_numpy(x)[(None,) * (5 - x.ndim)], torch.from_numpy(weight)[(None,) * (5 - x.ndim)]
    ).numpy()

    formula, algorithm = fast_multiplications(outputs, kernel, [False] * len(outputs), tiles)
    counts = []
    for tile in itertools.product((1, *tiles), repeat=len(outputs)):
        y, products = winograd(x, weight, tile)
        assert np.allclose(y, expected.reshape(y.shape), atol=1e-9)
        counts.append(products)
    assert formula == min(counts)
    assert (algorithm == "direct") == (formula == np.prod(outputs) * np.prod(kernel))
