"""Names of models: what is accepted, what is refused, and that a spec rebuilds its model."""

from __future__ import annotations

import json

import pytest
import torch

from lean3d.config import ModelConfig
from lean3d.errors import ConfigError, UnknownModelError
from lean3d.models import create_model, list_models, model_from_config, model_from_spec, register_model


def test_unknown_model_names_its_neighbours():
    with pytest.raises(UnknownModelError, match=r"did you mean .*smallbig50"):
        create_model("smalbig50")


def test_unknown_argument_names_the_accepted_ones():
    with pytest.raises(ConfigError, match="c3d has no argument 'num_class': did you mean num_classes"):
        create_model("c3d", num_class=10)


def test_a_name_is_registered_once():
    with pytest.raises(ConfigError, match="registered already"):

        @register_model(sampling_rate=1, size=8)
        def c3d():
            """A second one."""


def test_patterns():
    assert {"smallbig18", "smallbig23", "smallbig50", "smallbig101"} <= set(list_models("smallbig*"))
    assert list_models("nothing*") == []


def test_a_spec_is_json_and_rebuilds_the_model():
    model = create_model("c3d_light", num_classes=7, in_channels=1, width=0.25, size=(56, 80), sampling_rate=1)
    again = model_from_spec(json.loads(json.dumps(model.spec)))
    assert again.spec == model.spec and again.input_spec == model.input_spec
    assert again.input_spec.size == (56, 80) and again.input_spec.channels == 1
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 5, 20, 30)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_config_says_what_differs_from_the_models_defaults():
    config = ModelConfig(name="c3d_light", width=0.125, size=(32, 32), options={"expansion": 1.0, "trg": "none"})
    model = model_from_config(config, num_classes=3)
    assert model.spec["arguments"]["expansion"] == 1.0
    assert model.spec["arguments"]["num_frames"] == 16  # the model's own
    assert model.head.linear.out_features == 3


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((3, 16, 32, 32), r"clip\[None\]"), ((1, 1, 16, 32, 32), "takes clips"), ((0, 3, 4, 8, 8), "takes")],
)
def test_a_clip_of_the_wrong_shape_is_refused(shape, hint):
    with pytest.raises(ConfigError, match=hint):
        create_model("c3d_light", width=0.125)(torch.zeros(shape))
