"""A training that is killed or stopped, and resumed, is the training that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lean3d import checkpoint
from lean3d.config import TrainConfig, to_json
from lean3d.engine import Interrupted, fit, loop
from lean3d.engine.logging import read_rows
from lean3d.errors import CheckpointError, ConfigError, DataError
from tiny_runs import tiny_config, write_clips

pytestmark = pytest.mark.usefixtures("one_thread")

CHILD = """
import os, signal, sys, torch
from lean3d.config import TrainConfig, from_json
from lean3d.engine import Interrupted, loop

torch.set_num_threads(1)
train_step = loop._Training._train_step

def step(self, batch):
    if self.step == 8:
        self.saved_at = -1e9  # time for a checkpoint, after this step
    if self.step == 10:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return train_step(self, batch)

loop._Training._train_step = step
try:
    loop.fit(from_json(TrainConfig, sys.argv[1]))
except Interrupted as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""
"""Trains, writes a checkpoint after step 9 and gets a signal before step 11, in the middle of the second epoch."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    root = write_clips(tmp_path_factory.mktemp("clips"))
    (root / "train" / "dark" / "03.mp4").write_text("not a video")
    return root


def everything_random(root: Path, out: Path) -> TrainConfig:
    return tiny_config(
        root,
        out,
        model_dropout=0.5,
        data_num_workers=1,
        data_max_bad_share=0.1,
        augment_mixup=0.2,
        augment_erasing=0.5,
        optim_epochs=3,
        optim_ema=0.9,
        optim_precise_bn=4,
    )


@pytest.fixture(scope="module")
def uninterrupted(clips, tmp_path_factory) -> Path:
    return fit(everything_random(clips, tmp_path_factory.mktemp("runs") / "whole")).run


def run_until_signal(config: TrainConfig, name: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-c", CHILD, to_json(config), name]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=200)


def assert_equal(ours, theirs, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{where}[{number}]")
    else:
        assert ours == theirs, where


def assert_same_training(run: Path, other: Path) -> None:
    for file in ("model.safetensors", "checkpoints/step-00000018/model.safetensors"):
        _, ours = checkpoint.read_file(run / file)
        _, theirs = checkpoint.read_file(other / file)
        assert_equal(ours, theirs, file)
    states = [checkpoint.load_pickle(r / "checkpoints" / "step-00000018" / "state.pt") for r in (run, other)]
    for state in states:
        del state["seconds"]
    assert_equal(*states)
    assert states[0]["average"] and states[0]["bad_files"]
    rows = [read_rows(r / "metrics.jsonl") for r in (run, other)]
    for row in rows[0] + rows[1]:
        del row["clips_per_s"], row["data_wait"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if row["kind"] == "epoch"] == [6, 12, 18]
    assert (run / "bad_files.csv").read_text() == (other / "bad_files.csv").read_text()


def test_killed_in_mid_epoch_and_resumed_it_gives_the_same_to_the_bit(clips, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    child = run_until_signal(everything_random(clips, run), "SIGKILL")
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert checkpoint.latest_training_state(run).name == "step-00000009"
    with (run / "metrics.jsonl").open("a") as file:  # what a kill a little later would have left
        file.write(json.dumps({"kind": "step", "step": 10, "loss": 99.0}) + '\n{"kind": "st')
    fit(resume=run)
    assert_same_training(uninterrupted, run)


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(clips, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    child = run_until_signal(everything_random(clips, run), "SIGINT")
    assert child.returncode == 130, child.stderr
    assert f"stopped and saved after step 11; to go on: lean3d train --resume {run}" in child.stdout
    assert checkpoint.latest_training_state(run).name == "step-00000011"
    fit(resume=run)
    assert_same_training(uninterrupted, run)
    assert [start["step"] for start in json.loads((run / "environment.json").read_text())] == [0, 11]


def test_killed_in_the_validation_it_validates_again(clips, uninterrupted, tmp_path, monkeypatch):
    def stopped(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return collect_scores(*arguments, **settings)

    collect_scores = loop.collect_scores
    run = tmp_path / "stopped"
    monkeypatch.setattr(loop, "collect_scores", stopped)
    with pytest.raises(Interrupted) as caught:
        fit(everything_random(clips, run))
    assert caught.value.exit_code == 143 and caught.value.step == 6
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    fit(resume=run)
    assert_same_training(uninterrupted, run)


def test_a_finished_run_is_given_back_as_it_is(uninterrupted):
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    result = fit(resume=uninterrupted)
    assert result.metrics["val_top1"] == max(
        row["val_top1"] for row in read_rows(uninterrupted / "metrics.jsonl") if row["kind"] == "epoch"
    )
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_run_without_a_checkpoint_begins_again(clips, uninterrupted, tmp_path):
    run = tmp_path / "early"
    run.mkdir()
    for file in ("manifest.csv", "manifest.sha256"):
        (run / file).write_bytes((uninterrupted / file).read_bytes())
    config = tiny_config(clips, run, data_max_bad_share=0.1, optim_epochs=1)
    (run / "config.json").write_text(to_json(config))
    assert fit(resume=run).metrics["step"] == 6


def test_changed_data_are_named(tmp_path):
    root = write_clips(tmp_path / "clips", train=4, val=1)
    run = fit(tiny_config(root, tmp_path / "run", optim_epochs=1)).run
    (root / "train" / "dark" / "03.mp4").rename(root / "train" / "dark" / "new.mp4")
    with pytest.raises(DataError, match=r"1 gone, as .*03\.mp4.*1 new, as .*new\.mp4"):
        fit(resume=run)


def test_moved_data_and_a_moved_run_are_the_same(tmp_path):
    root = write_clips(tmp_path / "clips", train=4, val=1)
    run = fit(tiny_config(root, tmp_path / "run", optim_epochs=1)).run
    moved = run.rename(tmp_path / "elsewhere")
    assert fit(resume=moved).run == moved


def test_what_cannot_be_resumed_says_so(tmp_path, clips):
    with pytest.raises(CheckpointError, match=r"no run to go on with.*config\.json"):
        fit(resume=tmp_path)
    with pytest.raises(ConfigError, match="either a config"):
        fit()
    with pytest.raises(ConfigError, match="either a config"):
        fit(tiny_config(clips, tmp_path), resume=tmp_path)
