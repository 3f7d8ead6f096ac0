"""engine: a training leaves a run's folder with a model that works, and refuses what can't."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lean3d import checkpoint
from lean3d.config import TrainConfig, from_json
from lean3d.data.manifest import read_manifest
from lean3d.data.readers import VideoReader
from lean3d.engine import Interrupted, fit, loop
from lean3d.engine.logging import draw_curves, epoch_line, read_confusion, read_rows, write_confusion
from lean3d.engine.setup import load_initial_weights, step_seed
from lean3d.engine.stop import StopSignal
from lean3d.errors import CheckpointError, ConfigError, DataError, TooManyBadFilesError, TrainingError
from lean3d.models import create_model, model_from_config
from test_weights_2d import random_resnet
from tiny_runs import CLASSES, tiny_config, write_clips

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def learned(clips, tmp_path_factory):
    """A config and the result of a training long enough to learn an easy task."""
    config = tiny_config(clips, tmp_path_factory.mktemp("runs") / "learned", optim_epochs=8, optim_precise_bn=6)
    config = replace(config, augment=replace(config.augment, color_jitter=0.0))
    return config, fit(config)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_file(path)[1]


def test_it_learns_and_the_saved_model_is_the_one_it_reports(learned, clips):
    config, result = learned
    assert result.metrics["val_top1"] >= 0.75
    rows = [row for row in read_rows(result.run / "metrics.jsonl") if row["kind"] == "epoch"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    loaded = checkpoint.load(result.run)
    assert loaded.classes == CLASSES and loaded.recipe == config
    assert loaded.metadata["metrics"] == result.metrics


def test_the_run_folder_is_complete(learned, clips):
    config, result = learned
    run = result.run
    names = {"config.json", "environment.json", "manifest.csv", "manifest.sha256", "metrics.jsonl", "tensorboard"}
    names |= {"bad_files.csv", "curves.png", "confusion.png", "confusion.csv", "checkpoints", "model.safetensors"}
    assert {path.name for path in run.iterdir()} == names
    assert from_json(TrainConfig, (run / "config.json").read_text()) == config
    assert (run / "manifest.sha256").read_text().strip() == read_manifest(config.data).digest()
    (start,) = json.loads((run / "environment.json").read_text())
    assert {"lean3d", "commit", "python", "command", "packages"} <= start.keys()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000042", "step-00000048"]
    assert any((run / "tensorboard").iterdir())
    confusion, classes = read_confusion(run / "confusion.csv")
    assert classes == list(CLASSES) and confusion.sum(1).tolist() == [4, 4]
    assert int(confusion.trace()) / 8 == result.metrics["val_top1"]


def test_rows_say_what_happened(learned):
    _, result = learned
    rows = read_rows(result.run / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [10, 20, 30, 40]
    assert {"epoch", "loss", "lr", "clips_per_s", "data_wait", "bad_files"} <= steps[0].keys()
    assert steps[0]["lr"] > steps[-1]["lr"] > 0
    assert steps[-1]["clips_per_s"] > 0 and 0 <= steps[-1]["data_wait"] <= 1


def test_a_training_is_a_function_of_its_seed(clips, tmp_path):
    runs = [
        fit(tiny_config(clips, tmp_path / name, optim_epochs=1, model_dropout=0.5, run_seed=seed)).run
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = (weights(run / "model.safetensors")["head.linear.weight"] for run in runs)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_run_that_is_there_is_not_overwritten(learned):
    config, result = learned
    with pytest.raises(ConfigError, match=f"--resume {result.run}"):
        fit(config)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"optim_batch_size": 5, "optim_accumulate": 2}, "--optim.batch-size 6"),
        ({"optim_batch_size": 48}, "24 labelled clips"),
        ({"optim_epochs": 0}, r"--optim\.epochs must be at least 1, got 0"),
        ({"optim_lr": 0.0}, "above 0"),
        ({"optim_label_smoothing": 1.0}, "label-smoothing"),
        ({"run_precision": "fp16"}, "needs a GPU"),
        ({"run_devices": 0}, "devices"),
        ({"run_num_nodes": 2}, "torchrun --nnodes 2"),
        ({"optim_ema": 1.5}, r"optim\.ema"),
        ({"optim_teachers_share": 0.0}, r"teachers-share must be above 0 and at most 1, got 0\.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(clips, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        fit(tiny_config(clips, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_explodes_names_the_step_and_keeps_the_checkpoint(clips, tmp_path, monkeypatch, what):
    run = tmp_path / "run"
    train_step = loop._Training._train_step

    def explode(self, batch):
        loss = train_step(self, batch)
        if self.step == 7:
            self.model.head.linear.bias.data.fill_(float("inf"))
            return loss * float("nan") if what == "loss" else loss
        return loss

    monkeypatch.setattr(loop._Training, "_train_step", explode)
    with pytest.raises(TrainingError, match=rf"{what} became .* step 8 .*--optim\.lr"):
        fit(tiny_config(clips, run, run_save_minutes=0.0))
    assert checkpoint.latest_training_state(run).name == "step-00000007"


def test_bad_files_are_counted_and_named(tmp_path):
    root = write_clips(tmp_path / "clips", train=8, val=4)
    (root / "train" / "dark" / "01.mp4").write_bytes(b"")
    (root / "val" / "dark" / "02.mp4").write_text("no video")
    config = tiny_config(root, tmp_path / "run", data_max_bad_share=0.1)
    result = fit(config)
    assert result.metrics["bad_files"] == 2 and result.metrics["val_bad_files"] == 1
    table = (result.run / "bad_files.csv").read_text().splitlines()
    assert table[0] == "path,reason,count" and len(table) == 3
    assert "01.mp4" in table[1] and table[1].endswith(",2") and "02.mp4" in table[2]
    rows = read_rows(result.run / "metrics.jsonl")
    assert "2 bad files" in epoch_line(rows[-1], 2, best=False)


def test_too_many_bad_files_stop_the_run(tmp_path):
    root = write_clips(tmp_path / "clips", train=8, val=1)
    for name in ("01", "02"):
        (root / "train" / "dark" / f"{name}.mp4").write_bytes(b"")
    with pytest.raises(TooManyBadFilesError, match=r"(1|2) of 18 files"):
        fit(tiny_config(root, tmp_path / "run"))


def test_without_validation_clips_the_last_model_is_kept(tmp_path):
    root = write_clips(tmp_path / "clips", train=4, val=0)
    config = tiny_config(root, tmp_path / "run", data_val_share=0.0)
    result = fit(config)
    assert result.metrics["step"] == 4 and "val_top1" not in result.metrics
    last = result.run / "checkpoints" / "step-00000004" / "model.safetensors"
    ours, theirs = weights(result.run / "model.safetensors"), weights(last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_training_clips_is_an_error(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(f"{n}.mp4,a,test\n" for n in range(3)))
    for number in range(3):
        (tmp_path / f"{number}.mp4").touch()
    with pytest.raises(DataError, match="train"):
        fit(tiny_config(tmp_path / "list.csv", tmp_path / "run"))


def test_the_moving_average_is_what_is_saved(clips, tmp_path):
    result = fit(tiny_config(clips, tmp_path / "run", optim_epochs=1, optim_ema=0.9))
    trained = weights(result.run / "checkpoints" / "step-00000006" / "model.safetensors")
    state = checkpoint.load_pickle(result.run / "checkpoints" / "step-00000006" / "state.pt")
    saved = weights(result.run / "model.safetensors")
    assert torch.equal(saved["head.linear.weight"], state["average"]["head.linear.weight"])
    assert not torch.equal(saved["head.linear.weight"], trained["head.linear.weight"])


def test_where_clips_get_their_looks_changes_nothing(clips, tmp_path, monkeypatch):
    """On a GPU the trainer does it; here it is told to."""
    changes = {"augment_color_jitter": 0.4, "augment_rand_augment": 2, "augment_erasing": 0.5, "optim_precise_bn": 2}
    fit(tiny_config(clips, tmp_path / "loader", **changes))
    monkeypatch.setattr(loop, "_augments", lambda device: True)
    fit(tiny_config(clips, tmp_path / "trainer", **changes))
    here, there = (weights(tmp_path / run / "model.safetensors") for run in ("loader", "trainer"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_linear_probing_moves_the_classifier_alone(clips, learned, tmp_path):
    start = weights(learned[1].run / "model.safetensors")
    result = fit(
        tiny_config(
            clips,
            tmp_path / "run",
            optim_epochs=1,
            init_weights=str(learned[1].run),
            init_train="head",
            optim_weight_decay=0.5,
        )
    )
    moved = [n for n, v in weights(result.run / "model.safetensors").items() if not torch.equal(v, start[n])]
    assert sorted(moved) == ["head.linear.bias", "head.linear.weight"]


def test_staged_fine_tuning_lets_one_stage_more_join_in(clips, tmp_path, monkeypatch):
    config = tiny_config(clips, tmp_path / "run", optim_epochs=3, init_train="staged", init_stage_epochs=1)
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in model_from_config(config.model, 2).state_dict().items()}
    moved = {}

    def spy(run, step, model, *rest):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        moved[step] = {"head" if name.startswith("head") else ".".join(name.split(".")[:2]) for name in changed}
        return save(run, step, model, *rest)

    save = checkpoint.save_training_state
    monkeypatch.setattr(checkpoint, "save_training_state", spy)
    fit(config)
    assert moved == {6: {"head"}, 12: {"head", "stages.4"}, 18: {"head", "stages.4", "stages.3"}}


def test_accumulated_parts_are_one_batch(clips, learned, tmp_path):
    """With the features frozen no BN sees the parts, so the classifier must come out the same."""
    shared = {"optim_epochs": 1, "init_weights": str(learned[1].run), "init_train": "head", "optim_name": "sgd"}
    whole, parts = (
        weights(fit(tiny_config(clips, tmp_path / str(n), optim_accumulate=n, **shared)).run / "model.safetensors")
        for n in (1, 4)
    )
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_precision": "bf16"},
        {"augment_mixup": 0.4, "augment_cutmix": 1.0, "optim_label_smoothing": 0.1},
        {"optim_name": "sgd", "data_sampling": "segments", "data_num_workers": 2},
    ],
)
def test_other_ways_to_train_run_through(clips, tmp_path, changes):
    result = fit(tiny_config(clips, tmp_path / "run", optim_epochs=1, **changes))
    assert 0 < result.metrics["loss"] < 5 and result.metrics["step"] == 6


def test_max_minutes_shortens_the_schedule(clips, tmp_path):
    result = fit(tiny_config(clips, tmp_path / "run", optim_epochs=100_000, run_max_minutes=0.05))
    state = checkpoint.load_pickle(checkpoint.latest_training_state(result.run) / "state.pt")
    assert state["limited"] and state["total"] == state["step"] < 600_000
    assert state["seconds"] < 60  # the aim is 3; machines are busy


def test_initial_weights_of_other_classes_leave_the_classifier_fresh(learned):
    model = create_model("c3d_light", num_classes=5, num_frames=4, width=0.125, size=32)
    before = model.head.linear.weight.clone()
    said = load_initial_weights(model, learned[1].run, ("a", "b", "c", "d", "e"))
    assert "classifier is fresh" in said and "2 other classes" in said
    assert torch.equal(model.head.linear.weight, before)
    start = weights(learned[1].run / "model.safetensors")
    assert all(torch.equal(v, start[n]) for n, v in model.state_dict().items() if not n.startswith("head."))


def test_initial_weights_bring_their_normalisation_which_lasts(clips, learned, tmp_path):
    loaded = checkpoint.load(learned[1].run)
    loaded.model.input_spec = replace(loaded.model.input_spec, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    start = checkpoint.save_model(tmp_path / "start.safetensors", loaded.model, CLASSES, {})
    result = fit(tiny_config(clips, tmp_path / "run", optim_epochs=1, init_weights=str(start)))
    (result.run / "model.safetensors").unlink()
    rows = (result.run / "metrics.jsonl").read_text().splitlines()
    (result.run / "metrics.jsonl").write_text("\n".join(row for row in rows if '"epoch"' not in row.split(",")[0]))
    fit(resume=result.run)  # killed before its validation: the model is written anew, from the checkpoint
    spec = checkpoint.load(result.run).model.input_spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert spec.size == loaded.model.input_spec.size


def test_each_file_is_decoded_whole_once_a_run(clips, tmp_path, monkeypatch):
    checked, whole = [], VideoReader.check
    monkeypatch.setattr(VideoReader, "check", lambda reader: (checked.append(reader.path), whole(reader)))
    fit(tiny_config(clips, tmp_path / "run", optim_epochs=2))
    assert len(checked) == len(set(checked)) == 32  # 24 to train on, 8 to validate


def test_initial_weights_of_another_width_name_both(learned):
    model = create_model("c3d_light", num_classes=2, num_frames=4, width=0.25, size=32)
    with pytest.raises(CheckpointError, match=r"'width': 0\.125.*wants c3d_light.*'width': 0\.25"):
        load_initial_weights(model, learned[1].run, CLASSES)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_initial_weights_of_a_2d_net(tmp_path, ending):
    model = create_model("c2d_r18", num_classes=2, num_frames=4, size=32, width=0.25)
    state = random_resnet((2, 2, 2, 2), False, width=16).state_dict()
    path = tmp_path / f"r18.{ending}"
    if ending == "pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    said = load_initial_weights(model, path, CLASSES)
    assert said.startswith(f"initial weights from {path}: ") and "entries loaded" in said
    first = next(p for n, p in model.named_parameters() if n.startswith("stem") and p.ndim == 5)
    torch.testing.assert_close(first.sum(2), state["conv1.weight"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_kept():
    """Pages that are fetched from the system while 40 MB are taken, written and freed 20 times."""
    code = """
import resource, sys, torch
from lean3d.engine.setup import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True).stdout)
        for how in ("leave", "keep")
    )
    assert kept < given_back / 5


def test_initial_weights_that_are_missing(tmp_path):
    model = create_model("c3d_light", num_classes=2, width=0.125)
    for name in ("a.pth", "a.safetensors", "folder"):
        with pytest.raises(CheckpointError, match="no "):
            load_initial_weights(model, tmp_path / name, CLASSES)


def test_the_first_signal_asks_and_the_second_ends(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        assert stop.signum == 0
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_is_a_keyboard_interrupt_that_says_how_to_go_on():
    error = Interrupted("runs/a", 12)
    assert isinstance(error, KeyboardInterrupt) and error.exit_code == 130
    assert str(error) == "stopped and saved after step 12; to go on: lean3d train --resume runs/a"


def test_seeds_of_neighbours_are_unrelated():
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(100) for rank in range(4)}
    assert len(seeds) == 1600 and min(seeds) >= 0 and max(seeds) < 2**63


def test_curves_of_little_or_nothing_are_drawn(tmp_path):
    for number, rows in enumerate(([], [{"kind": "epoch", "step": 3, "epoch": 0, "loss": 1.0}])):
        draw_curves(rows, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_confusion_round_trip(tmp_path):
    matrix = torch.tensor([[3, 1], [0, 2]])
    write_confusion(tmp_path / "c.csv", matrix, ['a, "b"', "c"])
    back, classes = read_confusion(tmp_path / "c.csv")
    assert torch.equal(back, matrix) and classes == ['a, "b"', "c"]
