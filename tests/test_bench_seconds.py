"""`lean3d bench`: runtimes timed side by side."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lean3d import checkpoint
from lean3d.bench import runtimes, seconds, show, worker
from lean3d.bench.nets import Net, find_nets
from lean3d.bench.runtimes import CLIP_FILE, MODEL_FILE, Task, torch_layers
from lean3d.bench.seconds import NetReport, Report, Timing
from lean3d.bench.worker import Prepared, Worker, WorkerError
from lean3d.cli import main
from lean3d.errors import ConfigError, MissingDependencyError
from lean3d.models import create_model
from seeded import seeded_clip, seeded_state

TINY = {"num_frames": 4, "size": (32, 32), "options": {"width": 0.125, "num_classes": 5}}
HAVE = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]


def tiny(name: str = "c3d_light") -> Net:
    (net,) = find_nets([name], **TINY)
    return net


def task(folder: Path, net: Net) -> Task:
    """A folder as a worker finds it, without what is exported."""
    seconds._lay_out(net, folder, ["eager"])
    return Task(folder, 1)


# ---- the same net everywhere


SMALL = {"width": 0.125, "num_classes": 5}


@pytest.mark.parametrize("name", ["c3d", "c3d_light", "smallbig18", "slow_r50_nl", "slowfast_r50_light", "x3d_xs"])
def test_torch_layers_are_the_same_net(name: str):
    model = create_model(name, **(SMALL if "x3d" not in name else {"num_classes": 5})).eval()
    model.load_state_dict(seeded_state({key: value.shape for key, value in model.state_dict().items()}))
    model.double()
    clip = seeded_clip((1, 3, 8, 48, 48)).double()
    with torch.no_grad():
        expected, found = model(clip), torch_layers(model)(clip)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["c3d_light", "smallbig18", "slowfast_r50_light"])
def test_what_is_exported_is_convolutions_and_poolings(name: str):
    """Other runtimes have forms of their own for them; ours would be a graph of slices and reshapes."""
    model = torch_layers(create_model(name, **SMALL).eval())
    program = torch.export.export(model, (torch.zeros(1, 3, 8, 48, 48),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in called if "lean3d" in target]
    assert called.count("aten.conv3d.default") >= sum(isinstance(m, nn.Conv3d) for m in model.modules())
    assert any("max_pool3d" in target for target in called)


def test_random_weights_leave_no_layer_out():
    """What starts at zero (SmallBig's big view) would be free to leave out, and too large numbers hide errors."""
    model = create_model("smallbig18", **SMALL).eval()
    clip = seeded_clip((1, 3, 4, 48, 48))
    seconds._randomize(model, clip, torch.Generator().manual_seed(0))
    assert all(parameter.any() for parameter in model.parameters())
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.register_forward_hook(lambda norm, x, y: outputs.append(y.std().item()))
    with torch.no_grad():
        scores = model(clip)
    assert scores.isfinite().all() and max(outputs) < 1.2 and min(outputs) > 0.05


def test_a_trained_nets_own_weights_are_timed(tmp_path):
    model = create_model("c3d_light", num_frames=4, size=32, **SMALL)
    checkpoint.save_model(tmp_path / "run" / "model.safetensors", model, tuple("abcde"), {})
    (net,) = find_nets([str(tmp_path / "run")])
    folder = tmp_path / "bench"
    folder.mkdir()
    reference, out = seconds._lay_out(net, folder, ["eager"])
    assert out == {} and reference.dtype == np.float64
    found = checkpoint.load(folder / MODEL_FILE).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    clip = torch.from_numpy(np.load(folder / CLIP_FILE))
    with torch.no_grad():
        expected = model.eval()(clip).numpy()
    assert np.abs(expected - reference).max() < 1e-5 * np.abs(reference).max()


# ---- end to end


def test_the_command_times_what_is_there_and_names_what_is_not(capsys, tmp_path):
    """One process a runtime, in plain sight of the user: scores checked, times, memory, JSON, a picture."""
    words = ["c3d_light", "--size", "80", "80", "--options", "width", "0.5"]
    names = ["eager", *HAVE]
    words += [
        "--runtimes",
        ",".join(names),
        "--threads",
        "1",
        "--rounds",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *words])
    assert not leaving.value.code
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    assert found["machine"]["torch"] == torch.__version__ and found["rounds"] == 2
    (net,) = found["nets"]
    assert [timing["runtime"] for timing in net["timings"]] == names
    assert net["sgemm_gflops"]["1"] > 1 and net["copy_gbytes"]["1"] > 0.1
    middle, places = 16, 16 * 80 * 80  # the channels of the first block's middle, half of its output's
    for timing in net["timings"]:
        assert "reason" not in timing, timing
        assert 0 < timing["error"] <= 1e-4
        assert 0 < timing["least_ms"] <= timing["ms"] and timing["calls"] >= 2
        rate = 2 * net["macs"] / (timing["ms"] / 1e3) / (net["sgemm_gflops"]["1"] * 1e9)
        assert timing["of_sgemm"] == pytest.approx(rate, rel=0.02, abs=0.001)
        if timing["memory"] is not None:
            assert 4 * middle * places < timing["memory"] < 40 * 4 * 2 * middle * places
    assert len(net["timings"][0]["ways"]) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_is_timed():
    report = seconds.measure([tiny()], runtimes=["compile"], threads=[1], rounds=1, quiet=True)
    (timing,) = report.nets[0].timings
    assert timing.reason == "" and timing.error is not None and timing.error <= 1e-4
    times = [value for value in timing.ways.values() if isinstance(value, float)]
    assert len(times) == 3
    assert max(times) < 20 * min(times), "a way that compiles once more in its turn"


def test_a_net_that_cant_be_exported_is_timed_in_the_others(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such operator\nand more")

    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    monkeypatch.setattr(torch.onnx, "export", refuse)
    _, out = seconds._lay_out(tiny(), tmp_path, ["eager", "onnxruntime"])
    assert out == {"onnxruntime": "no ONNX: RuntimeError: no such operator and more"}


# ---- workers


def test_a_process_that_dies_is_an_answer(tmp_path):
    one = Worker("eager", task(tmp_path, tiny()))
    try:
        one.start_preparing()
        ways = one.prepared()
        assert len(ways) == 4 and not any(way.reason for way in ways.values())
        assert all(time > 0 for time in one.turn("as it stands"))
        one.keep(["as it stands"])
        one._process.kill()
        with pytest.raises(WorkerError, match="died with exit code -9"):
            one.turn("as it stands")
    finally:
        one.close()
    assert not one._process.is_alive()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes there are")
def test_a_worker_ends_with_the_process_that_wanted_its_answers(tmp_path):
    """Even when that was killed, and computing goes on for minutes."""
    (tmp_path / "bench.py").write_text(
        "import pathlib, sys, time\n"
        "from lean3d.bench import worker\n"
        "from lean3d.bench.runtimes import Task\n"
        "if __name__ == '__main__':\n"
        "    one = worker.Worker('machine', Task(pathlib.Path(sys.argv[1]), 1))\n"
        "    one.start_preparing()\n"
        "    print(one._process.pid, flush=True)\n"
        "    time.sleep(100)\n"
    )
    bench = subprocess.Popen([sys.executable, tmp_path / "bench.py", tmp_path], stdout=subprocess.PIPE, text=True)
    with bench:
        pid = int(bench.stdout.readline())
        bench.kill()
    end = time.monotonic() + 60
    while process_exists(pid):
        assert time.monotonic() < end
        time.sleep(0.1)


def process_exists(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody asked for has state Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_cant_be_prepared_has_its_reason():
    def broken():
        raise ValueError("\n  no such layer\ndetails")

    ready: dict = {}
    assert worker._prepare("a", broken, ready).reason == "ValueError: no such layer details"
    assert worker._prepare("b", lambda: lambda: np.ones((1, 2)), ready).scores.tolist() == [[1.0, 1.0]]
    assert list(ready) == ["b"]
    with pytest.raises(MissingDependencyError, match=r"lean3d\[export\]"):
        runtimes._optional("no_such_package", "export")


def test_a_turn_of_short_calls_has_several():
    assert len(worker._turn(lambda: np.ones(1))) == worker.TURN_CALLS


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")
def test_memory_is_that_of_the_peak():
    np.ones(1 << 24).sum()  # 128 MiB that are gone again
    worker._release()
    before = worker._memory("VmRSS")
    assert worker._reset_peak()
    np.ones(1 << 23).sum()
    grown = worker._memory("VmHWM") - before
    assert 60 << 20 < grown < 100 << 20


# ---- choices


class Fake:
    """A worker that answers from a list."""

    def __init__(self, scores: dict[str, np.ndarray | None], times: dict[str, list[float]]):
        self.runtime, self.threads, self.scores, self.times = "eager", 1, scores, times
        self.turns: list[str] = []
        self.kept: list[str] = []

    def start_preparing(self):
        pass

    def prepared(self):
        return {name: Prepared(s, "" if s is not None else "RuntimeError: no", 0.1) for name, s in self.scores.items()}

    def turn(self, way):
        self.turns.append(way)
        return self.times[way]

    def keep(self, ways):
        self.kept = list(ways)

    def memory(self, way):
        return 7


def test_the_fastest_right_way_stands_for_a_runtime():
    right = np.array([[1.0, -2.0, 0.5]])
    scores = {"wrong": right + 1e-3, "nan": right * math.nan, "none": None, "slow": right, "good": right + 1e-5}
    fake = Fake(scores, {"slow": [9.0], "good": [1.0, 0.9]})
    timing = seconds._checked(Timing("eager", 1), fake, right)
    assert timing.error == pytest.approx(5e-6) and timing.reason == ""
    assert timing.ways["wrong"] == "wrong: its error is 5.0e-04 and at most 1e-04 is allowed"
    assert str(timing.ways["nan"]).startswith("wrong") and timing.ways["none"] == "RuntimeError: no"
    chosen = seconds._choose(fake, timing)
    assert (chosen.way, chosen.memory, fake.kept) == ("good", 7, ["good"])
    assert fake.turns.count("slow") == 1 and fake.turns.count("good") == 2


def test_a_runtime_that_is_wrong_is_not_timed():
    right = np.array([[1.0, -2.0]])
    timing = seconds._checked(Timing("eager", 1), Fake({"a": right[:, :1]}, {}), right)
    assert "wrong" in timing.reason and timing.to_dict()["reason"] == timing.reason
    assert "ms" not in timing.to_dict()


# ---- reports


def report() -> Report:
    """Two nets: fast gains 2x and 0.5x on the best of the others."""
    nets = []
    for name, fast in (("c3d", 0.1), ("c3d_light", 0.4)):
        timings = (
            Timing("eager", 1, "", "cl", {"torch's layers": 0.8, "cl": 0.3}, 1e-6, 1 << 20, (0.4, 0.2, 0.6)),
            Timing("openvino", 1, "", "f32", {"f32": 0.2}, 1e-6, None, (0.2, 0.2, 0.2)),
            Timing("compile", 1, reason="no compiler"),
            Timing("fast", 1, "", "f", {"f": 0.1}, 1e-5, 2 << 20, (fast,)),
        )
        (net,) = find_nets([name])
        nets.append(NetReport(net, 10**9, timings, {1: 1e11}, {1: 1e10}))
    return Report({"torch": "2"}, 3, tuple(nets))


def test_gains_are_over_the_best_of_the_others():
    first, second = seconds.leads(report())
    assert (first.net, first.peer) == ("c3d", "openvino")
    assert (first.over_peer, first.over_eager, first.over_literal) == pytest.approx((2, 4, 8))
    assert second.over_peer == pytest.approx(0.5)
    assert seconds.leads(report(), "compile") == []


def test_numbers_of_a_timing():
    timing = report().nets[0].timings[0]
    assert (timing.median, timing.least) == (0.4, 0.2) and timing.spread == pytest.approx(0.5)
    assert report().nets[0].rate(timing) == pytest.approx(2e9 / 0.4 / 1e11)
    assert json.loads(report().to_json())["nets"][0]["timings"][2] == {
        "runtime": "compile",
        "threads": 1,
        "reason": "no compiler",
        "ways": {},
    }


def test_tables_and_picture(capsys, tmp_path):
    from rich.console import Console

    show.tables(report(), Console(width=120))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fast", "1", "100.0", "100.0", "0%", "4.00x", "0.20", "2", "1e-05"] in rows
    assert ["geometric", "mean", "1.00x"] in rows
    assert ["compile,", "1", "thread:", "not", "timed:", "no", "compiler"] in rows
    written = show.write(report(), tmp_path / "a" / "b", "name")
    assert [path.name for path in written] == ["name.json", "name.png"] and all(path.stat().st_size for path in written)


def test_words_that_are_wrong_say_what_is_right():
    assert seconds.parse_runtimes("fast, eager,fast") == ("fast", "eager")
    assert seconds.parse_threads("2, 1") == (2, 1)
    with pytest.raises(ConfigError, match="--runtimes has no 'opnvino': did you mean openvino"):
        seconds.parse_runtimes("eager,opnvino")
    with pytest.raises(ConfigError, match="--threads are whole numbers above 0"):
        seconds.parse_threads("0")
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        seconds.measure([], rounds=0)


# ---- benchmarks


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["runtimes", "smallbig_seconds"])
def test_the_scripts_run(script: str, tmp_path):
    words = ["--quick", "--runtimes", "eager", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *words], capture_output=True, text=True, check=True
    )
    found = json.loads((tmp_path / f"{script}.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert all("ms" in timing for net in found["nets"] for timing in net["timings"])
    assert (tmp_path / f"{script}.png").stat().st_size > 5000
