from typing import Any

import pytest
from ray.tune.search import Searcher

from tuning.encoding import BankState
from tuning.records import TrialRecord
from tuning.searcher import CategoriesSearcher
from tuning.settings import SearchSettings
from tuning.space import starting_point


def settings(**changes: Any) -> SearchSettings:
    values = {"shots": 2, "support_seeds": (0,), "trials": 4, "scheduler": "none", "steps": 8}
    return SearchSettings.parse(values | changes)


def ready(category: str) -> BankState:
    return "ready"


def draw(searcher: CategoriesSearcher, count: int) -> list[dict[str, Any]]:
    return [searcher.suggest(f"trial{number}") for number in range(count)]


def test_categories_take_turns_from_the_defaults_on() -> None:
    searcher = CategoriesSearcher(settings(), {"a": [], "b": []}, ready)
    drawn = draw(searcher, 8)
    assert [(each["category"], each["number"]) for each in drawn] == [
        (name, number) for number in range(4) for name in "ab"
    ]
    searched = settings()
    assert drawn[0]["settings"] == starting_point(searched.space, searched.backbone)
    for each in drawn:
        searched.fit_settings(each["settings"])
        searched.backbone_of(each["settings"])
    assert len({str(each["settings"]) for each in drawn}) == 4  # the same in both
    assert searcher.suggest("further") == Searcher.FINISHED


def test_a_category_that_is_not_ready_waits_and_a_broken_one_is_left_out() -> None:
    states: dict[str, BankState] = {"a": "waiting", "b": "failed"}
    searcher = CategoriesSearcher(settings(), {"a": [], "b": []}, states.__getitem__)
    assert searcher.suggest("early") is None
    states["a"] = "ready"
    assert {each["category"] for each in draw(searcher, 4)} == {"a"}
    assert searcher.suggest("further") == Searcher.FINISHED


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_resumed_search_repeats_what_is_recorded(kind: str) -> None:
    first = draw(CategoriesSearcher(settings(searcher=kind), {"a": []}, ready), 4)
    known = [
        TrialRecord(category="a", number=number, settings=first[number]["settings"])
        for number in (0, 2)
    ]
    again = draw(CategoriesSearcher(settings(searcher=kind), {"a": known}, ready), 4)
    if kind == "random":
        assert again == first
    else:
        assert [again[n]["settings"] for n in (0, 2)] == [first[n]["settings"] for n in (0, 2)]


def test_optuna_learns_from_both_objectives() -> None:
    chosen = settings(searcher="optuna", objective="pareto", trials=30)
    searcher = CategoriesSearcher(chosen, {"a": []}, ready)
    weights = []
    for number in range(30):
        drawn = searcher.suggest(str(number))
        weight = drawn["settings"]["smgs_weight"]
        weights.append(weight)
        result = {"rung": 4, "validation": weight, "patch": weight}
        searcher.on_trial_complete(str(number), result)
    assert sum(weights[20:]) / 10 > sum(weights[1:11]) / 10


def test_a_trial_that_failed_or_was_stopped_is_taken_note_of() -> None:
    searcher = CategoriesSearcher(settings(searcher="optuna"), {"a": []}, ready)
    draw(searcher, 3)
    searcher.on_trial_complete("trial0", None, error=True)
    searcher.on_trial_result("trial1", {"rung": 1, "validation": 0.4})
    searcher.on_trial_complete("trial1", {"rung": 1, "validation": 0.4})
    searcher.on_trial_complete("trial2", {"rung": 4, "validation": 0.7})
    assert searcher.suggest("next")["number"] == 3


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_past_settings_come_after_the_defaults(kind: str) -> None:
    chosen = settings(searcher=kind)
    start = starting_point(chosen.space, chosen.backbone)
    past = {**start, "context_length": 11}
    drawn = draw(CategoriesSearcher(chosen, {"a": []}, ready, past={"a": [past]}), 3)
    assert [each["settings"] for each in drawn[:2]] == [start, past]
    assert drawn[2]["settings"] not in (start, past)
