"""How far the banks of the categories are, without Ray: tasks that end when a test says so."""

from dataclasses import dataclass

import pytest
from ray.tune.search import Searcher

from apt_ray.errors import DataError
from tuning.encoding import Encoding
from tuning.outcome import Outcome
from tuning.records import TrialRecord
from tuning.searcher import CategoriesSearcher
from tuning.settings import SearchSettings


@dataclass
class Task:
    """The encoding of one category's banks."""

    has_ended: bool = False
    error: Exception | None = None
    asked: int = 0

    def __call__(self) -> bool:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.has_ended


def test_a_category_that_cannot_be_encoded_fails_once_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    early, broken, late = Task(has_ended=True), Task(error=DataError("a broken image")), Task()
    encoding = Encoding({"early": early, "broken": broken, "late": late})
    outcome = Outcome()

    def take_in() -> None:
        for category, error in encoding.poll().items():
            outcome.fail(category, error)

    settings = SearchSettings(trials=2, steps=8)
    records: dict[str, list[TrialRecord]] = {name: [] for name in encoding.categories}
    searcher = CategoriesSearcher(settings, records, encoding.state, take_in)
    drawn: list[str] = []
    for place in range(6):
        late.has_ended = place >= 3
        suggested = searcher.suggest(f"trial{place}")
        if isinstance(suggested, dict):
            drawn.append(suggested["category"])
    assert drawn == ["early", "early", "late", "late"]
    assert searcher.suggest("further") == Searcher.FINISHED
    assert outcome.failures == {"broken": "a broken image"}
    assert capsys.readouterr().out.count("broken failed") == 1
    assert broken.asked == early.asked == 1


def test_only_polling_changes_what_is_known() -> None:
    tasks = {"good": Task(has_ended=True), "broken": Task(error=DataError("a broken image"))}
    encoding = Encoding(tasks)
    for _ in range(2):
        assert encoding.categories == ("good", "broken")
        assert encoding.is_waiting
        assert [encoding.state(name) for name in tasks] == ["waiting", "waiting"]
    assert not any(task.asked for task in tasks.values())

    assert encoding.poll() == {"broken": tasks["broken"].error}
    for _ in range(2):
        assert encoding.categories == ("good", "broken")
        assert not encoding.is_waiting
        assert [encoding.state(name) for name in tasks] == ["ready", "failed"]
    assert encoding.poll() == {}
