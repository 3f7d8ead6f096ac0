"""Fused batch normalisation in training against torch's: results, running statistics, gradients, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from instruction_sets import each_isa
from lean3d.blocks.norm import NormReLU, normalise
from lean3d.ops import batch_norm, batch_norm_reference, native

CHANNELS_LAST = torch.channels_last_3d
NAMES = ("result", "running mean", "running variance", "dx", "dweight", "dbias", "da", "db")
needs_native = pytest.mark.skipif(not native.available(), reason="without the native extension there is one form only")


def all_of(f, x: Tensor, weight: Tensor, bias: Tensor, add: list[Tensor], gradient: Tensor, relu: bool) -> list[Tensor]:
    """Result, running statistics and all gradients."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias, *add)]
    mean, var = torch.full_like(weight, 0.3), torch.ones_like(weight)
    y = f(leaves[0], mean, var, *leaves[1:3], momentum=0.2, add=leaves[3:], relu=relu)
    y.backward(gradient)
    return [y.detach(), mean, var, *[leaf.grad for leaf in leaves]]


def inputs(shape: tuple[int, ...], frames: list[bool], offset: float, seed: int):
    g = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(shape, generator=g) + offset).contiguous(memory_format=CHANNELS_LAST)
    weight, bias = torch.rand(shape[1], generator=g) + 0.5, torch.randn(shape[1], generator=g)
    n, c, t, h, w = shape
    add = [
        torch.randn(n, c, 1 if one else t, h, w, generator=g).contiguous(memory_format=CHANNELS_LAST) for one in frames
    ]
    return x, weight, bias, add, torch.randn(shape, generator=g)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 3), st.sampled_from([1, 3, 16, 17, 64, 100]), *[st.integers(2, 9)] * 3),
    frames=st.lists(st.booleans(), max_size=2),
    offset=st.sampled_from([0.0, 1.0]),
    relu=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_forward_and_backward(shape, frames, offset, relu, threads, seed):
    x, weight, bias, add, gradient = inputs(shape, frames, offset, seed)
    exact = [t.double() for t in (x, weight, bias)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reference = all_of(batch_norm_reference, *exact, [t.double() for t in add], gradient.double(), relu)
        if relu:  # where rounding decides what the ReLU lets pass there is nothing to compare
            gradient = gradient.where(
                all_of(batch_norm_reference, *exact, [t.double() for t in add], gradient.double(), False)[0].abs()
                > 1e-4,
                0.0,
            )
            reference = all_of(batch_norm_reference, *exact, [t.double() for t in add], gradient.double(), relu)
        for _ in each_isa():
            ours = all_of(batch_norm, x, weight, bias, add, gradient, relu)
            assert native.last_backend("batch_norm") == ("native" if native.available() else "torch")
            for name, mine, true in zip(NAMES, ours, reference, strict=False):
                size = gradient.abs().sum() / x.shape[1] if name in ("dweight", "dbias") else true.abs().max()
                error = (mine - true).abs().max() / size.clamp(min=1e-3)
                assert error < 5e-5, f"{name} is off by {error:.1e}"
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("offset", [0.0, 10.0, 300.0])
def test_statistics_are_at_least_as_exact_as_torchs(offset):
    x, weight, bias, _, gradient = inputs((2, 33, 8, 28, 28), [], offset, 0)
    exact = all_of(batch_norm_reference, *[t.double() for t in (x, weight, bias)], [], gradient.double(), False)
    ours = all_of(batch_norm, x, weight, bias, [], gradient, False)
    torchs = all_of(batch_norm_reference, x, weight, bias, [], gradient, False)
    for name, mine, theirs, true in zip(NAMES, ours, torchs, exact, strict=False):
        mine_off, theirs_off = ((y - true).abs().max() / true.abs().max() for y in (mine, theirs))
        assert mine_off <= max(theirs_off, 1e-6), f"{name}: {mine_off:.1e}, torch's {theirs_off:.1e}"


@needs_native
def test_the_result_does_not_depend_on_the_number_of_threads():
    arguments = inputs((2, 48, 7, 30, 31), [True], 0.5, 0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_of(batch_norm, *arguments, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_nan_and_infinity_pass_as_in_torch():
    x, weight, bias, _, gradient = inputs((2, 20, 3, 4, 5), [], 0.0, 0)
    x[0, 3, 1, 1, 1], x[1, 5, 0, 0, 0] = float("nan"), float("inf")
    ours = all_of(batch_norm, x, weight, bias, [], gradient, True)
    torchs = all_of(batch_norm_reference, x, weight, bias, [], gradient, True)
    for name, mine, theirs in zip(NAMES, ours, torchs, strict=False):
        assert torch.equal(mine.isfinite(), theirs.isfinite()), name


@needs_native
@pytest.mark.parametrize("other", ["double", "contiguous", "bfloat16", "one value", "three to add"])
def test_what_the_kernel_does_not_take_is_torchs(other):
    x, weight, bias, add, gradient = inputs((2, 8, 3, 4, 5), [False] * (3 if other == "three to add" else 1), 0.0, 0)
    if other == "double":
        x, weight, bias, gradient = (t.double() for t in (x, weight, bias, gradient))
        add = [t.double() for t in add]
    elif other == "contiguous":
        x = x.contiguous()
    elif other == "bfloat16":
        x, add, gradient = x.bfloat16(), [t.bfloat16() for t in add], gradient.bfloat16()
    elif other == "one value":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            all_of(batch_norm, torch.zeros(1, 8, 1, 1, 1), weight, bias, [], torch.zeros(1, 8, 1, 1, 1), True)
        return
    ours = all_of(batch_norm, x, weight, bias, add, gradient, True)
    assert native.last_backend("batch_norm") == "torch"
    theirs = all_of(batch_norm_reference, x, weight, bias, add, gradient, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- in blocks


def steps(bn: nn.Module, fused: bool, count: int = 3) -> list[Tensor]:
    """Results and state of some steps."""
    bn = copy.deepcopy(bn)
    results = []
    for seed in range(count):
        x = inputs((2, 8, 3, 4, 5), [], 1.0, seed)[0]
        results.append(normalise(bn, x, relu=True) if fused else F.relu(bn(x)))
    return [*results, *bn.state_dict().values()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_state_is_that_of_batch_norm_3d(momentum, training):
    bn = nn.BatchNorm3d(8, eps=1e-3, momentum=momentum).train(training)
    for ours, theirs in zip(steps(bn, True), steps(bn, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_native
def test_hooks_conversions_and_eval_mode_are_called_as_they_are():
    x = inputs((2, 8, 3, 4, 5), [], 0.0, 0)[0]

    class Other(nn.BatchNorm3d):
        pass

    for bn in (nn.BatchNorm3d(8).eval(), Other(8), nn.BatchNorm3d(8, affine=False), nn.SyncBatchNorm(8).eval()):
        native.ran("batch_norm", "none")
        normalise(bn, x, relu=True)
        assert native.last_backend("batch_norm") == "none", bn
    hooked, seen = nn.BatchNorm3d(8), []
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
    normalise(hooked, x, relu=True)
    assert len(seen) == 1
    normalise(nn.BatchNorm3d(8), x, relu=True)
    assert native.last_backend("batch_norm") == "native"


def test_norm_relu_is_a_sequence_with_the_same_names():
    both = NormReLU(8)
    assert list(both.state_dict()) == list(nn.Sequential(nn.BatchNorm3d(8), nn.ReLU()).state_dict())
    x = inputs((2, 8, 3, 4, 5), [], 0.0, 0)[0]
    assert torch.equal(NormReLU(8, norm=False, activation=False)(x), x)
    assert torch.equal(NormReLU(8, norm=False)(x.clone()), F.relu(x))
    torch.testing.assert_close(NormReLU(8, activation=False)(x), nn.BatchNorm3d(8)(x))
