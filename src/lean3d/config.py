"""All settings of lean3d, as plain frozen data without torch.

A config is what its JSON is: `to_json` and `from_json` are exact inverses, and an unknown key is refused. The
command line (tyro) shows the text under each field as its help.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

from lean3d.errors import ConfigError, did_you_mean

T = TypeVar("T")

Scalar = Union[bool, int, float, str]

Region = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a frame, as shares of the frame's width and height."""

WHOLE_FRAME: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class InputSpec:
    """The clip that a model wants. The model owns it; data only reads it."""

    num_frames: int = 16
    """Frames in a clip (T)."""
    sampling_rate: int = 2
    """Distance between two sampled frames, in frames of the video."""
    size: tuple[int, int] = (112, 112)
    """Height and width of a frame, in pixels."""
    region: Region = WHOLE_FRAME
    """The part of a video's frames that is looked at, before it is cropped and resized."""
    channels: int = 3
    """3: RGB. 1: grey."""
    mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    """Mean that is taken away, by channel, for pixels in [0, 1]."""
    std: tuple[float, ...] = (0.225, 0.225, 0.225)
    """Standard deviation that is divided by, by channel, for pixels in [0, 1]."""

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.sampling_rate < 1 or min(self.size) < 1:
            raise ConfigError(f"num_frames, sampling_rate and size must be at least 1, got {self}")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(f"mean and std need {self.channels} values each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be positive, got {self.std}")
        left, top, right, bottom = self.region
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ConfigError(
                "region is left, top, right and bottom as shares of the frame, such as 0.25 0.3 0.75 0.8, with left "
                f"before right and top before bottom; got {' '.join(f'{side:g}' for side in self.region)}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and what differs from its own defaults (None: the model's default)."""

    name: str = "c3d_light"
    """A name from `lean3d models`."""
    num_frames: int | None = None
    """Frames in a clip."""
    sampling_rate: int | None = None
    """Distance between two sampled frames, in frames of the video."""
    size: tuple[int, int] | None = None
    """Height and width of a frame, in pixels."""
    region: Region | None = None
    """Only this part of each frame is looked at: LEFT TOP RIGHT BOTTOM, as shares of its width and height."""
    in_channels: int | None = None
    """3: RGB. 1: grey."""
    width: float | None = None
    """Multiplier of all channel counts: 0.25 makes a net that trains on a laptop."""
    dropout: float | None = None
    """Dropout before the classifier."""
    options: dict[str, Scalar] = field(default_factory=dict)
    """Further arguments of the model's function, as NAME VALUE pairs (see `lean3d models NAME`)."""


@dataclass(frozen=True)
class DataConfig:
    """Where the labelled clips are, and how clips are drawn from them."""

    root: str = ""
    """A folder of class folders, or an annotation file (CSV, JSON, list)."""
    format: Literal["auto", "folders", "csv", "kinetics", "something", "ucf101", "hmdb51", "jester"] = "auto"
    """How the labels are written down; auto looks at the root."""
    videos: str | None = None
    """The folder or object store that relative paths start from (default: where the annotation file lies)."""
    where: dict[str, str] = field(default_factory=dict)
    """Only rows of the CSV in which these columns have these values, as COLUMN VALUE pairs."""
    label_column: str = "label"
    """The CSV's column with the class."""
    group_column: str = "group"
    """The CSV's column whose equal values must stay on one side of a split (a person, a source)."""
    groups: str | None = None
    """A CSV beside class folders: first column a file's name (or stem), second its group."""
    fold: int = 1
    """Which of the published splits of UCF101 and HMDB51 (1, 2, 3)."""
    frame_template: str = "{:05d}.jpg"
    """How frames are named where a clip is a folder of pictures."""
    val_share: float = 0.15
    """Share of the training clips that is held back to validate on, where there is no val split."""
    test_share: float = 0.0
    """Share of all clips that is held back to test on, where there is no test split."""
    split_seed: int = 0
    """Seed of the splits that lean3d makes."""
    sampling: Literal["dense", "segments"] = "dense"
    """dense: num_frames at sampling_rate from a random place. segments: one frame from each of num_frames parts."""
    check_files: bool = True
    """Decode each file whole when a loader process first meets it, so that damage outside the drawn clip is found."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes video files: PyAV, or TorchCodec where it is installed."""
    decode_seconds: float = 300.0
    """A file that takes longer than this to be looked through, or to give one clip, counts as bad."""
    shard_cache: str | None = None
    """The folder for shards from an object store (default: in the user's cache)."""
    shard_cache_gb: float = 100.0
    """Gigabytes of them that are kept."""
    max_bad_share: float = 0.05
    """More than this share of files that can't be decoded stops the run."""
    cache_gb: float = 0.0
    """Gigabytes of decoded frames that each loader process keeps (0: none): small, short clips are decoded once."""
    num_workers: int = 2
    """Loader processes (0: load in the main process)."""


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training clip. Every random choice is drawn once a clip, not once a frame."""

    crop: Literal["multi_scale", "random_resized", "random", "center"] = "random_resized"
    """multi_scale: a corner or centre crop at one of `scales` (TSN). random_resized: a random area and aspect ratio."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """The multi-scale crop's sizes, relative to the short side."""
    area: tuple[float, float] = (0.5, 1.0)
    """The random resized crop's area, relative to the frame."""
    aspect: tuple[float, float] = (0.8, 1.25)
    """The random resized crop's aspect ratio, relative to the clip's own."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Horizontal flip. auto: on, and exchanges labels that say left and right; off where one has no counterpart."""
    flip_map: dict[str, str] = field(default_factory=dict)
    """Pairs of labels that a flip exchanges, as LABEL LABEL pairs, beside those that auto finds."""
    speed: float = 0.0
    """Clips are shown up to this much faster or slower: 0.25 is 0.8 to 1.25 times (0: none; dense sampling only)."""
    time_shift: float = 0.0
    """Clips lie up to this share of their length earlier or later, where one must hold a frame too (dense only)."""
    color_jitter: float = 0.2
    """Strength of the change of brightness, contrast, saturation (0: none)."""
    rand_augment: int = 0
    """Number of RandAugment operations a clip (0: none)."""
    rand_augment_magnitude: int = 7
    """Strength of RandAugment, 0 to 10."""
    erasing: float = 0.0
    """Probability of erasing a random box through all frames."""
    mixup: float = 0.0
    """Alpha of mixup (0: none)."""
    cutmix: float = 0.0
    """Alpha of cutmix (0: none)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["sgd", "adamw"] = "adamw"
    """SGD is with Nesterov's momentum."""
    lr: float = 2e-3
    """Peak learning rate, for the whole batch over all processes."""
    weight_decay: float = 0.05
    """Decay of weights; norms and biases have none."""
    momentum: float = 0.9
    """SGD's momentum, AdamW's first beta."""
    epochs: int = 30
    """Passes over the training clips."""
    batch_size: int = 16
    """Clips in one optimizer step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, where memory is short."""
    warmup_epochs: float = 2.0
    """Epochs in which the learning rate grows linearly, before the cosine."""
    clip_norm: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    ema: float = 0.0
    """Decay of the moving average of weights that is validated and saved (0: none)."""
    precise_bn: int = 0
    """Batches with which BN's statistics are taken anew before each validation (0: none)."""
    teachers: tuple[str, ...] = ()
    """Runs (or model files) of the same classes and clips whose mean scores the model follows, too: distillation."""
    teachers_share: float = 0.5
    """Share of the loss that is the distance from the teachers; the rest is that from the labels."""


@dataclass(frozen=True)
class InitConfig:
    """What a training starts from."""

    weights: str | None = None
    """A lean3d checkpoint, or a 2D ResNet's state dict (torchvision's or timm's names), which is inflated."""
    train: Literal["all", "head", "staged"] = "all"
    """all: every weight. head: the classifier alone (linear probing). staged: the head first, then stage by stage."""
    stage_epochs: int = 2
    """Epochs until the next stage joins in, when staged."""


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a video that are averaged in a test: num_clips x num_crops."""

    num_clips: int = 1
    """Clips spread evenly over the video."""
    num_crops: int = 1
    """1: centre. 3: left, centre, right (or top, centre, bottom)."""
    crop_area: float = 1.0
    """Area of a crop, relative to the largest that fits; best near the mean of the training's crops."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise ConfigError(f"crop_area must be above 0 and at most 1, got {self.crop_area}")


@dataclass(frozen=True)
class EventConfig:
    """When a class's scores on a stream are an event."""

    on: float = 0.5
    """Smoothed score at which an event begins."""
    off: float = 0.3
    """Smoothed score below which it ends; at most as much as on."""
    smooth: float | None = None
    """Seconds of scores that are averaged; 0: each by itself (default: an eighth of the span that a score is about)."""
    lag: float = 0.0
    """Seconds by which scores are behind what is to be seen, as those of causal models; eval --stream measures it."""
    min_seconds: float = 0.0
    """Shorter events don't count."""
    labels: tuple[str, ...] = ()
    """Classes that make events (default: all)."""

    def __post_init__(self) -> None:
        if not 0 < self.off <= self.on <= 1:
            raise ConfigError(f"on and off must be scores with 0 < off <= on <= 1, got on {self.on}, off {self.off}")
        if (self.smooth or 0.0) < 0 or self.lag < 0 or self.min_seconds < 0:
            raise ConfigError(
                f"smooth, lag and min_seconds are seconds, at least 0; got {self.smooth}, {self.lag} and "
                f"{self.min_seconds}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Machines, numbers and files."""

    out: str = ""
    """The run's folder (default: runs/RECIPE-MODEL-DATE)."""
    seed: int = 0
    """Every random choice of a run follows from it."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    devices: int = 1
    """Devices (or CPU processes) on each machine."""
    num_nodes: int = 1
    """Machines; start with torchrun when more than one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What processes share: ddp averages gradients; fsdp also spreads weights, gradients and optimizer over them."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are mixed precision; weights stay fp32."""
    save_minutes: float = 5.0
    """Minutes between two checkpoints within an epoch (one is written at each epoch's end anyway)."""
    max_minutes: float = 0.0
    """Shorten the schedule so that the training ends after about this many minutes (0: no limit)."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training is made of."""

    recipe: str = "light"
    """The recipe that this config started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: InitConfig = field(default_factory=InitConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    run: RunConfig = field(default_factory=RunConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, numbers and strings, as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The config of type `cls` that `to_dict` made `values` from.

    Raises:
        ConfigError: An unknown key, or a value of the wrong kind; the message names the key's full path.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key {where}{key}: {did_you_mean(key, names)}")
    return cls(**{key: _from_plain(hints[key], value, f"{where}{key}") for key, value in values.items()})


def to_json(config: Any, indent: int | None = 2) -> str:
    """A config as JSON text."""
    return json.dumps(to_dict(config), indent=indent)


def from_json(cls: type[T], text: str) -> T:
    """The config of type `cls` in a JSON text; see `from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error}") from error
    return from_dict(cls, values)


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as the type `hint`; a wrong kind is refused."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for option in args:
            if type(value) is option or (option is type(None) and value is None):
                return value
        for option in args:
            try:
                return _from_plain(option, value, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}; got {value!r}")
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_from_plain(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {k: _from_plain(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where} must be {hint}, got {value!r}")
