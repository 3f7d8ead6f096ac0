"""lean3d stream: lines, videos, lists, pipes, Ctrl-C, errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lean3d import checkpoint
from lean3d.cli import main
from lean3d.config import TrainConfig, to_dict
from lean3d.data.readers import VideoReader
from lean3d.models import create_model
from lean3d.stream import Session
from stream_parts import CLASSES, predictions_of
from video_files import moving_frames, write_video


def lean3d(*words: str | Path, **how) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "lean3d", "stream", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **how)


def test_the_command_writes_events_and_a_video(stream_run, stream_video, tmp_path):
    out = tmp_path / "seen.mp4"
    done = lean3d(
        stream_video,
        "--model",
        stream_run,
        "--lines",
        "results",
        "--events.on",
        "0.4",
        "--events.off",
        "0.2",
        "--video",
        out,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    results = [line for line in lines if "top" in line]
    expected = predictions_of(Session(stream_run, device="cpu"), stream_video)
    assert [line["top"][0]["label"] for line in results] == [p.label for p in expected]
    assert [line["end"] for line in results] == pytest.approx([p.end for p in expected], abs=1e-3)
    ended = [line for line in lines if line.get("end") and "label" in line]
    begun = [line for line in lines if "label" in line and line["end"] is None]
    assert len(ended) == len(begun) > 0 and ended[-1]["end"] == pytest.approx(2.4)
    assert [a["start"] for a in begun] == [b["start"] for b in ended]
    assert "60" in done.stderr and "late" in done.stderr
    with VideoReader(out) as reader:
        assert reader.num_frames == 60 and reader.size == (240, 320)
        frame = reader.get_frames([50])[0].numpy().astype(int)
        strip = frame[-14:-2]
        assert strip[:, :200].std() < 3 and strip[:, 310:].std() > 40  # nothing ten seconds ago, a coloured event now
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_takes_a_list_and_counts_each(stream_run, stream_video, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text(f"# the same one twice\n{stream_video}\n{stream_video}\n")
    folder = tmp_path / "videos"
    words = ["--sources", listed, "--model", stream_run, "--video", folder]
    with pytest.raises(SystemExit) as leaving:
        main(["stream", *map(str, words), "--events.on", "0.3", "--events.off", "0.2"])
    said = capsys.readouterr()
    assert leaving.value.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    names = [str(stream_video), f"{stream_video} (2)"]
    first, second = ([(e["label"], e["start"], e["end"]) for e in lines if e["source"] == name] for name in names)
    assert first == second and first
    assert len(list(folder.glob("*.mp4"))) == 2


def test_the_command_reads_a_pipe(stream_run):
    frames = moving_frames(30, 48, 64)
    command = [sys.executable, "-m", "lean3d", "stream", "-", "--raw-size", "48", "64", "--model", str(stream_run)]
    done = subprocess.run([*command, "--lines", "results"], input=frames.tobytes(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if b"top" in line]) > 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_the_last_event(stream_run, tmp_path, signum):
    path = write_video(tmp_path / "long.mp4", moving_frames(1500, 32, 32))
    words = [sys.executable, "-m", "lean3d", "stream", str(path), "--model", str(stream_run), "--realtime"]
    words += ["--lines", "begins", "--events.on", "0.34", "--events.off", "0.01", "--video", str(tmp_path / "o.mp4")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        begun = json.loads(process.stdout.readline())
        process.send_signal(signum)
        rest = [json.loads(line) for line in process.stdout.read().splitlines()]
        errors = process.stderr.read()
        assert process.wait(30) == 128 + signum, errors
    assert begun["end"] is None and rest[-1]["end"] is not None
    assert "Traceback" not in errors and "late" in errors
    assert VideoReader(tmp_path / "o.mp4").num_frames > 1


def test_the_command_explains_its_errors(stream_run, stream_video, tmp_path, capsys):
    checkpoint.save_model(
        tmp_path / "model.safetensors",
        create_model("smallbig18", width=0.125, num_classes=3, num_frames=4, size=32),
        CLASSES,
        to_dict(TrainConfig()),
    )
    for words, message in [
        ([stream_video], "lean3d stream SOURCE --model runs/mine"),
        (["--model", stream_run], "which source?"),
        ([stream_video, "--model", tmp_path], "--model.options causal True"),
        ([stream_video, "--model", stream_run, "--video", "out.avi"], "ends in .mp4"),
        ([stream_video, stream_video, "--model", stream_run, "--show"], "--show takes one source"),
        ([stream_video, "--model", stream_run, "--events.labels", "walk"], "did you mean walks"),
        ([stream_video, "--model", stream_run, "--seconds", "0"], "seconds above 0"),
    ]:
        with pytest.raises(SystemExit) as leaving:
            main(["stream", *map(str, words)])
        said = capsys.readouterr()
        assert leaving.value.code == 2 and message in " ".join(said.err.split()), (words, said.err)
        assert said.out == ""
