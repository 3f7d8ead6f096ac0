"""recipes.py: every recipe is a config that stands."""

from __future__ import annotations

import pytest
import torch

from lean3d import recipes
from lean3d.config import TrainConfig, from_json, to_json
from lean3d.errors import ConfigError, UnknownRecipeError
from lean3d.models import model_from_config


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_every_recipe_is_a_whole_config(name):
    config = recipes.get_recipe(name)
    assert config.recipe == name
    assert from_json(TrainConfig, to_json(config)) == config
    with torch.device("meta"):
        assert model_from_config(config.model, num_classes=3).head.linear.out_features == 3
    assert recipes.describe_recipe(name)


def test_light_is_there_and_patterns_select():
    assert "light" in recipes.list_recipes()
    assert recipes.list_recipes("li*") == ["light"]


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownRecipeError, match="did you mean light"):
        recipes.get_recipe("ligth")


def test_a_recipe_of_ones_own(monkeypatch):
    monkeypatch.setattr(recipes, "_RECIPES", dict(recipes._RECIPES))

    @recipes.register_recipe
    def my_clips() -> TrainConfig:
        """Mine."""
        return TrainConfig()

    assert recipes.get_recipe("my_clips").recipe == "my-clips"
    assert recipes.describe_recipe("my-clips") == "Mine."
    with pytest.raises(ConfigError, match="already"):
        recipes.register_recipe(my_clips)


def test_a_recipe_without_a_docstring_is_refused():
    def silent() -> TrainConfig:
        return TrainConfig()

    with pytest.raises(ConfigError, match="docstring"):
        recipes.register_recipe(silent)
