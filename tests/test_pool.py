"""Native max pooling against torch's: to the bit on every instruction set, with gradients, ties, NaN and infinities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruction_sets import each_isa
from lean3d.errors import ConfigError
from lean3d.ops import max_pool3d, native, pool3d
from lean3d.ops.pool.op import _max_pool3d, _max_pool3d_backward, _max_pool3d_with_places

CHANNELS_LAST = torch.channels_last_3d


def values(shape: tuple[int, ...], seed: int, share_of_nan: float = 0.0) -> Tensor:
    """Few different values, so that there are ties; infinities, and NaN where asked."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=g).float()
    if native.available():  # in channels_last_3d torch's gradient of a window full of -inf goes astray
        x[torch.rand(shape, generator=g) < 0.05] = float("-inf")
    x[torch.rand(shape, generator=g) < share_of_nan] = float("nan")
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def check_all(x: Tensor, window, stride, padding, ceil_mode: bool) -> None:
    """Result without and with a gradient, and the gradient itself, against contiguous `max_pool3d`."""
    theirs = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = F.max_pool3d(theirs, window, stride, padding, ceil_mode=ceil_mode)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(gradient)
    out = torch.empty_like(expected).contiguous(memory_format=CHANNELS_LAST)
    mine = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = max_pool3d(mine, window, stride, padding, ceil_mode=ceil_mode)
    y.backward(gradient)
    assert same(y.detach(), expected.detach())
    assert same(max_pool3d(x, window, stride, padding, ceil_mode=ceil_mode), expected.detach())
    assert max_pool3d(x, window, stride, padding, ceil_mode=ceil_mode, out=out) is out
    assert same(out, expected.detach())
    assert torch.equal(mine.grad, theirs.grad)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 16, 17, 33]), *[st.integers(1, 10)] * 3),
    axes=st.tuples(*[st.tuples(st.sampled_from([1, 2, 3, 5]), st.integers(1, 3), st.integers(0, 2))] * 3),
    ceil_mode=st.booleans(),
    channels_last=st.booleans(),
    nan=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_any_pooling_equals_torchs_on_every_instruction_set(shape, axes, ceil_mode, channels_last, nan, seed):
    window, stride, padding = zip(*[(k, s, min(p, k // 2)) for k, s, p in axes], strict=True)
    assume(all(n + 2 * p >= k for n, k, p in zip(shape[2:], window, padding, strict=True)))
    x = values(shape, seed, nan)
    if channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    for _ in each_isa():
        check_all(x, window, stride, padding, ceil_mode)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding", "ceil_mode"),
    [
        ((2, 40, 6, 30, 29), (3, 3, 3), (1, 1, 1), (1, 1, 1), False),
        ((1, 600, 4, 14, 14), (3, 3, 3), (1, 1, 1), (1, 1, 1), False),  # several blocks of rows
        ((2, 24, 40, 6, 5), (40, 3, 3), (1, 1, 1), (0, 1, 1), False),  # 360 places in a window: two bytes
        ((2, 24, 5, 13, 12), (1, 3, 3), (1, 2, 2), (0, 1, 1), False),
        ((2, 24, 5, 13, 12), (2, 2, 2), (2, 2, 2), (0, 0, 0), True),
        ((2, 24, 5, 13, 12), (2, 1, 1), (2, 1, 1), (0, 0, 0), True),
    ],
)
def test_the_nets_poolings_on_any_number_of_threads(shape, window, stride, padding, ceil_mode, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_all(values(shape, 0).contiguous(memory_format=CHANNELS_LAST), window, stride, padding, ceil_mode)
    finally:
        torch.set_num_threads(before)
    assert native.last_backend("max_pool3d") == ("native" if native.available() else "torch")


def test_a_view_in_the_middle_of_memory_is_read_where_it_is():
    whole = values((2, 16, 9, 8, 8), 0).contiguous(memory_format=CHANNELS_LAST)
    check_all(whole[:, :, 2:7], (3, 3, 3), (1, 1, 1), (1, 1, 1), False)
    check_all(whole[:, 3:11], (3, 3, 3), (1, 1, 1), (1, 1, 1), False)


@pytest.mark.skipif(not native.available(), reason="the operators have no kernel without the native extension")
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_are_well_behaved_for_torch(channels_last):
    x = torch.randn(2, 5, 4, 6, 7, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    settings = ([3, 3, 3], [1, 2, 1], [1, 1, 1], True)
    torch.library.opcheck(_max_pool3d, (x, *settings))
    torch.library.opcheck(_max_pool3d_with_places, (x.clone().requires_grad_(), *settings))
    y, places = _max_pool3d_with_places(x, *settings)
    torch.library.opcheck(_max_pool3d_backward, (y, places, [4, 6, 7], *settings[:3]))


def test_errors_say_what_fits():
    x = torch.zeros(1, 2, 4, 4, 4)
    if native.available():
        with pytest.raises(ConfigError, match="half its window"):
            max_pool3d(x, (3, 3, 3), padding=(2, 1, 1))
        with pytest.raises(ConfigError, match="doesn't fit into"):
            max_pool3d(x, (5, 3, 3))
        with pytest.raises(ConfigError, match=r"out must be \(1, 2, 4, 4, 4\)"):
            max_pool3d(x, (3, 3, 3), padding=(1, 1, 1), out=torch.empty(1, 2, 4, 4, 3))


def test_pool3d_is_native_where_kernels_are():
    pool3d(torch.zeros(1, 2, 4, 4, 4), (3, 3, 3))
    if native.available():
        assert native.last_backend("max_pool3d") == "native"
