"""The tables of the study, as lists. A table's rows are its nets x tasks x shares x seeds; two tables may share rows.

Every net is trained alike: the settings of the recipe `light` without its changes in time, the same clips of the same
size, the same epochs; each kind of net has its learning rate. A `Net` has a width, or another net as
`as_costly_as`: then its width is the one at which it needs as many multiplications under the fast algorithm as that
one, on a clip of the lips.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import TASKS, Task

from lean3d.config import ModelConfig, Scalar, TrainConfig, from_dict, to_dict
from lean3d.models import cost, create_model, model_arguments
from lean3d.recipes import get_recipe
from lean3d.recipes.papers import study

EPOCHS = {100: 30, 50: 36, 25: 44, 10: 60}
"""By the share of the training clips; fewer clips are shown more often, each net alike."""
SEEDS = (0, 1, 2)
WIDTH = 0.25
LR = 3e-3
"""Of nets without one of their own, which the table `rates` is for."""


@dataclass(frozen=True)
class Net:
    """A net of the study."""

    label: str
    """As tables name it; labels are unique in the study."""
    model: str
    options: dict[str, Scalar] = field(default_factory=dict)
    width: float = WIDTH
    as_costly_as: Net | None = None
    scale: int = 1
    """How many times higher and wider its clips are than the task's, for nets that are made for large ones."""
    lr: float | None = None
    """Learning rate, where it is not `LR`."""
    num_frames: int | None = None
    """Frames of its clips, where they are fewer than the task's: as many times further apart, so of the same time."""


@dataclass(frozen=True)
class Trick:
    """A change of the recipe, by the path of each setting."""

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    teachers: tuple[Net, ...] = ()
    """Nets that are followed, each trained before on the same clips by the recipe itself."""


@dataclass(frozen=True)
class Table:
    """A question and the rows that answer it."""

    name: str
    question: str
    nets: tuple[Net, ...]
    tasks: tuple[str, ...]
    shares: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = SEEDS
    tricks: tuple[Trick, ...] = (Trick("light"),)
    choice: bool = False
    """Variants that something is to be chosen from: they have results on val, and never read a test clip."""

    def rows(self) -> list[Row]:
        """All rows, those of one comparison beside each other."""
        return [
            Row(net, TASKS[task], share, seed, trick, not self.choice)
            for seed in self.seeds
            for task in self.tasks
            for share in self.shares
            for trick in self.tricks
            for net in self.nets
        ]


@dataclass(frozen=True)
class Row:
    """One training and its test."""

    net: Net
    task: Task
    share: int
    seed: int
    trick: Trick
    tested: bool

    @property
    def name(self) -> str:
        """As ``--only`` matches it: task/share/net/recipe/seed."""
        return f"{self.task.name}/{self.share}/{self.net.label}/{self.trick.label}/{self.seed}"

    def teachers(self) -> list[Row]:
        """The trainings whose models this one follows."""
        return [dataclasses.replace(self, net=net, trick=Trick("light")) for net in self.trick.teachers]

    def config(self) -> TrainConfig:
        """The training, without the places of files."""
        base = get_recipe("light")
        task = self.task
        num_frames = self.net.num_frames or task.num_frames
        model = ModelConfig(
            name=self.net.model,
            num_frames=num_frames,
            sampling_rate=task.sampling_rate * task.num_frames // num_frames,
            size=(task.size[0] * self.net.scale, task.size[1] * self.net.scale),
            in_channels=task.channels,
            width=width_of(self.net),
            dropout=base.model.dropout,
            options=self.net.options,
        )
        config = dataclasses.replace(
            base,
            model=model,
            augment=dataclasses.replace(base.augment, speed=0.0, time_shift=0.0),
            data=dataclasses.replace(base.data, val_share=0.0, num_workers=0, cache_gb=2.0),
            optim=dataclasses.replace(base.optim, epochs=EPOCHS[self.share], lr=self.net.lr or LR),
            test=dataclasses.replace(base.test, num_clips=task.num_clips),
            run=dataclasses.replace(base.run, seed=self.seed),
        )
        plain = to_dict(config)
        for path, value in self.trick.changes.items():
            part, name = path.split(".")
            # a factor of the epochs, so that one trick serves all shares
            plain[part][name] = round(plain[part][name] * value) if path == "optim.epochs" else value
        return from_dict(TrainConfig, plain)


def width_of(net: Net) -> float:
    """The width multiplier of a net."""
    if net.as_costly_as is None:
        return net.width
    other = net.as_costly_as
    target = multiplications(other.model, tuple(other.options.items()), width_of(other))
    widths = [number / 64 for number in range(1, 129)]

    def needs(width: float) -> int:
        return multiplications(net.model, tuple(net.options.items()), width)

    low, high = 0, len(widths) - 1
    while low < high:  # the first width that needs at least as many
        middle = (low + high) // 2
        low, high = (low, middle) if needs(widths[middle]) >= target else (middle + 1, high)
    return min(widths[max(0, low - 1) : low + 1], key=lambda width: abs(math.log(needs(width) / target)))


@functools.cache
def multiplications(model: str, options: tuple[tuple[str, Scalar], ...], width: float) -> int:
    """Of a net on a clip of the lips, under the fast algorithm."""
    task = TASKS["digit"]
    with torch.device("meta"):
        net = create_model(
            model,
            num_frames=task.num_frames,
            in_channels=task.channels,
            size=task.size,
            num_classes=10,
            width=width,
            **dict(options),
        )
    return cost(net).multiplications


# ---- the nets

_SMALL = {"stem": "conv", "expansion": 1.0, "layers": 5, "shrink": "stride", "halve_time_from": 4}
_FAST = 1e-2  # five layers take, and want, more than eight

C3D = Net("C3D", "c3d", lr=1e-3)
C3D_TRG = Net("C3D + TRG", "c3d", {"trg": "input"}, lr=1e-3)
C3D_LIGHT = Net("light C3D + TRG", "c3d_light")
C3D_LIGHT_PLAIN = Net("light C3D", "c3d_light", {"trg": "none"})
C3D_ALPHAS = tuple(
    Net(f"light C3D + TRG, alpha {alpha}", "c3d_light", {"expansion": alpha}) for alpha in (0.25, 0.75, 1.0)
)
C3D_NARROW = Net("C3D, as costly as light", "c3d", as_costly_as=C3D_LIGHT, lr=1e-3)
C3D_LIGHT_WIDE = Net("light C3D + TRG, as costly as C3D", "c3d_light", as_costly_as=C3D)

SLOWFAST = Net("SlowFast", "slowfast_r50")
SLOWFAST_LIGHT = Net("light SlowFast + TRG", "slowfast_r50_light")
SLOWFAST_LIGHT_PLAIN = Net("light SlowFast", "slowfast_r50_light", {"trg": "none"})
SLOWFAST_NARROW = Net("SlowFast, as costly as light", "slowfast_r50", as_costly_as=SLOWFAST_LIGHT)
SLOWFAST_LIGHT_WIDE = Net("light SlowFast + TRG, as costly as SlowFast", "slowfast_r50_light", as_costly_as=SLOWFAST)

SMALL = Net("recipe's net", "c3d_light", _SMALL, lr=_FAST)
SMALL_PLAIN = Net("recipe's net without TRG", "c3d_light", {**_SMALL, "trg": "none"}, lr=_FAST)
SMALL_BESIDE = Net("recipe's net, TRG beside", "c3d_light", {**_SMALL, "trg_mode": "beside"}, lr=_FAST)
SMALL_WIDE = Net("recipe's net, twice as wide", "c3d_light", _SMALL, width=0.5, lr=_FAST)
SMALL_NARROW = Net("recipe's net, half as wide", "c3d_light", _SMALL, width=0.125, lr=_FAST)

TRG_PLACES = tuple(
    Net(f"recipe's net, TRG at {place}{how}", "c3d_light", {**_SMALL, "trg": place, "trg_mode": mode}, lr=_FAST)
    for place in ("stage2", "stage3", "stage4", "stage5", "blocks")
    for mode, how in (("replace", ""), ("beside", ", beside"))
)
SMALL_LATER = tuple(
    net for net in TRG_PLACES if net.options["trg"] in ("stage2", "stage3") and net.options["trg_mode"] == "replace"
)
BIG_VIEWS = tuple(
    Net(f"recipe's net{without}, big view in {step}", "c3d_light", {**_SMALL, **trg, "big_view": step}, lr=_FAST)
    for without, trg in (("", {}), (" without TRG", {"trg": "none"}))
    for step in ("temporal", "depthwise", "pointwise")
)

# SmallBigNet's own clips have 8 frames
C2D_50 = Net("C2D-50", "c2d_r50", num_frames=8)
SLOW_50 = Net("SlowOnly-50", "slow_r50", num_frames=8)
FACTORISED_50 = Net("3x1x1 in every block", "smallbig50", {"block": "b"}, num_frames=8)
SMALLBIG_23 = Net("SmallBig-23", "smallbig23", num_frames=8)
SMALLBIG_50 = Net("SmallBig-50", "smallbig50", num_frames=8)
SMALLBIG_50_EXTRA = Net("SmallBig-50-extra", "smallbig50_extra", num_frames=8)
C2D_50_NL = Net("C2D-50 + Non-local", "c2d_r50_nl", num_frames=8)
SLOW_50_NL = Net("SlowOnly-50 + Non-local", "slow_r50_nl", num_frames=8)
C2D_18 = Net("C2D-18", "c2d_r18", num_frames=8)
SLOW_18 = Net("SlowOnly-18", "slow_r18", num_frames=8)
SMALLBIG_18 = Net("SmallBig-18", "smallbig18", num_frames=8)
SMALLBIG_18_TRG = Net("SmallBig-18 + TRG", "smallbig18", {"trg": "input"}, num_frames=8)

# read off at equal milliseconds: each net at three widths
_OTHER_WIDTHS = tuple(
    dataclasses.replace(net, label=f"{net.label}, width {width}", width=width)
    for width in (0.125, 0.375)
    for net in (C2D_50, SLOW_50, SMALLBIG_50, C2D_50_NL, SLOW_50_NL)
)

X3D_S = Net("X3D-S", "x3d_s", width=1.0)
R2PLUS1D_18 = Net("R(2+1)D-18", "r2plus1d_18", lr=1e-3)
MOVINET_A0 = Net("MoViNet-A0, clips of twice the size", "movinet_a0", width=1.0, scale=2)  # the least that it takes


def _behind_trg(net: Net, label: str) -> Net:
    return dataclasses.replace(net, label=label, model="behind_trg", options={"net": net.model})


X3D_S_TRG = _behind_trg(X3D_S, "X3D-S + TRG")
R2PLUS1D_18_TRG = _behind_trg(R2PLUS1D_18, "R(2+1)D-18 + TRG")
MOVINET_A0_TRG = _behind_trg(MOVINET_A0, "MoViNet-A0 + TRG, clips of twice the size")
MOVINETS = (MOVINET_A0, MOVINET_A0_TRG)
"""Nets that can't be built without the checkout that `peers` names."""
LINEAR = Net("linear on pixels", "linear_pixels", width=1.0)
LINEAR_SQUARE = Net("linear on pixels of 48 x 48", "linear_pixels", {"places": 144}, width=1.0)
PEERS = (
    SMALL_NARROW,
    SMALL,
    SMALL_WIDE,
    C3D_LIGHT,
    SMALLBIG_18,
    X3D_S,
    MOVINET_A0,
    R2PLUS1D_18,
    LINEAR,
)


# ---- the tables


def _ablation(name: str, question: str) -> Table:
    """One of SmallBigNet's own studies, on its net of 23 layers and at our width."""
    usual = model_arguments(SMALLBIG_23.model)
    nets = tuple(
        dataclasses.replace(
            SMALLBIG_23,
            label=f"{SMALLBIG_23.label} {' '.join(f'{k}={v}' for k, v in config.model.options.items())}",
            # without what the net has anyway, so that the row is the one of the other tables, and trained once
            options={k: v for k, v in config.model.options.items() if v != usual[k]},
        )
        for config in study(name)
    )
    return Table(f"smallbig-{name}", question, nets, ("motion-plain",), (25,))


_TIMES = {"augment.speed": 0.2, "augment.time_shift": 0.1}

TABLES = {
    table.name: table
    for table in (
        Table(
            "rates",
            "Learning rates, on val: each net of the tables gets the one that is best for its kind",
            (
                *(C3D, C3D_TRG, C3D_LIGHT, SLOWFAST, SLOWFAST_LIGHT, SMALL, SMALL_PLAIN, SMALL_BESIDE),
                *(SMALLBIG_50, SMALLBIG_23, SMALLBIG_18, R2PLUS1D_18, X3D_S, MOVINET_A0),
            ),
            ("motion-plain", "digit"),
            (25,),
            seeds=(0,),
            tricks=tuple(Trick(f"lr {lr}", {"optim.lr": lr}) for lr in (3e-3, 1e-3, 1e-2)),
            choice=True,
        ),
        Table(
            "light",
            "1. Light against dense, with and without TRG, at equal width",
            (C3D, C3D_TRG, C3D_LIGHT_PLAIN, C3D_LIGHT, SMALL, SLOWFAST, SLOWFAST_LIGHT_PLAIN, SLOWFAST_LIGHT),
            ("motion-plain", "fight", "digit", "letter"),
            (25, 100),
        ),
        Table(
            "curves",
            "Learning curves: what few clips do to a light net, a dense one and a linear one",
            (SMALL, C3D_TRG, LINEAR),
            ("digit", "color", "letter", "fight"),
            (10, 25, 50, 100),
        ),
        Table(
            "light-cost",
            "1. Light against dense at equal cost, and several alphas",
            (*C3D_ALPHAS, C3D_NARROW, C3D_LIGHT_WIDE, SLOWFAST_NARROW, SLOWFAST_LIGHT_WIDE),
            ("motion-plain", "digit"),
            (25,),
        ),
        Table(
            "trg",
            "2. TRG on and off, at each place",
            (SMALL_PLAIN, SMALL, SMALL_BESIDE, *TRG_PLACES),
            ("digit", "motion-plain"),
            (25,),
        ),
        Table(
            "trg-fight",
            "2. TRG on and off on surveillance video",
            (SMALL_PLAIN, SMALL, *SMALL_LATER, C3D_LIGHT_PLAIN, C3D_LIGHT, C3D, C3D_TRG),
            ("fight",),
        ),
        Table(
            "motions",
            "1., 2., 4. The generated motions at three difficulties",
            (C3D, C3D_TRG, C3D_LIGHT, SMALL, *SMALL_LATER, SMALL_PLAIN, SLOW_18, SMALLBIG_18, LINEAR_SQUARE),
            ("motion-plain", "motion-distracting", "motion-degraded"),
            (25,),
        ),
        Table(
            "smallbig",
            "3. SmallBig against C2D, SlowOnly, Non-local and 3x1x1, at equal depth",
            (
                C2D_50,
                SLOW_50,
                FACTORISED_50,
                C2D_50_NL,
                SLOW_50_NL,
                SMALLBIG_50,
                SMALLBIG_50_EXTRA,
                SMALLBIG_23,
                C2D_18,
                SLOW_18,
                SMALLBIG_18,
            ),
            ("motion-plain",),
            (25,),
        ),
        Table(
            "smallbig-fight",
            "3. SmallBig against C2D, SlowOnly and Non-local on surveillance video, at equal depth",
            (C2D_50, SLOW_50, C2D_50_NL, SMALLBIG_50, SMALLBIG_23, C2D_18, SLOW_18, SMALLBIG_18),
            ("fight",),
        ),
        Table(
            "smallbig-seconds",
            "3. The same at equal milliseconds: nets at several widths",
            (C2D_50, SLOW_50, SMALLBIG_50, C2D_50_NL, SLOW_50_NL, *_OTHER_WIDTHS),
            ("motion-plain",),
            (25,),
        ),
        _ablation("which-convolution", "3. SmallBig in one convolution: which"),
        _ablation("windows", "3. The pooling's size"),
        _ablation("last-window", "3. The pooling's size before the last convolution"),
        _ablation("pooling", "3. Max or average pooling"),
        _ablation("sharing", "3. One convolution for both views, or two"),
        _ablation("stages", "3. Which stages have SmallBig units"),
        _ablation("blocks", "3. Number of units in a block, and the attention"),
        Table(
            "both",
            "5. Both together: Fully Separable Blocks, SmallBig's big view and TRG",
            (SMALL_PLAIN, SMALL, SMALL_BESIDE, *BIG_VIEWS, SMALLBIG_18, SMALLBIG_18_TRG),
            ("digit", "motion-plain"),
            (25,),
        ),
        Table(
            "peers",
            "Against what a user would pick, trained from scratch alike",
            PEERS,
            ("digit", "color", "letter"),
            (25, 100),
        ),
        Table("peers-fight", "The same on surveillance video", PEERS, ("fight",)),
        Table(
            "peers-trg",
            "What the peers would do with TRG at their input",
            (SMALL, X3D_S, X3D_S_TRG, *MOVINETS, R2PLUS1D_18, R2PLUS1D_18_TRG),
            ("digit",),
            (25,),
        ),
        Table(
            "tricks",
            "One recipe for the light nets: what each change does, on val",
            (SMALL,),
            ("digit", "motion-plain"),
            (25,),
            tricks=(
                Trick("light"),
                Trick("twice as long", {"optim.epochs": 2.0}),
                Trick("other times", _TIMES),
                Trick("other times, twice as long", {**_TIMES, "optim.epochs": 2.0}),
                Trick("no EMA", {"optim.ema": 0.0}),
                Trick("no mixup", {"augment.mixup": 0.0}),
                Trick("mixup 0.4", {"augment.mixup": 0.4}),
                Trick("cutmix 1", {"augment.mixup": 0.0, "augment.cutmix": 1.0}),
                Trick("no label smoothing", {"optim.label_smoothing": 0.0}),
                Trick("RandAugment 2", {"augment.rand_augment": 2}),
                Trick("erasing", {"augment.erasing": 0.25}),
                Trick("lr 3e-3", {"optim.lr": 3e-3}),
                Trick("lr 2e-2", {"optim.lr": 2e-2}),
                Trick("batches of 8", {"optim.batch_size": 8}),
                Trick("weight decay 0.2", {"optim.weight_decay": 0.2}),
                Trick("larger crops only", {"augment.area": [0.85, 1.0]}),
                Trick("distilled from C3D + TRG", teachers=(C3D_TRG,)),
                Trick("distilled from C3D + TRG and from itself", teachers=(C3D_TRG, SMALL)),
            ),
            choice=True,
        ),
    )
}
"""In no order; question 4, which nets use time, is a column of all of them: the clips with their frames shuffled."""
