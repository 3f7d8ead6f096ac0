"""engine/optim.py: groups, schedule, moving average, precise BN, freezing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lean3d.config import InitConfig, OptimConfig
from lean3d.engine.optim import (
    WeightAverage,
    build_optimizer,
    freeze,
    learning_rate,
    limit_steps,
    precise_bn,
    train_mode,
    trained_stages,
)
from lean3d.errors import ConfigError
from lean3d.models import VideoNet, create_model


@pytest.fixture
def model() -> VideoNet:
    torch.manual_seed(0)
    return create_model("c3d_light", num_classes=3, num_frames=8, width=0.125, size=32)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(model, name):
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    free = {id(p) for p in plain["params"]}
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()]
    assert norms and all(id(p) in free for p in norms)
    assert id(model.head.linear.bias) in free and id(model.head.linear.weight) not in free
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_without_a_gradient_decay_leaves_a_weight_alone(model):
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    before = model.stem.state_dict() | {"head": model.head.linear.weight.detach().clone()}
    before = {name: value.clone() for name, value in before.items()}
    model.head.linear.weight.grad = torch.ones_like(model.head.linear.weight)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.stem.state_dict().items())
    assert not torch.equal(before["head"], model.head.linear.weight)


def test_the_rate_grows_linearly_then_falls_as_a_cosine():
    rates = [learning_rate(step, peak=2.0, total_steps=100, warmup_steps=10) for step in range(100)]
    assert rates[:3] == pytest.approx([2 / 11, 4 / 11, 6 / 11])
    assert rates[10] == 2.0 == max(rates)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.pi / 90), rel=1e-6)


@given(st.integers(1, 500), st.integers(0, 500))
def test_any_schedule_stays_between_nothing_and_its_peak(total, warmup):
    rates = [learning_rate(step, peak=1.0, total_steps=total, warmup_steps=warmup) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert top <= total // 5
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_average_follows_the_formula_and_copies_buffers(model):
    average = WeightAverage(model, 0.5)
    expected = model.head.linear.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model.head.linear.weight.add_(1.0)
            next(m for m in model.modules() if isinstance(m, nn.BatchNorm3d)).running_mean.add_(1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head.linear.weight.detach()
        average.update(model, step)
    torch.testing.assert_close(average.model.head.linear.weight, expected)
    assert all(torch.equal(a, b) for a, b in zip(average.model.buffers(), model.buffers(), strict=True))
    assert not average.model.training


def test_a_decay_of_one_is_refused(model):
    with pytest.raises(ConfigError, match=r"optim\.ema"):
        WeightAverage(model, 1.0)


def test_precise_bn_is_the_mean_over_batches_and_changes_nothing_else():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm3d(4), nn.Dropout(0.9), nn.Conv3d(4, 2, 1), nn.BatchNorm3d(2, momentum=0.3))
    net[3].eval()
    batches = [3 * torch.randn(5, 4, 2, 3, 3) + 1 for _ in range(4)]
    parameters = [p.clone() for p in net.parameters()]
    assert precise_bn(net, batches) == 4
    mean = torch.stack([batch.mean((0, 2, 3, 4)) for batch in batches]).mean(0)
    var = torch.stack([batch.var((0, 2, 3, 4)) for batch in batches]).mean(0)
    torch.testing.assert_close(net[0].running_mean, mean)
    torch.testing.assert_close(net[0].running_var, var)
    assert all(torch.equal(a, b) for a, b in zip(parameters, net.parameters(), strict=True))
    assert (net[0].momentum, net[3].momentum) == (0.1, 0.3)
    assert net[0].training and not net[3].training


def test_precise_bn_of_nothing_changes_nothing():
    net = nn.BatchNorm3d(2)
    assert precise_bn(net, []) == 0
    assert net.running_var.tolist() == [1.0, 1.0]


def test_stages_join_in_one_after_another():
    staged = InitConfig(train="staged", stage_epochs=2)
    assert [trained_stages(staged, epoch, 3) for epoch in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert trained_stages(InitConfig(train="head"), 99, 3) == 0
    assert trained_stages(InitConfig(train="all"), 0, 3) == 4


def test_frozen_parts_have_no_gradient_and_their_norms_stand_still(model):
    freeze(model, 1)
    train_mode(model)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 8, 32, 32)).sum().backward()
    last = f"stages.{len(model.stages) - 1}."
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("head.", last)), name
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, frozen[name])}
    assert moved and all(name.startswith(last) for name in moved)


def test_more_stages_than_there_are_is_everything(model):
    freeze(model, 0)
    freeze(model, len(model.stages) + 1)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_parts_can_only_be_trained_whole():
    with pytest.raises(ConfigError, match="use 'all'"):
        freeze(nn.Linear(2, 2), 0)


def test_steps_that_fit_into_the_time():
    assert limit_steps(1000, 0.5, 10, 5.0, 100.0) == 100  # an epoch is 5 s of steps and 5 s of validation
    assert limit_steps(30, 0.5, 10, 5.0, 100.0) == 30
    assert limit_steps(1000, 0.5, 10, 5.0, -3.0) == 1
