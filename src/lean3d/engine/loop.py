"""The training loop.

    config -> list of clips -> model -> loader -> | train -> save -> [precise BN] -> validate -> log | an epoch

Everything random follows from (seed, epoch, place) or (seed, step, rank), and everything else that a step depends on is
in the checkpoint; so a training that is killed and resumed is the training that was not. The checkpoint at an epoch's
end is written before the validation, which is a function of it: a kill in the validation only repeats it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from torch.optim import Optimizer

from lean3d import checkpoint
from lean3d.config import TrainConfig, ViewsConfig, from_json, to_dict, to_json
from lean3d.data.dataset import BadFile, BadFileLog, appearance_of_batch
from lean3d.data.loader import Batch, test_loader, train_loader
from lean3d.data.manifest import Manifest, read_manifest
from lean3d.data.transforms import Appearance, BatchMix, normalize
from lean3d.engine import setup
from lean3d.engine.distill import Teachers
from lean3d.engine.distributed import convert_sync_batchnorm, gather, load_optimizer, load_spread, shard, whole
from lean3d.engine.logging import (
    METRICS_FILE,
    Row,
    RunLog,
    draw_curves,
    environment,
    epoch_line,
    read_confusion,
    read_rows,
    write_confusion,
)
from lean3d.engine.optim import (
    WeightAverage,
    build_optimizer,
    freeze,
    learning_rate,
    limit_steps,
    precise_bn,
    set_learning_rate,
    train_mode,
    trained_stages,
)
from lean3d.engine.stop import Interrupted, PassOn, StopSignal
from lean3d.errors import ConfigError, DataError, Lean3dError
from lean3d.evaluate import Results, Scores, collect_scores, draw_confusion, results_from_scores
from lean3d.models import VideoNet, model_from_config

LOG_EVERY = 10
"""Steps between two rows of `metrics.jsonl`."""
SYNC_EVERY = 10
"""Steps between two looks at the loss on a GPU, where each look waits for all work given to it."""
CONFUSION_FILE = "confusion.csv"


@dataclass(frozen=True)
class FitResult:
    """A finished training."""

    run: Path
    """Its folder; `lean3d.load_model(run)` takes it."""
    metrics: dict[str, float]
    """Numbers of the epoch whose model was kept: ``epoch``, ``step``, ``loss``, ``val_top1``, ``bad_files``, ..."""


def fit(config: TrainConfig | None = None, *, resume: str | Path | None = None) -> FitResult:
    """Train a model, and leave a run's folder with it.

    Args:
        config: What to train, from scratch. A recipe with changes: ``dataclasses.replace(get_recipe("light"), ...)``.
        resume: Instead of a config: the folder of a run that was stopped or killed. It goes on as if it never had
            been; on a CPU to the bit. A run that is finished is given back as it is. ``torchrun --max-restarts`` needs
            no word of it: a run of the same config that has begun is gone on with.

    Returns:
        The folder and the numbers of the model in it. With several processes from torchrun each gets them.

    Raises:
        ConfigError: Settings don't fit together, or to the machine or data.
        DataError: The data can't be read, have changed since the run began, or differ between processes.
        TooManyBadFilesError: More files than `data.max_bad_share` can't be decoded.
        CheckpointError: The run or the initial weights can't be read.
        TrainingError: The loss became infinite or no number.
        Interrupted: Ctrl-C or SIGTERM came; all is saved, and the message says how to go on.
    """
    if (config is None) == (resume is None):
        raise ConfigError("fit takes either a config for a new run, or resume=FOLDER of one to go on with")
    if config is not None and setup.goes_on(config):
        resume = config.run.out
    if resume is not None:
        run = Path(resume)
        config = setup.read_run_config(run)
    else:
        assert config is not None
        run = setup.run_folder(config)
    fabric = setup.make_fabric(config.run)
    if fabric.world_size == 1:
        fabric.launch()
        return _Training(fabric, config, run, resume is not None).fit()
    # Under torchrun there is nobody to pass signals on to, and one that came while the processes still look for each
    # other must end this one.
    with contextlib.nullcontext() if is_torchelastic_launched() else PassOn():
        outcome = fabric.launch(cast(Any, _fit_rank), to_json(config), run, resume is not None)
    if isinstance(outcome, BaseException):
        raise outcome
    return FitResult(*outcome)


def _fit_rank(
    fabric: Fabric, config: str, run: Path, resume: bool
) -> tuple[Path, dict[str, float]] | Lean3dError | Interrupted:
    """One of several processes. Errors are handed back, since an exception would reach the parent as mere text.

    Fabric looks for tensors in what goes in and comes out, and refuses frozen dataclasses: so JSON in, a tuple out.
    """
    # Axes of length 1 may have any stride, and DDP warns of each that is not its own.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    run = fabric.broadcast(run)
    try:
        result = _Training(fabric, from_json(TrainConfig, config), run, resume).fit()
        return result.run, result.metrics
    except (Lean3dError, Interrupted) as error:
        if fabric.global_rank:
            print(f"process {fabric.global_rank}: {error}", file=sys.stderr)
        return error


def _augments(device: torch.device) -> bool:
    """Whether clips get their looks there: a GPU has time for it; on a CPU the loader's processes do it meanwhile."""
    return device.type == "cuda"


class _Training:
    """One process's part of a training, from its first step in this process to its last."""

    def __init__(self, fabric: Fabric, config: TrainConfig, run: Path, resume: bool):
        self.began = time.monotonic()
        self.fabric, self.config, self.run = fabric, config, run
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.first = fabric.is_global_zero
        self.log = RunLog(run, active=self.first)
        setup.check(config, self.world)
        if fabric.device.type == "cpu":
            setup.keep_freed_memory()

        manifest = read_manifest(config.data)
        setup.check_same_data(self._gather(manifest.digest()), self._gather(len(manifest.clips)))
        if resume:
            setup.check_manifest(run, manifest)
        train_clips, self.val_clips = manifest.select("train"), manifest.select("val")
        if not train_clips:
            raise DataError(f"{manifest.source} has no clips in the split train; see --data.format and --data.root")
        self.classes = manifest.classes

        torch.manual_seed(config.run.seed)
        model = model_from_config(config.model, len(self.classes))
        # The first process decides: others may not see yet what it wrote to a network's disk just before a kill.
        start = fabric.broadcast(checkpoint.latest_training_state(run) if resume else None)
        state = checkpoint.load_training_state(start, model) if start else {}
        if config.init.weights and start is None:
            self.log.say(setup.load_initial_weights(model, config.init.weights, self.classes))
        self.spec = model.input_spec
        self.appearance = Appearance(config.augment, self.spec) if _augments(fabric.device) else None
        self.loader = train_loader(
            train_clips,
            self.classes,
            config.data,
            self.spec,
            config.augment,
            batch_size=config.optim.batch_size,
            seed=config.run.seed,
            rank=self.rank,
            world=self.world,
            pin_memory=fabric.device.type == "cuda",
            whole=self.appearance is None,
        )
        # One for the whole run: its processes remember which files they found whole.
        self.val_loader = (
            test_loader(
                self.val_clips,
                config.data,
                self.spec,
                ViewsConfig(crop_area=config.test.crop_area),
                rank=self.rank,
                world=self.world,
            )
            if self.val_clips
            else None
        )
        self.epoch_steps = len(self.loader)
        self.mix = BatchMix(config.augment.mixup, config.augment.cutmix, len(self.classes))
        self.bad_files = BadFileLog(len(train_clips) + len(self.val_clips), config.data.max_bad_share)

        self.model = (convert_sync_batchnorm(model) if self.world > 1 else model).to(fabric.device)
        self.average = WeightAverage(self.model, config.optim.ema) if config.optim.ema > 0 else None
        teachers = config.optim.teachers
        self.teachers = Teachers(teachers, self.spec, self.classes, fabric.device) if teachers else None
        self.wrapped: Any = None
        self.spread = self.world > 1 and config.run.strategy == "fsdp"
        if self.spread:
            self.plain = copy.deepcopy(self.model).eval()  # what is validated and saved is put together in it
            self.wrapped = fabric.setup_module(self.model)
            if self.average:
                shard(self.average.model, next(self.model.parameters()).device_mesh)  # type: ignore[attr-defined]
        self.optimizer = cast(Optimizer, fabric.setup_optimizers(build_optimizer(self.model, config.optim)))
        self.step = 0
        self.total = config.optim.epochs * self.epoch_steps
        self.limited = not config.run.max_minutes
        self.seconds_before = 0.0
        self.epoch_loss, self.row_loss = [0.0, 0], [0.0, 0]  # sum and count
        self.losses: list[Tensor] = []  # of steps that nobody looked at yet
        self.new_bad: list[BadFile] = []
        self.recent: deque[tuple[int, Batch]] = deque(maxlen=config.optim.precise_bn or 1)
        self.stop = StopSignal()
        self.stages: int | None = None
        self.meter = _Meter()
        self.first_step: tuple[float, int] | None = None  # when the first step of this process was done, and its number
        self.saved_at = time.monotonic()
        self._restore(state)
        if self.first:
            self._write_start(manifest, resume)
        rows = self.log.open(self.step)
        self.rows: list[Row] = fabric.broadcast([row for row in rows if row["kind"] == "epoch"])

    # ---- from the first step to the last

    def fit(self) -> FitResult:
        try:
            with self.stop:
                while True:
                    if self.step and (self.step % self.epoch_steps == 0 or self.step == self.total):
                        self._end_epoch()
                    if self.step >= self.total:
                        break
                    self._train_epoch()
        finally:
            self.log.close()
        best = self._best_row()
        assert best is not None
        if self.first:
            draw_curves(read_rows(self.run / METRICS_FILE), self.run / "curves.png")
            if (self.run / CONFUSION_FILE).is_file():
                draw_confusion(self.run / "confusion.png", *read_confusion(self.run / CONFUSION_FILE))
        self.log.say(f"done after {self.step} steps; the model is in {self.run / checkpoint.MODEL_FILE}")
        return FitResult(self.run, {k: v for k, v in best.items() if isinstance(v, int | float)})

    def _train_epoch(self) -> None:
        """Train to the end of an epoch, from wherever in it the training is."""
        epoch, start = divmod(self.step, self.epoch_steps)
        self._set_stages(epoch)
        train_mode(self.model)
        self.recent.clear()
        self.meter = _Meter()
        self.log.bar(f"epoch {epoch + 1}/{self.epochs}", min(self.epoch_steps, self.total - self.step + start), start)
        for batch in self.meter.waiting(self.loader.batches(epoch, start)):
            self.losses.append(self._train_step(batch))
            self.new_bad += batch.bad
            if self.config.optim.precise_bn:
                self.recent.append((self.step, batch))
            self.step += 1
            self.meter.steps += 1
            self.first_step = self.first_step or (time.monotonic(), self.step)
            at_end = self.step % self.epoch_steps == 0 or self.step == self.total
            if at_end or self.fabric.device.type == "cpu" or self.step % SYNC_EVERY == 0:
                self._synchronise(at_end)
            if self.step >= self.total:
                break
        self._save()

    def _train_step(self, batch: Batch) -> Tensor:
        """One optimizer step; its mean loss in this process, not waited for."""
        optim, seed = self.config.optim, self.config.run.seed
        set_learning_rate(self.optimizer, self._lr(self.step))
        torch.manual_seed(setup.step_seed(seed, self.step, self.rank))  # dropout
        generator = torch.Generator().manual_seed(setup.step_seed(seed, self.step, self.rank, 1))
        size = len(batch.clips) // optim.accumulate
        total = torch.zeros((), device=self.fabric.device)
        clips = self._clips(batch, self.step // self.epoch_steps)
        for part in range(optim.accumulate):
            some = slice(part * size, (part + 1) * size)
            labels = batch.labels[some].to(self.fabric.device, non_blocking=True)
            mixed, targets = self.mix(normalize(clips[some], self.spec), labels, generator)
            last = part == optim.accumulate - 1
            waits = contextlib.nullcontext() if last or self.world == 1 else self.fabric.no_backward_sync(self.wrapped)
            with waits:
                loss = self._loss(self.wrapped(mixed), targets, mixed)
                self.fabric.backward(loss / optim.accumulate)
            total += loss.detach() / optim.accumulate
        if optim.clip_norm:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=optim.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, self.step)
        return total

    def _loss(self, scores: Tensor, targets: Tensor, clips: Tensor) -> Tensor:
        """How far the scores of clips are from their labels, and from what the teachers say."""
        optim = self.config.optim
        loss = F.cross_entropy(scores, targets, label_smoothing=optim.label_smoothing)
        if self.teachers is None:
            return loss
        with self.fabric.autocast():
            distance = self.teachers.loss(scores, clips)
        return (1 - optim.teachers_share) * loss + optim.teachers_share * distance

    def _clips(self, batch: Batch, epoch: int) -> Tensor:
        """A batch's clips on the device, as they are trained on: uint8 (N, C, T, h, w)."""
        clips = batch.clips.to(self.fabric.device, non_blocking=True)
        if self.appearance is None:
            return clips
        return appearance_of_batch(clips, batch.indices, self.appearance, self.config.run.seed, epoch)

    def _synchronise(self, at_end: bool) -> None:
        """Look at the last losses together, and decide together what all processes must do together."""
        first_step = self.step - len(self.losses)
        wants_save = self.first and time.monotonic() - self.saved_at >= 60 * self.config.run.save_minutes
        asks = [bool(self.stop.signum), bool(self.new_bad), wants_save, self._limit() if self.first else 0]
        heard = torch.tensor(asks, dtype=torch.float64)
        losses = torch.stack(self.losses).cpu().double() / self.world
        if self.world > 1:
            together = torch.cat([heard, losses]).to(self.fabric.device)
            dist.all_reduce(together)
            heard, losses = together.cpu().split([len(asks), len(losses)])
        stop, any_bad, save, total = heard.tolist()
        self.losses.clear()
        if any_bad:
            self.bad_files.add(file for part in self._gather(self.new_bad) for file in part)
            self.new_bad.clear()
            if self.first:
                self.bad_files.write_csv(self.run / "bad_files.csv")
        if total:
            self._shorten(int(total))
        for number, loss in enumerate(losses.tolist(), first_step + 1):
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise setup.not_finite(number, "loss", self._lr(number - 1))
            for tally in (self.epoch_loss, self.row_loss):
                tally[0] += loss
                tally[1] += 1
        self._log_steps(len(losses))
        if stop or (save and not at_end):
            self._save()
        if stop:
            raise Interrupted(self.run, self.step, self.stop.signum or 2)

    # ---- the end of an epoch

    def _end_epoch(self) -> None:
        """Validate and keep the model, unless that was done before a kill."""
        if any(row["step"] == self.step for row in self.rows):
            return
        epoch = (self.step - 1) // self.epoch_steps
        row: Row = {
            "kind": "epoch",
            "step": self.step,
            "epoch": epoch,
            "loss": self.epoch_loss[0] / max(1, self.epoch_loss[1]),
            **self._speed(),
        }
        model = self._whole(self.average.model if self.average else self.model)
        if self.config.optim.precise_bn:
            model = copy.deepcopy(model)
            with self.fabric.autocast():
                precise_bn(model, self._recent_clips(epoch))
        results = self._validate(model)
        if results is not None:
            self.bad_files.add(results.bad)
            row |= {f"val_{name}": value for name, value in results.metrics().items()}
            row["val_bad"] = [list(file) for file in results.bad]
        row["bad_files"] = len(self.bad_files)
        best = self._best_row()
        kept = best is None or row.get("val_top1", 1.0) >= best.get("val_top1", 0.0)
        setup.check_finite(model, self.step, self._lr(self.step - 1))
        if self.first:
            if kept:
                metrics = {name: value for name, value in row.items() if isinstance(value, int | float)}
                checkpoint.save_model(
                    self.run / checkpoint.MODEL_FILE, model, self.classes, to_dict(self.config), {"metrics": metrics}
                )
                if results is not None:
                    write_confusion(self.run / CONFUSION_FILE, results.confusion, self.classes)
            self.bad_files.write_csv(self.run / "bad_files.csv")
        self.log.write(row)  # last: this row says that the epoch is over
        self.rows.append(row)
        self.log.say(epoch_line(row, self.epochs, best=kept and results is not None))
        self.epoch_loss = [0.0, 0]

    def _validate(self, model: VideoNet) -> Results | None:
        """One centre clip of each validation video, each video in one process; None where there is no such video."""
        if self.val_loader is None:
            return None
        scores = collect_scores(
            model,
            self._until_stopped(self.val_loader),
            len(self.classes),
            device=self.fabric.device,
            precision=self.config.run.precision,
        )
        return results_from_scores(Scores.merge(self._gather(scores)), self.classes)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Let Ctrl-C end a validation, whose checkpoint is written; several processes would have to agree first."""
        for batch in batches:
            if self.stop.signum and self.world == 1:
                raise Interrupted(self.run, self.step, self.stop.signum)
            yield batch

    def _recent_clips(self, epoch: int) -> Iterator[Tensor]:
        """Inputs of the epoch's last batches; those from before a kill are loaded anew."""
        in_epoch = self.step - epoch * self.epoch_steps
        start = max(0, in_epoch - self.config.optim.precise_bn)
        have = dict(self.recent)
        missing = [step for step in range(start, in_epoch) if epoch * self.epoch_steps + step not in have]
        if missing:
            for step, batch in zip(range(start, missing[-1] + 1), self.loader.batches(epoch, start), strict=False):
                have[epoch * self.epoch_steps + step] = batch
        for step in sorted(have):
            yield normalize(self._clips(have[step], epoch), self.spec)

    def _best_row(self) -> Row | None:
        """The epoch whose model is kept: the best on val, of equal ones the last; without val the last."""
        return max(self.rows, key=lambda row: (row.get("val_top1", 0.0), row["step"]), default=None)

    # ---- parts of a step

    @property
    def epochs(self) -> int:
        """Epochs of the whole schedule; the last may be a part of one."""
        return -(-self.total // self.epoch_steps)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.epoch_steps)
        return learning_rate(step, peak=optim.lr, total_steps=self.total, warmup_steps=warmup)

    def _set_stages(self, epoch: int) -> None:
        """Wrap the model for its processes, anew where other parts of it begin to learn."""
        stages = trained_stages(self.config.init, epoch, len(self.model.stages))
        if stages == self.stages:
            return
        self.stages = stages
        if self.config.init.train != "all":
            freeze(self.model, stages)
        if not self.spread:
            self.wrapped = self.fabric.setup_module(self.model)

    def _whole(self, model: VideoNet) -> VideoNet:
        """A model that any process can use alone; all call it."""
        return gather(model, self.plain) if self.spread else model

    def _limit(self) -> int:
        """All steps that fit into `run.max_minutes`, once the speed is known; 0 until then, and ever after."""
        budget = 60 * self.config.run.max_minutes
        if self.limited or self.first_step is None or self._seconds() < 0.1 * budget:
            return 0
        since, first = self.first_step
        if self.step - first < 3:
            return 0
        step_time, validation = (time.monotonic() - since) / (self.step - first), 0.0
        if first // self.epoch_steps == (self.step - 1) // self.epoch_steps:  # the time so far has no validation in it
            # A clip without backward pass takes about a third of the time.
            validation = step_time * len(self.val_clips) / self.config.optim.batch_size / 3
        left = budget - self._seconds()
        return self.step + limit_steps(self.total - self.step, step_time, self.epoch_steps, validation, left)

    def _shorten(self, total: int) -> None:
        """End the schedule at step `total`; that number is part of the checkpoint."""
        if total < self.total:
            self.log.say(
                f"{total} steps ({total / self.epoch_steps:.1f} epochs) instead of {self.total}, to end within "
                f"{self.config.run.max_minutes:g} minutes"
            )
        self.total, self.limited = total, True

    def _log_steps(self, steps: int) -> None:
        row = {
            "kind": "step",
            "step": self.step,
            "epoch": (self.step - 1) // self.epoch_steps,
            "loss": self.row_loss[0] / max(1, self.row_loss[1]),
            "lr": self._lr(self.step - 1),
            **self._speed(),
            "bad_files": len(self.bad_files),
        }
        self.log.advance(steps, row, (self.total - self.step) * self.meter.seconds_per_step())
        if self.step % LOG_EVERY == 0:
            self.log.write(row)
            self.row_loss = [0.0, 0]

    def _speed(self) -> dict[str, float]:
        seconds = self.meter.seconds_per_step()
        return {
            "clips_per_s": round(self.config.optim.batch_size / seconds, 2) if seconds else 0.0,
            "data_wait": round(self.meter.wait_share(), 4),
        }

    def _seconds(self) -> float:
        """Time spent on this training, before a kill included."""
        return self.seconds_before + time.monotonic() - self.began

    def _gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    # ---- what lasts

    def _save(self) -> None:
        """Write a checkpoint. All processes call it; the first writes."""
        model = self._whole(self.model)
        setup.check_finite(model, self.step, self._lr(self.step - 1))
        optimizer = whole(self.optimizer.state_dict())
        average = whole(self.average.model.state_dict()) if self.average else {}
        if self.first:
            state = {
                "total": self.total,
                "limited": self.limited,
                "seconds": self._seconds(),
                "epoch_loss": self.epoch_loss,
                "row_loss": self.row_loss,
                "bad_files": {path: list(entry) for path, entry in self.bad_files.files.items()},
                "optimizer": optimizer,
                "scaler": self.fabric.strategy.precision.state_dict(),
                "average": average,
            }
            checkpoint.save_training_state(self.run, self.step, model, state, self.classes, to_dict(self.config))
        self.fabric.barrier()
        self.saved_at = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.step, self.total, self.limited = state["step"], state["total"], state["limited"]
        self.seconds_before = state["seconds"]
        self.epoch_loss, self.row_loss = state["epoch_loss"], state["row_loss"]
        self.bad_files.files = {path: (reason, count) for path, (reason, count) in state["bad_files"].items()}
        load_optimizer(self.optimizer, state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        if self.average:
            load_spread(self.average.model, state["average"])

    def _write_start(self, manifest: Manifest, resume: bool) -> None:
        """The run's folder as it stands before the first step, or what is new when it goes on."""
        file = self.run / "environment.json"
        if not resume:
            setup.write_run_config(self.run, self.config)
            setup.write_manifest(self.run, manifest)
            self.bad_files.write_csv(self.run / "bad_files.csv")
        starts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        file.write_text(json.dumps([*starts, environment(self.step)], indent=1) + "\n", encoding="utf-8")
        where = f"{self.fabric.device.type}, {self.world} process{'es' if self.world > 1 else ''}"
        self.log.say(
            f"{self.run}: {self.config.model.name}, {len(self.loader.dataset)} clips to train on, "  # type: ignore[arg-type]
            f"{len(self.val_clips)} to validate, {len(self.classes)} classes, {self.total} steps of "
            f"{self.config.optim.batch_size} clips, {where}" + (f"; goes on after step {self.step}" if resume else "")
        )


class _Meter:
    """Time of steps, and the share of it that was spent waiting for data. The first step, a start-up, is left out."""

    def __init__(self) -> None:
        self.steps = 0
        self._waited = 0.0
        self._since: float | None = None
        self._counted_from = 0

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time they let wait taken."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            if self._since is not None:
                self._waited += time.monotonic() - asked
            yield batch
            if self._since is None:
                self._since, self._counted_from = time.monotonic(), self.steps

    def seconds_per_step(self) -> float:
        """0 until there is something to say."""
        steps = self.steps - self._counted_from
        if self._since is None or steps < 1:
            return 0.0
        return (time.monotonic() - self._since) / steps

    def wait_share(self) -> float:
        """From 0 to 1."""
        return 0.0 if self._since is None else min(1.0, self._waited / max(1e-9, time.monotonic() - self._since))
