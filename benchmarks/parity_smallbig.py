"""Our SmallBigNets against the published code: equal weights in, equal scores out, for its seven models.

    python benchmarks/parity_smallbig.py ~/src/SmallBigNet

The path is a checkout of the published code. Weights, BN's statistics among them, and clips are random and follow from
names and seeds (tests/seeded.py). Printed is the largest difference of scores over the largest score, in float32, at
several clip sizes; the last line is JSON. `--goldens tests/goldens/smallbig.json` writes the published code's scores,
computed in float64, to the file that the tests compare with.

For the comparison the attention's last BN (big4_2) is scaled down ten times: with weights as large as the others'
each block triples its activations, the sigmoid is a step in the end, and both nets are 1e-5 from their own float64
(equal in float64 to 1e-14).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from lean3d.models.weights_smallbig import PUBLISHED_NAMES, convert_smallbig, from_smallbig
from seeded import digest, seeded_clip, seeded_state

CLASSES = 10
CLIPS = ((1, 3, 4, 32, 32), (2, 3, 8, 64, 48), (1, 3, 8, 112, 112), (1, 3, 3, 97, 65))
GOLDEN_CLIP = CLIPS[0]


def published_net(checkout: Path, name: str, num_frames: int) -> nn.Module:
    """A net of the published code, whose imports of packages that are not used here are left empty."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
        sys.modules["torchvision"] = mock.MagicMock()
    from models import SmallBig  # the checkout's

    arguments = SimpleNamespace(test=False, feat=False, imagenet=False, num_classes=CLASSES, t_length=num_frames)
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(SmallBig, name)(arguments).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--goldens", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    worst: dict[str, float] = {}
    goldens = {}
    for ours, theirs in PUBLISHED_NAMES.items():
        for shape in CLIPS:
            net = published_net(options.checkout, theirs, shape[2])
            shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
            state = seeded_state(shapes)
            clip = seeded_clip(shape)
            if shape == GOLDEN_CLIP:
                net.load_state_dict(state)
                with torch.no_grad():
                    exact = net.double()(clip.double())
                goldens[ours] = {"clip": shape, "digest": digest(shapes), "scores": exact.tolist()}
                net.float()
            state = {key: value / 10 if "big4_2.1.weight" in key else value for key, value in state.items()}
            net.load_state_dict(state)
            model = from_smallbig(state, num_frames=shape[2])
            assert model.spec["name"] == ours == convert_smallbig(state)[0]
            with torch.no_grad():
                expected, scores = net(clip), model(clip)
            difference = float((scores - expected).abs().max() / expected.abs().max())
            worst[ours] = max(worst.get(ours, 0.0), difference)
            print(f"{theirs:22} {ours:18} {'x'.join(map(str, shape)):16} {difference:.1e}", flush=True)
    if options.goldens:
        options.goldens.write_text(json.dumps(goldens, indent=1) + "\n")
    print(json.dumps({"max_relative_difference": worst, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
