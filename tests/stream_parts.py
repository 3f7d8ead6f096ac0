"""Nets, servers and predictions for the tests of lean3d.stream."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lean3d.models import VideoNet, create_model
from lean3d.stream import Session, StreamPrediction

CLASSES = ("walks", "runs", "jumps")


def small_net(
    name: str = "c3d_light", *, sampling_rate: int = 2, size: tuple[int, int] = (32, 32), **arguments
) -> VideoNet:
    """A net whose scores depend on what it sees."""
    if name == "c3d_light":
        arguments = {"layers": 5, "stem": "conv", "shrink": "stride", "halve_time_from": 4, **arguments}
    arguments = {"num_frames": 8, "width": 0.125, "num_classes": 3, "causal": True, **arguments}
    torch.manual_seed(0)
    net = create_model(name, size=size, sampling_rate=sampling_rate, **arguments)
    torch.nn.init.normal_(net.head.linear.weight, std=3.0)
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_(std=0.1), norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def predictions_of(session: Session, source, **how) -> list[StreamPrediction]:
    return [prediction for result in session.watch(source, **how) for prediction in result.predictions]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A live server in a process of its own, which can be killed and started again."""

    def __init__(self, kind: str, epoch: float, length: int = 2500):
        self.kind, self.epoch, self.length, self.port = kind, epoch, length, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{'rtsp' if self.kind == 'rtsp' else 'http'}://127.0.0.1:{self.port}/live"

    def start(self) -> None:
        words = [sys.executable, str(Path(__file__).with_name("live_servers.py"))]
        words += [self.kind, str(self.port), str(self.epoch), str(self.length)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(kind: str, length: int = 2500) -> Iterator[Server]:
    server = Server(kind, time.time(), length)
    try:
        yield server
    finally:
        server.kill()


class Quick:
    """A session whose model costs nothing, so that frames are dropped only where the machine stands still."""

    def __new__(cls) -> Session:
        return Session(small_net(sampling_rate=1, size=(16, 16), num_frames=4), classes=CLASSES, device="cpu")


def prediction(probabilities, end: float, *, start: float | None = None, stretch: int = 0) -> StreamPrediction:
    return StreamPrediction(
        end - 0.1 if start is None else start, end, end, stretch, torch.tensor(probabilities), CLASSES
    )


def of_first(score: float) -> list[float]:
    return [score, (1 - score) * 0.5, (1 - score) * 0.5]
