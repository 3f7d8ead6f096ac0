"""checkpoint.py: what is written comes back, bit for bit; what is broken says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lean3d import checkpoint
from lean3d.config import ModelConfig, TrainConfig, to_dict
from lean3d.errors import CheckpointError
from lean3d.models import VideoNet, create_model, model_from_spec

CLASSES = ("left", "right", "none")


@pytest.fixture
def model() -> VideoNet:
    torch.manual_seed(0)
    return create_model("c3d_light", num_classes=3, num_frames=8, width=0.125, size=32)


@pytest.fixture
def file(tmp_path: Path, model: VideoNet) -> Path:
    recipe = to_dict(TrainConfig(model=ModelConfig(width=0.125)))
    return checkpoint.save_model(
        tmp_path / "a" / "model.safetensors", model, CLASSES, recipe, {"metrics": {"top1": 0.5}}
    )


def rewrite(path: Path, change) -> None:
    """Change the header of a checkpoint and leave its tensors."""
    header, tensors = checkpoint.read_file(path)
    change(header, tensors)
    save_file(tensors, path, {"lean3d": json.dumps(header)})


def test_round_trip_keeps_weights_labels_recipe_and_numbers(model, file):
    loaded = checkpoint.load(file)
    assert loaded.classes == CLASSES
    assert loaded.recipe == TrainConfig(model=ModelConfig(width=0.125))
    assert loaded.metadata["metrics"] == {"top1": 0.5}
    assert loaded.model.spec == model.spec and loaded.model.input_spec == model.input_spec
    assert not loaded.model.training
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_region_comes_back_and_a_file_from_before_there_were_regions_has_the_whole_frame(tmp_path):
    region = (0.25, 0.3, 0.75, 0.8)
    net = create_model("c3d_light", num_classes=3, width=0.125, region=region)
    file = checkpoint.save_model(tmp_path / "model.safetensors", net, CLASSES, to_dict(TrainConfig()))
    assert checkpoint.load(file).model.input_spec.region == region
    assert model_from_spec(json.loads(json.dumps(net.spec))).input_spec == net.input_spec

    def forget(header, tensors):
        del header["input"]["region"], header["model"]["region"]

    rewrite(file, forget)
    assert checkpoint.load(file).model.input_spec.region == (0.0, 0.0, 1.0, 1.0)


def test_a_checkpoint_has_the_mode_of_any_file(file):
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_a_run_folder_stands_for_its_model(file):
    assert checkpoint.load(file.parent).path == file


def test_the_header_has_one_entry_of_json_that_others_can_read(file):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["lean3d"]
    assert json.loads(metadata["lean3d"])["input"]["num_frames"] == 8


def test_weights_in_channels_last_memory_are_written_as_they_read(tmp_path, model):
    model.to(memory_format=torch.channels_last_3d)
    loaded = checkpoint.load(checkpoint.save_model(tmp_path / "m.safetensors", model, CLASSES, {}))
    assert loaded.recipe is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))


def test_a_missing_file_names_what_lies_beside_it(file):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*modle.*model\.safetensors"):
        checkpoint.load(file.with_name("modle.safetensors"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoint.load(tmp_path / "nowhere" / "model.safetensors")


def test_an_empty_file(tmp_path):
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(CheckpointError, match="0 bytes"):
        checkpoint.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_that_is_cut_off(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut off"):
        checkpoint.load(file)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "m.safetensors").write_text("hello, this is text and no checkpoint at all")
    with pytest.raises(CheckpointError, match="another kind"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_safetensors_of_another_program(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"not lean3d's header.*--init\.weights"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_a_newer_format_says_to_update(file):
    rewrite(file, lambda header, tensors: header.update(format=checkpoint.FORMAT + 1, version="9.9"))
    with pytest.raises(CheckpointError, match=r"lean3d 9\.9.*pip install -U"):
        checkpoint.load(file)


def test_an_unknown_model_names_its_neighbour(file):
    rewrite(file, lambda header, tensors: header["model"].update(name="c3d_lihgt"))
    with pytest.raises(CheckpointError, match="did you mean c3d_light"):
        checkpoint.load(file)


def test_an_unknown_argument_of_the_model(file):
    rewrite(file, lambda header, tensors: header["model"]["arguments"].update(colour="red"))
    with pytest.raises(CheckpointError, match="colour"):
        checkpoint.load(file)


def test_missing_and_foreign_tensors_are_named(file):
    rewrite(file, lambda header, tensors: tensors.update(extra=tensors.pop("head.linear.bias")))
    with pytest.raises(CheckpointError, match=r"lacks head\.linear\.bias; it has extra"):
        checkpoint.load(file)


def test_a_tensor_of_another_shape_is_named(file):
    rewrite(file, lambda header, tensors: tensors.update({"head.linear.bias": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r"head\.linear\.bias as \(7,\), the model as \(3,\)"):
        checkpoint.load(file)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(file, model, monkeypatch):
    before = file.read_bytes()

    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(CheckpointError, match=r"can't be written \(no space left on device\)"):
        checkpoint.save_model(file, model, CLASSES, {})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]


def test_training_state_round_trip_and_only_the_newest_two_stay(tmp_path, model):
    assert checkpoint.latest_training_state(tmp_path) is None
    for step in (5, 50, 500):
        with torch.no_grad():
            model.head.linear.bias.fill_(step)
        checkpoint.save_training_state(tmp_path, step, model, {"a": torch.arange(step)}, CLASSES, {})
    folder = checkpoint.latest_training_state(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-00000500"
    assert [p.name for p in sorted(folder.parent.iterdir())] == ["step-00000050", "step-00000500"]
    with torch.no_grad():
        model.head.linear.bias.zero_()
    state = checkpoint.load_training_state(folder, model)
    assert state["step"] == 500 and torch.equal(state["a"], torch.arange(500))
    assert model.head.linear.bias.tolist() == [500.0] * 3


def test_half_written_and_half_removed_checkpoints_are_passed_over_and_swept_up(tmp_path, model):
    checkpoint.save_training_state(tmp_path, 1, model, {}, CLASSES, {})
    parent = tmp_path / "checkpoints"
    (parent / ".step-00000002.77").mkdir()
    (parent / "step-00000003").mkdir()
    assert checkpoint.latest_training_state(tmp_path) == parent / "step-00000001"
    checkpoint.save_training_state(tmp_path, 3, model, {}, CLASSES, {})
    assert [p.name for p in sorted(parent.iterdir())] == ["step-00000001", "step-00000003"]


def test_a_run_without_a_model_yet_says_how_to_go_on(tmp_path, model):
    checkpoint.save_training_state(tmp_path, 1, model, {}, CLASSES, {})
    with pytest.raises(CheckpointError, match="--resume"):
        checkpoint.load(tmp_path)


def test_a_kill_during_the_write_leaves_the_last_good_checkpoint(tmp_path, model):
    """A process writes checkpoints without end and is killed at an arbitrary moment."""
    code = (
        "import itertools, sys, torch; from lean3d import checkpoint; from lean3d.models import create_model\n"
        "model = create_model('c3d_light', num_classes=3, num_frames=8, width=0.125, size=32)\n"
        "for step in itertools.count(1):\n"
        "    model.head.linear.bias.data.fill_(step)\n"
        "    checkpoint.save_training_state(sys.argv[1], step, model, {'a': torch.full((9,), step)}, 'abc', {})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 4:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = checkpoint.latest_training_state(tmp_path)
    state = checkpoint.load_training_state(folder, model)
    assert state["step"] >= 4
    assert model.head.linear.bias.tolist() == [float(state["step"])] * 3
    assert state["a"].tolist() == [state["step"]] * 9


def test_a_pickle_that_holds_code_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"a": os.system}, path)
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        checkpoint.load_pickle(path)
