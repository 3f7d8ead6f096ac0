"""stream/evaluate.py: numbers that can be counted by hand, with a net that sees nothing but colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lean3d import checkpoint
from lean3d.blocks.head import Head
from lean3d.cli import main
from lean3d.config import DataConfig, EventConfig, InputSpec, TrainConfig, to_dict
from lean3d.data.manifest import Clip
from lean3d.errors import DataError
from lean3d.models import VideoNet, create_model
from lean3d.stream import Event, Session
from lean3d.stream.evaluate import Match, Segment, evaluate, match_events
from tiny_runs import write_clips
from video_files import broken_files, write_video

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
WINDOW = 3


def colour_session() -> Session:
    """The class is the colour of most of the last three frames."""
    head = Head(3, 3, dropout=0.0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(3) * 30)
        head.linear.bias.zero_()
    net = VideoNet(nn.Identity(), [nn.Identity()], head)
    net.input_spec = InputSpec(num_frames=WINDOW, sampling_rate=1, size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    net.spec = {"name": "colours", "arguments": {"num_classes": 3}}
    return Session(net, classes=tuple(COLOURS), fps=10, device="cpu")


def clip(folder: Path, name: str, label: str, *parts: tuple[str, int]) -> Clip:
    """A video of plain colours, each for some frames of 0.1 s."""
    frames = np.concatenate([np.full((n, 32, 32, 3), COLOURS[c], np.uint8) for c, n in parts])
    path = write_video(folder / f"{name}.mp4", frames, fps=10)
    return Clip(str(path), list(COLOURS).index(label), "test")


def test_delay_and_accuracy_by_share(tmp_path):
    clips = [
        clip(tmp_path, "at-once", "red", ("red", 10)),
        # two of the last three frames are green from its second green frame on, 0.7 s after the start
        clip(tmp_path, "late", "green", ("red", 5), ("green", 5)),
        clip(tmp_path, "never", "blue", ("red", 10)),
        # correct at first, wrong, then correct again: only the last time counts
        clip(tmp_path, "again", "blue", ("blue", 2), ("red", 3), ("blue", 5)),
    ]
    results = evaluate(colour_session(), clips)
    assert results.clips == 4 and results.bad == ()
    assert results.top1 == 0.75
    assert results.by_share[0.1] == 0.5 and results.by_share[0.5] == 0.25 and results.by_share[0.8] == 0.75
    assert results.delay == pytest.approx((0.1 + 0.7 + 0.7) / 3)
    assert results.share_seen == pytest.approx((0.1 + 0.7 + 0.7) / 3)
    json.dumps(results.to_dict())


def test_events_on_joined_clips_are_found_where_they_are(tmp_path):
    clips = [clip(tmp_path, f"{i}", c, (c, 10 + i)) for i, c in enumerate(list(COLOURS) * 4)]
    session = colour_session()
    results = evaluate(session, clips, events=EventConfig(smooth=0.0))
    assert results.videos == 1 and results.predicted == results.truth <= 12
    assert results.matches == tuple(Match(overlap, 1.0, 1.0) for overlap in (0.3, 0.5, 0.7))
    assert results.lag == pytest.approx(0.0, abs=0.06)
    early = evaluate(session, clips, events=EventConfig(smooth=0.0, lag=0.2))
    assert early.lag == pytest.approx(results.lag - 0.2, abs=0.06)
    slow = evaluate(session, clips, events=EventConfig(on=0.9, off=0.5, smooth=2.5))
    assert slow.matches[-1].recall < 0.6  # averages over two clips see none of them
    assert session.streams == ()


def test_matching_is_one_to_one_by_score():
    def event(label: str, start: float, end: float, score: float) -> Event:
        return Event("", label, start, end, score)

    truth = [[Segment("a", 0, 10), Segment("b", 10, 20)], [Segment("a", 0, 10)]]
    found = [
        [
            event("a", 0, 9, 0.5),  # better overlap, but second choice
            event("a", 0, 6, 0.9),  # takes the first
            event("a", 10, 20, 0.9),  # another class
            event("b", 14, 20, 0.7),  # 0.6
        ],
        [],
    ]
    assert match_events(found, truth, 0.5) == Match(0.5, 2 / 4, 2 / 3)
    assert match_events(found, truth, 0.7) == Match(0.7, 1 / 4, 1 / 3)
    assert match_events([[]], [[]], 0.5) == Match(0.5, 1.0, 1.0)
    assert match_events(found[::-1], truth, 0.5).recall == 1 / 3


def test_bad_files_are_counted_and_the_others_go_on(tmp_path):
    good = [clip(tmp_path, f"good{i}", c, (c, 8)) for i, c in enumerate(COLOURS)]
    bad = [Clip(str(path), 0, "test") for path in broken_files(tmp_path / "bad").values()]
    results = evaluate(colour_session(), [*good, *bad, Clip(good[0].path, -1, "test")])
    assert results.clips == 3 and results.top1 == 1.0
    assert {file.path for file in results.bad} == {c.path for c in bad}
    with pytest.raises(DataError, match=f"{len(bad)} clips can't be decoded"):
        evaluate(colour_session(), bad)


def test_the_command(tmp_path, capsys):
    clips = write_clips(tmp_path / "clips", train=1, val=3)
    net = create_model("slow_r18", width=0.125, num_classes=2, num_frames=4, size=32, sampling_rate=1)
    recipe = TrainConfig(data=DataConfig(root=str(clips)))
    checkpoint.save_model(tmp_path / "run/model.safetensors", net, ("bright", "dark"), to_dict(recipe))

    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["eval", str(tmp_path / "run"), *words])
        said = capsys.readouterr()
        return leaving.value.code, " ".join((said.out + said.err).split())

    status, said = call("--stream")
    assert status == 0, said
    assert "accuracy after 50% of the clip" in said and "tIoU 0.5" in said
    written = json.loads((tmp_path / "run/stream.json").read_text())
    assert written["metrics"]["clips"] == 6 and written["data"]["split"] == "val"
    assert written["metrics"]["top1"] == written["metrics"]["by_share"]["1"]
    status, said = call("--stream", "--precision", "bf16")
    assert status == 2 and "in fp32" in said
