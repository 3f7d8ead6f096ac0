"""What goes wrong in long trainings on many machines: kills at any moment, full disks, damage, unequal data."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lean3d import checkpoint
from lean3d.config import TrainConfig, to_json
from lean3d.engine import fit, loop, setup
from lean3d.engine.logging import read_rows
from lean3d.errors import CheckpointError, ConfigError, DataError
from test_shards import free_port
from tiny_runs import tiny_config, write_clips

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = """
import sys, torch
from lean3d.config import TrainConfig, from_json
from lean3d.engine import fit

torch.set_num_threads(1)
config, resume = sys.argv[1:]
fit(resume=resume) if resume else fit(from_json(TrainConfig, config))
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def config_of(clips: Path, out: Path, **changes) -> TrainConfig:
    return tiny_config(clips, out, optim_epochs=3, optim_ema=0.9, model_dropout=0.5, run_save_minutes=0.0, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, best = checkpoint.read_file(run / "model.safetensors")
    _, last = checkpoint.read_file(run / "checkpoints" / "step-00000018" / "model.safetensors")
    return {**best, **{f"last.{name}": tensor for name, tensor in last.items()}}


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory) -> Path:
    return fit(config_of(clips, tmp_path_factory.mktemp("runs") / "whole")).run


# ---- kills


def killed_training(config: TrainConfig, run: Path, moments: list[float]) -> int:
    """Train in child processes, each killed so many seconds after its run's folder changed first; then to the end.

    Returns:
        How many were killed before they were done.
    """
    kills = 0
    for moment in moments:
        resume = str(run) if (run / "config.json").is_file() else ""
        before = time.time()
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, to_json(config), resume],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        file = run / "environment.json"  # written when all is loaded and the first step is near
        while child.poll() is None and not (file.is_file() and file.stat().st_mtime > before):
            time.sleep(0.005)
        time.sleep(moment)
        if child.poll() is None:
            child.kill()
            kills += 1
        _, said = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), said.decode()
    return kills


def unequal(run: Path, other: Path) -> list[str]:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def killed_at_random(clips: Path, unbroken: Path, tmp_path: Path, kills: int, seed: int) -> None:
    rng, done = random.Random(seed), 0
    rounds = 0
    while done < kills:
        run = tmp_path / f"run{rounds}"
        config = config_of(clips, run)
        done += killed_training(config, run, [rng.uniform(0, 0.8) for _ in range(min(5, kills - done))])
        fit(resume=run) if (run / "config.json").is_file() else fit(config)
        assert unequal(run, unbroken) == []
        assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "epoch"] == [6, 12, 18]
        rounds += 1


def test_killed_twice_at_random_moments_the_weights_are_those_of_the_unbroken_run(clips, unbroken, tmp_path):
    killed_at_random(clips, unbroken, tmp_path, kills=2, seed=time.time_ns())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(clips, unbroken, tmp_path):
    killed_at_random(clips, unbroken, tmp_path, kills=20, seed=6)


SAVES = """
import os, signal, sys
from lean3d import checkpoint

deadly, name = int(sys.argv.pop()), sys.argv.pop()
real, calls = getattr(checkpoint, name), 0

def die(*arguments, **settings):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **settings)

setattr(checkpoint, name, die)
"""
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "call"),
    [("_sync", 9), pytest.param("save_file", 3, marks=SLOW), pytest.param("_remove_folder", 8, marks=SLOW)],
)
def test_killed_while_a_checkpoint_is_written_the_last_good_one_stays(clips, unbroken, tmp_path, name, call):
    """Before its bytes are on the disk, before the weights are written, and between writing and tidying up."""
    run = tmp_path / "run"
    arguments = [to_json(config_of(clips, run)), "", name, str(call)]
    child = subprocess.run([sys.executable, "-c", SAVES + TRAIN, *arguments], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    good = checkpoint.latest_training_state(run)
    assert good is not None
    state = checkpoint.load_pickle(good / "state.pt")
    assert state["step"] == int(good.name.removeprefix("step-")) and checkpoint.read_file(good / "model.safetensors")[0]
    fit(resume=run)
    assert unequal(run, unbroken) == []
    assert not list((run / "checkpoints").glob(".*"))


# ---- disks and damage


def test_a_full_disk_while_saving_is_named_and_the_last_good_checkpoint_stays(clips, unbroken, tmp_path, monkeypatch):
    """No file may grow beyond a limit from the second save on, which gives an error as a full disk does."""
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, saved = checkpoint.save_training_state, []

    def full(*arguments, **settings):
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        saved.append(save(*arguments, **settings))
        return saved[-1]

    monkeypatch.setattr(checkpoint, "save_training_state", full)
    try:
        with pytest.raises(CheckpointError, match=r"can't be written \(.*What was written before is whole"):
            fit(config_of(clips, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert checkpoint.latest_training_state(run) == saved[-1] and len(saved) == 2
    assert not list((run / "checkpoints").rglob(".*.safetensors.*"))
    fit(resume=run)
    assert unequal(run, unbroken) == []


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_offered(clips, unbroken, tmp_path, file):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    last = run / "checkpoints" / "step-00000018"
    (last / file).write_bytes((last / file).read_bytes()[:1000])
    with pytest.raises(CheckpointError) as caught:
        fit(resume=run)
    said = str(caught.value)
    assert f"the checkpoint {last} is damaged" in said and file in said
    assert f"The one before it, step-00000017, is there: remove the damaged one (rm -r {last})" in said
    shutil.rmtree(last)
    fit(resume=run)
    assert unequal(run, unbroken) == []


def test_with_no_checkpoint_before_it_a_new_run_is_offered(clips, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "checkpoints" / "step-00000017")
    (run / "checkpoints" / "step-00000018" / "state.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=f"There is none before it; start a new run, perhaps with --init.weights {run}"
    ):
        fit(resume=run)


# ---- several processes


def test_processes_that_disagree_on_the_data_are_named():
    setup.check_same_data(["a", "a", "a"], [10, 10, 10])
    with pytest.raises(DataError, match="process 0 has found 10 clips, process 2 9, or with other labels or splits"):
        setup.check_same_data(["a", "a", "b"], [10, 10, 9])


NODE = """
import os, sys, torch
from pathlib import Path
from lean3d.config import TrainConfig, from_json
from lean3d.engine import fit, loop
from lean3d.errors import Lean3dError

torch.set_num_threads(1)
config, fault = sys.argv[1:]
rank = int(os.environ["RANK"])
read_manifest = loop.read_manifest
train_step = loop._Training._train_step

def unequal(data):
    manifest = read_manifest(data)
    return manifest if rank == 0 else type(manifest)(manifest.classes, manifest.clips[1:], manifest.source)

def step(self, batch):
    if self.step == 8 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return train_step(self, batch)

if fault == "unequal":
    loop.read_manifest = unequal
if fault == "kill":
    loop._Training._train_step = step
try:
    result = fit(from_json(TrainConfig, config))
    print("finished", result.metrics["step"], flush=True)
except Lean3dError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
"""


def torchrun(script: Path, *arguments: str, node: int, port: int, restarts: int) -> subprocess.Popen:
    """One machine of two, as docs/scale.md has it."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"),
            *("--max-restarts", str(restarts), "--rdzv-conf", f"is_host={int(node == 0)}"),
            *(str(script), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def two_nodes(script: Path, *arguments: str, restarts: int) -> list[tuple[int, str]]:
    port = free_port()
    nodes = [torchrun(script, *arguments, node=node, port=port, restarts=restarts) for node in range(2)]
    said = [node.communicate(timeout=550)[0] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_process_on_one_of_two_machines_costs_only_the_steps_since_the_last_checkpoint(clips, tmp_path):
    script = tmp_path / "node.py"
    script.write_text(NODE)
    run = tmp_path / "run"
    ends = two_nodes(script, to_json(config_of(clips, run)), "kill", restarts=1)
    assert [status for status, _ in ends] == [0, 0], ends
    assert all("finished" in said for _, said in ends)
    starts = [start["step"] for start in json.loads((run / "environment.json").read_text())]
    assert starts[0] == 0 and starts[1] in (7, 8) and len(starts) == 2, "one checkpoint a step: no step is lost"
    whole = tmp_path / "whole"
    ends = two_nodes(script, to_json(config_of(clips, whole)), "none", restarts=1)
    assert [status for status, _ in ends] == [0, 0], ends
    assert unequal(run, whole) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_machines_with_unequal_data_stop_at_the_start(clips, tmp_path):
    script = tmp_path / "node.py"
    script.write_text(NODE)
    ends = two_nodes(script, to_json(config_of(clips, tmp_path / "run")), "unequal", restarts=0)
    assert all(status != 0 for status, _ in ends)
    assert any("process 0 has found 32 clips, process 1 31, or with other labels" in said for _, said in ends), ends
    assert not (tmp_path / "run").exists()


def test_torchrun_that_restarts_needs_a_folder_and_goes_on_in_it(clips, unbroken, tmp_path, monkeypatch):
    config = setup.read_run_config(unbroken)
    assert not setup.goes_on(config), "not under torchrun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert not setup.goes_on(config)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert setup.goes_on(config)
    assert not setup.goes_on(config_of(clips, tmp_path / "new"))
    assert not setup.goes_on(config_of(clips, unbroken, optim_lr=0.5)), "another training: refused by run_folder"
    with pytest.raises(ConfigError, match=r"--max-restarts needs a folder.*--run\.out DIR"):
        setup.goes_on(tiny_config(clips, Path(), run_out=""))
    with pytest.raises(ConfigError, match="there is a run in"):
        setup.run_folder(config)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="type TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"):
        setup.goes_on(config)
    assert loop.fit is fit
