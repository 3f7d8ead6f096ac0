"""Clips that lie in WebDataset shards, on this machine or in an object store.

A shard is a tar archive of some hundred clips. `lean3d data prepare --shards` writes them with an index.csv, whose
paths say where in which shard a clip lies, so that any clip is one read:

    train-000003.tar/1536+20480/jumps/0012.mp4      20480 bytes from byte 1536 of train-000003.tar, which were
                                                    jumps/0012.mp4 in the folder that was packed

Before that may stand a folder, or the address of an object store: ``s3://bucket/set/train-000003.tar/1536+...``. A
shard from there is fetched whole, once, through webdataset's `gopen`, which knows http(s), gs, hf, sftp and others (s3
by the command aws), and is kept in a folder of limited size.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import platformdirs

from lean3d.errors import DecodeError, MissingDependencyError

_MEMBER = re.compile(r"(.+?\.tar)/(\d+)\+(\d+)/(.+)")
TRIES = 3
"""How often a shard is asked for, with pauses that double from one second."""


class Member(NamedTuple):
    """A clip in a shard."""

    shard: str
    """Path or address of the archive."""
    offset: int
    """Where in it the clip's bytes begin."""
    size: int
    """How many they are."""
    name: str
    """The clip's path before it was packed."""

    @property
    def path(self) -> str:
        """All this as one path, which `member_of` reads."""
        return f"{self.shard}/{self.offset}+{self.size}/{self.name}"


def member_of(path: str | Path) -> Member | None:
    """What a path into a shard means; None for the path of a file."""
    match = _MEMBER.fullmatch(str(path))
    return Member(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def is_address(path: str) -> bool:
    """Whether this is the address of something in an object store and no path."""
    return "://" in path


def shards_of(paths: Iterable[str]) -> tuple[np.ndarray, list[str]] | None:
    """For each clip the number of its shard, int64 (N,), and the shards by number; None where a clip is in none."""
    numbers: dict[str, int] = {}
    of = []
    for path in paths:
        member = member_of(path)
        if member is None:
            return None
        of.append(numbers.setdefault(member.shard, len(numbers)))
    return np.array(of, dtype=np.int64), list(numbers)


class ShardCache:
    """Shards from object stores, kept in a folder. Several processes may share it; each shard is fetched once.

    Args:
        folder: Where they are kept; default: ``shards`` in the user's cache folder.
        gigabytes: When there are more, those go that were not used for the longest time.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float = 100.0):
        self.folder = Path(folder or Path(platformdirs.user_cache_dir("lean3d")) / "shards").expanduser()
        self.limit = gigabytes * 1e9
        self._pool: ThreadPoolExecutor | None = None

    def read(self, member: Member) -> bytes:
        """A clip's bytes.

        Raises:
            DecodeError: The shard is missing, can't be fetched, or is cut short.
            MissingDependencyError: The shard is in an object store, and webdataset is not installed.
        """
        try:
            with self._open(member.shard) as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise DecodeError(member.path, f"its shard can't be read ({error.strerror or error})") from error
        if len(content) < member.size:
            raise DecodeError(member.path, "its shard is cut short")
        return content

    def fetch(self, shard: str) -> Path:
        """The file of a shard, fetched if it is not there yet.

        Raises:
            OSError: It can't be fetched.
            MissingDependencyError: webdataset is not installed.
        """
        if not is_address(shard):
            return Path(shard)
        file = self.folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{shard.rpartition('/')[2]}"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and finds it there
                if not file.is_file():
                    self._make_room()
                    _download(shard, file)
        os.utime(file)
        return file

    def prefetch(self, shards: Sequence[str]) -> None:
        """Begin to fetch shards, and come back at once. What goes wrong shows when they are read."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(4, thread_name_prefix="shards")
        for shard in shards:
            self._pool.submit(self.fetch, shard)

    def _open(self, shard: str) -> BinaryIO:
        try:
            return self.fetch(shard).open("rb")
        except FileNotFoundError:  # another process made room just now
            return self.fetch(shard).open("rb")

    def _make_room(self) -> None:
        files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in self.folder.glob("*.tar"))
        total = sum(size for _, size, _ in files)
        for _, size, file in files:
            if total <= self.limit:
                break
            file.unlink(missing_ok=True)
            total -= size


def _download(shard: str, file: Path) -> None:
    """Stream a shard into a file that appears when it is whole."""
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise MissingDependencyError("webdataset", "scale") from error
    unfinished = file.with_suffix(f".{os.getpid()}")
    for attempt in range(TRIES):
        try:
            # webdataset knows no s3; the address may have any character, so it is quoted.
            source = f"pipe:aws s3 cp {shlex.quote(shard)} -" if shard.startswith("s3://") else shard
            with gopen(source, "rb") as stream, unfinished.open("wb") as kept:
                shutil.copyfileobj(stream, kept, 1 << 20)
            unfinished.replace(file)
            return
        except (OSError, ValueError) as error:
            unfinished.unlink(missing_ok=True)
            if attempt == TRIES - 1:
                raise OSError(f"{shard} can't be fetched: {error}") from error
            time.sleep(2**attempt)
