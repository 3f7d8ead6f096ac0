"""`lean3d bench --cost`: the counter's numbers, side by side."""

from __future__ import annotations

import json

import pytest
import torch

from lean3d import checkpoint
from lean3d.bench import cost as bench
from lean3d.bench.nets import find_nets
from lean3d.cli import main
from lean3d.errors import CheckpointError, ConfigError, UnknownModelError
from lean3d.models import cost, create_model


def say(capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *words])
    assert not leaving.value.code
    return capsys.readouterr().out


def test_numbers_are_the_counters_in_one_line_of_json(capsys):
    out = say(capsys, "c3d_light", "--cost", "--json", "--layers", "--tiles", "2", "--options", "expansion", "0.75")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (found["bench"], found["tiles"]) == ("cost", [2])
    (net,) = found["nets"]
    with torch.device("meta"):
        counted = cost(create_model("c3d_light", expansion=0.75), tiles=(2,))
    assert (net["weights"], net["macs"], net["multiplications"]) == (
        counted.weights,
        counted.macs,
        counted.multiplications,
    )
    assert net["clip"] == [1, 3, 16, 112, 112] and net["arguments"]["expansion"] == 0.75
    assert [layer["algorithm"] for layer in net["layers"]] == [layer.algorithm for layer in counted.layers]
    assert sum(layer["macs"] for layer in net["layers"]) == counted.macs


def test_tables_of_nets_layers_and_ratios(capsys):
    out = say(capsys, "c3d", "c3d_light", "--cost", "--layers")
    rows = [line.split() for line in out.splitlines()]
    assert ["c3d", "16", "x", "112x112", "27.86", "38.50", "5.26"] in rows
    assert ["c3d_light", "11.78x", "10.38x", "14.96x", "2.04x"] in rows
    (depthwise,) = [row for row in rows if row[:1] == ["stages.1.0.depthwise"]]
    assert depthwise[2] == "1x3x3" and depthwise[-2:] == ["F(4x4,", "3x3)"]
    assert len([row for row in rows if row[:1] == ["total"]]) == 2
    assert "m in {2, 4}" in out


def test_a_clip_of_another_size(capsys):
    text = say(capsys, "c3d", "--cost", "--json", "--num-frames", "8", "--size", "56", "64")
    (net,) = json.loads(text)["nets"]
    assert net["clip"] == [1, 3, 8, 56, 64]
    assert net["macs"] < 38.5e9 / 6


def test_a_run_is_counted_with_its_own_arguments(tmp_path):
    model = create_model("c3d_light", width=0.125, num_classes=3, num_frames=4, size=32)
    checkpoint.save_model(tmp_path / "model.safetensors", model, ("a", "b", "c"), {})
    (net,) = find_nets([str(tmp_path)])
    assert (net.name, net.spec, net.clip, net.weights) == (str(tmp_path), model.spec, (1, 3, 4, 32, 32), tmp_path)
    (measured,) = bench.measure([net])
    assert measured.cost == cost(model)


def test_a_pattern_names_several_and_what_is_nothing_says_so(tmp_path):
    assert [net.name for net in find_nets(["c3d*"], num_frames=2, size=(32, 32))] == ["c3d", "c3d_light"]
    with pytest.raises(UnknownModelError, match=r"'c3d_lihgt' is neither a model \(did you mean c3d_light"):
        find_nets(["c3d_lihgt"])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_nets([str(tmp_path / "x.safetensors")])
    with pytest.raises(ConfigError, match="c3d has no argument 'expansion'"):
        find_nets(["c3d"], options={"expansion": 1.0})
