"""Damaged files, of every kind, are decoded or refused: no crash, no hang, no growth of memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lean3d.data.isolate import Inspection, inspect_many, look
from mutations import KINDS, mutate, write_mutations
from test_loader import megabytes
from video_files import moving_frames, write_video

HARM = re.compile(r"crashes|ends the decoder|killed|takes longer|unexpected")


def good_files(shared: Path) -> list[Path]:
    return sorted(path for path in (shared / "media").iterdir() if path.suffix != ".md")


def told(found: Inspection) -> bool:
    """Whether a file was decoded, or refused for a reason, and did no harm."""
    return found.ok != bool(found.reason) and not (found.reason and HARM.search(found.reason))


def test_a_mutation_follows_from_its_seed_and_every_kind_changes_something():
    data = write_bytes()
    for seed in range(5 * len(KINDS)):
        kind, damaged = mutate(data, seed, [data])
        assert (kind, damaged) == mutate(data, seed, [data])
    changed = {mutate(data, seed, [data[::-1]])[0] for seed in range(40) if mutate(data, seed, [data[::-1]])[1] != data}
    assert changed == set(KINDS)


def write_bytes() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / "a.mp4", moving_frames(12)).read_bytes()


def test_some_mutations_of_small_files(tmp_path):
    """In this process, where an error without a name would show."""
    files = [
        write_video(tmp_path / "a.mp4", moving_frames(12), options={"g": "4"}),
        write_video(tmp_path / "a.mkv", moving_frames(12), codec="libvpx-vp9", options={"cpu-used": "8"}),
        write_video(tmp_path / "a.avi", moving_frames(12), codec="mjpeg", pix_fmt="yuvj420p"),
        write_video(tmp_path / "b.avi", moving_frames(12), codec="mpeg4"),
    ]
    seen = [look(path) for path in write_mutations(files, tmp_path / "damaged", range(90))]
    assert all(map(told, seen))
    assert 5 < sum(found.ok for found in seen) < 70, "some damage is harmless, most is not"
    assert len({found.reason for found in seen}) > 5


def test_some_mutations_of_the_shared_files(shared, tmp_path):
    paths = write_mutations(good_files(shared), tmp_path, range(36))
    seen = list(inspect_many(paths, 2, seconds=60))
    assert len(seen) == 36 and all(map(told, seen)), [found for found in seen if not told(found)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(9))
def test_many_mutations_in_children(shared, tmp_path, part):
    """2,700 damaged files, 300 at a time."""
    paths = write_mutations(good_files(shared), tmp_path, range(300 * part, 300 * part + 300))
    seen = list(inspect_many(paths, 2, seconds=120))
    assert len(seen) == 300
    assert all(map(told, seen)), [(found.path, found.reason) for found in seen if not told(found)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_memory_does_not_grow_over_damaged_files(shared, tmp_path):
    paths = write_mutations(good_files(shared), tmp_path, range(180))
    sizes = []
    for _ in range(5):
        for path in paths:
            look(path)
        sizes.append(megabytes("self")[0])
    assert sizes[4] - sizes[1] < 24, sizes


def test_a_picture_that_claims_too_much_is_refused(tmp_path):
    """A header that says 60,000 x 60,000 pixels costs no memory."""
    path = write_video(tmp_path / "a.avi", moving_frames(3), codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    for frame in [match.start() for match in re.finditer(rb"\xff\xc0\x00\x11\x08", bytes(data))]:
        data[frame + 5 : frame + 9] = (60000).to_bytes(2, "big") * 2
    path.write_bytes(data)
    before = megabytes("self")[0] if sys.platform == "linux" else 0
    found = look(path)
    assert not found.ok and told(found)
    assert sys.platform != "linux" or megabytes("self")[0] - before < 200
