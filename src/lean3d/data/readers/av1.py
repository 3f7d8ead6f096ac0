"""Leaves those frames out of an AV1 stream that nothing refers to.

A frame of AV1 hands on what it knows (pixels, motion, probabilities) through eight slots, and its header says which of
them it fills: `refresh_frame_flags` (AV1 Bitstream & Decoding Process Specification, 5.9.2 and 7.20). One that fills
none can be taken out before the decoder sees it, and all others are decoded to the same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

SEQUENCE_HEADER, FRAME_HEADER, TILE_GROUP, FRAME, REDUNDANT_FRAME_HEADER = 1, 3, 4, 6, 7
KEY_FRAME, INTRA_ONLY, SWITCH_FRAME = 0, 2, 3
CHOSEN_BY_FRAME = 2  # SELECT_SCREEN_CONTENT_TOOLS, SELECT_INTEGER_MV


class _Sequence(NamedTuple):
    """What of a sequence header says where a frame header's fields lie."""

    screen_content_tools: int
    integer_mv: int
    order_hint_bits: int


class Av1References:
    """Reads the packets of a stream, one after the other from a keyframe on."""

    def __init__(self) -> None:
        self._sequence: _Sequence | None = None

    def needed(self, packet: bytes) -> bytes | None:
        """What of a packet other packets need: all of it, a part, or nothing.

        Frames of layers, and of the rare kinds of streams that are not looked into, are needed.
        """
        parts: list[bytes] = []
        anything = drops = False
        for kind, layered, payload, unit in _units(packet):
            if kind == SEQUENCE_HEADER:
                self._sequence = _read_sequence(_Bits(payload[:64]))
            elif kind in (FRAME_HEADER, FRAME):
                drops = not (layered or self._sequence is None or _is_kept(_Bits(payload[:16]), self._sequence))
                anything |= not drops
            if not (drops and kind in (FRAME_HEADER, TILE_GROUP, FRAME, REDUNDANT_FRAME_HEADER)):
                parts.append(unit)
        return b"".join(parts) if anything else None


class _Bits:
    """Reads numbers from bytes, high bits first; zeros follow the end."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data + bytes(16), "big")
        self._left = 8 * (len(data) + 16)

    def __call__(self, count: int = 1) -> int:
        self._left = max(self._left - count, 0)
        return self._value >> self._left & ((1 << count) - 1)


def _units(packet: bytes) -> list[tuple[int, bool, bytes, bytes]]:
    """The open bitstream units of a packet: type, whether it belongs to a layer, content, and all of it (5.3)."""
    units = []
    place = 0
    while place < len(packet):
        start, header = place, packet[place]
        layered = bool(header & 4)
        place += 1 + layered
        size = len(packet) - place
        if header & 2:
            size = shift = 0
            while place < len(packet) and shift < 56:
                byte = packet[place]
                size |= (byte & 127) << shift
                shift += 7
                place += 1
                if byte < 128:
                    break
        units.append((header >> 3 & 15, layered, packet[place : place + size], packet[start : place + size]))
        place += size
    return units


def _read_sequence(bits: _Bits) -> _Sequence | None:
    """A sequence header (5.5.1), or None for the rare kinds: still pictures, timing information, frame numbers."""
    bits(4)  # profile, still picture
    if bits() or bits():
        return None
    delays = bits()
    for _ in range(bits(5) + 1):
        bits(12)
        if bits(5) > 7:
            bits()
        if delays and bits():
            bits(4)
    sides = bits(4), bits(4)
    for side in sides:
        bits(side + 1)
    if bits():
        return None
    bits(7)
    hints = bits()
    if hints:
        bits(2)
    tools = CHOSEN_BY_FRAME if bits() else bits()
    integer_mv = CHOSEN_BY_FRAME
    if tools and not bits():
        integer_mv = bits()
    return _Sequence(tools, integer_mv, bits(3) + 1 if hints else 0)


def _is_kept(bits: _Bits, sequence: _Sequence) -> bool:
    """Whether a frame fills any slot, by its header (5.9.2)."""
    if bits():  # shows a frame that is in a slot already, which may fill others
        return True
    kind, shown = bits(2), bits()
    if kind == SWITCH_FRAME or (kind == KEY_FRAME and shown):
        return True
    if not shown:
        bits()
    resilient = bits()
    bits()
    tools = bits() if sequence.screen_content_tools == CHOSEN_BY_FRAME else sequence.screen_content_tools
    if tools and sequence.integer_mv == CHOSEN_BY_FRAME:
        bits()
    bits(1 + sequence.order_hint_bits)
    if kind not in (KEY_FRAME, INTRA_ONLY) and not resilient:
        bits(3)
    return bits(8) != 0
