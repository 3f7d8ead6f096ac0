"""Weights with the published SmallBigNet's names, and the scores that its code gave with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lean3d.errors import CheckpointError
from lean3d.models import cost, create_model
from lean3d.models.weights_smallbig import PUBLISHED_NAMES, convert_smallbig, from_smallbig, smallbig_names
from seeded import digest, seeded_clip, seeded_state

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "smallbig.json").read_text())


def published_shapes(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    ours = model.state_dict()
    return {theirs: tuple(ours[key].shape) for key, theirs in smallbig_names(model).items()}


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_scores_are_those_of_the_published_code(name):
    golden = GOLDENS[name]
    shapes = published_shapes(name)
    assert digest(shapes) == golden["digest"]
    model = from_smallbig(seeded_state(shapes), num_frames=4)
    assert model.spec["name"] == name
    expected = torch.tensor(golden["scores"], dtype=torch.float64)
    with torch.no_grad():
        scores = model.double()(seeded_clip(golden["clip"]).double())
    assert (scores - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_whole_checkpoint_of_a_parallel_net_is_read():
    state = seeded_state(published_shapes("smallbig23"))
    saved = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    name, converted = convert_smallbig(saved, "smallbig23")
    assert name == "smallbig23"
    assert torch.equal(converted["stages.1.0.units.2.big_bn.weight"], state["layer2.0.big3.1.weight"])


def test_what_is_not_of_the_seven_is_refused():
    state = seeded_state(published_shapes("smallbig23"))
    with pytest.raises(CheckpointError, match="weights of smallbig23_no_extra, our smallbig23, not of smallbig50"):
        convert_smallbig(state, "smallbig50")
    with pytest.raises(CheckpointError, match=r"not weights of one of .*stages\.0"):
        convert_smallbig({"stages.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no classifier"):
        convert_smallbig({key: value for key, value in state.items() if not key.startswith("fc.")})
    with pytest.raises(CheckpointError, match=r"missing: layer2.0.big1.1.bias; unexpected: layer2.0.more"):
        changed = {key: value for key, value in state.items() if key != "layer2.0.big1.1.bias"}
        convert_smallbig({**changed, "layer2.0.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"layer1.0.bn1.bias has the shape \(3,\)"):
        convert_smallbig({**state, "layer1.0.bn1.bias": torch.zeros(3)})


def test_a_converted_net_costs_what_the_published_one_does():
    counted = cost(from_smallbig(seeded_state(published_shapes("smallbig23"))), (1, 3, 8, 224, 224))
    classifier = (400 - 10) * 2048
    assert f"{(counted.macs + classifier) / 1e9:.2f}" == "26.53"
