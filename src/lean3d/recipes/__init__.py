"""Named runs: a recipe is one decorated function that gives a `TrainConfig`.

    @register_recipe
    def my_recipe() -> TrainConfig:
        \"\"\"One line that `lean3d recipes` shows.\"\"\"
        return TrainConfig(model=ModelConfig(name="smallbig50"))

The function's name is what users type; underscores may be typed as hyphens (``my-recipe``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase

from lean3d.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig, ViewsConfig
from lean3d.errors import ConfigError, UnknownRecipeError, did_you_mean

_RECIPES: dict[str, Callable[[], TrainConfig]] = {}


def register_recipe(function: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Make a function without arguments that returns a `TrainConfig` a recipe, under its own name.

    Raises:
        ConfigError: The name is taken, or the function has no docstring (`lean3d recipes` shows its first line).
    """
    name = function.__name__.replace("_", "-")
    if name in _RECIPES:
        raise ConfigError(f"there is a recipe {name} already; give this one another name")
    if not (function.__doc__ or "").strip():
        raise ConfigError(f"recipe {name} needs a docstring: its first line is what `lean3d recipes` shows")
    _RECIPES[name] = function
    return function


def get_recipe(name: str) -> TrainConfig:
    """The config of a recipe, by its name as users type it (``light``).

    Raises:
        UnknownRecipeError: No such recipe; the message names the nearest.
    """
    key = name.replace("_", "-")
    if key not in _RECIPES:
        raise UnknownRecipeError(f"no recipe {name!r}: {did_you_mean(key, _RECIPES)}")
    return dataclasses.replace(_RECIPES[key](), recipe=key)


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of all recipes that match a shell pattern, sorted."""
    return sorted(name for name in _RECIPES if fnmatchcase(name, pattern))


def describe_recipe(name: str) -> str:
    """The first line of a recipe's docstring."""
    get_recipe(name)
    return (_RECIPES[name.replace("_", "-")].__doc__ or "").strip().splitlines()[0]


@register_recipe
def light() -> TrainConfig:
    """A light net on your own folder of clips, on a laptop: c3d_light, AdamW, moving average. The default."""
    return TrainConfig(
        model=ModelConfig(
            name="c3d_light",
            width=0.25,
            dropout=0.2,
            options={"stem": "conv", "expansion": 1.0, "layers": 5, "shrink": "stride", "halve_time_from": 4},
        ),
        augment=AugmentConfig(area=(0.7, 1.0), speed=0.2, time_shift=0.1, color_jitter=0.2, mixup=0.2),
        optim=OptimConfig(
            name="adamw",
            lr=5e-3,
            weight_decay=0.05,
            epochs=60,
            batch_size=16,
            warmup_epochs=2.0,
            label_smoothing=0.1,
            ema=0.99,
        ),
        test=ViewsConfig(num_clips=2, num_crops=1, crop_area=0.85),
    )


@register_recipe
def smallbig() -> TrainConfig:
    """SmallBig-18 on your own folder of clips, as the paper trains: SGD, multi-scale crops, one frame a segment."""
    recipe = TrainConfig(
        model=ModelConfig(name="smallbig18", width=0.5, dropout=0.5),
        augment=AugmentConfig(crop="multi_scale", color_jitter=0.0),
        optim=OptimConfig(name="sgd", lr=0.01, weight_decay=1e-4, epochs=50, clip_norm=20.0, label_smoothing=0.0),
        test=ViewsConfig(num_clips=2, num_crops=1),
    )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sampling="segments"))


from lean3d.recipes import papers  # noqa: E402, F401  (registers its recipes)
