"""Our baselines against the implementations that others publish: equal weights in, equal scores out.

    python benchmarks/parity_baselines.py --pytorchvideo ~/src/pytorchvideo --torchvision ~/src/vision \
        --tsm ~/src/temporal-shift-module --slowfast ~/src/SlowFast

Each path is a checkout of a peer; one without a path is left out. Modules that a peer imports and does not need here
are replaced by empty ones. Weights, BN's statistics among them, and clips are random and follow from names and seeds
(tests/seeded.py). Printed is the largest difference of scores over the largest score, in float32; the last line is
JSON. `--goldens tests/goldens` writes the peers' scores in float64 into the files that the tests compare with.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from lean3d.blocks import NonLocalBlock
from lean3d.models import create_model
from lean3d.models.weights_pytorchvideo import from_pytorchvideo
from seeded import digest, seeded_clip, seeded_state

CLASSES = 10
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One net of a peer and ours."""

    name: str
    source: str
    peer: nn.Module
    ours: Callable[[State], nn.Module]
    """Our net with the peer's state dict."""
    shapes: tuple[tuple[int, ...], ...]
    """Inputs to compare on."""
    goldens: tuple[tuple[int, ...], ...]
    """Inputs whose scores the tests keep: small ones."""
    by_our_names: bool = True
    """Whether the tests make the weights from our names, in our order, or from the peer's names."""


class OneClip(nn.Module):
    """Pytorchvideo's SlowFast with pathways split by strides, as a net of one clip."""

    def __init__(self, net: nn.Module, alpha: int):
        super().__init__()
        self.net, self.alpha = net, alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.net([x[:, :, :: self.alpha], x])


class Frames(nn.Module):
    """A net over pictures with one frame a picture, as a net of one clip; scores are averaged over frames."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).mean(1)


def clips(*sizes: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    return tuple((1, 3, frames, size, size) for frames, size in sizes)


def in_order(build: Callable[[], nn.Module]) -> Callable[[State], nn.Module]:
    """Our net with a state dict whose entries come in our order; pictures' kernels become one frame long."""

    def ours(state: State) -> nn.Module:
        model = build()
        target = model.state_dict()
        values = [v.unsqueeze(2) if v.ndim == 4 else v for v in state.values()]
        model.load_state_dict(dict(zip(target, values, strict=True)))
        return model.eval()

    return ours


def pytorchvideo(path: Path) -> Iterator[Case]:
    sys.path.insert(0, str(path))
    for name in ("torchvision", "torchvision.ops"):  # for detection only
        sys.modules.setdefault(name, mock.MagicMock(__path__=[], __spec__=None))
    hub = importlib.import_module("pytorchvideo.models.hub")
    create_slowfast = importlib.import_module("pytorchvideo.models.slowfast").create_slowfast

    def case(name: str, peer: nn.Module, parity: tuple, goldens: tuple, model: str | None = None) -> Case:
        return Case(
            name, "pytorchvideo", peer, functools.partial(from_pytorchvideo, name=model), parity, goldens, False
        )

    for name, wanted in (
        ("slow_r50", clips((8, 224), (12, 96))),
        ("c2d_r50", clips((8, 224), (12, 96))),
        ("i3d_r50", clips((8, 224), (12, 96))),
        ("csn_r101", clips((32, 224), (16, 96))),
        ("r2plus1d_r50", clips((16, 224), (8, 96))),
    ):
        net = getattr(hub, name)(model_num_class=CLASSES)
        net.blocks[-1].pool = nn.AdaptiveAvgPool3d(1)  # at its own size, its window is all there is
        net.blocks[-1].activation = None
        yield case(name, net, wanted, clips((8, 64), (6, 48)))
    for name, alpha, kernel in (("slowfast_r50", 4, 7), ("slowfast_r50_4x16", 8, 5)):
        net = create_slowfast(
            model_num_class=CLASSES,
            slowfast_fusion_conv_kernel_size=(kernel, 1, 1),
            slowfast_fusion_conv_stride=(alpha, 1, 1),
        )
        net.blocks[-2].pool = nn.ModuleList([nn.AdaptiveAvgPool3d(1)] * 2)
        yield case(name, OneClip(net, alpha), clips((32, 224), (16, 96)), clips((16, 64), (32, 48)))
    for name, frames, trained, tested in (("x3d_xs", 4, 160, 182), ("x3d_s", 13, 160, 182), ("x3d_m", 16, 224, 256)):
        net = getattr(hub, name)(model_num_class=CLASSES)
        net.blocks[-1].activation = None
        goldens = clips((frames, trained), (frames, tested)) if name == "x3d_xs" else ()
        yield case(name, net, clips((frames, trained), (frames, tested)), goldens, name)


def torchvision(path: Path) -> Iterator[Case]:
    sys.path.insert(0, str(path))
    package = mock.MagicMock(__path__=[str(path / "torchvision")], __spec__=None)
    models = mock.MagicMock(__path__=[str(path / "torchvision/models")], __spec__=None)
    video = mock.MagicMock(__path__=[str(path / "torchvision/models/video")], __spec__=None)
    sys.modules |= {"torchvision": package, "torchvision.models": models, "torchvision.models.video": video}
    for name in ("transforms", "transforms._presets", "utils", "models._api", "models._meta", "models._utils"):
        sys.modules[f"torchvision.{name}"] = mock.MagicMock(__path__=[], __spec__=None, WeightsEnum=object)
    source = importlib.import_module("torchvision.models.video.resnet")
    for name, layer, stem in (
        ("r3d_18", source.Conv3DSimple, source.BasicStem),
        ("r2plus1d_18", source.Conv2Plus1D, source.R2Plus1dStem),
    ):
        net = source.VideoResNet(source.BasicBlock, [layer] * 4, [2] * 4, stem, num_classes=CLASSES)
        ours = in_order(functools.partial(create_model, name, num_classes=CLASSES))
        yield Case(name, "torchvision", net, ours, clips((16, 112), (9, 80)), clips((8, 48), (5, 32)))


def tsm(path: Path, torchvision_path: Path) -> Iterator[Case]:
    """The shift of the published code, put into torchvision's ResNet-50 in front of every block's first convolution."""
    list(torchvision(torchvision_path))
    resnet = importlib.import_module("torchvision.models.resnet")
    shift = _load(path / "ops/temporal_shift.py").TemporalShift
    for frames in (8, 5):
        net = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], num_classes=CLASSES)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                block.conv1 = shift(block.conv1, n_segment=frames, n_div=8)
        ours = in_order(functools.partial(create_model, "tsm_r50", num_classes=CLASSES))
        goldens = clips((frames, 64)) if frames == 8 else ()
        yield Case("tsm_r50", "temporal-shift-module", Frames(net), ours, clips((frames, 28 * frames)), goldens)


def non_local(path: Path) -> Iterator[Case]:
    """The block alone."""
    block = _load(path / "slowfast/models/nonlocal_helper.py").Nonlocal
    for affinity, theirs in (("embedded_gaussian", "softmax"), ("dot_product", "dot_product")):
        net = block(64, 32, pool_size=[1, 2, 2], instantiation=theirs)
        ours = in_order(functools.partial(NonLocalBlock, 64, affinity=affinity))
        shapes = ((2, 64, 4, 14, 14), (1, 64, 5, 9, 7))
        yield Case(f"non_local_{affinity}", "SlowFast", net, ours, shapes, ((1, 64, 3, 5, 4),))


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(case: Case, goldens: Path | None) -> list[float]:
    """The relative difference on each input."""
    inner = getattr(case.peer, "net", case.peer) if isinstance(case.peer, OneClip | Frames) else case.peer
    shapes = {name: tuple(value.shape) for name, value in inner.state_dict().items()}
    if case.by_our_names:
        ours = {name: tuple(v.shape) for name, v in case.ours(inner.state_dict()).state_dict().items()}
        numbers = seeded_state(ours).values()
        state = {name: v.reshape(shape) for (name, shape), v in zip(shapes.items(), numbers, strict=True)}
    else:
        ours, state = shapes, seeded_state(shapes)
    inner.load_state_dict(state)
    case.peer.eval()
    model = case.ours(state).eval()
    with torch.inference_mode():
        differences = []
        for shape in case.shapes:
            theirs, mine = case.peer(seeded_clip(shape)), model(seeded_clip(shape))
            differences.append(float((theirs - mine).abs().max() / theirs.abs().max()))
        if goldens is not None and case.goldens:
            case.peer.double()
            outputs = [(shape, case.peer(seeded_clip(shape).double())) for shape in case.goldens]
            record = {
                "source": case.source,
                "state": digest(ours),
                "clips": [{"shape": shape, "output": _sample(output)} for shape, output in outputs],
            }
            (goldens / f"{case.name}.json").write_text(json.dumps(record) + "\n")
    return differences


def _sample(output: Tensor) -> list[float]:
    """Up to sixty of its numbers, evenly spread."""
    flat = output.flatten()
    return [float(f"{value:.9g}") for value in flat[:: max(1, flat.numel() // 60)].tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("pytorchvideo", "torchvision", "tsm", "slowfast"):
        parser.add_argument(f"--{peer}", type=Path, metavar="PATH")
    parser.add_argument("--goldens", type=Path, metavar="FOLDER", help="write the peers' scores into its files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[Iterator[Case]] = []
    if options.pytorchvideo:
        cases.append(pytorchvideo(options.pytorchvideo))
    if options.torchvision:
        cases.append(torchvision(options.torchvision))
    if options.tsm and options.torchvision:
        cases.append(tsm(options.tsm, options.torchvision))
    if options.slowfast:
        cases.append(non_local(options.slowfast))
    results: dict[str, dict[str, float]] = {}
    print(f"{'model':28}{'peer':24}{'input':24}max |difference| / max |score|")
    for case in (case for peer in cases for case in peer):
        for shape, difference in zip(case.shapes, compare(case, options.goldens), strict=True):
            text = "x".join(map(str, shape))
            print(f"{case.name:28}{case.source:24}{text:24}{difference:.1e}", flush=True)
            results.setdefault(case.name, {})[text] = difference
    print(json.dumps({"benchmark": "parity_baselines", "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
