"""Configs are plain data: exact JSON round trips, unknown keys and wrong kinds refused by their full path."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lean3d import config as config_module
from lean3d import errors
from lean3d.config import InputSpec, ModelConfig, TrainConfig, from_dict, from_json, to_dict, to_json
from lean3d.errors import ConfigError, DecodeError, Lean3dError, MissingDependencyError, did_you_mean

scalars = st.one_of(st.booleans(), st.integers(-99, 99), st.floats(-9, 9), st.text(max_size=5))


@given(
    lr=st.floats(1e-6, 1.0),
    size=st.tuples(st.integers(1, 512), st.integers(1, 512)) | st.none(),
    options=st.dictionaries(st.text(min_size=1, max_size=8), scalars, max_size=4),
    scales=st.lists(st.floats(0.1, 1.0), max_size=5),
)
def test_json_round_trip_is_exact(lr, size, options, scales):
    base = TrainConfig()
    config = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=lr),
        model=ModelConfig(size=size, options=options),
        augment=dataclasses.replace(base.augment, scales=tuple(scales)),
    )
    again = from_json(TrainConfig, to_json(config))
    assert again == config
    assert all(type(again.model.options[key]) is type(value) for key, value in options.items())
    assert json.loads(to_json(config)) == to_dict(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 0.1}}, r"unknown key optim\.lrr: did you mean lr"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr must be .*float.*'fast'"),
        ({"optim": {"epochs": 1.5}}, r"optim\.epochs must be .*int"),
        ({"optim": {"name": "adam"}}, r"optim\.name must be one of sgd, adamw"),
        ({"model": {"size": [1, 2, 3]}}, r"model\.size must be"),
        ({"data": []}, r"data\.: expected an object"),
    ],
)
def test_wrong_json_is_refused_by_its_path(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        from_json(TrainConfig, "{")


@pytest.mark.parametrize(
    "values",
    [
        {"num_frames": 0},
        {"size": (0, 10)},
        {"channels": 2},
        {"channels": 1},
        {"std": (0.0, 1.0, 1.0)},
        {"region": (0.5, 0.0, 0.5, 1.0)},
        {"region": (0.0, 0.0, 1.0, 56.0)},
        {"region": (0.0, float("nan"), 1.0, 1.0)},
    ],
)
def test_an_input_spec_that_cannot_be_is_refused(values):
    with pytest.raises(ConfigError):
        InputSpec(**values)


def test_every_setting_has_its_help():
    """The command line shows the text under each field; a setting without one is undocumented."""
    tree = ast.parse(inspect.getsource(config_module))
    missing = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "TrainConfig":
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not documented:
                    missing.append(f"{node.name}.{field.target.id}")
    assert missing == []


def test_the_error_tree_is_the_one_in_the_docstring():
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Lean3dError)}
    assert all(name in errors.__doc__ for name in classes)


def test_errors_cross_process_borders_and_read_well():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "no video stream")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "no video stream", "can't decode a.mp4: no video stream")
    missing = pickle.loads(pickle.dumps(MissingDependencyError("onnx", "export")))
    assert 'pip install "lean3d[export]"' in str(missing)
    assert str(errors.UnknownModelError("no model 'x'")) == "no model 'x'"  # KeyError alone would add quotes


def test_did_you_mean_names_neighbours_or_all():
    assert did_you_mean("smalbig50", ["c3d", "smallbig50"]) == "did you mean smallbig50?"
    assert did_you_mean("zzz", ["c3d", "x3d_s"]) == "known are: c3d, x3d_s"
