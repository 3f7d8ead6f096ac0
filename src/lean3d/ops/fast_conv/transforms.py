"""The matrices of the fast algorithm F(m, r), exact, for any m and r.

F(m, r) computes m outputs of a correlation with r taps, y[i] = sum_j d[i + j] g[j], from n = m + r - 1 inputs in n
multiplications instead of m * r (Winograd, "Arithmetic Complexity of Computations", 1980; for convolutional nets
Lavin & Gray, CVPR 2016, arXiv 1509.09308):

    y = A^T [(G g) * (B^T d)]         A^T (m, n)    G (n, r)    B^T (n, n)    * element by element

Where they come from (Cook and Toom): a polynomial of degree n - 1 is known by its values at n points. So the product of
one of degree m - 1 and one of degree r - 1 is found by evaluating both, multiplying the values, and interpolating.
The correlation is the transpose of this product in one of its factors: A^T holds the powers of the points; so does G,
divided by what interpolation divides by; and B^T holds the coefficients of the interpolating polynomials.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lean3d.errors import ConfigError

Matrix = tuple[tuple[Fraction, ...], ...]


@dataclass(frozen=True)
class Transform:
    """F(m, r): y = at @ ((g @ taps) * (bt @ inputs)), with exact entries; made by `cook_toom`."""

    m: int
    """Outputs of a tile."""
    r: int
    """Taps of the filter."""
    at: Matrix
    """A^T `(m, n)`: back to the outputs. Entries are dyadic (integers over powers of two), so exact in floats."""
    g: Matrix
    """G `(n, r)`: what is done to the filter, once."""
    bt: Matrix
    """B^T `(n, n)`: what is done to each tile of inputs. Dyadic entries, like A^T."""

    @property
    def n(self) -> int:
        """Inputs of a tile, and multiplications for it: m + r - 1."""
        return self.m + self.r - 1

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A^T `(m, n)`, G `(n, r)` and B^T `(n, n)`, each entry rounded once; made anew, the caller's to keep."""
        at, g, bt = (
            torch.tensor([[float(x) for x in row] for row in rows], dtype=dtype, device=device)
            for rows in (self.at, self.g, self.bt)
        )
        return at, g, bt


def points(count: int) -> list[Fraction]:
    """The first so many of 0, 1, -1, 2, -2, 1/2, -1/2, 4, -4, 1/4, -1/4, 8, ...; infinity comes on top of them.

    Pairs of opposite sign let B^T share its even and odd parts, and dyadic points keep A^T and B^T free of rounding.
    Errors are least where small and large powers of the points balance: where the reciprocal of each is one, too. Where
    those of the last pair are not among the first so many, all points are 3/4 of the above: 0, 3/4, -3/4, 3/2, -3/2 for
    F(4, 3), whose error that makes 2 to 3 times smaller, and 6 to 12 in three nested axes (docs/fast_algorithm.md).
    """
    pairs = (p for k in itertools.count(1) for p in (Fraction(2**k), Fraction(1, 2**k)))
    signed = (s for p in pairs for s in (p, -p))
    first = list(itertools.islice(itertools.chain(map(Fraction, (0, 1, -1)), signed), count))
    scale = Fraction(3, 4) if count % 4 in (0, 1) else Fraction(1)
    return [scale * p for p in first]


@functools.cache
def cook_toom(m: int, r: int) -> Transform:
    """The matrices of F(m, r), for m + r - 2 `points` and infinity.

    F(2, 3) is the one that Lavin & Gray print, and F(4, 3) theirs with all points scaled by 3/4. m = 1 and r = 1 give
    the direct form (identities and ones), which needs as few multiplications.

    Each row of the product (G g) * (B^T d) may be scaled: a factor in G, its inverse in B^T or A^T. Factors that are
    powers of two change no rounding error. The others, which interpolation divides by (3 in F(4, 3)), are all in G:
    only the filter, transformed once, meets constants that floats can't hold.

    Args:
        m: outputs of a tile, 1 or more.
        r: taps of the filter, 1 or more.

    Raises:
        ConfigError: m or r below 1.
    """
    if m < 1 or r < 1:
        raise ConfigError(f"F(m, r) has m outputs and r taps, each 1 or more; got F({m}, {r})")
    n = m + r - 1
    if m == 1 or r == 1:
        identity, ones = _identity(n), ((Fraction(1),),) * n
        return Transform(m, r, _transposed(ones) if m == 1 else identity, identity if m == 1 else ones, identity)
    finite = points(n - 1)
    g, bt = [], []
    for i, p in enumerate(finite):
        others = finite[:i] + finite[i + 1 :]
        scale = math.prod((p - q for q in others), start=Fraction(1))
        sign = 1 if scale > 0 else -1
        g.append(tuple(p**j / abs(scale) for j in range(r)))
        bt.append((*(sign * c for c in _with_roots(others)), Fraction(0)))
    g.append(_at_infinity(r))
    bt.append(_with_roots(finite))
    at = _transposed((*(tuple(p**j for j in range(m)) for p in finite), _at_infinity(m)))
    return Transform(m, r, at, tuple(g), tuple(bt))


def _with_roots(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of the product of (x - root), the constant one first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return tuple(coefficients)


def _at_infinity(size: int) -> tuple[Fraction, ...]:
    """A polynomial's value at infinity is its leading coefficient."""
    return (*(Fraction(0),) * (size - 1), Fraction(1))


def _identity(size: int) -> Matrix:
    return tuple(tuple(Fraction(int(i == j)) for j in range(size)) for i in range(size))


def _transposed(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(zip(*rows, strict=True))
