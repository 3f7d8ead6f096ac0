"""Damaged copies of video files: each follows from its seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KINDS = ("bits", "bytes", "header", "cut", "splice", "zeros", "repeat", "swap_atoms", "sizes")
"""What can happen to a file; see `mutate`."""


def mutate(data: bytes, seed: int, others: list[bytes]) -> tuple[str, bytes]:
    """One damaged copy of `data`, and which kind of damage it has.

    - bits, bytes: a few of them are changed, anywhere; header: the same among the first and last 4 kB, where containers
      keep what they say of themselves.
    - cut: the end is missing. splice: from some place on another file follows. zeros: a range is zeroed.
    - repeat: a range stands twice. swap_atoms: two top-level boxes of an MP4 (elsewhere: two ranges) change places.
    - sizes: four bytes become a very large or very small number.

    Args:
        data: The file.
        seed: Decides everything.
        others: Contents of files to splice with.
    """
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    out = bytearray(data)
    size = len(out)
    place = int(rng.integers(size))
    length = int(min(size - place, 2 ** rng.uniform(0, 14)))
    if kind == "bits":
        for spot in rng.integers(size, size=rng.integers(1, 30)):
            out[spot] ^= 1 << int(rng.integers(8))
    elif kind == "bytes":
        for spot in rng.integers(size, size=rng.integers(1, 30)):
            out[spot] = int(rng.integers(256))
    elif kind == "header":
        for spot in rng.integers(min(4096, size), size=rng.integers(1, 8)):
            out[spot if rng.integers(2) else size - 1 - spot] = int(rng.integers(256))
    elif kind == "cut":
        del out[place:]
    elif kind == "splice":
        other = others[int(rng.integers(len(others)))]
        out[place:] = other[int(rng.integers(len(other))) :]
    elif kind == "zeros":
        out[place : place + length] = bytes(length)
    elif kind == "repeat":
        out[place:place] = out[place : place + length]
    elif kind == "swap_atoms":
        spans = _boxes(data) or [tuple(sorted(rng.integers(size, size=2))) for _ in range(2)]
        one, two = sorted(rng.choice(len(spans), 2, replace=len(spans) < 2))
        (a, b), (c, d) = spans[one], spans[two]
        if b <= c:
            out = bytearray(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])
    elif kind == "sizes":
        value = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, int(rng.integers(2**32))][int(rng.integers(6))]
        place = int(rng.integers(min(size, 4096))) if rng.integers(2) else place
        out[place : place + 4] = value.to_bytes(4, "big" if rng.integers(2) else "little")
    return kind, bytes(out)


def _boxes(data: bytes) -> list[tuple[int, int]]:
    """Start and end of an MP4's top-level boxes and of those within its index; empty for another container."""
    spans: list[tuple[int, int]] = []
    if data[4:8] != b"ftyp":
        return spans

    def walk(start: int, end: int) -> None:
        while start + 8 <= end:
            size = int.from_bytes(data[start : start + 4], "big")
            if size < 8:
                return
            spans.append((start, start + size))
            if data[start + 4 : start + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
                walk(start + 8, start + size)
            start += size

    walk(0, len(data))
    return spans


def write_mutations(files: list[Path], folder: Path, seeds: range) -> list[Path]:
    """Mutation number s of file s modulo their number, as SEED-KIND-NAME, for each s in `seeds`."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [file.read_bytes() for file in files]
    paths = []
    for seed in seeds:
        which = seed // len(KINDS) % len(files)
        kind, data = mutate(contents[which], seed, contents)
        paths.append(folder / f"{seed:05d}-{kind}-{files[which].name}")
        paths[-1].write_bytes(data)
    return paths
