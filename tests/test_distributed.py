"""engine/distributed.py: two processes over gloo are one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lean3d import checkpoint
from lean3d.config import to_json
from lean3d.engine import fit
from lean3d.engine.distributed import SyncBatchNorm, convert_sync_batchnorm
from lean3d.engine.logging import read_rows
from lean3d.engine.setup import check, make_fabric
from lean3d.errors import ConfigError, TooManyBadFilesError
from tiny_runs import tiny_config, write_clips

SHARES = (3, 5)
"""Clips of each process: they differ, so that a plain mean of means would be wrong."""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SHARES), 4, 2, 3, 3, generator=generator, dtype=torch.float64) * 3 + 100
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def norm(affine: bool = True) -> nn.BatchNorm3d:
    module = nn.BatchNorm3d(4, affine=affine, momentum=0.3).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.arange(4) + 0.5 * number + 1)
    return module


def one_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for affine in (True, False):
        module = convert_sync_batchnorm(norm(affine))
        x, gradient = (part.split(SHARES)[rank] for part in batch())
        x = x.clone().requires_grad_()
        y = module(x)
        y.backward(gradient)
        result = {"y": y.detach(), "dx": x.grad, "dp": [p.grad.clone() for p in module.parameters()]}
        result["state"] = {name: value.clone() for name, value in module.state_dict().items()}
        result["half"] = str(module.float()(x.detach().bfloat16()).dtype)
        torch.save(result, Path(folder) / f"{affine}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two processes made of the batch that they shared."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("affine", [True, False])
def test_two_processes_normalise_as_one(two_ranks, affine):
    first, second = (torch.load(two_ranks / f"{affine}-{rank}.pt") for rank in range(2))

    module = norm(affine)
    x, gradient = batch()
    x.requires_grad_()
    y = module(x)
    y.backward(gradient)
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach())
    torch.testing.assert_close(torch.cat([first["dx"], second["dx"]]), x.grad)
    for one, other, parameter in zip(first["dp"], second["dp"], module.parameters(), strict=True):
        torch.testing.assert_close(one + other, parameter.grad)
    for rank in (first, second):
        assert list(rank["state"]) == list(module.state_dict())
        torch.testing.assert_close(rank["state"], dict(module.state_dict()))
        assert rank["half"] == "torch.bfloat16"


def test_in_one_process_it_is_the_plain_norm():
    plain, sync = norm(), convert_sync_batchnorm(norm())
    x, _ = batch()
    assert torch.equal(plain(x), sync(x))
    assert torch.equal(plain.running_var, sync.running_var)
    assert torch.equal(plain.eval()(x), sync.eval()(x))


def test_conversion_keeps_parameters_modes_and_sharing():
    shared = nn.BatchNorm3d(4)
    net = nn.Sequential(nn.Conv3d(3, 4, 1), shared, nn.Sequential(nn.BatchNorm1d(2, affine=False).eval(), shared))
    before = dict(net.named_parameters())
    names = list(net.state_dict())
    assert convert_sync_batchnorm(net) is net
    assert isinstance(net[1], SyncBatchNorm) and net[2][1] is net[1]
    assert not net[2][0].training and net[1].training
    assert list(net.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert convert_sync_batchnorm(net)[1] is net[1]


def test_two_processes_train_as_one_with_the_same_batch(tmp_path, one_thread):
    """Everything is on but dropout and mixing, which each process draws for itself."""
    root = write_clips(tmp_path / "clips", train=12, val=3)
    (root / "train" / "dark" / "03.mp4").write_text("not a video")
    (root / "val" / "dark" / "01.mp4").write_text("not a video")
    settings = {
        "model_name": "slow_r18",  # well conditioned: rounding stays rounding
        "optim_name": "sgd",
        "optim_lr": 0.002,
        "optim_batch_size": 8,
        "optim_epochs": 3,
        "optim_ema": 0.9,
        "optim_precise_bn": 3,
        "data_max_bad_share": 0.1,
    }
    one, two = (
        fit(tiny_config(root, tmp_path / f"run{devices}", run_devices=devices, **settings)) for devices in (1, 2)
    )
    curves = [
        [(row["kind"], row["step"], row["loss"], row.get("val_loss", 0.0)) for row in read_rows(run / "metrics.jsonl")]
        for run in (one.run, two.run)
    ]
    assert [point[1] for point in curves[0]] == [3, 6, 9]
    for ours, theirs in zip(*curves, strict=True):
        assert ours[:2] == theirs[:2]
        # Sums in another order differ by 1e-7, which BN over few small clips has made 1e-3 within nine steps; processes
        # that normalise alone, or average wrongly, are apart by more than 1e-2.
        assert ours[2:] == pytest.approx(theirs[2:], rel=4e-3)
    for key in ("step", "val_top1", "val_videos", "val_bad_files", "bad_files"):
        assert one.metrics[key] == two.metrics[key]
    assert one.metrics["val_videos"] == 5 and one.metrics["bad_files"] == 2
    assert (one.run / "bad_files.csv").read_text() == (two.run / "bad_files.csv").read_text()
    for file in ("model.safetensors", "checkpoints/step-00000009/model.safetensors"):
        _, ours = checkpoint.read_file(one.run / file)
        _, theirs = checkpoint.read_file(two.run / file)
        torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_an_error_in_the_processes_comes_back_as_itself(tmp_path):
    root = write_clips(tmp_path / "clips", train=4, val=1)
    (root / "train" / "dark" / "03.mp4").write_text("not a video")
    with pytest.raises(TooManyBadFilesError, match="1 of 10 files"):
        fit(tiny_config(root, tmp_path / "run", run_devices=2))


SCRIPT = """
import sys
from lean3d.config import TrainConfig, from_json
from lean3d.engine import Interrupted, fit, loop

train_step = loop._Training._train_step

def step(self, batch):
    if self.step == 3 and self.first:
        print("step 3", flush=True)
    return train_step(self, batch)

loop._Training._train_step = step
if __name__ == "__main__":
    try:
        print(fit(from_json(TrainConfig, sys.argv[1])).metrics)
    except Interrupted as stopped:
        print(stopped)
        sys.exit(stopped.exit_code)
"""


SPREAD = """
import sys
from pathlib import Path
from dataclasses import replace
from shutil import rmtree
import torch
from lean3d.config import TrainConfig, from_json
from lean3d.engine import fit, loop

torch.set_num_threads(1)
config = from_json(TrainConfig, sys.argv[1])
out = Path(config.run.out)
parts = []
train_step = loop._Training._train_step

def step(self, batch):
    loss = train_step(self, batch)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in self.model.parameters())
    parts.append((self.config.run.strategy, held / sum(p.numel() for p in self.model.parameters())))
    return loss

loop._Training._train_step = step
for strategy in ("ddp", "fsdp"):
    fit(replace(config, run=replace(config.run, out=str(out / strategy), strategy=strategy)))
run = out / "fsdp"
torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").mkdir()
    (run / "kept" / "step-00000003").rename(run / "checkpoints" / "step-00000003")
torch.distributed.barrier()
fit(resume=run)
for strategy, share in set(parts):
    print(strategy, round(share, 2), flush=True)
"""


@pytest.mark.slow
def test_spread_over_processes_the_same_weights_are_trained_and_files_are_whole(tmp_path):
    """FSDP is DDP, up to the order of sums; its checkpoints go on, and are read where there is one process."""
    (tmp_path / "train.py").write_text(SPREAD)
    root = write_clips(tmp_path / "clips", train=6, val=2)
    settings = {"optim_ema": 0.9, "optim_accumulate": 2, "optim_clip_norm": 1.0, "optim_precise_bn": 2}
    config = tiny_config(root, tmp_path / "runs", model_dropout=0.5, model_name="slow_r18", **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", to_json(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "ddp 1.0" in done.stdout and "fsdp 0.5" in done.stdout, "each process holds half"
    ddp, fsdp = tmp_path / "runs" / "ddp", tmp_path / "runs" / "fsdp"
    for file in ("model.safetensors", "checkpoints/step-00000006/model.safetensors"):
        _, ours = checkpoint.read_file(ddp / file)
        _, theirs = checkpoint.read_file(fsdp / file)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    before = checkpoint.read_file(fsdp / "kept" / "step-00000006" / "model.safetensors")[1]
    after = checkpoint.read_file(fsdp / "checkpoints" / "step-00000006" / "model.safetensors")[1]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    states = [checkpoint.load_pickle(run / "checkpoints/step-00000006/state.pt") for run in (ddp, fsdp)]
    for name in ("optimizer", "average"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-2, atol=1e-3)
    assert checkpoint.load(fsdp).model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 2)


def test_what_can_not_be_spread_is_refused(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, tmp_path / "run", run_strategy="fsdp")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 -m lean3d train"):
        make_fabric(config.run)
    for changes, says in (({"init_train": "head"}, "type --run.strategy ddp"), ({"run_precision": "fp16"}, "bf16")):
        with pytest.raises(ConfigError, match=says):
            check(tiny_config(tmp_path, tmp_path / "run", run_strategy="fsdp", **changes), world=2)


@pytest.mark.slow
def test_torchrun_needs_no_other_code(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    config = tiny_config(write_clips(tmp_path / "clips", train=4, val=1), tmp_path / "run", optim_epochs=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", to_json(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "cpu, 2 processes" in done.stdout and checkpoint.load(tmp_path / "run").classes == ("bright", "dark")


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_together(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    root = write_clips(tmp_path / "clips", train=12, val=1)
    config = tiny_config(root, tmp_path / "run", optim_epochs=1000, run_devices=2, data_num_workers=1)
    process = subprocess.Popen(
        [sys.executable, "train.py", to_json(config)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        if "step 3" in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=100) == 130
    assert f"to go on: lean3d train --resume {tmp_path / 'run'}" in said
    assert checkpoint.latest_training_state(tmp_path / "run") is not None
