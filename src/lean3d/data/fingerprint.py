"""What stays of a clip when it is encoded anew: a few numbers to find copies by that no hash finds.

    frames, grey, 64 x 64  ->  means over 4 x 4 pixels and over eighths of the clip  ->  less their mean over time

What does not move is taken away, since clips of one camera or speaker share it; what is left says what moves where and
when. Two clips are compared by the cosine of their numbers.

Source: the idea of small averaged differences over space and time is that of Oostveen, Kalker & Haitsma, "Feature
extraction and a database strategy for video fingerprinting", 2002; the numbers of parts and the threshold are ours
(docs/data_tools.md says what they find).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TIMES, SIDE = 8, 16
"""Parts of a clip in time, and in each of height and width."""

LEAST_MOTION = 0.25
"""Grey levels (root of the mean square over a clip's parts) below which what is left is the noise of the encoder."""

ALIKE = 0.88
"""Cosine from which on two clips are taken for copies."""

_BLOCK = 2048  # clips that are compared with all others at a time


class Fingerprint:
    """Takes in the frames of a clip, in order and in as many parts as one likes.

    Args:
        num_frames: Frames that will come.
    """

    def __init__(self, num_frames: int):
        self._edges = np.arange(num_frames + 1) / num_frames
        self._sums = np.zeros((TIMES, SIDE * SIDE))
        self._seen = 0

    def add(self, frames: np.ndarray) -> None:
        """Grey frames, uint8 (T, H, W), H and W multiples of 16."""
        count, height, width = frames.shape
        pooled = frames.reshape(count, SIDE, height // SIDE, SIDE, width // SIDE).mean((2, 4)).reshape(count, -1)
        starts, ends = (self._edges[self._seen + part : self._seen + part + count] for part in (0, 1))
        bounds = np.arange(TIMES + 1)[:, None] / TIMES
        shares = np.minimum(ends, bounds[1:]) - np.maximum(starts, bounds[:-1])  # of each frame in each part
        self._sums += TIMES * shares.clip(0) @ pooled
        self._seen += count

    def numbers(self) -> np.ndarray | None:
        """int8 (2048,), all frames being in; None where too little moves."""
        motion = self._sums - self._sums.mean(0)
        if np.sqrt(np.square(motion).mean()) < LEAST_MOTION:
            return None
        return np.round(motion / np.abs(motion).max() * 127).astype(np.int8).ravel()


def alike(fingerprints: Sequence[np.ndarray | None]) -> list[tuple[int, int, float]]:
    """The pairs of clips that are taken for copies: two places in the list, the lower first, and their cosine.

    Every pair is compared: 2e11 of 650,000 clips, 4e14 multiplications, which take less time than the decoding.

    Args:
        fingerprints: `Fingerprint.numbers` of each clip.
    """
    places = [place for place, numbers in enumerate(fingerprints) if numbers is not None]
    if len(places) < 2:
        return []
    table = torch.from_numpy(np.stack([fingerprints[place] for place in places]))  # type: ignore[misc]
    found = []
    for start in range(0, len(places), _BLOCK):
        rows = torch.nn.functional.normalize(table[start : start + _BLOCK].float())
        for other in range(start, len(places), _BLOCK):
            cosines = rows @ torch.nn.functional.normalize(table[other : other + _BLOCK].float()).T
            for i, j in (cosines >= ALIKE).nonzero().tolist():
                if start + i < other + j:
                    found.append((places[start + i], places[other + j], float(cosines[i, j])))
    return found
