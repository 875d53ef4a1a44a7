"""Trials on their way to a registry in memory."""

import time

import pytest

from tests.registry.fake import FakeRegistry
from tuning import tracking
from tuning.records import TrialRecord
from tuning.tracking import TrialLog

TRIAL = TrialRecord(
    category="washer",
    number=3,
    settings={"noise_strength": 0.3},
    steps=(2, 4),
    validation=(0.5, 0.75),
    validation_sd=(0.1, 0.1),
    patch=(0.5, 0.75),
    status="finished",
)


def test_trials_wait_for_a_registry_that_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_BATCH_S", 0.02)
    registry = FakeRegistry()
    registry.is_away = True
    log = TrialLog(registry, "search")
    log.add([TRIAL])
    time.sleep(0.2)
    assert log.missing == 1
    assert capsys.readouterr().out.count("trials are kept until MLflow takes them") == 1
    registry.is_away = False
    log.add([TRIAL])
    log.close(30)
    assert log.missing == 0
    (logged,) = registry.trials.items()
    assert logged[0] == ("search", "washer", 3)
    assert logged[1].metrics["validation"] == ((2, 0.5), (4, 0.75))
