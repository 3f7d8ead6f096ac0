"""What is done to the test clips to see what a net relies on. Each probe is the same for every net.

A probe takes uint8 (C, T, h, w) at the net's input size and gives the same; what is random in it follows from the
video's place in the test part.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from typing import cast

import av
import numpy as np
import torch
from torch import Tensor

from lean3d.data.drawing import ON_EVERY_CPU
from lean3d.data.loader import Batch

Probe = Callable[[Tensor, torch.Generator], Tensor]

NOISE = 20.0
"""Standard deviation of the noise, of 255."""
BLUR = 1.5
"""Standard deviation of the blur, in pixels of the input."""
BRIGHTNESS = 0.5
CRF = 32
"""H.264's quality, 0 to 51: 20 is good, 40 so bad that at these sizes nothing is left to recognise."""


def shuffled(clip: Tensor, generator: torch.Generator) -> Tensor:
    """The frames in a random order: a net that keeps its accuracy does not use time."""
    return clip[:, torch.randperm(clip.shape[1], generator=generator)]


def noise(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, new in every frame."""
    return (clip + NOISE * torch.randn(clip.shape, generator=generator)).round().clamp(0, 255).byte()


def blur(clip: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of every frame."""
    reach = round(3 * BLUR)
    places = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-(places**2) / (2 * BLUR**2))
    kernel /= kernel.sum()
    frames = clip.flatten(0, 1)[:, None].float()  # (C * T, 1, h, w)
    frames = torch.nn.functional.pad(frames, (reach,) * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        frames = torch.nn.functional.conv2d(frames, kernel.view(shape))
    return frames.round().clamp(0, 255).byte().view_as(clip)


def dropped(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the frames, drawn at random but never the first, are lost: the one before stays on the screen."""
    frames = clip.shape[1]
    lost = 1 + torch.randperm(frames - 1, generator=generator)[: frames // 2]
    shown = torch.arange(frames)
    shown[lost] = 0
    return clip[:, shown.cummax(0).values]


def darker(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the light."""
    return (clip * BRIGHTNESS).round().byte()


def compressed(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Through H.264 at a poor quality."""
    pixels = clip.permute(1, 2, 3, 0).expand(-1, -1, -1, 3).numpy()  # grey becomes RGB
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": str(CRF), **ON_EVERY_CPU}
        stream = cast(av.VideoStream, container.add_stream("libx264", rate=Fraction(25), options=options))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    kind = "gray" if len(clip) == 1 else "rgb24"
    with av.open(file) as container:
        frames = np.stack([frame.to_ndarray(format=kind) for frame in container.decode(video=0)])
    shown = torch.from_numpy(frames[:, :height, :width].reshape(len(frames), height, width, -1))
    return shown.permute(3, 0, 1, 2).contiguous()


PROBES: dict[str, Probe] = {probe.__name__: probe for probe in (shuffled, noise, blur, dropped, darker, compressed)}
"""By the name that results have them under."""


def apply(probe: Probe, batch: Batch) -> Batch:
    """The batch, views and all, with the probe done to each clip."""
    clips = batch.clips.clone()  # (N, V, C, T, h, w)
    for number, index in enumerate(batch.indices.tolist()):
        generator = torch.Generator().manual_seed(index)
        for view in range(clips.shape[1]):
            clips[number, view] = probe(clips[number, view], generator)
    return batch._replace(clips=clips)
