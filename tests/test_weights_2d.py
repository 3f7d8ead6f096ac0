"""2D ResNets in plain torch, with torchvision's and timm's names, and the nets that start from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lean3d.errors import ConfigError
from lean3d.models import create_model, load_2d_weights


class Block2d(nn.Module):
    def __init__(self, in_channels, channels, stride, bottleneck):
        super().__init__()
        shapes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [in_channels, channels, channels, channels * 4] if bottleneck else [in_channels, channels, channels]
        for i, (kernel, step) in enumerate(shapes):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.convolutions = len(shapes)
        self.downsample = None
        if stride != 1 or in_channels != widths[-1]:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1])
            )

    def forward(self, x):
        y = x
        for i in range(1, self.convolutions + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.convolutions:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet2d(nn.Module):
    """A 2D ResNet with the names of torchvision's and timm's."""

    def __init__(self, depths, bottleneck, num_classes=10, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                inner = width * 2**number
                blocks.append(Block2d(channels, inner, 2 if i == 0 and number else 1, bottleneck))
                channels = inner * (4 if bottleneck else 1)
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def random_resnet(depths, bottleneck, **arguments):
    torch.manual_seed(0)
    net = ResNet2d(depths, bottleneck, **arguments).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def resnet50():
    return random_resnet((3, 4, 6, 3), True)


@pytest.mark.parametrize("name", ["c2d_r50", "smallbig50"])
def test_a_net_starts_as_the_2d_net_on_a_still_clip(name, resnet50):
    model = create_model(name, num_classes=10).eval()
    report = load_2d_weights(model, {f"module.{k}": v for k, v in resnet50.state_dict().items()})
    picture = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = resnet50(picture)
        torch.testing.assert_close(model(picture[:, :, None].repeat(1, 1, 3, 1, 1)), expected, rtol=1e-4, atol=1e-4)
    assert len(report.loaded) == len(resnet50.state_dict())
    assert not report.unexpected
    assert all("big_bn" in key for key in report.fresh)
    assert bool(report.fresh) == (name == "smallbig50")
    assert f"{len(report.loaded)} entries loaded" in str(report)


def test_moving_frames_are_averaged():
    net = random_resnet((2, 2, 2, 2), False)
    model = create_model("c2d_r18", num_classes=10).eval()
    load_2d_weights(model, net.state_dict())
    frames = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(frames).mean(0, keepdim=True)
        torch.testing.assert_close(model(frames.transpose(0, 1)[None]), expected, rtol=1e-4, atol=1e-4)


def test_kernels_in_time_sum_to_the_2d_kernel(resnet50):
    model = create_model("slow_r50", num_classes=400)
    before = model.head.linear.weight.clone()
    report = load_2d_weights(model, resnet50.state_dict())
    weight = model.stages[2][0].units[0].conv.weight
    assert weight.shape[2] == 3
    torch.testing.assert_close(weight.sum(2), resnet50.layer3[0].conv1.weight)
    assert torch.equal(weight[:, :, 0], weight[:, :, 2])
    assert torch.equal(model.head.linear.weight, before)
    assert set(report.fresh) == {"head.linear.weight", "head.linear.bias"}


def test_grey_clips_get_the_sum_over_colours(resnet50):
    model = create_model("c2d_r50", in_channels=1)
    load_2d_weights(model, resnet50.state_dict())
    torch.testing.assert_close(model.stem.conv.weight[:, 0, 0], resnet50.conv1.weight.sum(1))


def test_another_depth_is_refused_and_nothing_changes(resnet50):
    model = create_model("smallbig101")
    before = model.stem.conv.weight.clone()
    with pytest.raises(ConfigError, match=r"3, 4, 6, 3 blocks of 3 .*smallbig101 has 3, 4, 23, 3 blocks of 3"):
        load_2d_weights(model, resnet50.state_dict())
    assert torch.equal(model.stem.conv.weight, before)
    with pytest.raises(ConfigError, match="c2d_r18 has 2, 2, 2, 2 blocks of 2"):
        load_2d_weights(create_model("c2d_r18"), resnet50.state_dict())


def test_other_nets_are_refused(resnet50):
    state = resnet50.state_dict()
    with pytest.raises(ConfigError, match="width must be 1"):
        load_2d_weights(create_model("c2d_r50", width=0.5), state)
    with pytest.raises(ConfigError, match="c3d doesn't have the convolutions of a ResNet"):
        load_2d_weights(create_model("c3d", width=0.125), state)
    with pytest.raises(ConfigError, match="no ResNet in these weights"):
        load_2d_weights(create_model("c2d_r18"), {"features.0.weight": torch.zeros(1)})
    deep = {**state, "conv1.0.weight": torch.zeros(32, 3, 3, 3)}
    with pytest.raises(ConfigError, match="deep stem"):
        load_2d_weights(create_model("c2d_r50"), deep)


def test_what_has_no_place_is_reported(resnet50):
    state = {**resnet50.state_dict(), "layer1.0.se.fc1.weight": torch.zeros(4, 4, 1, 1)}
    report = load_2d_weights(create_model("c2d_r50", num_classes=10), state)
    assert report.unexpected == ("layer1.0.se.fc1.weight",)
