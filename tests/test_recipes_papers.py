"""The published runs and studies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lean3d.config import ModelConfig, TrainConfig, from_json, to_json
from lean3d.errors import ConfigError
from lean3d.models import model_from_config
from lean3d.recipes import get_recipe, list_recipes
from lean3d.recipes.papers import STUDIES, study


def test_every_data_set_of_the_papers_has_recipes() -> None:
    for data, least in (("k400", 9), ("sthv1", 2), ("sthv2", 2), ("ucf101", 2), ("hmdb51", 2), ("jester", 2)):
        assert len(list_recipes(f"{data}-*")) >= least


@pytest.mark.parametrize("name", list_recipes("k400-*") + list_recipes("sthv*"))
def test_settings_of_the_published_code(name: str) -> None:
    config = get_recipe(name)
    optim = config.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.lr) == ("sgd", 0.9, 1e-4, 0.01)
    assert (optim.epochs, optim.batch_size, optim.warmup_epochs, optim.ema) == (100, 64, 0, 0)
    assert (config.augment.crop, config.augment.scales) == ("multi_scale", (1.0, 0.875, 0.75, 0.66))
    views = (config.test.num_clips, config.test.num_crops)
    frames, rate = config.model.num_frames or 0, config.model.sampling_rate or 0
    if name.startswith("k400"):
        assert (config.data.format, config.data.sampling, config.augment.flip) == ("kinetics", "dense", "on")
        assert views == (10, 3)
        assert frames * rate == 64
    else:
        assert (config.data.format, config.data.sampling, config.augment.flip) == ("something", "segments", "off")
        assert views == (2, 3)


@pytest.mark.parametrize("name", STUDIES)
def test_rows_of_a_study_differ_and_stand(name: str) -> None:
    rows = study(name)
    assert len({to_json(row) for row in rows}) == len(rows) >= 2
    for row in rows:
        assert from_json(TrainConfig, to_json(row)) == row
        assert row.recipe in list_recipes()
        plain = dataclasses.replace(row, model=dataclasses.replace(row.model, options={}))
        assert plain == get_recipe(row.recipe)  # typed: the recipe and the row's options
        small: ModelConfig = dataclasses.replace(row.model, width=0.125, num_frames=3)
        with torch.device("meta"):
            assert model_from_config(small, 5).eval()(torch.empty(1, 3, 3, 32, 32)).shape == (1, 5)


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean windows"):
        study("window")
