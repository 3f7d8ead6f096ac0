"""The fast forms of the operators against their plain references: outputs, gradients, ties, NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lean3d.errors import ConfigError
from lean3d.ops import conv3d, conv3d_reference, pool3d, pool3d_reference

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]

# kernel, stride, padding, dilation, groups: every form of the dispatch, with and without its odd cases
CONVOLUTIONS = [
    ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
    ((1, 1, 1), (2, 2, 2), (0, 0, 0), (1, 1, 1), 1),
    ((1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 4),
    ((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1),
    ((3, 1, 1), (2, 2, 2), (1, 0, 0), (1, 1, 1), 1),
    ((3, 1, 1), (1, 1, 1), (2, 0, 0), (2, 1, 1), 4),
    ((5, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
    ((3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
    ((1, 3, 3), (2, 2, 2), (0, 1, 1), (1, 1, 1), 4),
    ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 8),
    ((1, 3, 5), (1, 2, 1), (0, 0, 2), (1, 2, 1), 1),
    ((1, 7, 7), (1, 2, 2), (0, 3, 3), (1, 1, 1), 1),
    ((1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ((3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1), 8),
    ((5, 3, 3), (2, 1, 2), (2, 1, 0), (1, 1, 1), 8),
    ((3, 3, 5), (1, 1, 1), (0, 1, 2), (2, 2, 1), 8),
    ((2, 3, 3), (3, 1, 1), (3, 1, 1), (1, 1, 1), 8),
]


def gradients(f, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The output of f and, for a fixed random gradient, the gradients of all its inputs."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = f(*leaves)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
    return y.detach(), *[leaf.grad for leaf in leaves]


def assert_equal_to_the_reference(channels: int, kernel, layout, settings) -> None:
    """A convolution of so many channels to 8, forward and backward, in float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 6, 9, 7, dtype=torch.float64, generator=g).contiguous(memory_format=layout)
    weight = torch.randn(8, channels // settings.get("groups", 1), *kernel, dtype=torch.float64, generator=g)
    bias = torch.randn(8, dtype=torch.float64, generator=g)
    ours = gradients(lambda *a: conv3d(*a, **settings), x, weight, bias)
    reference = gradients(lambda *a: conv3d_reference(*a, **settings), x, weight, bias)
    for mine, theirs in zip(ours, reference, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_convolution_equals_its_reference_forward_and_backward(kernel, stride, padding, dilation, groups, layout):
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    assert_equal_to_the_reference(8, kernel, layout, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (3, 3, 3)])
def test_one_channel_gives_what_the_reference_gives_forward_and_backward(kernel, layout):
    settings = {"stride": (1, 2, 2), "padding": tuple(k // 2 for k in kernel)}
    assert_equal_to_the_reference(1, kernel, layout, settings)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3)])
def test_convolution_keeps_channels_innermost(kernel, channels):
    """The forms are free of copies only while activations stay in channels_last_3d."""
    x = torch.randn(2, channels, 4, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    y = conv3d(x, torch.randn(16, channels, *kernel), padding=tuple(k // 2 for k in kernel))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


WINDOWS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (5, 5, 5), (7, 3, 5), (None, 3, 3), (None, 1, 1), (None, None, None)]


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", [(2, 3, 6, 9, 7), (1, 8, 1, 2, 1), (2, 1, 3, 1, 4)])
def test_pooling_equals_its_reference(shape, window, mode):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()  # many ties at 0
    with torch.no_grad():
        assert_close(
            pool3d(x, window, mode), pool3d_reference(x, window, mode), rtol=0, atol=0 if mode == "max" else 1e-12
        )
    ours = gradients(lambda t: pool3d(t, window, mode), x)
    reference = gradients(lambda t: pool3d_reference(t, window, mode), x)
    for mine, theirs in zip(ours, reference, strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 9)] * 3),
    window=st.tuples(*[st.sampled_from([1, 3, None])] * 3),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_maximum_without_gradient_equals_torch_to_the_bit(shape, window, channels_last, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(pool3d(x, window), pool3d_reference(x, window))


def test_maximum_passes_nan_on_as_torch_does():
    x = torch.randn(1, 4, 5, 6, 7)
    x[0, 1, 2, 3, 4] = float("nan")
    ours, reference = pool3d(x, (3, 3, 3)), pool3d_reference(x, (3, 3, 3))
    assert reference.isnan().sum() == 27
    assert torch.equal(ours.isnan(), reference.isnan())
    assert torch.equal(ours.nan_to_num(), reference.nan_to_num())


@pytest.mark.parametrize(
    ("window", "mode"), [((2, 3, 3), "max"), ((3, 3), "max"), ((0, 3, 3), "max"), ((3, 3, 3), "min")]
)
def test_pooling_refuses_what_it_is_not_defined_for(window, mode):
    with pytest.raises(ConfigError, match="pooling"):
        pool3d(torch.zeros(1, 1, 4, 4, 4), window, mode)
