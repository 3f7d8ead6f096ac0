"""The test of it all: steps joined equal the clip, for every block and every net of the zoo."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lean3d import checkpoint
from lean3d.blocks import (
    CausalConv3d,
    Conv3d,
    ConvBN,
    FullySeparableBlock,
    NonLocalBlock,
    Pool3d,
    Recent,
    ResNetStem,
    SlidingMax,
    SmallBigExtra,
    SmallBigUnit,
    SqueezeExcitation,
    State,
    Stream,
    TemporalMaxPool,
    TemporalResidualGradient,
    TemporalShift,
    basic,
    bottleneck,
    fsb_basic,
    map_state,
    smallbig_bottleneck,
    split_state,
    stack_states,
    state_batch,
    state_layout,
    stream_of,
    trg_places,
)
from lean3d.blocks.streaming import sliding_max, sliding_mean
from lean3d.errors import ConfigError, StreamingError
from lean3d.models import NetStream, VideoNet, create_model, list_models
from lean3d.models.c3d import ShrinkPool
from lean3d.models.slowfast import Lateral
from lean3d.models.x3d import X3DBlock, X3DStem
from seeded import seeded_state

WHOLE_CLIP = [
    name for name in list_models() if name.startswith(("smallbig", "x3d")) or name.endswith(("_nl", "_extra"))
]
"""Nets with an operation over whole clips."""
QUICK = [name for name in list_models() if not name.endswith("101")]
"""All but those that are others with more blocks; `test_long_streams_of_all_nets` has all."""
QUICK_18 = [name for name in QUICK if "50" not in name]


def seeded(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    module.load_state_dict(seeded_state({name: value.shape for name, value in module.state_dict().items()}))
    return module.to(dtype).eval()


def run(stream: Stream, clip: Tensor, state: State | None = None) -> tuple[list[Tensor | None], State]:
    """What each step gives, and the state after the last one."""
    state = stream.init_state() if state is None else state
    outputs = []
    for t in range(clip.shape[2]):
        y, state = stream.step(clip[:, :, t : t + 1], state)
        outputs.append(y)
    return outputs, state


def joined(stream: Stream, clip: Tensor) -> Tensor:
    outputs, state = run(stream, clip)
    return torch.cat([*(y for y in outputs if y is not None), *stream.flush(state)], 2)


# ---------------------------------------------------------------------------------------------------------- blocks


def limited(module: Any, frames: int, *, causal: bool) -> Any:
    for part in module.modules():
        if hasattr(part, "limit_time"):
            part.limit_time(frames, causal=causal)
    return module


BLOCKS: dict[str, Callable[[], Any]] = {
    "fsb": lambda: FullySeparableBlock(4, 6, 3, stride=(2, 1, 1)),
    "fsb, wide and dilated": lambda: FullySeparableBlock(4, 6, (5, 3, 3), dilation=(2, 1, 1)),
    "fsb, big views": lambda: FullySeparableBlock(
        4, 6, 3, stride=(2, 1, 1), big_views={"temporal": (3, 3, 3), "pointwise": (3, 3, 3)}
    ),
    "fsb, big views, causal": lambda: limited(
        FullySeparableBlock(4, 6, 3, big_views={"depthwise": (3, 3, 3)}), 4, causal=True
    ),
    "stem 5x7x7": lambda: ResNetStem(4, 6, time=5),
    "lateral 7x1x1, stride 4": lambda: Lateral(4, time=7, alpha=4),
    "x3d stem": lambda: X3DStem(4, 6),
    "temporal max pool": TemporalMaxPool,
    "c3d pool": lambda: ShrinkPool(time=True),
    "c3d pool in the plane": lambda: ShrinkPool(time=False),
    "shift": lambda: TemporalShift(0.25),
    "shift, causal": lambda: limited(TemporalShift(0.25), 3, causal=True),
    "se, windowed": lambda: limited(SqueezeExcitation(4, 2), 3, causal=False),
    "extra, windowed": lambda: limited(SmallBigExtra(4), 3, causal=False),
    "non-local, windowed": lambda: limited(NonLocalBlock(4), 3, causal=False),
    "non-local dot product": lambda: limited(
        NonLocalBlock(4, affinity="dot_product", subsample=False), 2, causal=False
    ),
    "bottleneck": lambda: bottleneck(4, 2, 8, stride=2, time=3),
    "basic": lambda: basic(4, 4, 4, time=3),
    "fsb basic behind trg": lambda: fsb_basic(4, 4, 8, stride=2, trg=trg_places("blocks", "beside", 4)),
    "smallbig": lambda: limited(smallbig_bottleneck(4, 2, 8, stride=2, extra=True), 4, causal=False),
    "smallbig, causal": lambda: limited(smallbig_bottleneck(4, 2, 8, stride=2), 4, causal=True),
    "smallbig unit, average, own convolution": lambda: SmallBigUnit(4, 6, 1, pool_mode="average", shared=False),
    "x3d block": lambda: limited(X3DBlock(4, 6, 4, stride=2, excite=True), 3, causal=True),
    **{
        f"pool {window} {mode} {form}": (
            lambda window=window, mode=mode, causal=form == "causal": limited(Pool3d(window, mode), 3, causal=causal)
        )
        for window in ((3, 3, 3), (5, 1, 1), (1, 3, 3), (None, 3, 3), (None, 1, 1), (None, None, None))
        for mode in ("max", "average")
        for form in ("windowed", "causal")
    },
    **{
        f"trg {order} {'beside' if beside else 'replace'} {form}": (
            lambda order=order, beside=beside, form=form: (
                TemporalResidualGradient(order, beside=beside)
                if form == "clip"
                else limited(TemporalResidualGradient(order, beside=beside), 3, causal=form == "causal")
            )
        )
        for order in ("differences_first", "mean_first")
        for beside in (False, True)
        for form in ("clip", "windowed", "causal")
        if (order, form) != ("mean_first", "clip")
    },
}


@pytest.mark.parametrize("kind", BLOCKS)
@given(frames=st.integers(1, 12), batch=st.integers(1, 2), seed=st.integers(0, 3))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_a_blocks_steps_joined_equal_the_clip(kind: str, frames: int, batch: int, seed: int) -> None:
    block = seeded(BLOCKS[kind]())
    clip = torch.randn(batch, 4, frames, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = block(clip)
        torch.testing.assert_close(joined(block.stream(), clip), whole, rtol=1e-10, atol=1e-10)
        outputs, _ = run(block.stream(), clip)
        due = [t for t, y in enumerate(outputs) if y is not None]
        wanted = range(block.lookahead, frames, block.stream().stride)
        assert due == list(wanted), "an output comes with the last frame that it needs"
        y, state = block.step(clip[:, :, :1], block.init_state())  # the block's own methods are those of its stream
        rest = [] if y is None else [y]
        torch.testing.assert_close(torch.cat(rest + block.flush(state), 2), block(clip[:, :, :1]), rtol=0, atol=1e-10)


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 2),
    causal=st.booleans(),
    frames=st.integers(1, 11),
    groups=st.sampled_from([1, 2]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_convolution(kernel: int, stride: int, dilation: int, causal: bool, frames: int, groups: int) -> None:
    """Whatever kernel, stride and dilation. The causal one's output j sees no frame after j * stride + stride - 1."""
    torch.manual_seed(0)
    padding = (kernel - 1) * dilation // 2
    conv = Conv3d(
        2,
        4,
        (kernel, 3, 3),
        stride=(stride, 1, 2),
        padding=(padding, 1, 1),
        dilation=(dilation, 1, 1),
        groups=groups,
        dtype=torch.float64,
    )
    if causal:
        conv = CausalConv3d.of(conv)
    clip = torch.randn(1, 2, frames, 4, 4, dtype=torch.float64)
    if frames + 2 * padding < (kernel - 1) * dilation + 1:
        return  # even kernels need another frame
    with torch.no_grad():
        whole = conv(clip)
        assert whole.shape == nn.Conv3d.forward(conv, clip).shape
        torch.testing.assert_close(joined(conv.stream(), clip), whole, rtol=1e-10, atol=1e-10)
        if causal and 2 * padding == (kernel - 1) * dilation:  # even kernels give one output less, and begin later
            for j in range(whole.shape[2]):
                changed = clip.clone()
                changed[:, :, j * stride + stride :] += 1
                torch.testing.assert_close(conv(changed)[:, :, : j + 1], whole[:, :, : j + 1], rtol=0, atol=0)


def test_a_net_of_another_house_is_refused_and_torchs_own_layers_are_not() -> None:
    stream = stream_of(nn.Sequential(ConvBN(2, 2, 3), nn.ReLU(), nn.Sequential(nn.Identity(), nn.Dropout())).eval())
    assert (stream.lookahead, stream.stride, stream.receptive_field) == (1, 1, 3)
    with pytest.raises(StreamingError, match="LSTM doesn't say how it works frame by frame"):
        stream_of(nn.Sequential(nn.LSTM(2, 2)))


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 32])
def test_sliding_maximum(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit with the definition, NaN as torch has it, in at most three comparisons a frame."""
    clip = torch.randn(2, 3, 100, 2, 2)
    clip[0, 1, 40] = torch.nan
    wanted = torch.stack([clip[:, :, max(0, t + 1 - frames) : t + 1].amax(2) for t in range(100)], 2)
    assert torch.equal(sliding_max(clip, frames).nan_to_num(9.0), wanted.nan_to_num(9.0))
    comparisons = 0
    maximum = torch.maximum

    def counted(a: Tensor, b: Tensor) -> Tensor:
        nonlocal comparisons
        comparisons += 1
        return maximum(a, b)

    monkeypatch.setattr(torch, "maximum", counted)
    got = joined(SlidingMax(frames), clip)
    assert torch.equal(got.nan_to_num(9.0), wanted.nan_to_num(9.0))
    assert comparisons <= 3 * 100


def test_sliding_mean() -> None:
    clip = torch.randn(2, 3, 20, 2, 2, dtype=torch.float64)
    for frames in (1, 3, 20, 50):
        wanted = torch.stack([clip[:, :, max(0, t + 1 - frames) : t + 1].mean(2) for t in range(20)], 2)
        torch.testing.assert_close(sliding_mean(clip, frames), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(joined(Recent(frames, "mean"), clip), wanted, rtol=1e-12, atol=1e-12)


def test_windowed_trg_is_the_clips_on_a_clip_and_has_a_mean_in_every_window() -> None:
    clip = torch.randn(1, 2, 12, 3, 3)
    plain = TemporalResidualGradient()
    windowed = limited(TemporalResidualGradient(), 4, causal=False)
    assert torch.equal(windowed(clip[:, :, :4]), plain(clip[:, :, :4]))
    causal = limited(TemporalResidualGradient(), 4, causal=True)(clip)
    for t in (3, 7, 11):
        torch.testing.assert_close(causal[:, :, t], clip[:, :, t - 3 : t + 1].mean(2))
    assert torch.equal(causal[:, :, 4], clip[:, :, 4] - clip[:, :, 3])


# ------------------------------------------------------------------------------------------------------------- nets


def tiny(name: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> VideoNet:
    """A net of clips of 4 frames, or of two of the slow pathway."""
    alpha = {"slowfast_r50": 4, "slowfast_r50_4x16": 8, "slowfast_r50_light": 4}.get(name)
    frames = 2 * alpha if alpha else 4
    net = create_model(name, **{"width": 0.125, "num_classes": 5, "num_frames": frames, "size": 32, **arguments})
    return seeded(net, dtype)


def windowed_scores(net: VideoNet, stream: NetStream, clip: Tensor) -> list[Tensor]:
    """The clip net's head over every window of its features."""
    features = net.stages(net.stem(clip))
    scores = []
    for end in range(1, (features[0] if isinstance(features, tuple) else features).shape[2] + 1):
        start = max(0, end - stream.window)
        if isinstance(features, tuple):
            alpha = net.head.alpha
            scores.append(net.head((features[0][:, :, start:end], features[1][:, :, alpha * start : alpha * end])))
        else:
            scores.append(net.head(features[:, :, start:end]))
    return scores


def saved_and_loaded(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_net(net: VideoNet, frames: int, tolerance: float) -> None:
    """All scores of a stream that is saved in the middle, and those of a stream that ends where the clip does."""
    stream, clip_frames = net.stream(), net.input_spec.num_frames
    dtype = next(net.parameters()).dtype
    clip = torch.randn(2, 3, frames, 32, 24, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = windowed_scores(net, stream, clip)
        of_clip = net(clip[:, :, :clip_frames])
    outputs, state = run(stream, clip[:, :, :clip_frames])
    scores = [y for y in outputs if y is not None]
    ended = [*scores, *stream.flush(state)]
    rest, state = run(stream, clip[:, :, clip_frames:], saved_and_loaded(state))
    scores += [y for y in rest if y is not None]
    assert len(scores) == max(0, (frames - 1 - stream.lookahead) // stream.period + 1)
    scores += stream.flush(state)
    assert len(scores) == len(wanted)
    scale = max(1.0, *(y.abs().max().item() for y in [*wanted, of_clip]))
    for got, want in [*zip(scores, wanted, strict=True), (ended[-1], of_clip)]:
        assert (got - want).abs().max() <= tolerance * scale


@pytest.mark.parametrize("name", QUICK)
def test_a_causal_nets_steps_are_its_windowed_clip_nets(name: str) -> None:
    net = tiny(name, torch.float32, causal=True)
    stream = net.stream()
    assert stream.delay == 0
    assert net.state_dict().keys() == create_model(name, width=0.125).state_dict().keys()
    check_net(net, 2 * stream.period + net.input_spec.num_frames, 1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_a_delayed_nets_steps_are_its_clip_nets(name: str) -> None:
    if name in WHOLE_CLIP:
        with pytest.raises(StreamingError, match=rf"{name} can't run frame by frame .*whole clip.*windowed=True"):
            create_model(name, width=0.125).eval().stream()
    net = tiny(name, windowed=name in WHOLE_CLIP)
    check_net(net, 2 * net.input_spec.num_frames + 1, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("form", ["delayed", "windowed", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_streams_of_all_nets(name: str, form: str, dtype: torch.dtype) -> None:
    """As long as it takes until scores come while the stream runs, and for three clips more."""
    if form == "delayed" and name in WHOLE_CLIP:
        pytest.skip("this net takes something over the whole clip")
    net = tiny(name, dtype, windowed=form == "windowed", causal=form == "causal")
    stream = net.stream()
    frames = stream.lookahead + 3 * max(stream.period, net.input_spec.num_frames) + 1
    check_net(net, frames, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("c3d_light", {"halve_time_from": 6, "trg": "input, stage3, blocks", "trg_mode": "beside"}),
        ("c3d_light", {"stem": "conv", "layers": 5, "shrink": "stride", "halve_time_from": 4}),
        ("smallbig18", {"block": "-, TxHxW", "pooling": "average", "shared": False}),
        ("smallbig23", {"block": "Tx3x3, 3x3x3, Tx1x1 + extra"}),
        ("slow_r50_light", {"trg": "stage3, stage4"}),
        ("i3d_r50_nl", {"affinity": "dot_product", "temporal_pool": False}),
        ("slowfast_r50_light", {"alpha": 2, "lateral_time": 3, "num_frames": 5}),
    ],
)
@pytest.mark.parametrize("form", ["windowed", "causal"])
def test_arguments_of_nets(name: str, arguments: dict[str, Any], form: str) -> None:
    net = tiny(name, **arguments, **{form: True})
    stream = net.stream()
    frames = 2 * stream.period + net.input_spec.num_frames + (0 if form == "causal" else min(stream.lookahead, 12))
    check_net(net, frames, 1e-10)


STREAMED = [
    ("c3d_light", {"halve_time_from": 5, "layers": 5, "causal": True}),
    ("smallbig18", {"windowed": True}),
    ("slow_r18", {}),
]


@pytest.mark.parametrize(("name", "arguments"), STREAMED)
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_streams_interleave_and_run_as_batches(name: str, arguments: dict[str, Any], data: st.DataObject) -> None:
    """Streams that begin and end when they like, batched whenever their states allow, are what each is alone."""
    net = tiny(name, num_frames=3, **arguments)
    stream = net.stream()
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=3, max_size=3))
    clips = [torch.randn(1, 3, n, 16, 16, dtype=torch.float64) for n in lengths]
    states: list[State] = [stream.init_state() for _ in clips]
    positions, scores, batches = [0] * len(clips), [[] for _ in clips], set()
    while any(position < n for position, n in zip(positions, lengths, strict=True)):
        running = [i for i, n in enumerate(lengths) if positions[i] < n]
        chosen = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        groups: dict[Any, list[int]] = {}
        for i in chosen:
            groups.setdefault(state_layout(states[i]), []).append(i)
        for group in groups.values():
            frames = torch.cat([clips[i][:, :, positions[i] : positions[i] + 1] for i in group])
            y, state = stream.step(frames, stack_states([states[i] for i in group]))
            batches.add(len(group))
            for k, (i, part) in enumerate(zip(group, split_state(state), strict=True)):
                states[i], positions[i] = part, positions[i] + 1
                scores[i] += [] if y is None else [y[k : k + 1]]
    for i, clip in enumerate(clips):
        outputs, state = run(stream, clip)
        alone = [y for y in outputs if y is not None] + stream.flush(state)
        for got, want in zip([*scores[i], *stream.flush(states[i])], alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_causal_streams_of_any_age_run_as_one_batch() -> None:
    stream = tiny("slow_r18", causal=True).stream()
    clips = [torch.randn(1, 3, n, 16, 16, dtype=torch.float64) for n in (1, 2, 7, 30)]
    states = [run(stream, clip)[1] for clip in clips]
    frame = torch.randn(4, 3, 1, 16, 16, dtype=torch.float64)
    y, state = stream.step(frame, stack_states(states))
    for k, part in enumerate(states):
        alone, _ = stream.step(frame[k : k + 1], part)
        torch.testing.assert_close(y[k : k + 1], alone, rtol=1e-10, atol=1e-10)
    assert state_batch(state) == 4
    pairs = split_state(state, [3, 1])
    assert [state_batch(pair) for pair in pairs] == [3, 1]
    halves = map_state(lambda tensor: tensor.to(torch.float32) if tensor.is_floating_point() else tensor, pairs[1])
    assert state_layout(halves) != state_layout(pairs[1])


def memory(state: State) -> int:
    """Bytes of all memory that a state keeps alive."""
    if isinstance(state, Tensor):
        return state.untyped_storage().nbytes()
    return sum(map(memory, state)) if isinstance(state, tuple) else 0


def check_endurance(name: str, arguments: dict[str, Any], frames: int, every: int) -> None:
    """In float32: memory stays what it was, and now and then a stream that has just begun says the same."""
    net = tiny(name, torch.float32, causal=True, **arguments)
    stream, generator = net.stream(), torch.Generator().manual_seed(0)
    context = -(-stream.receptive_field // every) * every  # a fresh stream has to begin at the same point of a period
    assert context % (stream.period * net.input_spec.num_frames) == 0
    recent: list[Tensor] = []
    state, sizes, checks = stream.init_state(), set(), 0
    for t in range(frames):
        frame = 1 + torch.randn(1, 3, 1, 16, 16, generator=generator)  # a mean that would add up
        recent = [*recent[-context + 1 :], frame]
        y, state = stream.step(frame, state)
        if t > context:
            sizes.add((t % every, memory(state)))
        if t % every == every - 1 and t >= context and (t + 1) % (frames // 4) < every:
            fresh, _ = run(stream, torch.cat(recent, 2))
            torch.testing.assert_close(y, fresh[-1], rtol=1e-5, atol=1e-5)
            checks += 1
    assert checks >= 3
    assert len(sizes) == every, "memory depends on nothing but the point of the period"


@pytest.mark.parametrize(
    ("name", "arguments"), [("smallbig18", {}), ("c3d_light", {"layers": 5, "halve_time_from": 5})]
)
def test_many_frames(name: str, arguments: dict[str, Any]) -> None:
    check_endurance(name, arguments, 240, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("smallbig18", {}), ("c3d_light", {"layers": 5, "halve_time_from": 5}), ("slow_r18", {}), ("x3d_xs", {})],
)
def test_thousands_of_frames(name: str, arguments: dict[str, Any]) -> None:
    check_endurance(name, arguments, 5000, 8)


@pytest.mark.parametrize("frames", [8000, pytest.param(128_000, marks=pytest.mark.slow)])
def test_means_do_not_drift(frames: int) -> None:
    """The head's average and the gradient's two means, in float32, of values far from zero."""
    values = 100 + torch.randn(frames, generator=torch.Generator().manual_seed(0))
    clip = values.view(1, 1, -1, 1, 1)
    windowed = limited(TemporalResidualGradient(), 16, causal=True).stream()
    whole = TemporalResidualGradient().stream()
    average = Recent(16, "mean")
    last_mean = values[-16:].double().mean()
    for stream in (average, windowed):  # the last frame ends a block of 16
        outputs, state = run(stream, clip)
        assert abs(outputs[-1].item() / last_mean - 1) <= 1e-6
        assert memory(state) == memory(run(stream, clip[:, :, :20])[1])
    _, state = run(whole, clip)
    assert abs(whole.flush(state)[0].item() / values.double().mean() - 1) <= 1e-6


TABLE_ROW = re.compile(r"\| `(\w+)` \| (\d+) \| (as it is|windowed) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|")


@pytest.mark.parametrize("names", [QUICK_18, pytest.param(list_models(), marks=pytest.mark.slow)], ids=["few", "all"])
def test_the_pages_table_of_delays_is_that_of_the_nets(names: list[str]) -> None:
    lines = (Path(__file__).parents[1] / "docs/streaming.md").read_text(encoding="utf-8").splitlines()
    rows = [row.groups() for line in lines if (row := TABLE_ROW.fullmatch(line))]
    assert [row[0] for row in rows] == list_models()
    for name, frames, form, *numbers in rows:
        if name not in names:
            continue
        with torch.device("meta"):
            net = create_model(name, width=0.125, size=32, windowed=form == "windowed").eval()
            causal = create_model(name, width=0.125, size=32, causal=True).eval().stream()
        stream = net.stream()
        assert (name in WHOLE_CLIP) == (form == "windowed"), name
        assert net.input_spec.num_frames == int(frames), name
        counted = [stream.period, stream.delay, stream.receptive_field, causal.receptive_field]
        assert counted == [int(number) for number in numbers], name
        assert causal.delay == 0, name


# ----------------------------------------------------------------------------------------- checkpoints and mistakes


@pytest.mark.parametrize(
    "name", ["c3d_light", "smallbig18", "slowfast_r50", "x3d_xs", "i3d_r50_nl", "tsm_r50", "csn_r50"]
)
@pytest.mark.parametrize("form", ["windowed", "causal"])
def test_forms_are_trained_and_checkpoints_carry_them(name: str, form: str, tmp_path: Any) -> None:
    net = tiny(name, torch.float32, **{form: True}).train()
    clips = torch.randn(2, 3, net.input_spec.num_frames, 32, 32)
    nn.functional.cross_entropy(net(clips), torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    checkpoint.save_model(tmp_path / "model.safetensors", net, tuple("abcde"), {})
    loaded = checkpoint.load(tmp_path).model
    assert loaded.spec["arguments"][form] is True
    with torch.inference_mode():
        assert torch.equal(loaded(clips), net.eval()(clips))
    plain = create_model(name, **{**net.spec["arguments"], form: False}).eval()
    plain.load_state_dict(net.state_dict())  # the same names and shapes
    if form == "causal":
        causal = sum(isinstance(module, CausalConv3d) for module in loaded.modules())
        assert causal == sum(type(module) is Conv3d for module in plain.modules()) > 0


def test_mistakes_are_named() -> None:
    net = tiny("slow_r18", torch.float32)
    stream = net.stream()
    frame = torch.randn(2, 3, 1, 16, 16)
    _, state = stream.step(frame, stream.init_state())
    with pytest.raises(StreamingError, match=r"one frame at a time, \(N, C, 1, H, W\); got \(1, 3, 4, 16, 16\)"):
        stream.step(torch.randn(1, 3, 4, 16, 16), stream.init_state())
    with pytest.raises(StreamingError, match="of 2 streams of 16x16 pixels, the frame of 2 of 32x16"):
        stream.step(torch.randn(2, 3, 1, 32, 16), state)
    with pytest.raises(StreamingError, match="of 2 streams of 16x16 pixels, the frame of 1 of 16x16"):
        stream.step(frame[:1], state)
    with pytest.raises(ConfigError, match=r"slow_r18 takes clips"):
        stream.step(frame[:, :1], state)
    with pytest.raises(StreamingError, match="not at the same point"):
        stack_states([state, stream.init_state()])
    with pytest.raises(StreamingError, match="not at the same point"):
        map_state(torch.add, state, stream.step(frame, state)[1])
    with pytest.raises(StreamingError, match="begins with the mean over the whole clip"):
        TemporalResidualGradient("mean_first").stream()
    net.train()
    with pytest.raises(StreamingError, match=r"training mode.*model\.eval\(\)"):
        stream.step(frame, state)
