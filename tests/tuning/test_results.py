import math

import pytest

from apt_ray.errors import DataError
from tuning.records import TrialRecord
from tuning.results import choose_winner, importances
from tuning.space import DEFAULT_SPACE, starting_point

TRIAL = TrialRecord(
    category="washer",
    number=0,
    settings=starting_point(DEFAULT_SPACE),
    steps=(25, 50, 75, 100),
    validation=(0.6, 0.7, 0.8, 0.8),
    validation_sd=(0.1, 0.1, 0.1, 0.1),
    seconds=(1.0, 2.0, 3.0, 4.0),
    status="finished",
)


def trial(number: int, **changes: object) -> TrialRecord:
    return TRIAL.model_copy(update={"number": number, **changes})


def test_winner_has_the_best_last_value() -> None:
    better = trial(1, validation=(0.5, 0.5, 0.5, 0.81))
    assert choose_winner([TRIAL, better]) is better


def test_winner_of_equals_has_the_least_spread() -> None:
    steadier = trial(1, validation_sd=(0.2, 0.2, 0.2, 0.05))
    assert choose_winner([TRIAL, steadier]) is steadier


def test_a_stopped_trial_does_not_win_by_an_early_value() -> None:
    stopped = trial(1, steps=(25,), validation=(0.99,), validation_sd=(0.0,))
    assert choose_winner([stopped, TRIAL]) is TRIAL


def test_an_undefined_value_does_not_win() -> None:
    undefined = trial(1, validation=(0.9, 0.9, 0.9, math.nan))
    assert choose_winner([undefined, TRIAL]) is TRIAL


def test_where_every_trial_failed_the_first_error_is_raised() -> None:
    failed = trial(0, steps=(), validation=(), validation_sd=(), error="a broken image")
    with pytest.raises(DataError, match="a broken image"):
        choose_winner([failed, failed])


def test_the_setting_that_decides_is_the_most_important() -> None:
    values = [i / 20 for i in range(20)]
    trials = [
        trial(
            number,
            settings={**TRIAL.settings, "smgs_weight": value, "context_length": 2 + number % 7},
            validation=(0.5, 0.5, 0.5, value),
        )
        for number, value in enumerate(values)
    ]
    shares = importances(trials, DEFAULT_SPACE)
    assert next(iter(shares)) == "smgs_weight"
    assert shares["smgs_weight"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_too_few_trials_say_nothing_of_importance() -> None:
    assert importances([TRIAL, trial(1)], DEFAULT_SPACE) == {}
