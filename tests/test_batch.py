"""`lean3d predict --engine ray`: every video exactly once, whoever dies."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from lean3d import batch, checkpoint
from lean3d.cli import main
from lean3d.errors import ConfigError, DataError, MissingDependencyError
from lean3d.models import create_model
from lean3d.predict import load_model
from video_files import broken_files, moving_frames, write_video

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra scale)")
pytest.importorskip("ray.data", reason="Ray Data is not installed (extra scale)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = create_model("c3d_light", num_classes=3, width=0.125, num_frames=4, size=32, sampling_rate=1)
    return checkpoint.save_model(tmp_path_factory.mktemp("model") / "m.safetensors", net, ("a", "b", "c"), {})


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "clips"
    (folder / "deep").mkdir(parents=True)
    for number in range(9):
        write_video(folder / ("deep" if number % 2 else ".") / f"{number}.mp4", moving_frames(10, seed=number))
    (folder / "bad.mp4").write_bytes(broken_files(folder.parent / "broken")["truncated"].read_bytes())
    return folder


def rows(out: Path) -> dict[str, dict]:
    found = [row for part in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(part).to_pylist()]
    assert len({row["path"] for row in found}) == len(found), "each video once"
    return {row["path"]: row for row in found}


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the worker run here, without Ray; the numbers of the chunks that it was given."""
    given: list[int] = []

    def apply(chunks, workers, settings):
        worker = batch.Worker(**settings)
        for row in chunks:
            given.append(row["chunk"])
            yield {name: values[0] for name, values in worker({k: [v] for k, v in row.items()}).items()}

    monkeypatch.setattr(batch, "_map", apply)
    return given


def test_rows_are_the_predictions_and_bad_files_are_named(model, videos, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    done = batch.run(model, [videos], tmp_path / "out", top_k=2, chunk=4, quiet=True)
    found = rows(done.out)
    assert done.videos == len(found) == 10 and done.before == 0
    assert done.bad_files == ((str(videos / "bad.mp4"), "the file is cut off"),)
    assert list(csv.reader((done.out / "bad_files.csv").open()))[1:] == [[*done.bad_files[0]]]
    assert found[str(videos / "bad.mp4")]["label"] is None and not found[str(videos / "bad.mp4")]["ok"]
    predictor = load_model(model)
    for name in ("0.mp4", "deep/3.mp4"):
        row, truth = found[str(videos / name)], predictor.predict(videos / name, top_k=2)
        assert (row["label"], row["labels"]) == (truth.overall.labels[0], list(truth.overall.labels))
        assert row["scores"] == pytest.approx(truth.overall.scores, rel=1e-5)
        assert [(w["start"], w["label"]) for w in row["windows"]] == [(c.start, c.labels[0]) for c in truth.clips]


def test_a_second_run_does_only_what_is_missing_and_another_is_refused(model, videos, tmp_path, monkeypatch):
    given = in_this_process(monkeypatch)
    batch.run(model, [videos], tmp_path, chunk=4, quiet=True)
    assert given == [0, 1, 2]
    (tmp_path / "part-000001.parquet").unlink()
    (tmp_path / ".part-000001.parquet.77").write_bytes(b"PAR1 half of it")
    before = rows(tmp_path)
    done = batch.run(model, [videos], tmp_path, chunk=4, quiet=True)
    assert given == [0, 1, 2, 1] and done.before == 6 and len(rows(tmp_path)) == 10
    assert before.items() <= rows(tmp_path).items()
    with pytest.raises(ConfigError, match="holds predictions with another top_k"):
        batch.run(model, [videos], tmp_path, chunk=4, top_k=1, quiet=True)
    with pytest.raises(ConfigError, match="another videos and digest"):
        batch.run(model, [videos / "deep"], tmp_path, chunk=4, quiet=True)


def test_a_video_that_kills_its_worker_twice_is_bad(model, videos, tmp_path):
    settings = {"top_k": 1, "stride": None, "device": "cpu", "fast": False}
    paths = [str(videos / name) for name in ("0.mp4", "2.mp4", "4.mp4")]
    deaths = []

    def kills(self, path):
        if path == paths[1]:
            deaths.append(path)
            raise SystemExit  # no error that the worker catches: as a crash, as far as its files tell
        return batch._bad_row(path, "fine")

    for _ in range(3):
        worker = batch.Worker(str(model), str(tmp_path), **settings)
        worker._row = kills.__get__(worker)
        try:
            worker({"chunk": [7], "paths": [paths]})
        except SystemExit:
            continue
    assert len(deaths) == 2
    assert [row["reason"] for row in rows(tmp_path).values()] == ["fine", "ends the process that decodes it", "fine"]
    assert not list((tmp_path / ".now").iterdir())


def test_sources(videos, tmp_path):
    shard = tmp_path / "x-000000.tar"
    with tarfile.open(shard, "w") as archive:
        for number in (0, 2):
            archive.add(videos / f"{number}.mp4", f"{number:04d}.mp4")
            archive.add(__file__, f"{number:04d}.json")
    members = batch.find_sources([tmp_path / "*.tar"])
    assert members == batch.find_sources([tmp_path]) and len(members) == 2
    for path, number in zip(members, (0, 2), strict=True):
        member = batch.member_of(path)
        assert member.name == f"{number:04d}.mp4"
        content = (videos / f"{number}.mp4").read_bytes()
        assert shard.read_bytes()[member.offset : member.offset + member.size] == content
    assert batch.find_sources([videos / "**" / "*.mp4"]) == batch.find_sources([videos, videos / "0.mp4"])
    (tmp_path / "index.csv").write_text(f"path,label\n{batch.member_of(members[1]).path.split('/', tmp_path.as_posix().count('/') + 1)[-1]}," + "a\n")  # fmt: skip  # noqa: E501
    assert batch.find_sources([tmp_path]) == batch.find_sources([shard]) == members[1:]
    with pytest.raises(DataError, match="no file, folder or pattern"):
        batch.find_sources(["nowhere/*.tar"])
    (tmp_path / "y.tar").write_text("no archive at all" * 99)
    with pytest.raises(DataError, match=r"y\.tar is no shard"):
        batch.find_sources([tmp_path / "y.tar"])


def test_without_ray_the_extra_is_named(model, videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingDependencyError, match=r"lean3d\[scale\]"):
        batch.run(model, [videos], tmp_path)


def test_words_that_do_not_fit_are_refused(model, videos, capsys):
    for words in (["--engine", "ray"], ["--out", "x"], ["--engine", "ray", "--out", "x", "--video", "y"]):
        with pytest.raises(SystemExit) as leaving:
            main(["predict", str(model), str(videos), *words])
        assert leaving.value.code == 2
        assert "--engine ray" in capsys.readouterr().err


@pytest.mark.slow
def test_on_two_workers_one_of_which_is_killed_every_video_is_there_once(model, videos, tmp_path):
    """A local Ray; the worker that wrote the first chunk is killed while it is in another."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(60):
        (many / f"{number:03d}.mp4").symlink_to(videos / f"{2 * (number % 5)}.mp4")
    out = tmp_path / "out"
    slow = (
        "import sys, time; from lean3d import batch; row = batch.Worker._row\n"
        "from lean3d.predict import Predictor; predict = Predictor.predict\n"
    )
    code = (
        f"{slow}done = batch.run({str(model)!r}, [{str(many)!r}], {str(out)!r}, workers=2, chunk=3, quiet=True)\n"
        "print(done.videos, done.before, len(done.bad_files))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(out.glob("part-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = ray_workers(process.pid)
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=280)
    # Ray tells of the dead worker on standard output.
    assert process.returncode == 0 and said.splitlines()[-1].split() == ["60", "0", "0"]
    assert len(rows(out)) == 60 and all(row["ok"] for row in rows(out).values())


def ray_workers(parent: int) -> list[int]:
    """Processes of Ray's that run our worker, anywhere below `parent`."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, ahead = [], [parent]
    while ahead:
        process = ahead.pop()
        ahead += children.get(process, [])
        if "ray::" in titles.get(process, "") and "Map" in titles[process]:
            found.append(process)
    return found
