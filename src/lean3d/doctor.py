"""What lean3d finds on this machine: versions, what is missing, how to mend it, and whether the parts work together.

examine() -> Findings, one a line -> a table, or JSON
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lean3d.version import __version__

DECODERS = ("h264", "hevc", "vp9", "av1", "mjpeg")
ENCODERS = ("libx264",)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: The heading it stands under.
        name: What was looked at.
        value: What was found.
        state: "ok"; "note": lean3d works, but something is absent or odd; "missing": lean3d can't do its work.
        mend: What to type or do, where there is something to mend.
    """

    area: str
    name: str
    value: str
    state: Literal["ok", "note", "missing"] = "ok"
    mend: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds. Nothing raises: what fails is a finding."""
    areas = {
        "machine": _machine,
        "packages": _packages,
        "extras": _extras,
        "codecs": _codecs,
        "self-check": _self_check,
    }
    findings = []
    for area, look in areas.items():
        try:
            findings += [dataclasses.replace(finding, area=area) for finding in look()]
        except Exception as error:  # a broken installation can fail in any way, and to say so is the work
            findings.append(Finding(area, "failed", _reason(error), "missing", REINSTALL))
    return findings


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing that lean3d needs is missing."""
    return all(finding.state != "missing" for finding in findings)


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain JSON data."""
    return {
        "lean3d": __version__,
        "healthy": healthy(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def render(findings: Sequence[Finding]) -> Group:
    """The findings for a terminal, with a last line that sums up."""
    signs = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("MISSING", "bold red")}
    parts: list[Any] = [Text(f"lean3d {__version__}", style="bold")]
    for area in dict.fromkeys(finding.area for finding in findings):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=7)
        table.add_column(width=18)
        table.add_column(overflow="fold")
        for finding in (f for f in findings if f.area == area):
            sign, style = signs[finding.state]
            value = Text(finding.value)
            if finding.mend:
                value.append(f"\nmend it: {finding.mend}", style=style)
            table.add_row(Text(sign, style=style), finding.name, value)
        parts += [Text(f"\n{area}", style="bold"), table]
    missing = sum(finding.state == "missing" for finding in findings)
    notes = sum(finding.state == "note" for finding in findings)
    if missing:
        end = Text(f"\n{missing} {'thing' if missing == 1 else 'things'} missing that lean3d needs.", style="bold red")
    else:
        end = Text("\nEverything that lean3d needs is here and works", style="bold green")
        end.append(f"; {notes} {'note' if notes == 1 else 'notes'} above." if notes else ".")
    return Group(*parts, end)


REINSTALL = "install lean3d into a fresh environment (in a clone: make clean setup)"


def _machine() -> Iterator[Finding]:
    import torch

    yield _finding("python", f"{platform.python_version()} at {sys.executable}")
    yield _finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield _finding("processor", f"{_cpu_name()}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}")
    flags = _cpu_flags()
    if flags:
        wanted = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_tile", "asimd") if flag in flags]
        yield _finding("CPU features", ", ".join(wanted) or "no wide vector units")
    cores, limit = _usable_cores(), _core_limit()
    extra = f", limited to {limit:g} by the container" if limit else ""
    yield _finding("cores", f"{cores} of {os.cpu_count()} usable{extra}")
    threads = torch.get_num_threads()
    if threads > cores or (limit and threads > limit):
        mend = f"export OMP_NUM_THREADS={max(1, int(min(cores, limit or cores)))}"
        yield _finding("threads", f"PyTorch computes with {threads}, more than there are cores", "note", mend)
    else:
        yield _finding("threads", f"PyTorch computes with {threads}")
    yield _native_kernels()
    yield _finding("memory", _memory())
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            yield _finding(f"GPU {number}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield _finding("GPU", "Apple GPU (mps)")
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield _finding("GPU", f"none (PyTorch is built with {built}); light nets train on a CPU")


def _native_kernels() -> Finding:
    """The optional extension `lean3d._native`: what it runs on, or why it is not there."""
    from lean3d.ops import native

    if native.available():
        kernels = native.kernels()
        pool = "PyTorch's threads (libgomp)" if kernels.thread_pool() == "libgomp" else "threads of their own"
        return _finding("native kernels", f"{kernels.isa()}, on {pool}")
    if os.environ.get("LEAN3D_NATIVE") == "off":
        return _finding("native kernels", native.absence(), "note", "unset LEAN3D_NATIVE")
    mend = (
        "with a C++17 compiler at hand (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), install "
        "lean3d again: pip install --force-reinstall --no-deps --no-cache-dir lean3d (in a clone: make native)"
    )
    return _finding("native kernels", f"{native.absence()}; lean3d works without them, more slowly", "note", mend)


def _packages() -> Iterator[Finding]:
    for need in requirements():
        if not need.extra:
            found = _version(need.name)
            if found is None:
                yield _finding(need.name, "not installed", "missing", f'pip install "{need.text}"')
            elif _older(found, need.text):
                yield _finding(need.name, f"{found} is too old", "missing", f'pip install "{need.text}"')
            else:
                yield _finding(need.name, found)
    import av

    yield _finding("FFmpeg in av", f"{av.ffmpeg_version_info} ({_library_versions(av.library_versions)})")
    if importlib.util.find_spec("torchvision"):
        yield _torchvision()


def _extras() -> Iterator[Finding]:
    needs = [need for need in requirements() if need.extra]
    for extra in dict.fromkeys(need.extra for need in needs):
        found = {need: _version(need.name) for need in needs if need.extra == extra}
        missing = [need for need, version in found.items() if version is None]
        if missing:
            mend = f"pip install {' '.join(shlex.quote(need.text) for need in missing)}"
            yield _finding(extra, f"not installed: {', '.join(need.name for need in missing)}", "note", mend)
        else:
            yield _finding(extra, ", ".join(f"{need.name} {version}" for need, version in found.items()))


def _codecs() -> Iterator[Finding]:
    from av.codec import Codec

    for kind, mode, names in (("decoder", "r", DECODERS), ("encoder", "w", ENCODERS)):
        for name in names:
            try:
                codec = Codec(name, mode)  # type: ignore[arg-type]
            except ValueError:  # av's UnknownCodecError
                state: Literal["missing", "note"] = "missing" if name in ("h264", "libx264") else "note"
                mend = "pip install --force-reinstall --only-binary av av"
                yield _finding(name, f"no {kind} in this build of FFmpeg", state, mend)
            else:
                yield _finding(name, f"{kind}: {codec.long_name}")


def _self_check() -> Iterator[Finding]:
    checks: dict[str, Callable[[], str]] = {
        "encode and decode": _check_video,
        "a tiny model": _check_model,
        "fast forms": _check_ops,
    }
    for name, check in checks.items():
        try:
            yield _finding(name, check())
        except Exception as error:  # whatever it is, it is what the user wants to know
            yield _finding(name, _reason(error), "missing", REINSTALL)


def _check_video() -> str:
    """Twelve grey frames, each brighter than the one before, through an mp4 file and back."""
    import av
    import numpy as np

    from lean3d.data.readers import open_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"  # type: ignore[union-attr]
            for number in range(12):
                picture = np.full((48, 64, 3), 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))  # type: ignore[union-attr, attr-defined]
            container.mux(stream.encode())  # type: ignore[union-attr, attr-defined]
        with open_video(path) as reader:
            frames = reader.get_frames(range(reader.num_frames))
    worst = float(np.abs(frames.numpy().mean((1, 2, 3)) - 20 * np.arange(12)).max())
    if tuple(frames.shape) != (12, 48, 64, 3) or worst > 4:
        raise RuntimeError(f"12 frames of 48 x 64 came back as {tuple(frames.shape)}, off by {worst:.1f} of 255")
    return "12 frames through H.264 and back, all there"


def _check_model() -> str:
    import torch

    from lean3d.models import create_model

    model = create_model("c3d_light", num_classes=3, width=0.125, num_frames=4).eval()
    with torch.no_grad():
        scores = model(torch.rand(1, 3, 4, 32, 32))
    if scores.shape != (1, 3) or not scores.isfinite().all():
        raise RuntimeError(f"c3d_light gave {scores}")
    return "c3d_light gives finite scores"


def _check_ops() -> str:
    import torch

    from lean3d.ops.conv import conv3d, conv3d_reference
    from lean3d.ops.pool import pool3d, pool3d_reference

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, 9, 11, generator=generator)
    worst = 0.0
    for shape, groups in (((8, 8, 3, 1, 1), 1), ((8, 1, 1, 3, 3), 8), ((8, 8, 1, 1, 1), 1)):
        weight = torch.randn(shape, generator=generator)
        padding = tuple(k // 2 for k in shape[2:])
        fast = conv3d(x, weight, None, padding=padding, groups=groups)  # type: ignore[arg-type]
        plain = conv3d_reference(x, weight, None, padding=padding, groups=groups)  # type: ignore[arg-type]
        worst = max(worst, float((fast - plain).abs().max() / plain.abs().max()))
    if not torch.equal(pool3d(x, (3, 3, 3)), pool3d_reference(x, (3, 3, 3))):
        raise RuntimeError("the fast max pooling differs from PyTorch's")
    if worst > 1e-5:
        raise RuntimeError(f"the fast convolutions differ from PyTorch's by {worst:.1e}")
    return f"equal PyTorch's conv3d (to {worst:.0e}) and max_pool3d"


def _torchvision() -> Finding:
    """lean3d does not use torchvision, but one that does not fit breaks every package that imports it."""
    version = _version("torchvision") or "of unknown version"
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return _finding("torchvision", f"{version} (lean3d does not use it)")
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return _finding(
        "torchvision",
        f"{version} can't be imported, and so breaks other packages that try: {reason}",
        "note",
        "pip uninstall torchvision (lean3d does not use it)",
    )


class Requirement(NamedTuple):
    """A package that lean3d asks for: its name, the whole requirement as pip takes it, the extra it belongs to."""

    name: str
    text: str
    extra: str = ""


def requirements() -> list[Requirement]:
    """What lean3d's own metadata asks for; read without further packages, since any of them may be what is missing."""
    found = []
    for line in importlib.metadata.requires("lean3d") or []:
        text, _, marker = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w.-]+", text)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", marker)
        if name:
            found.append(Requirement(name[0], text, extra[1] if extra else ""))
    return found


def _finding(name: str, value: str, state: Literal["ok", "note", "missing"] = "ok", mend: str = "") -> Finding:
    return Finding("", name, value, state, mend)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(found: str, wanted: str) -> bool:
    """Whether a version is below the lower bound in a requirement like ``torch>=2.6``."""
    bound = re.search(r">=\s*([\d.]+)", wanted)
    return bound is not None and _numbers(found) < _numbers(bound[1])


def _numbers(version: str) -> tuple[int, ...]:
    """The release's numbers: "2.13.0+cpu" -> (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _library_versions(versions: Mapping[str, tuple[int, ...]]) -> str:
    wanted = ("libavcodec", "libavformat", "libswscale")
    return ", ".join(f"{name} {'.'.join(map(str, versions[name]))}" for name in wanted if name in versions)


def _cpu_name() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return names[0] if names else platform.processor() or "unknown processor"


def _cpu_flags() -> set[str]:
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return set(lines[0].split()) if lines else set()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _core_limit() -> float | None:
    """The cores' worth of time that a container may use (cgroup v2), or None where nothing limits it."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    total = min(total, int(limit)) if limit.isdigit() else total
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return f"{total / 2**30:.1f} GiB" + (f", {int(free[1]) / 2**20:.1f} GiB of the machine's free" if free else "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
