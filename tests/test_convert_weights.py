"""`lean3d convert`: files that others' code saved become checkpoints that give the recorded scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lean3d import checkpoint, convert
from lean3d.cli import main
from lean3d.engine.setup import load_initial_weights
from lean3d.errors import CheckpointError, ConfigError
from lean3d.models import create_model
from lean3d.models.weights_pytorchvideo import pytorchvideo_names
from lean3d.models.weights_smallbig import smallbig_names
from seeded import seeded_clip, seeded_state

GOLDENS = Path(__file__).parent / "goldens"


def published_state(name: str, names, **arguments) -> dict[str, torch.Tensor]:
    """Seeded weights under the published names."""
    with torch.device("meta"):
        model = create_model(name, num_classes=10, **arguments)
    theirs, ours = names(model), model.state_dict()
    return seeded_state({theirs[key]: tuple(value.shape) for key, value in ours.items()})


@pytest.fixture(scope="module")
def smallbig23() -> dict[str, torch.Tensor]:
    return published_state("smallbig23", smallbig_names)


def test_a_smallbig_checkpoint_gives_its_codes_scores(smallbig23, tmp_path, capsys):
    file = tmp_path / "smallbig23.pth.tar"
    parallel = {f"module.{key}": value for key, value in smallbig23.items()}
    torch.save({"epoch": 3, "state_dict": parallel, "best_metric": 1.0, "optimizer": {"state": {}}}, file)
    with pytest.raises(SystemExit) as leaving:
        main(["convert", "smallbig", str(file), "--num-frames", "4", "--sampling-rate", "2"])
    assert leaving.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    out = tmp_path / "smallbig23.lean3d.safetensors"
    assert "smallbig23, 10 classes, 4 frames 2 apart of 224 x 224 pixels" in said and f"lean3d eval {out}" in said

    loaded = checkpoint.load(out)
    assert loaded.classes == tuple("0123456789") and loaded.recipe is None
    spec = loaded.model.input_spec
    assert (spec.num_frames, spec.sampling_rate, spec.mean, spec.std) == (
        4,
        2,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    golden = json.loads((GOLDENS / "smallbig.json").read_text())["smallbig23"]
    expected = torch.tensor(golden["scores"], dtype=torch.float64)
    with torch.no_grad():
        scores = loaded.model.double()(seeded_clip(golden["clip"]).double())
    assert (scores - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_pytorchvideo_file_gives_its_scores(tmp_path):
    golden = json.loads((GOLDENS / "x3d_xs.json").read_text())
    state = published_state("x3d_xs", pytorchvideo_names)
    torch.save({"model_state": state}, tmp_path / "X3D_XS.pyth")
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps({f'"class {n}"': n for n in reversed(range(10))}))
    done = convert.run(
        "pytorchvideo",
        tmp_path / "X3D_XS.pyth",
        out=tmp_path / "new" / "x.safetensors",
        model="x3d_xs",
        labels=labels,
    )
    loaded = checkpoint.load(done.path)
    assert loaded.classes == tuple(f"class {n}" for n in range(10))
    assert loaded.model.spec["name"] == "x3d_xs" and loaded.model.input_spec.mean == (0.45, 0.45, 0.45)
    clip = golden["clips"][0]
    with torch.inference_mode():
        output = loaded.model(seeded_clip(clip["shape"])).flatten()
    expected = torch.tensor(clip["output"])
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_safetensors_are_read_too_and_our_own_are_refused(smallbig23, tmp_path):
    save_file(smallbig23, tmp_path / "weights.safetensors")
    done = convert.run("smallbig", tmp_path / "weights.safetensors")
    assert done.path == tmp_path / "weights.lean3d.safetensors"
    state = done.model.state_dict()
    assert torch.equal(state["stages.1.0.units.2.big_bn.weight"], smallbig23["layer2.0.big3.1.weight"])
    with pytest.raises(CheckpointError, match="is a checkpoint of lean3d already"):
        convert.run("smallbig", done.path, out=tmp_path / "again.safetensors")


def test_a_training_starts_from_a_converted_checkpoint(smallbig23, tmp_path):
    torch.save(smallbig23, tmp_path / "w.pth")
    done = convert.run("smallbig", tmp_path / "w.pth")
    model = create_model("smallbig23", num_classes=2, num_frames=4)
    said = load_initial_weights(model, done.path, ("left", "right"))
    assert "the classifier is fresh, since that model has 10 other classes" in said
    assert torch.equal(model.stem.conv.weight, smallbig23["conv1.weight"])
    spec = model.input_spec  # ImageNet's, not the zoo's 0.45 and 0.225
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_what_can_not_be_converted_says_why(smallbig23, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(smallbig23, file)
    with pytest.raises(CheckpointError, match="of smallbig23, not of smallbig50: leave --model away"):
        convert.run("smallbig", file, model="smallbig50")
    with pytest.raises(CheckpointError, match="no classifier of pytorchvideo's hub"):
        convert.run("pytorchvideo", file)
    with pytest.raises(CheckpointError, match="no file at"):
        convert.run("smallbig", tmp_path / "nothing.pth")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        convert.run("smallbig", file, out=tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="num_frames"):
        convert.run("smallbig", file, num_frames=0)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"names\.txt has 2 names; smallbig23 in .*w\.pth has 10 classes"):
        convert.run("smallbig", file, labels=tmp_path / "names.txt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="can't be read"):
        convert.run("smallbig", file)


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        convert.run("smallbig", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "\ufeffwalk\nrun\n\n"),
        ("l.json", '["walk", "run"]'),
        ("l.json", '{"run": "1", "walk": "0"}'),
        ("l.json", '{"1": "run", "0": "walk"}'),
    ],
)
def test_labels_are_read_in_every_form(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert convert.read_labels(tmp_path / name) == ("walk", "run")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "a\na\n", "has 'a' twice"),
        ("l.json", "{", "holds no names"),
        ("l.json", "3", "expected a list"),
        ("l.json", '{"a": 0, "b": 2}', "its numbers are not 0 to 1"),
        ("l.json", '{"a": "b"}', "holds no names"),
    ],
)
def test_labels_that_can_not_be_read_say_why(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert.read_labels(tmp_path / name)
