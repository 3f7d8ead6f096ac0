"""Live sources for tests: a program of numbered frames, served by HTTP, RTSP and UDP at its own pace.

    python live_servers.py mpegts|mjpeg|rtsp PORT EPOCH         until it is killed

The program runs on the wall clock: frame i is sent at EPOCH + i / FPS whoever listens, so that a server which was
killed and started again goes on where the program is by then.
"""

from __future__ import annotations

import abc
import contextlib
import io
import socket
import socketserver
import struct
import sys
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image

FPS = 25
SIZE = (48, 96)
BITS = 12
LENGTH = 2500
"""Frames of the program, after which it ends."""


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A frame, uint8 (H, W, 3), on which its number stands as black and white blocks."""
    frame = np.full((*size, 3), 60, np.uint8)
    frame[24:] = 40 + (5 * number) % 160
    for bit in range(BITS):
        frame[:16, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: av.VideoFrame) -> int:
    """The number on a frame that was encoded and decoded."""
    pixels = frame.to_ndarray(format="gray8")
    return sum(int(pixels[4:12, 8 * bit + 2 : 8 * bit + 6].mean() > 127) << bit for bit in range(BITS))


def mpegts_chunks(length: int = LENGTH, keyframe_every: int = 5) -> Iterator[tuple[bytes, bool]]:
    """The program as MPEG-TS: the bytes of each frame, and whether one can begin with it."""
    buffer = io.BytesIO()
    options = {"flush_packets": "1", "mpegts_flags": "resend_headers+pat_pmt_at_frames"}
    with av.open(buffer, "w", format="mpegts", options=options) as container:
        settings = {"tune": "zerolatency", "preset": "ultrafast", "g": str(keyframe_every), "crf": "18"}
        stream = container.add_stream("libx264", rate=FPS, options=settings)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(length):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets = stream.encode(frame)
            container.mux(packets)
            chunk = buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
            yield chunk, packets[0].is_keyframe


def jpeg(number: int) -> bytes:
    """A frame as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(numbered(number)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


class Program:
    """The frames' bytes and their times."""

    def __init__(self, epoch: float, length: int = LENGTH):
        self.epoch = epoch
        self.chunks = list(mpegts_chunks(length))

    def now(self) -> int:
        """The number of the frame that is on air."""
        return max(0, int((time.time() - self.epoch) * FPS))

    def play(self, from_keyframe: bool = True) -> Iterator[tuple[int, bytes]]:
        """Numbers and bytes of frames from now on, each at its time."""
        number = self.now()
        while from_keyframe and number < len(self.chunks) and not self.chunks[number][1]:
            number += 1
        for place in range(number, len(self.chunks)):
            time.sleep(max(0.0, self.epoch + place / FPS - time.time()))
            yield place, self.chunks[place][0]


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    program: Program


class _Handler(socketserver.StreamRequestHandler, abc.ABC):
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the other side has gone
            self.serve()

    @abc.abstractmethod
    def serve(self) -> None:
        """Answer, until the other side has gone."""

    def head(self) -> list[str]:
        """The lines of a request."""
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        return lines


class MpegTs(_Handler):
    """MPEG-TS over HTTP, without a length."""

    def serve(self) -> None:
        self.head()
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n")
        for _, chunk in self.server.program.play():
            self.wfile.write(chunk)


class Mjpeg(_Handler):
    """JPEG pictures over HTTP, as simple cameras send them; every fifth frame, so five in a second."""

    def serve(self) -> None:
        self.head()
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
        for number, _ in self.server.program.play(from_keyframe=False):
            if number % 5 == 0:
                picture = jpeg(number)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")


class Rtsp(_Handler):
    """MPEG-TS in RTP in RTSP over TCP (RFC 2326, RFC 3550, RFC 2250): what a camera says, and no more."""

    def serve(self) -> None:
        sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=program\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
        while lines := self.head():
            method = lines[0].split()[0]
            headers = dict(line.split(": ", 1) for line in lines[1:])
            answer = [f"CSeq: {headers['CSeq']}"]
            body = ""
            if method == "OPTIONS":
                answer.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
            elif method == "DESCRIBE":
                body = sdp
                answer += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
            elif method == "SETUP":
                if "TCP" not in headers["Transport"]:
                    self.wfile.write(f"RTSP/1.0 461 Unsupported Transport\r\n{answer[0]}\r\n\r\n".encode())
                    continue
                answer += ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1;timeout=60"]
            elif method == "PLAY":
                answer.append("Session: 1")
            self.wfile.write(("\r\n".join(["RTSP/1.0 200 OK", *answer]) + "\r\n\r\n" + body).encode())
            if method == "PLAY":
                self.play()
                return

    def play(self) -> None:
        sequence = 0
        for number, chunk in self.server.program.play():
            for start in range(0, len(chunk), 7 * 188):
                payload = chunk[start : start + 7 * 188]
                header = struct.pack(">BBHII", 0x80, 33, sequence & 0xFFFF, number * 90000 // FPS, 1)
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(header) + len(payload)) + header + payload)
                sequence += 1


def send_udp(program: Program, port: int, until: int) -> None:
    """Send the program to a port of this machine, up to a frame."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for number, chunk in program.play():
            for start in range(0, len(chunk), 7 * 188):
                out.sendto(chunk[start : start + 7 * 188], ("127.0.0.1", port))
            if number >= until:
                return


def main() -> None:
    """Serve until killed."""
    kind, port, epoch = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with _Server(("127.0.0.1", port), {"mpegts": MpegTs, "mjpeg": Mjpeg, "rtsp": Rtsp}[kind]) as server:
        server.program = Program(epoch, int(sys.argv[4]) if len(sys.argv) > 4 else LENGTH)
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
