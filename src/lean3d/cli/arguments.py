"""The arguments of each verb, as dataclasses that tyro reads from the command line; their texts are the help."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional, arg

from lean3d.config import (
    AugmentConfig,
    DataConfig,
    EventConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Scalar,
    ViewsConfig,
)

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], default: T | None = None) -> T:
    """The arguments in `argv`; what is not there is as in `default`. Help and errors are printed by tyro, which exits.

    NAME VALUE pairs, as in ``--model.options stem conv``, join those of the default, which tyro alone would turn into
    the only names that are accepted.

    Args:
        cls: One of the classes below.
        argv: The words after the verb.
        default: Another instance than the plain one.
    """
    prog, description = f"lean3d {cls.__name__.lower()}", inspect.getdoc(cls)
    config = (tyro.conf.FlagCreatePairsOff,)
    if default is None:
        return tyro.cli(cls, args=argv, prog=prog, description=description, config=config)
    plain = _without_pairs(default)
    return _with_pairs(
        tyro.cli(cls, args=argv, prog=prog, description=description, config=config, default=plain), default
    )


def _without_pairs(config: Any) -> Any:
    """A config, or a part of one, whose dictionaries are empty."""
    if isinstance(config, dict):
        return {}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    return dataclasses.replace(
        config, **{f.name: _without_pairs(getattr(config, f.name)) for f in dataclasses.fields(config)}
    )


def _with_pairs(config: Any, default: Any) -> Any:
    """A config whose dictionaries also hold the default's pairs; a model's options go with the model's name."""
    if isinstance(config, dict) and isinstance(default, dict):
        return {**default, **config}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    if isinstance(config, ModelConfig) and isinstance(default, ModelConfig) and config.name != default.name:
        return config
    return dataclasses.replace(
        config,
        **{f.name: _with_pairs(getattr(config, f.name), getattr(default, f.name)) for f in dataclasses.fields(config)},
    )


@dataclass(frozen=True)
class Train:
    """Train a model on a folder of class folders, or on an annotation file.

    RECIPE is a name from `lean3d recipes` (default: light) and gives every default below. DATA is a folder or file.
    """

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="[RECIPE] [DATA]", help_behavior_hint="")] = ()
    """A recipe, then the data; each may be left out."""
    resume: Annotated[str | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Go on with the run in this folder, with its own settings."""
    dry_run: bool = False
    """Show the data, the model and the plan, and stop there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: InitConfig = field(default_factory=InitConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Eval:
    """Test a trained model: accuracies, a table by class, a confusion picture, results.json.

    Defaults below that have to do with data and views are those of the model's own training. An ensemble, here of nets
    with 8 and 16 frames: lean3d eval runs/8f --with runs/16f
    """

    run: Annotated[Positional[str], arg(metavar="RUN|FILE")]
    """A run's folder, or a .safetensors file."""
    root: Annotated[Positional[str | None], arg(metavar="[DATA]", help_behavior_hint="")] = None
    """Other data than the model was trained on: a folder or an annotation file."""
    others: Annotated[tuple[str, ...], arg(name="with", metavar="RUN ...", help_behavior_hint="")] = ()
    """Further models of the same classes, to average the scores with; DATA stand before it."""
    split: Annotated[
        Literal["train", "val", "test", "all"] | None, arg(metavar="{train,val,test,all}", help_behavior_hint="")
    ] = None
    """What to test on (default: test where there is such a split, else val)."""
    out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """The folder for results.json and pictures (default: beside the model; an ensemble's: ensemble/ there)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are mixed precision."""
    fast: bool = False
    """Compile the model for this machine's CPU first: the same scores, but for rounding, in less time."""
    batch_size: int = 16
    """Largest number of videos that are loaded at once."""
    stream: bool = False
    """Test it frame by frame, as on a stream: how soon it is right, and events on long videos joined from the clips."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    events: EventConfig = field(default_factory=EventConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Predict:
    """Say what is to be seen in videos: for each as a whole, and for each window of a long one.

    Of very many videos: lean3d predict RUN --engine ray 'shards/*.tar' --out DIR
    """

    run: Annotated[Positional[str], arg(metavar="RUN|FILE")]
    """A run's folder, or a .safetensors file."""
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEO|FOLDER ...", help_behavior_hint="")]
    """Video files, folders of pictures, or folders with videos anywhere in them; with Ray also patterns and shards."""
    engine: Literal["local", "ray"] = "local"
    """ray: on a cluster of machines by Ray Data (RAY_ADDRESS), or on all cores; it needs --out, and goes on where a run
    before was stopped."""
    out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """With --engine ray: the folder for Parquet files."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """With --engine ray: processes, each with a model (default: one for each CPU or GPU)."""
    top_k: int = 5
    """Classes to name."""
    json: bool = False
    """Print JSON in place of a table."""
    video: Annotated[str | None, arg(metavar="OUT.mp4", help_behavior_hint="")] = None
    """Write the video with its classes drawn on; a folder where there are several videos."""
    stride: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Frames from one window's start to the next (default: windows touch)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    fast: bool = False
    """Compile the model for this machine's CPU first: the same scores, but for rounding, in less time."""


@dataclass(frozen=True)
class Stream:
    """Watch files, cameras and streams frame by frame, and write what happens as JSON lines.

    SOURCE is a file; a camera's number (0 is the first); an address: rtsp://, http://, udp://, or another that FFmpeg
    knows; or - for raw frames on standard input. A file is watched whole. Of a live source the latest frame wins: what
    comes while the model is busy is dropped and counted. One that breaks off is connected again. Several sources run
    side by side. Ctrl-C ends with the last events.

    The model must be able to run frame by frame: most are as they are and are a little late; trained with
    --model.options causal True they are not late.

    A line: {"source": ..., "label": ..., "start": seconds, "end": seconds, "score": 0 to 1, "started": wall clock,
    "ended": wall clock}
    """

    source: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE ...", help_behavior_hint="")] = ()
    """What to watch."""
    model: Annotated[str | None, arg(metavar="RUN|FILE", help_behavior_hint="(required)")] = None
    """A run's folder, or a .safetensors file."""
    sources: Annotated[str | None, arg(metavar="LIST.txt", help_behavior_hint="")] = None
    """A text file with further sources, one a line."""
    lines: Literal["events", "begins", "results"] = "events"
    """events: a line for each, when it is over. begins: one more when it begins. results: one more for each result."""
    events: EventConfig = field(default_factory=EventConfig)
    video: Annotated[str | None, arg(metavar="OUT.mp4", help_behavior_hint="")] = None
    """Write the video with scores and a timeline drawn on; a folder where there are several sources."""
    show: bool = False
    """Show that on the screen."""
    realtime: bool = False
    """Take files as if they were live: at their own pace, the latest frame wins."""
    seconds: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Stop after so long."""
    retries: int = 5
    """How often in a row a live source is tried again, after 0.5, 1, 2, 4 ... seconds."""
    timeout: float = 5.0
    """Seconds after which a live source that says nothing counts as broken off."""
    fps: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Frames per second that the model's sampling rate counts (default: the source's own; 25 where it can't tell)."""
    sampling_rate: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Distance of the model's frames, in frames of the source (default: as in its training)."""
    raw_size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = None
    """Size of raw frames on standard input: 3 bytes a pixel, RGB; 1 byte, grey, for models of grey clips."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    fast: bool = False
    """Compile the model's step for this machine's CPU first: the same scores, but for rounding, in less time."""


@dataclass(frozen=True)
class Convert:
    """Make weights that others published a checkpoint of lean3d, which eval, predict and train --init.weights take.

    Which net it is, is found from the weights. smallbig: what SmallBigNet's code saved. pytorchvideo: its hub's models.
    """

    source: Annotated[Positional[Literal["smallbig", "pytorchvideo"]], arg(metavar="smallbig|pytorchvideo")]
    """Whose weights."""
    file: Annotated[Positional[str], arg(metavar="FILE")]
    """What torch.save wrote (.pth, .pt, .pyth; no code in it is run), or .safetensors."""
    out: Annotated[str | None, arg(metavar="FILE.safetensors", help_behavior_hint="")] = None
    """The checkpoint to write (default: beside FILE, as NAME.lean3d.safetensors)."""
    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Which model it is, where several have the same weights: x3d_xs, x3d_s or x3d_m."""
    num_frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Frames in the clips that it was trained on; weights don't tell (default: the model's)."""
    sampling_rate: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Distance between two of them, in frames of the video (default: the model's)."""
    labels: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The classes' names in order: one a line, or JSON (default: their numbers)."""


@dataclass(frozen=True)
class Bench:
    """Time nets on this machine in several runtimes, or count what they cost.

    Timed is one clip at a time in float32. Every runtime has the same weights and clip, and is held against float64
    before it is timed; one that is wrong or can't be used is named with the reason. Each is in a process of its own,
    and they take turns: a minute or two for each net. compile needs a C++ compiler, onnxruntime the extra export,
    openvino both extras, export and openvino.

    --cost counts weights, multiply-accumulates (MACs), and multiplications with the fast algorithms, for the default
    number of classes or, of a trained model, its own. Nothing is computed then, so it takes a moment and no memory.
    Convolutions take F(m, r) along an axis where that saves multiplications.
    """

    nets: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL|RUN|FILE ...", help_behavior_hint="")]
    """Names or patterns of models ('smallbig*', in quotes), runs' folders, checkpoints."""
    runtimes: Annotated[str, arg(metavar="NAME,...")] = "eager,compile,onnxruntime,openvino,fast"
    """What to time."""
    threads: Annotated[str, arg(metavar="N,...")] = "1,2"
    """Numbers of threads to compute with."""
    rounds: int = 5
    """How often each runtime gets its turn."""
    out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Write times as bench.json and bench.png to this folder."""
    cost: bool = False
    """Count in place of timing."""
    layers: bool = False
    """With --cost: each layer's kernel, weights, work and algorithm, too."""
    json: bool = False
    """Print one line of JSON in place of tables."""
    tiles: Annotated[str, arg(metavar="M,...")] = "2,4"
    """With --cost: the m of the F(m, r) that a convolution may use; 2 alone is as exact as the direct form."""
    num_frames: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Frames in the clip (default: the model's)."""
    size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = None
    """Height and width of the clip (default: the model's)."""
    options: Annotated[dict[str, Scalar], arg(metavar="NAME VALUE ...", help_behavior_hint="")] = field(
        default_factory=dict
    )
    """Arguments of the models, as in `lean3d models NAME`: --options expansion 0.75 num_classes 174."""


@dataclass(frozen=True)
class Check:
    """Decode every file of a data set and report what is wrong: files that are damaged or crash the decoder, copies,
    clips of the training among those of the test, labels.

    Each file is decoded in a child process with limits of time and memory. The exit status is 1 where there is a
    problem, so that a script can stop there.
    """

    root: Annotated[Positional[str], arg(metavar="DIR|FILE")]
    """A folder of class folders, an annotation file, or a folder with videos without labels."""
    out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """The folder for index.html, manifest.csv and check.json (default: check-NAME, here)."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Processes (default: one for each core)."""
    seconds: float = 60.0
    """Longest time that one file may take."""
    memory: float = 2.0
    """Gigabytes that decoding one file may need."""
    json: bool = False
    """Print check.json in place of tables."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Prepare:
    """Write a data set anew in the form that trainings read fastest: small, with many keyframes, perhaps in shards.

    The files of DIR stay as they are. Each new one is decoded and compared with the old one: number of frames and their
    times. A run that was stopped goes on where it was. Labels and splits go to OUT/clips.csv, in shards to
    OUT/index.csv; sound is left out. The exit status is 1 where files were bad.
    """

    root: Annotated[Positional[str], arg(metavar="DIR|FILE")]
    """A folder of class folders, or an annotation file."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """A new folder, or one that an earlier run with the same settings began."""
    short_side: int = 256
    """Largest length of the shorter side, in pixels; smaller videos keep their size."""
    gop: int = 12
    """Frames from one keyframe to the next: fewer make random clips quicker to decode, and files larger."""
    codec: Literal["h264", "mjpeg"] = "h264"
    """mjpeg needs no encoder beside FFmpeg's own, makes every frame a keyframe, and files much larger."""
    quality: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """The encoder's quantiser, less is better (default: H.264's crf 20, MJPEG's qscale 4)."""
    shards: bool = False
    """Pack the new files into WebDataset shards (tar), with labels and splits inside."""
    shard_mb: float = 64.0
    """Size of a shard, in megabytes."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Processes (default: one for each core)."""
    seconds: float = 600.0
    """Longest time that one file may take."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Data:
    """Look after a data set: see whether it is whole, or write it anew in the form that is read fastest."""

    action: Annotated[
        Annotated[Check, tyro.conf.subcommand("check")] | Annotated[Prepare, tyro.conf.subcommand("prepare")],
        arg(name=""),
    ]


@dataclass(frozen=True)
class Models:
    """List the models with what they cost, or show one with its arguments."""

    pattern: Annotated[Positional[str], arg(metavar="[PATTERN|NAME]")] = "*"
    """A model's name, or a pattern such as 'smallbig*' (in quotes)."""
    markdown: bool = False
    """Print a Markdown table."""


@dataclass(frozen=True)
class Recipes:
    """List the recipes, or show one as JSON."""

    name: Annotated[Positional[str | None], arg(metavar="[NAME]", help_behavior_hint="")] = None
    """A recipe's name."""


@dataclass(frozen=True)
class Demo:
    """Make small videos in which only the motion tells the class, train a light net on them and a 2D net beside it,
    test both, predict a clip, and write a report."""

    out: str = "demo"
    """The folder for videos, runs and report. Videos that are there already are used again."""
    minutes: float = 3.0
    """Longest time of the light net's training."""
    clips_per_class: int = 80
    """Training videos of each of the ten classes."""


@dataclass(frozen=True)
class Doctor:
    """Show versions, codecs and what is missing, try the parts, and say how to mend what does not work.

    The exit status is 1 where something is missing that lean3d needs.
    """

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Report:
    """Write one HTML file about a run: accuracy, curves, confusions, clips with their predictions."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """A run's folder that `lean3d eval` has tested."""
    out: Annotated[str | None, arg(metavar="FILE.html", help_behavior_hint="")] = None
    """The file to write (default: RUN/report.html)."""
    compare: Annotated[tuple[str, ...], arg(metavar="RUN ...", help_behavior_hint="")] = ()
    """Folders of other runs, tested on the same videos, to show beside it."""
    clips: int = 24
    """Clips in the gallery."""
