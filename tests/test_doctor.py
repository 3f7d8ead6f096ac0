"""doctor: it finds what is here, says what is missing and how to mend it, and never falls over itself."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from lean3d import doctor
from lean3d.doctor import Finding


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return doctor.examine()


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def printed(findings: list[Finding], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(doctor.render(findings))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_this_machine_is_healthy(findings: list[Finding]):
    assert [finding for finding in findings if finding.state == "missing"] == []
    assert doctor.healthy(findings)
    found = by_name(findings)
    assert {"python", "cores", "memory", "torch", "av", "h264", "libx264"} <= set(found)
    assert found["torch"].value.startswith("2.")
    assert found["fast forms"].value.startswith("equal PyTorch's conv3d")
    assert found["encode and decode"].value.startswith("12 frames")


def test_what_is_printed_fits_80_columns_and_sums_up(findings: list[Finding]):
    text = printed(findings)
    assert max(map(len, text.splitlines())) <= 80
    assert "Everything that lean3d needs is here and works" in text
    assert "MISSING" not in text


def test_json_holds_every_finding(findings: list[Finding]):
    content = json.loads(json.dumps(doctor.to_dict(findings)))
    assert content["healthy"] is True
    assert len(content["findings"]) == len(findings)
    assert set(content["findings"][0]) == {"area", "name", "value", "state", "mend"}


def test_requirements_are_those_of_the_package():
    needs = doctor.requirements()
    assert {need.name for need in needs if not need.extra} >= {"torch", "numpy", "av", "tyro", "rich"}
    assert {need.extra for need in needs} >= {"", "dev", "export"}
    assert next(need.text for need in needs if need.name == "torch") == "torch>=2.6"


def test_missing_and_old_packages_come_with_the_line_that_mends_them(monkeypatch: pytest.MonkeyPatch):
    real = doctor._version
    fake = {"safetensors": None, "tyro": "0.1.0", "onnx": None}
    monkeypatch.setattr(doctor, "_version", lambda name: fake.get(name, real(name)) if name in fake else real(name))
    found = by_name([*doctor._packages(), *doctor._extras()])
    assert (found["safetensors"].state, found["safetensors"].mend) == ("missing", 'pip install "safetensors>=0.4.5"')
    assert (found["tyro"].state, found["tyro"].value) == ("missing", "0.1.0 is too old")
    assert found["export"].state == "note"
    assert "'onnx>=1.17'" in found["export"].mend
    assert not doctor.healthy(list(found.values()))
    text = printed(list(found.values()))
    assert "2 things missing that lean3d needs" in text and 'mend it: pip install "safetensors>=0.4.5"' in text


def test_a_missing_codec_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DECODERS", ("h264", "no_such_codec"))
    found = by_name(list(doctor._codecs()))
    assert found["h264"].state == "ok"
    assert found["no_such_codec"].state == "note" and "pip install" in found["no_such_codec"].mend


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def fail() -> str:
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(doctor, "_check_model", fail)
    monkeypatch.setattr(doctor, "_machine", fail)
    findings = doctor.examine()
    assert not doctor.healthy(findings)
    found = by_name(findings)
    assert found["a tiny model"].value == "RuntimeError: illegal instruction"
    assert found["failed"].area == "machine"
    assert found["torch"].state == "ok"  # the other areas were looked at all the same


def test_a_torchvision_that_breaks_imports_is_told_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "x\nRuntimeError: operator torchvision::nms is gone\n"),
    )
    found = by_name(list(doctor._packages()))["torchvision"]
    assert found.state == "note"
    assert "operator torchvision::nms is gone" in found.value
    assert found.mend.startswith("pip uninstall torchvision")


@pytest.mark.parametrize(
    ("found", "wanted", "older"),
    [
        ("2.13.0+cpu", "torch>=2.6", False),
        ("0.9", "tyro>=0.9.11", True),
        ("14.0.0", "av>=14", False),
        ("1", "x", False),
    ],
)
def test_versions_are_compared_as_numbers(found: str, wanted: str, older: bool):
    assert doctor._older(found, wanted) is older


def test_too_many_threads_are_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_usable_cores", lambda: 0)
    threads = by_name(list(doctor._machine()))["threads"]
    assert threads.state == "note" and threads.mend == "export OMP_NUM_THREADS=1"


def test_the_command_answers_with_json_and_status():
    done = subprocess.run([sys.executable, "-m", "lean3d", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"] is True
