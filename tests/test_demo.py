"""demo: the whole way in small, and in full where there is time for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lean3d import demo
from lean3d.config import TrainConfig, from_json
from lean3d.data.synthetic import MOTION_CLASSES
from lean3d.errors import ConfigError


def run(out: Path, **settings: float) -> tuple[demo.DemoResult, str]:
    console = Console(file=io.StringIO(), width=100)
    done = demo.run(out, console=console, **settings)  # type: ignore[arg-type]
    return done, console.file.getvalue()  # type: ignore[attr-defined]


def small_configs(out: Path, minutes: float, real: Callable = demo.demo_configs) -> tuple[TrainConfig, ...]:
    """The demo's trainings with small nets, small clips and one epoch."""
    return tuple(
        replace(
            config,
            model=replace(config.model, num_frames=4, size=(32, 32), width=0.125),
            data=replace(config.data, num_workers=0),
            optim=replace(config.optim, epochs=1),
        )
        for config in real(out, minutes)
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.DemoResult, str]:
    out = tmp_path_factory.mktemp("demo") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_configs", small_configs)
        return out, *run(out, clips_per_class=4)


def test_the_whole_way_leaves_all_its_parts(small: tuple[Path, demo.DemoResult, str]):
    out, done, text = small
    assert len(list((out / "videos" / "train").rglob("*.mp4"))) == 40
    assert len(list((out / "videos" / "test").rglob("*.mp4"))) == 20
    assert done.report == out / "report.html" and done.video.stat().st_size > 0
    for name, accuracy in (("light", done.light), ("flat", done.flat)):
        results = json.loads((out / name / "results.json").read_text())
        assert results["data"]["split"] == "test"
        assert results["metrics"]["videos"] == 20
        assert results["metrics"]["top1"] == accuracy
    for words in ("[1/5]", "[5/5]", "c3d_light", "c2d_r18", "chance", str(done.report), "lean3d train FOLDER"):
        assert words in text


def test_the_report_shows_both(small: tuple[Path, demo.DemoResult, str]):
    page = small[1].report.read_text(encoding="utf-8")
    assert "Side by side" in page and "c2d_r18 (width" in page
    assert page.count("<video") == 20
    assert all(name in page for name in MOTION_CLASSES)


def test_again_it_goes_on_where_it_was(small: tuple[Path, demo.DemoResult, str], monkeypatch: pytest.MonkeyPatch):
    out, before, _ = small
    monkeypatch.setattr(demo, "demo_configs", small_configs)
    weights = (out / "light" / "model.safetensors").read_bytes()
    done, text = run(out, clips_per_class=4)
    assert "goes on" in text
    assert done == before
    assert (out / "light" / "model.safetensors").read_bytes() == weights


def test_other_settings_train_anew_and_a_foreign_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[TrainConfig] = []
    monkeypatch.setattr(demo, "fit", lambda config=None, resume=None: trained.append(config or resume))
    light, _ = demo.demo_configs(tmp_path, 1.0)
    folder = tmp_path / "light"
    folder.mkdir()
    (folder / "config.json").write_text(demo_json(demo.demo_configs(tmp_path, 2.0)[0]))
    demo._train(light, Console(file=io.StringIO()))
    assert trained == [light] and not folder.exists()
    folder.mkdir()
    (folder / "config.json").write_text(demo_json(TrainConfig()))
    with pytest.raises(ConfigError, match="holds another run"):
        demo._train(light, Console(file=io.StringIO()))
    assert (folder / "config.json").exists()


def demo_json(config: TrainConfig) -> str:
    from lean3d.config import to_json

    text = to_json(config)
    assert from_json(TrainConfig, text) == config
    return text


def test_the_two_trainings_differ_in_the_net_and_the_time_alone(tmp_path: Path):
    light, flat = demo.demo_configs(tmp_path, 3.0)
    assert light.model.width == flat.model.width
    assert light.model.name == "c3d_light" and flat.model.name == "c2d_r18"
    assert light.run.max_minutes == 3.0
    assert (light.data, light.augment) == (flat.data, flat.augment)


@pytest.mark.parametrize("settings", [{"minutes": 0.0}, {"clips_per_class": 3}])
def test_settings_that_make_no_demo_are_refused(tmp_path: Path, settings: dict[str, float]):
    with pytest.raises(ConfigError, match="a demo needs"):
        run(tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_light_net_sees_what_the_2d_net_can_not(tmp_path: Path):
    done, _ = run(tmp_path / "demo")
    assert done.light >= 0.9
    assert done.flat < 0.4
