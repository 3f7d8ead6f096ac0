"""engine.distill: a model that follows others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lean3d import checkpoint
from lean3d.config import InputSpec
from lean3d.engine import fit
from lean3d.engine.distill import TEMPERATURE, Teachers
from lean3d.engine.logging import METRICS_FILE, read_rows
from lean3d.errors import CheckpointError, ConfigError
from lean3d.models import create_model
from tiny_runs import CLASSES, tiny_config, write_clips

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def kept(path: Path, classes: tuple[str, ...], seed: int) -> tuple[str, torch.nn.Module]:
    """A small model with other scores for other clips, in a file."""
    torch.manual_seed(seed)
    model = create_model("c3d_light", num_classes=len(classes), num_frames=4, size=(16, 16), width=0.125)
    clips = torch.randn(8, 3, 4, 16, 16)
    for _ in range(20):  # with statistics of fresh BN nothing gets through
        model(clips)
    model.eval()
    with torch.no_grad():
        model.head.linear.weight /= model(clips).std(0).mean()
        model.head.linear.bias -= model(clips).mean(0)
    return str(checkpoint.save_model(path, model, classes, {})), model


def test_teachers_are_followed_in_the_order_of_the_training_s_classes(tmp_path):
    """By hand, in float64: the mean of two teachers, of which one has its classes in another order."""
    first, model_1 = kept(tmp_path / "1.safetensors", ("a", "b", "c"), 1)
    second, model_2 = kept(tmp_path / "2.safetensors", ("c", "a", "b"), 2)
    clips, scores = torch.randn(5, 3, 4, 16, 16), torch.randn(5, 3, requires_grad=True)
    teachers = Teachers([first, second], model_1.input_spec, ("a", "b", "c"), CPU)

    with torch.no_grad():
        one, other = model_1(clips).double(), model_2(clips).double()[:, [1, 2, 0]]
    target = ((one / TEMPERATURE).softmax(1) + (other / TEMPERATURE).softmax(1)) / 2
    ours = scores.detach().double().requires_grad_()
    by_hand = TEMPERATURE**2 * (target * (target.log() - (ours / TEMPERATURE).log_softmax(1))).sum(1).mean()
    loss = teachers.loss(scores, clips)
    assert (target - target.mean(0)).abs().max() > 0.01  # they tell clips apart, so the order counts
    assert_close(loss.double(), by_hand, rtol=1e-3, atol=1e-5)  # BN of large numbers, in another order
    loss.backward()
    by_hand.backward()
    assert_close(scores.grad.double(), ours.grad, rtol=1e-2, atol=1e-5)
    assert all(parameter.grad is None for model, _ in teachers.members for parameter in model.parameters())


def test_a_model_follows_its_teacher_rather_than_its_labels(tmp_path):
    """A classifier that knows bright from dark learns from clips with the labels exchanged, and follows itself."""
    right, wrong = write_clips(tmp_path / "right"), write_clips(tmp_path / "wrong")
    for split in ("train", "val"):
        (wrong / split / "bright").rename(wrong / split / "other")
        (wrong / split / "dark").rename(wrong / split / "bright")
        (wrong / split / "other").rename(wrong / split / "dark")
    shared = {"optim_epochs": 8, "optim_precise_bn": 6, "augment_color_jitter": 0.0}
    teacher = fit(tiny_config(right, tmp_path / "teacher", **shared))
    shared |= {"init_weights": str(teacher.run), "init_train": "head", "optim_name": "sgd", "optim_lr": 3e-3}
    follows = {"optim_teachers": (str(teacher.run),), "optim_teachers_share": 1.0}
    last = {
        name: read_rows(fit(tiny_config(wrong, tmp_path / name, **shared, **changes)).run / METRICS_FILE)[-1]
        for name, changes in (("student", follows), ("alone", {}))
    }
    knows, student, alone = (row["val_top1"] for row in (teacher.metrics, last["student"], last["alone"]))
    assert knows >= 0.75 and student <= 1 - knows + 0.125 and alone >= student + 0.25


@pytest.mark.parametrize(
    "classes, spec, says",
    [
        ((*CLASSES[:-1], "another"), {}, "another"),
        (CLASSES, {"num_frames": 8}, "num_frames=8.*--model.num-frames"),
        (CLASSES, {"mean": (0.0, 0.0, 0.0)}, "mean"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(tmp_path, classes, spec, says):
    file, model = kept(tmp_path / "1.safetensors", tuple(CLASSES), 0)
    wanted = dataclasses.replace(model.input_spec, **spec)
    assert isinstance(wanted, InputSpec)
    with pytest.raises(ConfigError, match=f"--optim.teachers.*{says}"):
        Teachers([file], wanted, classes, CPU)


def test_a_teacher_that_is_missing_is_an_error_before_there_is_a_run(tmp_path):
    clips = write_clips(tmp_path / "clips")
    config = tiny_config(clips, tmp_path / "run", optim_teachers=(str(tmp_path / "nowhere"),))
    with pytest.raises(CheckpointError, match="nowhere"):
        fit(config)
    assert not (tmp_path / "run" / "config.json").exists()
