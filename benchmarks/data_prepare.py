"""What preparing a video costs and gains, in CPU time: python benchmarks/data_prepare.py VIDEO

Without a video, the clip of Kinetics in LEAN3D_SHARED. CPU time depends less than the clock on what else the machine
does. Prints a table and one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from lean3d.data.isolate import look
from lean3d.data.readers import open_video
from lean3d.data.sampling import clip_span
from lean3d.data_tools import prepare

CLIPS, ROUNDS = 20, 3


def clip_ms(path: Path, num_frames: int = 8, rate: int = 8) -> float:
    """Milliseconds to open the file and get one clip from a random place; the least of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        places = random.Random(0)
        began = time.process_time()
        for _ in range(CLIPS):
            with open_video(path) as video:
                start = places.randrange(max(1, video.num_frames - clip_span(num_frames, rate) + 1))
                video.get_frames([min(start + i * rate, video.num_frames - 1) for i in range(num_frames)])
        best = min(best, (time.process_time() - began) / CLIPS)
    return 1e3 * best


def main(video: str | None = None) -> None:
    """Prepare one video in both codecs and time clips of it."""
    shared = Path(os.environ.get("LEAN3D_SHARED") or Path(__file__).parents[2] / "shared")
    source = Path(video or shared / "media" / "kinetics_arm_wrestling.mp4")
    if not source.is_file():
        print(f"skipped: there is no {source}; name a video")
        return
    began = time.process_time()
    assert look(source).ok
    print(f"to check it: {time.process_time() - began:.2f} s")
    rows = [{"file": "as it came", "kB": source.stat().st_size / 1e3, "ms": clip_ms(source)}]
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("h264", "mjpeg"):
            target = Path(folder) / f"{codec}.mp4"
            began = time.process_time()
            job = prepare.Job(str(source), str(target), target.name)
            done = prepare.encode(job, short_side=256, gop=12, codec=codec, quality=prepare.QUALITY[codec])
            seconds = time.process_time() - began
            assert done.ok, done.reason
            ms = clip_ms(target)
            rows.append({"file": codec, "kB": done.size_bytes / 1e3, "ms": ms, "seconds": seconds})
    for row in rows:
        prepared = f"{row['seconds']:>9.1f} s to prepare" if "seconds" in row else ""
        print(f"{row['file']:<12}{row['kB']:>9.0f} kB{row['ms']:>9.1f} ms a clip{prepared}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
