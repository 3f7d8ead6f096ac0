"""The nets that others published: their costs, their scores, and what is particular to each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lean3d.blocks import Conv3d, NonLocalBlock, TemporalMaxPool, TemporalShift
from lean3d.errors import CheckpointError, ConfigError
from lean3d.models import create_model, list_models
from lean3d.models.weights_pytorchvideo import from_pytorchvideo, pytorchvideo_names
from seeded import digest, seeded_clip, seeded_state

GOLDENS = Path(__file__).parent / "goldens"
POOLED = {"temporal_pool": True}


@pytest.mark.parametrize(
    ("name", "arguments", "frames", "size", "weights", "gmacs"),
    [
        ("x3d_xs", {}, 4, 182, "3.79", "0.84"),
        ("x3d_s", {}, 13, 182, "3.79", "2.73"),
        ("x3d_m", {}, 16, 224, "3.79", "4.73"),
        ("slow_r50", {}, 8, 224, "32.45", "41.74"),
        ("c2d_r50", POOLED, 8, 224, "24.33", "19.49"),
        ("i3d_r50", {}, 8, 224, "28.04", "28.41"),
        ("slowfast_r50", {}, 32, 224, "34.57", "50.31"),
        ("r2plus1d_r50", {}, 16, 224, "28.11", "57.53"),
        ("csn_r101", {}, 32, 224, "22.21", "56.47"),
        ("r3d_18", {}, 16, 112, "33.37", "40.70"),
        ("r2plus1d_18", {}, 16, 112, "31.51", "40.52"),
    ],
)
def test_published_costs(
    name: str, arguments: dict[str, Any], frames: int, size: int, weights: str, gmacs: str
) -> None:
    with torch.device("meta"):
        model = create_model(name, **arguments).eval()
        assert (model.input_spec.num_frames, model.input_spec.size) == (frames, (size, size))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, frames, size, size))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == weights
    assert f"{counter.get_total_flops() / 2e9:.2f}" == gmacs


def test_published_cost_of_c3d() -> None:
    with torch.device("meta"):
        model = create_model("c3d").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 16, 112, 112))
    convolutions = [m for m in model.modules() if isinstance(m, Conv3d)]
    classifier = model.head.linear.weight.numel()
    assert len(convolutions) == 8
    assert f"{sum(m.weight.numel() for m in convolutions) / 1e6:.1f}" == "27.7"
    assert f"{(counter.get_total_flops() / 2 - classifier) / 1e9:.2f}" == "38.50"


def _golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{name}.json").read_text())


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _assert_equal_outputs(model: torch.nn.Module, golden: dict[str, Any]) -> None:
    for clip in golden["clips"]:
        with torch.inference_mode():
            output = model(seeded_clip(clip["shape"])).flatten()
        expected = torch.tensor(clip["output"])
        sample = output[:: max(1, output.numel() // 60)]
        assert sample.shape == expected.shape
        assert (sample - expected).abs().max() <= 1e-5 * expected.abs().max(), clip["shape"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slow_r50", {}),
        ("c2d_r50", POOLED),
        ("i3d_r50", {}),
        ("slowfast_r50", {}),
        ("slowfast_r50_4x16", {}),
        ("csn_r101", {}),
        ("r2plus1d_r50", {}),
        ("x3d_xs", {}),
    ],
)
def test_pytorchvideo_scores(name: str, arguments: dict[str, Any]) -> None:
    """Its names and shapes, made from ours, are the recorded ones; its weights, loaded by name, give its scores."""
    golden = _golden(name)
    with torch.device("meta"):
        ours = create_model(name, num_classes=10, **arguments)
    names = pytorchvideo_names(ours)
    shapes = {names[key]: shape for key, shape in _shapes(ours.state_dict()).items()}
    assert digest(shapes) == golden["state"]
    model = from_pytorchvideo({"model_state": seeded_state(shapes)}, name="x3d_xs" if name.startswith("x3d") else None)
    assert model.spec["name"] == name
    assert not model.training
    _assert_equal_outputs(model, golden)


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "tsm_r50"])
def test_published_scores(name: str) -> None:
    golden = _golden(name)
    with torch.device("meta"):
        model = create_model(name, num_classes=10).eval()
    shapes = _shapes(model.state_dict())
    assert digest(shapes) == golden["state"]
    model.load_state_dict(seeded_state(shapes), assign=True)
    _assert_equal_outputs(model, golden)


@pytest.mark.parametrize("affinity", ["embedded_gaussian", "dot_product"])
def test_non_local_block_output(affinity: Any) -> None:
    golden = _golden(f"non_local_{affinity}")
    block = NonLocalBlock(64, affinity=affinity).eval()
    shapes = _shapes(block.state_dict())
    assert digest(shapes) == golden["state"]
    block.load_state_dict(seeded_state(shapes))
    _assert_equal_outputs(block, golden)


def test_x3d_sizes_share_weights() -> None:
    with torch.device("meta"):
        m = create_model("x3d_m", num_classes=3)
    names = pytorchvideo_names(m)
    state = {names[key]: torch.zeros(shape) for key, shape in _shapes(m.state_dict()).items()}
    assert from_pytorchvideo(state).spec["name"] == "x3d_m"
    assert from_pytorchvideo(state, name="x3d_s").spec["name"] == "x3d_s"
    with pytest.raises(CheckpointError, match="of x3d_m, not of slow_r50"):
        from_pytorchvideo(state, name="slow_r50")


def test_other_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no classifier.*fc\.weight"):
        from_pytorchvideo({"fc.weight": torch.zeros(1)})
    with torch.device("meta"):
        model = create_model("csn_r50", num_classes=3)
    names = pytorchvideo_names(model)
    state = {names[key]: torch.zeros(shape) for key, shape in _shapes(model.state_dict()).items()}
    state["blocks.7.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"csn_r50.*no place for blocks\.7\.weight"):
        from_pytorchvideo(state)
    del state["blocks.7.weight"], state["blocks.0.norm.bias"]
    with pytest.raises(CheckpointError, match=r"lack blocks\.0\.norm\.bias"):
        from_pytorchvideo(state)


def test_slowfast_splits_the_clip_by_strides() -> None:
    model = create_model("slowfast_r50", width=0.125, num_classes=3).eval()
    clip = torch.randn(1, 3, 16, 32, 32)
    slow, fast = model.stem(clip)
    assert (slow.shape[2], fast.shape[2]) == (4, 16)
    with torch.inference_mode():
        channels = model.stem.slow.conv.out_channels
        assert torch.equal(slow[:, :channels], model.stem.slow(clip[:, :, [0, 4, 8, 12]]))
        other = clip.clone()
        other[:, :, 5] = 0  # a frame of the fast pathway alone
        assert not torch.allclose(model(other), model(clip))


@pytest.mark.parametrize("options", [{"alpha": 0}, {"beta": 0.0}, {"lateral_time": 4}])
def test_slowfast_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="alpha must be at least 1"):
        create_model("slowfast_r50", **options)


def test_slowfast_channel_ratio() -> None:
    with torch.device("meta"):
        half = create_model("slowfast_r50_4x16", beta=0.25)
    assert half.stem.fast.conv.out_channels == 16
    assert half.stages[0].slow[0].units[0].conv.in_channels == 64 + 2 * 16


def test_temporal_pool_keeps_the_last_odd_frame() -> None:
    x = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    assert TemporalMaxPool()(x).flatten().tolist() == [1, 3, 4]
    assert TemporalMaxPool()(x[:, :, :1]).flatten().tolist() == [0]


def test_temporal_shift() -> None:
    x = torch.arange(1.0, 4.0).reshape(1, 1, 3, 1, 1).expand(1, 8, 3, 1, 1)
    y = TemporalShift(0.25)(x)[0, :, :, 0, 0].tolist()
    assert y[:2] == [[2, 3, 0]] * 2
    assert y[2:4] == [[0, 1, 2]] * 2
    assert y[4:] == [[1, 2, 3]] * 4
    assert TemporalShift()(x[:, :, :1])[0, :, 0, 0, 0].tolist() == [0, 0, *[1] * 6]
    with pytest.raises(ConfigError, match="share must be"):
        TemporalShift(0.6)


def test_weights_of_the_2d_net_fit_tsm_and_non_local_nets() -> None:
    with torch.device("meta"):
        plain = _shapes(create_model("c2d_r50").state_dict())
        assert _shapes(create_model("tsm_r50").state_dict()) == plain
        non_local = _shapes(create_model("c2d_r50_nl").state_dict())
    more = {name for name in non_local if name not in plain}
    assert {name: non_local[name] for name in plain} == plain
    assert all("_non_local." in name for name in more)
    assert {name.split(".")[1] + ":" + name.split(".")[2] for name in more} == {
        f"{stage}:{block}_non_local" for stage, block in [(1, 1), (1, 3), (2, 1), (2, 3), (2, 5)]
    }


@pytest.mark.parametrize("name", list_models("*_nl"))
@pytest.mark.parametrize("affinity", ["embedded_gaussian", "dot_product"])
def test_non_local_nets_start_as_the_net_without(name: str, affinity: str) -> None:
    arguments = {"width": 0.125, "num_classes": 3}
    if name != "slow_r50_nl":
        arguments["temporal_pool"] = True
    plain = create_model(name.removesuffix("_nl"), **arguments).eval()
    model = create_model(name, affinity=affinity, **arguments).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(clip), plain(clip))


def test_non_local_block_refuses_other_affinities() -> None:
    with pytest.raises(ConfigError, match="affinity must be"):
        NonLocalBlock(8, affinity="gaussian")  # type: ignore[arg-type]


def test_x3d_head_classifies_window_by_window() -> None:
    """On larger features the head's scores are the average of those of its windows."""
    model = create_model("x3d_xs", width=0.125, num_classes=3, head_size=2).eval()
    features = torch.rand(1, 24, 4, 2, 3)
    with torch.inference_mode():
        whole = model.head(features)
        windows = [model.head(features[..., :2]), model.head(features[..., 1:])]
    torch.testing.assert_close(whole, (windows[0] + windows[1]) / 2)
