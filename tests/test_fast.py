"""The compiler: the same function for the whole zoo, whatever the kernels, and nothing left behind between calls."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from lean3d import fast
from lean3d.blocks import (
    ConvBN,
    FastConv3d,
    FullySeparableBlock,
    SmallBigUnit,
    TemporalResidualGradient,
    convert_to_fsb,
)
from lean3d.errors import ConfigError
from lean3d.fast import choose, compiler
from lean3d.fast.algorithms import algorithms
from lean3d.fast.exact import exact
from lean3d.fast.graph import Call, Conv, ConvPool, Gradient, MaxPool, SmallBig, StageTwo, Value
from lean3d.fast.memory import Block, place
from lean3d.fast.passes import simplify, ways
from lean3d.fast.trace import trace
from lean3d.models import create_model, list_models
from lean3d.models.c3d import ShrinkPool
from lean3d.ops import native
from seeded import seeded_state

BACKENDS = [
    pytest.param(True, id="native", marks=pytest.mark.skipif(not native.available(), reason=native.absence())),
    pytest.param(False, id="torch"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this run's own, shared by its tests, and one run of each algorithm: times don't matter here."""
    folder = tmp_path_factory.getbasetemp() / "fast"
    monkeypatch.setenv("LEAN3D_CACHE", str(folder))
    monkeypatch.setattr(choose, "ROUNDS", 0)
    return folder


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the native kernels, and without them."""
    if not request.param:
        monkeypatch.setattr(native, "_module", None)
        monkeypatch.setattr(native, "_absence", "left out by a test")
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeded(model: nn.Module) -> nn.Module:
    """Weights and statistics from names: every BN has something to fold, the SmallBig units' big ones too."""
    model.load_state_dict(seeded_state({name: x.shape for name, x in model.state_dict().items()}))
    return model.eval()


def in_float64(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return copy.deepcopy(model).double()(*(x.double() for x in inputs))


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).abs().max() / right.abs().max()).item()


def quick(model: nn.Module, example: Any, **settings: Any) -> fast.CompiledModel:
    return fast.compile(model, example, quiet=True, **settings)


# One of each kind of net; their deeper and wider relatives take minutes more.
QUICK = {"c2d_r18", "c3d", "c3d_light", "csn_r50", "i3d_r50_nl", "r2plus1d_18", "slow_r50", "slowfast_r50_light"}
QUICK |= {"smallbig18", "smallbig23", "tsm_r50", "x3d_xs"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in list_models()]
)
def test_the_zoo(name: str, kernels: bool) -> None:
    """Outputs against float64, at the example's shape and at others, odd ones and several clips among them."""
    torch.manual_seed(0)
    model = seeded(create_model(name, width=0.125, num_classes=5))
    example = torch.randn(1, 3, 4, 40, 32)
    compiled = quick(model, example)
    assert compiled.error <= 1e-4
    for shape in [(1, 3, 4, 40, 32), (2, 3, 4, 40, 32), (1, 3, 5, 33, 47)]:
        clip = torch.randn(shape)
        right = in_float64(model, clip)
        found = compiled(clip)
        assert found.shape == right.shape
        assert error(found, right) < 2e-5, shape
    if kernels:
        assert any("native" in a for layer in compiled.layers for a in layer.algorithms)
    else:
        assert not any("native" in a for layer in compiled.layers for a in layer.algorithms)


@pytest.mark.parametrize("view", ["temporal", "depthwise", "pointwise"])
def test_big_views_of_separable_blocks(view: str, kernels: bool) -> None:
    torch.manual_seed(0)
    model = seeded(create_model("c3d_light", layers=5, big_view=view, width=0.125, num_classes=5))
    clip = torch.randn(1, 3, 4, 40, 32)
    compiled = quick(model, clip)
    assert error(compiled(clip), in_float64(model, clip)) < 2e-5


def test_every_algorithm_computes_its_layer(kernels: bool) -> None:
    """Not only those that are chosen: all algorithms of all operations that the zoo's kinds of nets have."""
    torch.manual_seed(0)
    seen, seen_algorithms = set(), set()
    names = [
        "c3d",
        "c3d_light",
        "smallbig50_extra",
        "i3d_r50_nl",
        "csn_r50",
        "x3d_s",
        "slowfast_r50_light",
        "tsm_r50",
        "r3d_18",
    ]
    for name in names:
        model = seeded(create_model(name, width=0.125, num_classes=5))
        graph = trace(model, [torch.randn(2, 3, 5, 33, 32)])
        simplify(graph)
        for op in [part for whole in graph.ops for way in ways(whole) for part in way]:
            if isinstance(op, Call) or op.signature() in seen:
                continue
            seen.add(op.signature())
            given = {v: torch.randn(v.shape).contiguous(memory_format=layout(v)) for v in op.inputs}
            inputs = [given[v] for v in op.inputs]
            right = exact(op, [x.double() for x in inputs])[0]
            for algorithm in algorithms(op):
                kernel = algorithm.pack()
                before = [x.clone() for x in inputs]
                out = torch.full(op.output.shape, torch.nan).contiguous(memory_format=layout(op.output))
                found = kernel.run(inputs, out if kernel.fills else None)
                assert (found is out) == kernel.fills
                assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an input was written over"
                assert error(found, right) < 5e-5, (algorithm.name, op.signature())
                for i in kernel.in_place:
                    if i < len(op.inputs):
                        copies = [x.clone() for x in inputs]
                        kernel.run(copies, copies[i])
                        torch.testing.assert_close(copies[i], found, rtol=1e-4, atol=1e-4)
                seen_algorithms.add(f"{type(op).__name__} {algorithm.name}")
    assert len(seen) > 100
    if kernels:
        assert {"ConvPool native F(4x1x1)", "SmallBig native F(1x4x4) shared"} <= seen_algorithms


def layout(value: Value) -> torch.memory_format:
    return torch.channels_last_3d if len(value.shape) == 5 else torch.contiguous_format


def test_fast_algorithms_obey_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounds more than direct convolution is out where its error is above the budget."""
    conv = Conv([Value((1, 8, 2, 8, 8), torch.float32)], [Value((1, 8, 2, 8, 8), torch.float32)],
                torch.zeros(8, 8, 3, 3, 3), None, (1, 1, 1), (1, 1, 1), 1)  # fmt: skip
    known = {conv.signature(): {a.name: [1.0, 1e-7] for a in algorithms(conv)}}
    rounding = [a.name for a in algorithms(conv) if a.rounds]
    for name in rounding:
        known[conv.signature()][name] = [0.5, 3e-5]
    assert (choose.choose(conv, known, 1e-4).names[0] in rounding) == bool(rounding)
    assert choose.choose(conv, known, 1e-5).names[0] not in rounding


def test_a_missed_tolerance_is_tightened_and_then_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = seeded(create_model("c3d_light", width=0.125, num_classes=5))
    clip = torch.randn(1, 3, 4, 32, 32)
    budgets = []
    choices = choose.choose
    monkeypatch.setattr(
        compiler, "choose", lambda op, known, budget: (budgets.append(budget), choices(op, known, budget))[1]
    )
    with pytest.raises(
        ConfigError, match=r"can't be computed within the tolerance 1e-12.*Give fast.compile a tolerance"
    ):
        quick(model, clip, tolerance=1e-12, cache=tmp_path)
    assert len(set(budgets)) > 1
    assert budgets[-1] == 0


def test_passes_fuse_what_they_know() -> None:
    def kinds(model: nn.Module, shape: tuple[int, ...]) -> list[type]:
        graph = trace(model.eval(), [torch.randn(shape)])
        simplify(graph)
        return [type(op) for op in graph.ops]

    assert kinds(FullySeparableBlock(24, 12, 3), (1, 24, 4, 9, 9)) == [Conv, StageTwo]
    assert kinds(FullySeparableBlock(8, 12, 3), (1, 8, 4, 9, 9)) == [StageTwo]
    for time in (True, False):
        shrunk = nn.Sequential(FullySeparableBlock(8, 12, 3), ShrinkPool(time=time))
        assert kinds(shrunk, (1, 8, 5, 9, 9)) == [StageTwo]
    for time, kind in ((False, [ConvPool]), (True, [Conv, MaxPool])):
        assert kinds(nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), ShrinkPool(time=time)), (1, 3, 5, 9, 9)) == kind
    assert kinds(nn.Sequential(nn.Conv3d(32, 8, 3), ShrinkPool(time=False)), (1, 32, 5, 9, 9)) == [Conv, MaxPool]
    viewed = FullySeparableBlock(8, 12, 3, big_views={"pointwise": (3, 3, 3)})
    assert SmallBig in kinds(viewed, (1, 8, 4, 9, 9)), "dense and flat; other steps stay a pooling and two convolutions"
    assert kinds(SmallBigUnit(8, 12, (1, 3, 3)), (1, 8, 4, 9, 9)) == [SmallBig]
    assert kinds(SmallBigUnit(8, 12, 1, pool=(None, 3, 3)), (1, 8, 4, 9, 9)) == [SmallBig]
    net = create_model("smallbig23", width=0.125, num_classes=5)
    graph = trace(net.eval(), [torch.randn(1, 3, 4, 32, 32)])
    simplify(graph)
    counts = {kind: sum(type(op) is kind for op in graph.ops) for kind in (SmallBig, Conv, MaxPool, Call)}
    assert counts == {SmallBig: 18, Conv: 8, MaxPool: 1, Call: 2}
    assert len(graph.ops) == sum(counts.values())


class Odd(nn.Module):
    """All that is not in the zoo: a branch on shapes, writing in place, weight norm, tensors of its own, a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv3d(3, 8, 3, padding="same"))
        self.norm = nn.BatchNorm3d(8)
        self.strided = nn.Conv3d(8, 8, 3, stride=2, padding=1, dilation=(1, 1, 2), groups=2)
        self.second = nn.Conv3d(8, 8, (3, 1, 1), padding=(2, 0, 0), padding_mode="circular")
        self.register_buffer("scale", torch.rand(1, 8, 1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.norm(self.first(x))
        if y.shape[2] > 2:
            y += F.relu(y, inplace=False) * self.scale
        a, b = y.chunk(2, 1)
        z = torch.cat((b.relu_(), a), 1)
        z = F.hardswish(self.second(z))
        return self.strided(z), {"mean": z.mean((2, 3, 4)), "one": z[:, 0, 0].exp() + 1}


def test_a_shared_convolution_is_known_by_its_weights() -> None:
    graph = trace(seeded(SmallBigUnit(8, 12, (1, 3, 3))), [torch.randn(1, 8, 4, 9, 9)])
    simplify(graph)
    (unit,) = graph.ops
    assert isinstance(unit, SmallBig) and unit.ratio is not None
    torch.testing.assert_close(unit.big_weight, unit.ratio[:, None, None, None, None] * unit.weight)
    one_other = unit.big_weight.clone()
    one_other[3, 2, 0, 1, 1] *= 1.001
    assert dataclasses.replace(unit, big_weight=one_other).ratio is None
    assert dataclasses.replace(unit, weight=torch.zeros_like(unit.weight)).ratio is None


def test_memory_has_a_price() -> None:
    """A hundredth of a second is worth some megabytes of weights, a thousandth of that is not."""
    torch.set_num_threads(1)
    few, many = 2**20, 2**25
    assert choose.Choice(["few"], 2e-2, 0.0, weights=few).price > choose.Choice(["many"], 1e-2, 0.0, weights=many).price
    assert (
        choose.Choice(["few"], 1.001e-2, 0.0, weights=few).price
        < choose.Choice(["many"], 1e-2, 0.0, weights=many).price
    )


def test_any_module(kernels: bool) -> None:
    model = seeded(Odd())
    clip = torch.randn(2, 3, 4, 9, 8)
    compiled = quick(model, clip)
    for x in (clip, torch.randn(1, 3, 2, 8, 8)):
        (first, more), (right, right_more) = compiled(x), in_float64(model, x)
        assert error(first, right) < 1e-5
        assert more.keys() == right_more.keys()
        assert all(error(more[key], right_more[key]) < 1e-5 for key in more)


class Steps(nn.Module):
    """Decides by its numbers: can't be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBN(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            y[:, 0] = 0
        return y


def test_what_is_not_understood_runs_as_it_is() -> None:
    model = seeded(nn.Sequential(ConvBN(3, 4, 3), Steps(), nn.ReLU(inplace=True), nn.Conv3d(4, 4, 1)))
    clips = [torch.randn(1, 3, 4, 8, 8), torch.randn(1, 3, 4, 8, 8) - 3]
    compiled = quick(model, clips[0])
    for clip in clips:
        assert error(compiled(clip), in_float64(model, clip)) < 1e-5
    graph = trace(model, [clips[0]])
    assert [type(op) for op in graph.ops] == [Conv, type(graph.ops[1]), Call, type(graph.ops[3]), Conv]
    assert graph.opaque == {"1"}


@pytest.mark.parametrize("block", ["-, TxHxW, -", "-, Tx1x1, -", "3x3x3, 5x5x5, TxHxW"])
def test_every_way_to_compute_a_big_view_of_any_window(block: str, kernels: bool) -> None:
    """Choosing runs all of them: a view of whole axes has fewer places than what it is added to."""
    model = seeded(create_model("smallbig23", width=0.125, num_classes=5, num_frames=4, block=block))
    for size in ((33, 32), (64, 48)):
        clip = torch.randn(1, 3, 4, *size)
        assert error(quick(model, clip)(clip), in_float64(model, clip)) < 1e-5


@pytest.mark.parametrize("name", ["smallbig18", "c3d_light", "tsm_r50"])
@pytest.mark.parametrize("form", ["windowed", "causal"])
def test_forms_for_streams(name: str, form: str, kernels: bool) -> None:
    model = seeded(create_model(name, width=0.125, num_classes=5, num_frames=4, **{form: True}))
    compiled = quick(model, torch.randn(1, 3, 4, 33, 32))
    for frames in (4, 7):
        x = torch.randn(1, 3, frames, 33, 32)
        assert error(compiled(x), in_float64(model, x)) < 1e-5


@pytest.mark.parametrize("order", ["differences_first", "mean_first"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_temporal_residual_gradient_is_one_operation(order: Any, beside: bool, kernels: bool) -> None:
    block = TemporalResidualGradient(order, beside=beside)
    model = seeded(nn.Sequential(block, nn.Conv3d(6 if beside else 3, 4, 1)))
    clip = torch.randn(2, 3, 6, 5, 7)
    compiled = quick(model, clip)
    for frames, horizon, kinds in ((6, None, [Gradient, Conv]), (1, None, [Gradient, Conv]), (6, 4, [Call, Conv])):
        if horizon is not None:
            block.limit_time(horizon, causal=False)
            compiled = quick(model, clip)
        x = clip[:, :, :frames]
        assert [type(op) for op in trace(model, [x]).ops] == kinds
        assert error(compiled(x), in_float64(model, x)) < 1e-5


def test_hooks_are_called() -> None:
    model = seeded(nn.Sequential(ConvBN(3, 4, 3), nn.ReLU()))
    model[0].conv.register_forward_hook(lambda module, args, output: output * 2)
    clip = torch.randn(1, 3, 2, 8, 8)
    assert error(quick(model, clip)(clip), in_float64(model, clip)) < 1e-5


def test_fast_conv_layers_and_converted_nets() -> None:
    converted = create_model("r3d_18", width=0.125, num_classes=5)
    convert_to_fsb(converted)
    fast_net = nn.Sequential(FastConv3d(3, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
    for model in (seeded(converted), seeded(fast_net)):
        clip = torch.randn(1, 3, 4, 32, 32)
        compiled = quick(model, clip)
        assert error(compiled(clip), in_float64(model, clip)) < 1e-5
        assert not any(layer.kind == "FastConv3d" for layer in compiled.layers)


def test_trained_weights() -> None:
    """After steps of training, statistics and weights are no longer what they were made."""
    torch.manual_seed(0)
    model = create_model("smallbig18", width=0.125, num_classes=5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(4):
        loss = F.cross_entropy(model(torch.randn(4, 3, 4, 32, 32)), torch.tensor([0, 1, 2, step % 5]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip = torch.randn(1, 3, 4, 32, 32)
    compiled = quick(model.eval(), clip)
    assert error(compiled(clip), in_float64(model, clip)) < 1e-5


@pytest.mark.parametrize("name", ["smallbig23", "slowfast_r50_light", "i3d_r50_nl", "x3d_xs"])
def test_calls_leave_nothing_behind(name: str, kernels: bool) -> None:
    """Results are new tensors; a call sees nothing of the one before; inputs in any layout stay as they were."""
    model = seeded(create_model(name, width=0.125, num_classes=5))
    clips = [torch.randn(1, 3, 4, 32, 32) for _ in range(2)]
    clips[1] = clips[1].contiguous(memory_format=torch.channels_last_3d)
    compiled = quick(model, clips[0])
    kept = [clip.clone() for clip in clips]
    first, second = compiled(clips[0]), compiled(clips[1])
    copies = first.clone(), second.clone()
    compiled(torch.full((1, 3, 4, 32, 32), torch.nan))
    again = compiled(clips[0]), compiled(clips[1])
    for found, copied, repeated in zip((first, second), copies, again, strict=True):
        assert torch.equal(found, copied), "a result was written over"
        assert torch.equal(repeated, copied), "a call left something behind"
    assert all(torch.equal(a, b) for a, b in zip(clips, kept, strict=True))


def test_two_threads_may_call_at_a_time() -> None:
    model = seeded(create_model("c3d_light", width=0.125, num_classes=5))
    clips = [torch.randn(1, 3, 4, 32, 32) for _ in range(4)]
    compiled = quick(model, clips[0])
    right = [compiled(clip) for clip in clips]
    found: list[list[Tensor]] = [[] for _ in clips]

    def work(i: int) -> None:
        found[i] = [compiled(clips[i]) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(clips))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(y, right[i]) for i in range(len(clips)) for y in found[i])
    assert all(len(results) == 10 for results in found)


def test_threads_are_those_asked_for_and_given_back() -> None:
    torch.set_num_threads(1)
    seen = []
    model = seeded(nn.Sequential(ConvBN(3, 4, 3), Steps()))
    compiled = quick(model, torch.randn(1, 3, 2, 8, 8), threads=2)
    model[1].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    compiled(torch.randn(1, 3, 2, 8, 8))
    assert (seen, torch.get_num_threads(), compiled.threads) == ([2], 1, 2)


def test_measurements_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = seeded(create_model("c3d_light", width=0.125, num_classes=5))
    clip = torch.randn(1, 3, 4, 32, 32)
    first = quick(model, clip, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert len(content["nets"]) == 1

    def refuse(*_: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(choose, "measure", refuse)
        second = quick(model, clip, cache=tmp_path)
        assert [layer.algorithms for layer in second.layers] == [layer.algorithms for layer in first.layers]
        assert second.layers == first.layers
        assert torch.equal(first(clip), second(clip))
        with torch.no_grad():  # other weights: the times hold, the error is found again
            model.head.linear.weight.mul_(2)
        assert quick(model, clip, cache=tmp_path).error > 0
    assert len(json.loads(file.read_text())["nets"]) == 2


@pytest.mark.parametrize(
    "damage", ["", "{", '{"format": 1}', '{"format": 99}', '{"format": 1, "layers": [], "nets": {}}']
)
def test_a_damaged_cache_is_left_out(damage: str, tmp_path: Path) -> None:
    model = seeded(nn.Sequential(ConvBN(3, 4, 3), nn.ReLU()))
    clip = torch.randn(1, 3, 2, 8, 8)
    quick(model, clip, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    with pytest.warns(UserWarning, match=r"leaves out .*json, which can't be read"):
        compiled = quick(model, clip, cache=tmp_path)
    assert error(compiled(clip), in_float64(model, clip)) < 1e-5
    assert json.loads(file.read_text())["nets"]
    assert [path for path in tmp_path.iterdir() if path != file] == []


def test_a_cache_that_can_not_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = seeded(nn.Sequential(ConvBN(3, 4, 3), nn.ReLU()))
    with pytest.warns(UserWarning):
        quick(model, torch.randn(1, 3, 2, 8, 8), cache=tmp_path / "file")


def test_another_shape_is_planned_when_it_comes_and_few_are_kept() -> None:
    model = seeded(create_model("c2d_r18", width=0.125, num_classes=5))
    compiled = quick(model, torch.randn(1, 3, 2, 32, 32))
    for size in (33, 40, 48, 56, 32):
        clip = torch.randn(1, 3, 2, size, size)
        assert error(compiled(clip), in_float64(model, clip)) < 1e-5
    assert len(compiled._plans) == compiler.MOST_PLANS


def test_frozen() -> None:
    model = seeded(create_model("c2d_r18", width=0.125, num_classes=5))
    clip = torch.randn(1, 3, 2, 32, 32)
    compiled = quick(model, clip).freeze()
    right = in_float64(model, clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert error(compiled(clip), right) < 1e-5
    with pytest.raises(ConfigError, match=r"was frozen.*\(1, 3, 2, 32, 32\).*compile the net again"):
        compiled(torch.randn(2, 3, 2, 32, 32))


def test_refusals() -> None:
    model = create_model("c2d_r18", width=0.125, num_classes=5)
    clip = torch.randn(1, 3, 2, 32, 32)
    with pytest.raises(ConfigError, match=r"training mode: call model.eval\(\)"):
        quick(model, clip)
    model.eval().head.dropout.train()
    with pytest.raises(ConfigError, match=r"head.dropout is in training mode"):
        quick(model, clip)
    model.eval()
    with pytest.raises(ConfigError, match="c2d_r18 takes clips"):
        quick(model, clip[0])
    with pytest.raises(ConfigError, match=r"float32 on the CPU, got torch.uint8.*normalize") as caught:
        quick(model, clip.to(torch.uint8))
    assert "x.float()" in str(caught.value)
    with pytest.raises(ConfigError, match="tolerance must be above 0"):
        quick(model, clip, tolerance=0)
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        quick(model, clip, threads=0)
    with pytest.raises(ConfigError, match=r"float32 nets on the CPU; .* is torch.float64"):
        quick(copy.deepcopy(model).double(), clip.double())
    compiled = quick(model, clip)
    with pytest.raises(ConfigError, match=r"no gradients: give it x.detach\(\)"):
        compiled(clip.clone().requires_grad_())
    with pytest.raises(ConfigError, match="takes clips"):
        compiled(torch.randn(1, 4, 2, 32, 32))


def test_explain() -> None:
    model = seeded(create_model("smallbig23", width=0.125, num_classes=5))
    clip = torch.randn(1, 3, 4, 32, 32)
    compiled = quick(model, clip)
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(compiled.explain())
    console.print(compiled.explain(clip, runs=1))
    text = " ".join(console.export_text().split())  # a caption wraps where the table is narrow
    assert "stages.1.0.units.1.conv" in text
    assert "SmallBig 1x3x3" in text
    assert "tolerance 0.0001" in text
    assert all(layer.before is not None and layer.before > 0 for layer in compiled.layers)


def test_blocks_never_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.randint(1, 1000, (30, 3), generator=generator).tolist()
        blocks = [Block(size, first % 20, first % 20 + length % 6) for size, first, length in numbers]
        total = place(blocks)
        assert total >= max(sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(26))
        assert total <= sum(-(-b.size // 64) * 64 for b in blocks)
        for i, a in enumerate(blocks):
            assert a.offset % 64 == 0
            for b in blocks[:i]:
                apart = a.last < b.first or b.last < a.first
                assert apart or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


@pytest.mark.skipif(not native.available(), reason=native.absence())
@pytest.mark.parametrize("name", ["smallbig23", "c3d_light", "slow_r50", "slowfast_r50_light"])
def test_buffers_are_few(name: str) -> None:
    """Activations of the compiled net need no more memory than those of the net as it is."""
    model = seeded(create_model(name, width=0.25, num_classes=5))
    clip = torch.randn(1, 3, 8, 64, 64)
    compiled = quick(model, clip)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(clip)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert compiled.buffer_bytes <= peak


def test_without_an_example_the_first_call_is_one() -> None:
    model = seeded(create_model("c2d_r18", width=0.125, num_classes=5))
    compiled = fast.compile(model, quiet=True)
    with pytest.raises(ConfigError, match="nothing is compiled yet"):
        compiled.explain()
    clip = torch.randn(1, 3, 2, 32, 32)
    assert error(compiled(clip), in_float64(model, clip)) < 1e-5
    assert compiled.error < 1e-5
