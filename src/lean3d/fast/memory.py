"""Which value lies where: one piece of memory for all of them, used again as soon as nobody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass
class Block:
    """Memory that is needed from one step to another, both included.

    Args:
        size: bytes.
        first, last: steps.
    """

    size: int
    first: int
    last: int
    offset: int = 0


def place(blocks: Sequence[Block]) -> int:
    """Give every block an offset such that no two overlap in memory and in time; greedy, the largest first.

    Returns:
        The bytes that all of them need together.
    """
    placed: list[Block] = []
    total = 0
    for block in sorted(blocks, key=lambda b: (-b.size, b.first)):
        rounded = -(-block.size // ALIGNMENT) * ALIGNMENT
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < block.first or block.last < other.first:
                continue
            if offset + rounded <= other.offset:
                break
            offset = max(offset, other.offset + -(-other.size // ALIGNMENT) * ALIGNMENT)
        block.offset = offset
        placed.append(block)
        total = max(total, offset + rounded)
    return total
