"""A net's step, compiled: the same function of frame and state, with the same states.

    Frames, Windows, SlidingMax, ...      what a step is made of, see `lean3d.blocks.streaming`
       |       |
       f  ..  g                           functions of a few frames, without a memory: each is compiled as a net

What remembers stays as it is, so states are those of the net's own step, from the first frame to the flush. A window's
function and those of each frame behind it become one: a convolution in time takes in all that follows, up to the next
thing that remembers. Each compiled function is timed against what it replaces, and stays only where it is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lean3d.blocks import Chain, Frames, State, Stream, Windows, state_layout
from lean3d.errors import ConfigError, StreamingError
from lean3d.fast.clock import clock
from lean3d.fast.compiler import TIGHTER, CompiledModel, check_model, compile
from lean3d.models import NetStream

TOLERANCE = 1e-5
"""The scores' largest error against the net's own step, over the largest score."""
SIZES = (8, 4, 2, 1)
"""How many streams run as one: each number has its plan, and a `CompiledModel` keeps four. Others are cut into such."""
ROUNDS = 5
"""How often own and compiled functions are timed, in turns."""

Function = Callable[[Tensor], Tensor]
Seconds = tuple[float, float]


class FastStream(NetStream):
    """`NetStream` whose step is compiled; made by `compile_stream`.

    Attributes:
        seconds: Of a step of one stream: the net's own, and this one; the mean over a period.
        error: max|y - own| / max|own| of the scores over a period.
    """

    def __init__(self, stream: NetStream, chain: Stream):
        vars(self).update(vars(stream))
        self.chain, self._own = chain, stream  # type: ignore[assignment]
        self.pieces: list[_Piece] = []
        self.seconds: Seconds = (0.0, 0.0)
        self.error = 0.0

    @property
    def gains(self) -> bool:
        """Whether it is faster; where it isn't, the step is the net's own."""
        return self.chain is not self._own.chain

    def explain(self) -> Table:
        """A table of the functions with convolutions that the step is made of; print it with rich."""
        table = Table("from", "on", "algorithms", "own ms", "fast ms", title=self.net.spec["name"])
        for column in table.columns[3:]:
            column.justify = "right"
        for piece in self.pieces:
            layers = piece.compiled.layers if piece.compiled else ()
            names = dict.fromkeys(name for layer in layers for name in layer.algorithms)
            shape = "x".join(map(str, piece.example.shape))
            table.add_row(piece.name, shape, ", ".join(names) or "as it is", *map(_ms, piece.seconds))
        table.add_section()
        table.add_row("a step", "", "", *map(_ms, self.seconds))
        table.caption = f"error of the scores {self.error:.0e}"
        return table


def compile_stream(
    stream: NetStream,
    size: tuple[int, int] | None = None,
    *,
    cache: str | Path | None = None,
    quiet: bool = False,
) -> FastStream:
    """Make a net's step fast on this machine's CPU.

    Args:
        stream: Of a net on the CPU, in float32 and in eval mode.
        size: Height and width of the frames; default: the net's. Frames of another size run as they are.
        cache: As in `compile`.
        quiet: No progress bar.

    Returns:
        The same step with the same states. What was not faster compiled is as it was; see `gains`. Scores differ by at
        most 1e-5 of the largest.

    Raises:
        StreamingError: The net is in training mode.
        ConfigError: The net can't be compiled; see `compile`.
    """
    net = stream.net
    if net.training:
        raise StreamingError(f"{net.spec['name']} is in training mode: call model.eval() before its step is compiled")
    check_model(net)
    every: list[_Piece] = []
    fast = FastStream(stream, _rebuilt(stream.chain, every))
    tolerance = TOLERANCE
    with torch.inference_mode():
        frames, state = _period(stream, size or net.input_spec.size)
        with _listening(every):
            _run(fast, frames, state)
        fast.pieces = [piece for piece in every if piece.find_layers(net)]
        while True:
            for piece in _track(fast.pieces, f"compiling {net.spec['name']}'s step", quiet):
                piece.compile(tolerance, cache)
            fast.error, fast.seconds = _compare(stream, fast, frames, state)
            if fast.error <= TOLERANCE:
                break
            tolerance /= TIGHTER
        if fast.seconds[1] >= fast.seconds[0]:
            fast.chain = stream.chain
    return fast


class _Piece:
    """A row of functions, and what became of them.

    Attributes:
        example: What came to it last while somebody listened.
        name: Of its first convolution in the net.
        seconds: Own, and compiled.
        compiled: None where it runs as it was.
    """

    def __init__(self, functions: Sequence[Function]):
        self.functions = tuple(functions)
        self.listens = False
        self.example = torch.empty(0)
        self.name = ""
        self.seconds = (0.0, 0.0)
        self.compiled: CompiledModel | None = None
        self._layers: list[nn.Module] = []

    def __call__(self, x: Tensor) -> Tensor:
        if self.listens:
            self.example = x
        # at a stream's borders, and of other sizes, there are other shapes: as they are
        if self.compiled is None or x.shape[1:] != self.example.shape[1:]:
            return self.own(x)
        if len(x) in SIZES:
            return self.compiled(x)
        return torch.cat([self.compiled(part) for part in x.split(_sizes(len(x)))])

    def own(self, x: Tensor) -> Tensor:
        """As it was."""
        for function in self.functions:
            x = function(x)
        return x

    def find_layers(self, net: nn.Module) -> bool:
        """Which layers are called in it; whether there is a convolution among them."""
        if not self.example.numel():
            return False
        called: list[nn.Module] = []
        with register_module_forward_pre_hook(lambda module, _: called.append(module)):
            self.own(self.example)
        self._layers = list(dict.fromkeys(called))
        convolutions = [layer for layer in self._layers if isinstance(layer, nn.Conv3d)]
        weights = {id(m.weight): name for name, m in net.named_modules() if isinstance(m, nn.Conv3d)}
        self.name = weights.get(id(convolutions[0].weight), "") if convolutions else ""
        return bool(convolutions)

    def compile(self, tolerance: float, cache: str | Path | None) -> None:
        """Compile it, and keep that if it is faster."""
        self.compiled = None
        row = _Row(self._layers, self.functions)
        try:
            compiled = compile(row, self.example, tolerance=tolerance, cache=cache, quiet=True)
        except ConfigError:  # no algorithm is so exact: single precision itself isn't
            return
        self.seconds = _times(lambda: self.own(self.example), lambda: compiled(self.example))
        if self.seconds[1] < self.seconds[0]:
            self.compiled = compiled


class _Row(nn.Module):
    """Functions one after another, with the layers that they call, as a net."""

    def __init__(self, layers: Sequence[nn.Module], functions: Sequence[Function]):
        super().__init__()
        self.layers, self.functions = nn.ModuleList(layers), functions
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


def _rebuilt(stream: Stream, pieces: list[_Piece]) -> Stream:
    """The same parts with pieces for functions, which are listed."""

    def piece(*functions: Function) -> _Piece:
        pieces.append(_Piece(functions))
        return pieces[-1]

    if isinstance(stream, Frames):
        return Frames(piece(*stream.functions)) if stream.functions else stream
    new: Any = copy.copy(stream)
    if isinstance(stream, Windows):
        new.function = piece(stream.function)
    elif isinstance(stream, Chain):
        new.parts = []
        for part in stream.parts:
            last = new.parts[-1] if new.parts else None
            if isinstance(part, Frames) and isinstance(last, Windows):
                pieces[-1].functions += part.functions
                new.parts.append(Frames())
            else:
                new.parts.append(_rebuilt(part, pieces))
    else:
        for name, value in vars(stream).items():
            if isinstance(value, Stream):
                setattr(new, name, _rebuilt(value, pieces))
            elif isinstance(value, list | tuple) and value and all(isinstance(part, Stream) for part in value):
                setattr(new, name, [_rebuilt(part, pieces) for part in value])
    return new


def _period(stream: NetStream, size: tuple[int, int]) -> tuple[list[Tensor], State]:
    """Frames of noise for a period of states' layouts, and the state before them, where buffers are full."""
    generator = torch.Generator().manual_seed(0)
    seen: dict[Hashable, int] = {}
    frames: list[Tensor] = []
    states: list[State] = []
    state = stream.init_state()
    while state_layout(state) not in seen:
        seen[state_layout(state)] = len(frames)
        states.append(state)
        frames.append(torch.randn(1, stream.net.input_spec.channels, 1, *size, generator=generator))
        _, state = stream.step(frames[-1], state)
    first = seen[state_layout(state)]
    return frames[first:], states[first]


def _run(stream: NetStream, frames: Sequence[Tensor], state: State) -> list[Tensor]:
    scores = []
    for frame in frames:
        y, state = stream.step(frame, state)
        scores += [] if y is None else [y]
    return scores


@contextmanager
def _listening(pieces: Sequence[_Piece]) -> Iterator[None]:
    for piece in pieces:
        piece.listens = True
    yield
    for piece in pieces:
        piece.listens = False


def _compare(own: NetStream, fast: NetStream, frames: Sequence[Tensor], state: State) -> tuple[float, Seconds]:
    """The largest error of scores, and seconds of a step."""
    right, found = (torch.cat(_run(stream, frames, state)) for stream in (own, fast))
    error = ((right - found).abs().max() / right.abs().max()).item()
    own_seconds, fast_seconds = _times(lambda: _run(own, frames, state), lambda: _run(fast, frames, state))
    return error, (own_seconds / len(frames), fast_seconds / len(frames))


def _times(own: Callable[[], object], compiled: Callable[[], object]) -> Seconds:
    """The least seconds of each, in turns."""
    best = [float("inf")] * 2
    now = clock()
    for _ in range(ROUNDS):
        for i, run in enumerate((own, compiled)):
            begin = now()
            run()
            best[i] = min(best[i], now() - begin)
    return best[0], best[1]


def _track(pieces: Sequence[_Piece], what: str, quiet: bool) -> Iterable[_Piece]:
    console = Console(stderr=True)
    return track(pieces, what, console=console, transient=True, disable=quiet or not console.is_terminal)


def _sizes(number: int) -> list[int]:
    """Sizes for which there are plans that are so many in all, the largest first."""
    sizes = []
    for size in SIZES:
        sizes += [size] * (number // size)
        number %= size
    return sizes


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
