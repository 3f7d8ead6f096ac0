"""Whatever is in `list_models()` runs, learns, costs something and is rebuilt: a new model is tested for free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lean3d import checkpoint
from lean3d.errors import ConfigError
from lean3d.models import VideoNet, cost, create_model, list_models, model_arguments, model_from_spec, model_summary

SMALL: dict[str, Any] = {"width": 0.125, "num_classes": 5}
CLIPS = [(4, 32, 32), (5, 48, 33)]


@pytest.fixture(scope="module", params=list_models())
def model(request: pytest.FixtureRequest) -> VideoNet:
    torch.manual_seed(0)
    return create_model(request.param, **SMALL)


def zero_initialised(model: nn.Module) -> set[str]:
    """Names of BNs that start at weight 0, so that what they follow gets no gradient in the first step."""
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm3d) and not module.weight.any()
    }


def test_forward_at_any_length_and_size(model: VideoNet) -> None:
    model.eval()
    with torch.inference_mode():
        for t, h, w in CLIPS:
            scores = model(torch.randn(2, 3, t, h, w))
            assert scores.shape == (2, 5)
            assert scores.isfinite().all()
        one = torch.randn(1, 3, 1, 32, 32)  # a picture
        assert model(one).isfinite().all()


def test_clips_of_a_batch_are_independent(model: VideoNet) -> None:
    model.eval()
    clips = torch.randn(2, 3, *CLIPS[0])
    with torch.inference_mode():
        both, first = model(clips), model(clips[:1])
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)


def test_one_training_step(model: VideoNet) -> None:
    """The loss is finite and every parameter gets a gradient, but for those in front of a BN that starts at zero."""
    model = model_from_spec(model.spec).train()
    zeros = zero_initialised(model)
    for name, module in model.named_modules():
        if name in zeros:
            nn.init.constant_(module.weight, 0.5)  # type: ignore[arg-type]
    loss = F.cross_entropy(model(torch.randn(2, 3, 4, 64, 64)), torch.tensor([0, 3]))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_zero_initialised_norms(model: VideoNet) -> None:
    """Said so here: SmallBig's big BNs and attention, and the non-local blocks; all others start at one."""
    kind = model.spec["name"]
    zeros = zero_initialised(model_from_spec(model.spec))
    if kind.startswith("smallbig") or kind.endswith(("_nl", "_extra")):
        assert zeros
        assert all("big_bn" in name or ".before." in name or "non_local" in name for name in zeros), zeros
    else:
        assert not zeros


def test_spec_rebuilds_the_model(model: VideoNet) -> None:
    twin = model_from_spec(model.spec)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert twin.spec == model.spec
    assert twin.input_spec == model.input_spec
    model.eval(), twin.eval()
    clip = torch.randn(1, 3, *CLIPS[0])
    with torch.inference_mode():
        assert torch.equal(twin(clip), model(clip))


def test_a_trained_step_comes_back_from_a_file(model: VideoNet, tmp_path: Path) -> None:
    """One step of training, saved and loaded: the same scores at several lengths and sizes."""
    torch.manual_seed(0)
    trained = model_from_spec(model.spec).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    F.cross_entropy(trained(torch.randn(2, 3, *CLIPS[0])), torch.tensor([1, 4])).backward()
    nn.utils.clip_grad_norm_(trained.parameters(), 1.0)  # two tiny clips give deep nets huge gradients
    optimizer.step()
    checkpoint.save_model(tmp_path / "model.safetensors", trained, tuple("abcde"), {})
    loaded = checkpoint.load(tmp_path)
    assert (loaded.model.spec, loaded.model.input_spec) == (trained.spec, trained.input_spec)
    trained.eval()
    with torch.inference_mode():
        for t, h, w in CLIPS:
            clip = torch.randn(1, 3, t, h, w)
            scores = trained(clip)
            assert scores.isfinite().all()
            assert torch.equal(loaded.model(clip), scores)


def test_parts_and_classifier(model: VideoNet) -> None:
    assert isinstance(model.stages, nn.Sequential)
    assert len(model.stages) >= 4
    assert model.head.linear.out_features == 5
    parts = [*model.stem.parameters(), *model.stages.parameters(), *model.head.parameters()]
    assert len(parts) == len(list(model.parameters()))


def test_cost(model: VideoNet) -> None:
    counted = cost(model, (1, 3, 4, 32, 32))
    assert counted.weights == sum(p.numel() for p in model.parameters())
    assert 0 < counted.multiplications <= counted.macs


def test_input_is_checked(model: VideoNet) -> None:
    with pytest.raises(ConfigError, match=rf"{model.spec['name']} takes clips \(N, 3, T, H, W\), got"):
        model(torch.randn(1, 4, 4, 32, 32))


def test_width_dropout_and_channels_are_honoured(model: VideoNet) -> None:
    with torch.device("meta"):
        grey = create_model(model.spec["name"], width=0.25, num_classes=5, in_channels=1, dropout=0.3, num_frames=6)
        assert grey(torch.empty(2, 1, 6, 32, 32)).shape == (2, 5)
    weights = [sum(p.numel() for p in net.parameters()) for net in (model, grey)]
    assert weights[1] > 2.5 * weights[0]
    assert [m.p for m in grey.modules() if isinstance(m, nn.Dropout)] == [0.3]
    assert (grey.input_spec.num_frames, grey.input_spec.channels) == (6, 1)


@pytest.mark.parametrize("name", list_models())
def test_function_is_documented_and_has_the_common_arguments(name: str) -> None:
    assert {"num_classes", "num_frames", "in_channels", "width", "dropout"} <= set(model_arguments(name))
    assert model_summary(name).strip().endswith(".")
