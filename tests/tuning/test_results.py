import math
import random
import re
from collections.abc import Sequence

import pytest

from apt_ray.config import BackboneSpec
from apt_ray.errors import DataError
from tuning.records import TrialRecord
from tuning.results import best_trial, choose_winner, importances, say_what_was_found
from tuning.space import PROMPT_SPACE, starting_point

TRIAL = TrialRecord(
    category="washer",
    number=0,
    settings=starting_point(PROMPT_SPACE, BackboneSpec()),
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
    assert best_trial([TRIAL, better]) is better


def test_winner_of_equals_has_the_least_spread() -> None:
    steadier = trial(1, validation_sd=(0.2, 0.2, 0.2, 0.05))
    assert best_trial([TRIAL, steadier]) is steadier


def test_the_defaults_stay_unless_something_is_far_better() -> None:
    defaults = trial(0, images=(0.8, 0.7, 0.9, 0.8))
    for images, value, words in (
        ((0.84, 0.75, 0.93, 0.84), 0.84, r"better than the defaults by \+4.0 ± 0.4 points"),
        ((0.83, 0.60, 0.99, 0.88), 0.825, "nothing that is far better than the defaults: the best"),
        ((0.82, 0.72, 0.92, 0.82), 0.82, "nothing that is far better than the defaults: the best"),
    ):
        better = trial(1, validation=(0.5, 0.5, 0.5, value), images=images)
        trials = [defaults, better]
        assert best_trial(trials) is better
        assert choose_winner(trials) is (better if value == 0.84 else defaults)
        assert re.search(words, say_what_was_found(trials))
    worse = trial(1, validation=(0.5, 0.5, 0.5, 0.7), images=(0.7, 0.7, 0.7, 0.7))
    assert choose_winner([defaults, worse]) is defaults
    assert say_what_was_found([defaults, worse]).endswith("nothing better than the defaults")


def test_where_the_defaults_do_not_compare_the_best_wins() -> None:
    stopped = trial(0, steps=(25,), validation=(0.9,), validation_sd=(0.1,), images=(0.9,) * 4)
    for first in (stopped, trial(0, images=(0.8, 0.8))):
        best = trial(1, validation=(0.5, 0.5, 0.5, 0.81), images=(0.81, 0.81))
        assert choose_winner([first, best]) is best
        assert "have not come as far" in say_what_was_found([first, best])


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


def scored(values: Sequence[float], lengths: Sequence[int]) -> list[TrialRecord]:
    """Trials whose SMGS weight rises from 0 to 1."""
    pairs = enumerate(zip(values, lengths, strict=True))
    return [
        trial(
            number,
            settings={
                **TRIAL.settings,
                "smgs_weight": number / len(values),
                "context_length": length,
            },
            validation=(0.5, 0.5, 0.5, value),
        )
        for number, (value, length) in pairs
    ]


def test_the_setting_that_decides_is_the_most_important() -> None:
    lengths = [2 + number % 7 for number in range(20)]
    found = importances(scored([number / 20 for number in range(20)], lengths), PROMPT_SPACE)
    first = found["smgs_weight"]
    assert next(iter(found)) == "smgs_weight"
    assert first.share > 0.8
    assert first.is_seen
    assert first.low <= first.share <= max(first.high, first.share)
    assert sum(one.share for one in found.values()) == pytest.approx(1)
    assert [name for name, one in found.items() if one.is_seen] == ["smgs_weight"]
    assert str(found["context_length"]).endswith("no difference seen")


def test_noise_makes_no_setting_important() -> None:
    rng = random.Random(1)
    values = [0.8 + 0.01 * rng.random() for _ in range(24)]
    found = importances(scored(values, [rng.randint(2, 16) for _ in values]), PROMPT_SPACE)
    assert found
    assert not any(one.is_seen for one in found.values())


def test_too_few_trials_or_equal_values_say_nothing_of_importance() -> None:
    assert importances([TRIAL, trial(1)], PROMPT_SPACE) == {}
    assert importances(scored([0.8] * 8, range(2, 10)), PROMPT_SPACE) == {}
    assert importances(scored([0.8, 0.8, 0.8, 0.8 + 1e-12], range(2, 6)), PROMPT_SPACE) == {}
