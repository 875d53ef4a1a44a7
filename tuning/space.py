"""What the search varies: settings of FitSettings, with their ranges."""

from typing import Any

from ray import tune

from apt_ray.config import NOISE_LADDER, FitSettings

SEARCHED = ("context_length", "noise_strength", "smgs_weight", "learning_rate")


def search_space() -> dict[str, Any]:
    """Setting -> the distribution that a trial's value is drawn from."""
    return {
        "context_length": tune.randint(2, 17),
        "noise_strength": tune.choice(NOISE_LADDER),
        "smgs_weight": tune.uniform(0.0, 1.0),
        "learning_rate": tune.loguniform(0.003, 0.3),
    }


def starting_point() -> dict[str, Any]:
    """The default settings: the first trial, so that no search ends below them unknowingly."""
    return FitSettings().model_dump(include=set(SEARCHED))
