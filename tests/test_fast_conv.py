"""The fast algorithm against exact arithmetic and against torch's convolution: outputs, gradients, caches, errors."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch

from lean3d.errors import ConfigError
from lean3d.ops.fast_conv import cook_toom


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


@pytest.mark.parametrize(("m", "known"), [(2, F23), (4, F43)])
def test_transforms_are_the_published_ones_up_to_sign(m, known):
    f = cook_toom(m, 3)
    at, g, bt = ([[Fraction(x) for x in row] for row in matrix] for matrix in known)
    for i in range(f.n):
        ours = ([row[i] for row in f.at], list(f.g[i]), list(f.bt[i]))
        theirs = ([row[i] for row in at], g[i], bt[i])
        signs = [+1 if a == b else -1 for a, b in zip(ours, theirs, strict=True)]
        assert all(a == [s * x for x in b] for a, b, s in zip(ours, theirs, signs, strict=True))
        assert signs[0] * signs[1] * signs[2] == 1


def test_transforms_as_tensors():
    f = cook_toom(4, 3)
    assert cook_toom(4, 3) is f
    at, g, bt = f.tensors(torch.float64)
    assert (at.shape, g.shape, bt.shape) == ((4, 6), (6, 3), (6, 6))
    assert g.dtype == torch.float64
    assert g[3, 1].item() == 1 / 12
    assert [x.dtype for x in f.tensors()] == [torch.float32] * 3
    with pytest.raises(ConfigError, match=r"1 or more; got F\(0, 3\)"):
        cook_toom(0, 3)
