"""lean3d.fast.compile_stream: the scores and states of the net's own step."""

from __future__ import annotations

import pytest
import torch

from lean3d import fast
from lean3d.blocks import map_state, split_state, stack_states, state_layout
from lean3d.errors import ConfigError, StreamingError
from lean3d.fast import choose, streaming
from lean3d.fast.graph import Call, Conv
from lean3d.fast.trace import trace
from lean3d.models import VideoNet, create_model
from lean3d.stream import Session

NETS = {
    "c3d_light": {"layers": 5, "stem": "conv", "shrink": "stride", "halve_time_from": 4, "causal": True},
    "slow_r18": {"num_frames": 4},
    "slowfast_r50": {"num_frames": 8, "causal": True},
    "smallbig18": {"num_frames": 3, "windowed": True},
    "r2plus1d_18": {"num_frames": 4, "causal": True},
    "x3d_xs": {"num_frames": 3, "causal": True},
}
QUICK = ("c3d_light", "slow_r18", "smallbig18")


def small(name: str, **arguments) -> VideoNet:
    torch.manual_seed(0)
    net = create_model(name, width=0.125, num_classes=5, size=32, **{**NETS[name], **arguments})
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_(std=0.1), norm.running_var.uniform_(0.5, 1.5), norm.weight.data.uniform_(0.5, 1.5)
    return net.eval()


def check_equal(right: torch.Tensor, found: torch.Tensor, within: float = 1e-5) -> None:
    assert (found - right).abs().max() <= within * right.abs().max()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this run's own, shared by its tests."""
    monkeypatch.setenv("LEAN3D_CACHE", str(tmp_path_factory.getbasetemp() / "fast"))


@pytest.fixture
def all_compiled(monkeypatch):
    """As if all that is compiled were faster; and algorithms are run once, since times don't matter."""
    monkeypatch.setattr(choose, "ROUNDS", 1)
    monkeypatch.setattr(streaming, "_times", lambda own, compiled: (2.0, 1.0))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
)
def test_scores_and_states_are_the_nets_own(name, all_compiled):
    own = small(name).stream()
    compiled = fast.compile_stream(own, quiet=True)
    algorithms = {
        name for p in compiled.pieces if p.compiled for layer in p.compiled.layers for name in layer.algorithms
    }
    assert compiled.gains and algorithms - {"torch"} and compiled.error <= 1e-5
    generator = torch.Generator().manual_seed(1)
    states = own.init_state(), compiled.init_state()
    compared = 0
    for number in range(2 * own.period + 6):
        frame = torch.randn(3, 3, 1, 32, 32, generator=generator)
        right, first = own.step(frame, states[0])
        found, second = compiled.step(frame, states[1])
        assert state_layout(first) == state_layout(second)
        map_state(lambda a, b: check_equal(a.float(), b.float(), 1e-4), first, second)
        if right is not None:
            check_equal(right, found)
            compared += 1
        states = (second, first) if number % 3 == 0 else (first, second)  # each goes on from the other's
    rest = own.flush(states[0]), compiled.flush(states[1])
    assert len(rest[0]) == len(rest[1])
    for right, found in zip(*rest, strict=True):
        check_equal(right, found)
        compared += 1
    assert compared >= 2


def test_any_number_of_streams_and_other_sizes(all_compiled):
    own = small("c3d_light").stream()
    compiled = fast.compile_stream(own, quiet=True)
    for count, size in ((1, 32), (7, 32), (21, 32), (2, 40)):
        frames = torch.randn(8, count, 3, 1, size, size)
        scores = []
        for stream in (own, compiled):
            state = stream.init_state()
            scores.append([])
            for frame in frames:
                y, state = stream.step(frame, state)
                scores[-1] += [] if y is None else [y]
        right, found = map(torch.cat, scores)
        assert right.shape == (2 * count, 5)
        check_equal(right, found)


def test_streams_join_and_part(all_compiled):
    compiled = fast.compile_stream(small("slow_r18").stream(), quiet=True)
    frames = torch.randn(12, 3, 3, 1, 32, 32)
    states = [compiled.init_state() for _ in range(3)]
    alone = []
    for frame in frames:
        steps = [compiled.step(frame[i : i + 1], states[i]) for i in range(3)]
        states = [state for _, state in steps]
        alone.append([y for y, _ in steps])
    joined = stack_states([compiled.init_state() for _ in range(3)])
    for number, frame in enumerate(frames):
        y, joined = compiled.step(frame, joined)
        joined = stack_states(split_state(joined)) if number > 4 else joined
        if y is not None:
            check_equal(y, torch.cat(alone[number]))


def test_what_is_not_faster_stays_as_it_is(monkeypatch):
    own = small("c3d_light").stream()
    monkeypatch.setattr(streaming, "_times", lambda own, compiled: (1.0, 2.0))
    compiled = fast.compile_stream(own, quiet=True)
    assert not compiled.gains and compiled.chain is own.chain
    frame = torch.randn(1, 3, 1, 32, 32)
    with torch.inference_mode():
        a, b = own.init_state(), compiled.init_state()
        for _ in range(8):
            (right, a), (found, b) = own.step(frame, a), compiled.step(frame, b)
            assert right is found is None or torch.equal(right, found)


def test_too_large_an_error_is_mended(all_compiled, monkeypatch):
    """A function that is within its own limit, yet spoils the scores, gets a narrower one."""
    tolerances = []
    inner = streaming.compile

    def spoiled(row, example, *, tolerance, **how):
        tolerances.append(tolerance)
        compiled = inner(row, example, tolerance=1e-4, **how)
        if tolerance < 1e-6:
            return compiled
        spoil = type("Spoiled", (), {"layers": compiled.layers, "__call__": lambda self, x: compiled(x) * 1.001})
        return spoil()

    monkeypatch.setattr(streaming, "compile", spoiled)
    compiled = fast.compile_stream(small("c3d_light").stream(), quiet=True)
    assert compiled.gains and compiled.error <= 1e-5 and len(set(tolerances)) == 3
    assert "stages.1" in "".join(str(cell) for column in compiled.explain().columns for cell in column.cells)


def test_causal_nets_compile_on_clips_too():
    """Their convolutions are seen as such: the zeros before the first frame, and the windowed gradient, are calls."""
    net, clip = small("c3d_light", num_frames=8), torch.randn(2, 3, 8, 32, 32)
    graph = trace(net, (clip,))
    assert sum(isinstance(op, Conv) for op in graph.ops) > 8
    calls = {op.name for op in graph.ops if isinstance(op, Call) and len(op.outputs[0].shape) == 5}
    assert calls == {"torch.nn.functional.pad", "TemporalResidualGradient"}
    with torch.inference_mode():
        check_equal(net(clip), fast.compile(net, clip, quiet=True)(clip))


def test_errors_say_what_to_do():
    net = small("c3d_light")
    stream = net.stream()
    with pytest.raises(StreamingError, match=r"call model.eval\(\) before its step is compiled"):
        fast.compile_stream(net.train().stream(), quiet=True)
    with pytest.raises(ConfigError, match="float64 on cpu"):
        net.eval().double()
        fast.compile_stream(stream, quiet=True)
    with pytest.raises(ConfigError, match="fast is for CPUs"):
        Session(small("c3d_light"), device="cuda", fast=True)


def test_a_session_with_it_says_the_same(all_compiled):
    net = small("c3d_light", num_frames=8)
    plain, compiled = Session(net, device="cpu"), Session(net, device="cpu", fast=True)
    assert isinstance(compiled.net, fast.FastStream) and compiled.net.gains
    frames = torch.randint(0, 256, (30, 36, 48, 3), dtype=torch.uint8)
    found = [[p for frame in frames for p in session.push(frame)] for session in (plain, compiled)]
    assert len(found[0]) == len(found[1]) > 2
    for a, b in zip(*found, strict=True):
        assert (a.start, a.end) == (b.start, b.end)
        torch.testing.assert_close(a.probabilities, b.probabilities, atol=1e-5, rtol=0)
    plain.restore(compiled.state())  # states are the same thing
