"""engine/distributed.py: two processes over gloo are one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lean3d.engine.distributed import SyncBatchNorm, convert_sync_batchnorm

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
        result = {"y": y.detach(), "dx": x.grad, "dp": [p.grad for p in module.parameters()]}
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
