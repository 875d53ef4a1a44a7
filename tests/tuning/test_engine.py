"""The engine's core, without Ray."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from apt_ray.anomalies.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import DataError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.prompts.lanes import folds
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.judge import Judge
from apt_ray.validation.synthetic import judge_folds
from tuning.calls import EngineBusyError, RungCall, RungResult, UnknownCallError
from tuning.engine import Engine, EngineLimits

STEPS = 8


def call(call_id: str = "a", **changes: Any) -> RungCall:
    settings = {"steps": STEPS, "noise_strength": 0.3} | changes.pop("settings", {})
    banks = changes.get("banks", ("washer",))
    values = {
        "banks": banks,
        "judges": tuple(f"judge of {bank}" for bank in banks),
        "layers": None,
        "settings": settings,
        "steps": STEPS,
        "state": None,
    }
    return RungCall(id=call_id, **(values | changes))


@contextmanager
def running(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge, **limits: Any
) -> Iterator[Engine]:
    def load(digest: str) -> SupportBank | Judge:
        name = digest.removeprefix("judge of ")
        if name not in ("washer", "textile"):
            raise DataError(f"no bank {name}")
        return bank if digest == name else judge

    engine = Engine(backbone, load, limits=EngineLimits(**limits))
    try:
        yield engine
    finally:
        engine.close()


def result(engine: Engine, call_id: str) -> RungResult:
    found = engine.collect(call_id, 60)
    assert found is not None
    return found


def test_calls_of_all_lengths_and_categories_equal_trials_alone(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    calls = [
        call(
            str(i),
            banks=(("washer",), ("washer", "textile"))[i % 2],
            settings={"context_length": 2 + i, "smgs_weight": (0.0, 1.0)[i % 2]},
        )
        for i in range(3)
    ]
    with running(backbone, bank, judge, lanes=8) as engine:
        for each in calls:
            engine.submit(each)
            time.sleep(0.05)  # so that they stand at different steps
        for each in calls:
            lanes = folds([bank] * len(each.banks), FitSettings.parse(each.settings))
            trainer = PromptTrainer(backbone, lanes)
            trainer.advance(STEPS)
            alone = judge_folds(
                backbone, trainer.lanes, trainer.text_features(), [judge] * len(each.banks)
            )
            found = result(engine, each.id)
            assert found.error is None
            assert found.validation == pytest.approx(alone.value, abs=1e-4)
            assert found.validation_sd == pytest.approx(alone.sd, abs=1e-4)
            assert found.images == pytest.approx(alone.images, abs=1e-3)
            assert found.families == pytest.approx(alone.families, abs=1e-3)


def test_rung_by_rung_on_two_engines_equals_one_call(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    with running(backbone, bank, judge) as one, running(backbone, bank, judge) as two:
        one.submit(call("whole"))
        one.submit(call("first", steps=3))
        two.submit(call("second", state=result(one, "first").state))
        assert result(two, "second").validation == pytest.approx(
            result(one, "whole").validation, abs=1e-4
        )


def test_a_call_made_twice_is_served_once(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    with running(backbone, bank, judge) as engine:
        engine.submit(call())
        engine.submit(call())
        first = result(engine, "a")
        engine.submit(call())
        assert result(engine, "a") is first
        assert engine.status().lane_steps == STEPS * bank.shots


def test_an_abandoned_call_expires(backbone: FrozenCLIP, bank: SupportBank, judge: Judge) -> None:
    with running(backbone, bank, judge, lease_s=0.2) as engine:
        engine.submit(call(settings={"steps": 100_000}, steps=100_000))
        deadline = time.monotonic() + 20
        while engine.status().training == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        while engine.status().training and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.status().training == 0
        with pytest.raises(UnknownCallError):
            engine.collect("a", 0)


def test_a_call_that_is_asked_for_does_not_expire(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    with running(backbone, bank, judge, lease_s=0.5) as engine:
        engine.submit(call(settings={"steps": 100_000}, steps=100_000))
        for _ in range(15):
            assert engine.collect("a", 0.1) is None
        engine.forget("a")


def test_a_full_engine_refuses_and_says_so(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    with running(backbone, bank, judge, calls=1) as engine:
        engine.submit(call("a"))
        with pytest.raises(EngineBusyError, match="live trials"):
            engine.submit(call("b"))
        result(engine, "a")
        engine.forget("a")
        engine.submit(call("b"))
        assert result(engine, "b").error is None


def test_lanes_beyond_the_limit_wait(backbone: FrozenCLIP, bank: SupportBank, judge: Judge) -> None:
    with running(backbone, bank, judge, lanes=bank.shots) as engine:
        long = {"settings": {"steps": 100_000}, "steps": 100_000}
        engine.submit(call("a", **long))
        engine.submit(call("b", **long))
        time.sleep(0.5)
        assert (engine.status().training, engine.status().waiting) == (bank.shots, 1)
        engine.forget("a")
        engine.forget("b")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"banks": ("blister",)}, "no bank blister"),
        ({"judges": ("judge of blister",)}, "no bank blister"),
        ({"settings": {"context_length": 31}}, "at most 30"),
        ({"settings": {"noise_strength": 0.17}}, "noise_strength"),
        ({"steps": STEPS + 1}, "cannot go on"),
    ],
)
def test_a_bad_call_is_answered_and_harms_no_other(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge, changes: dict[str, Any], complaint: str
) -> None:
    with running(backbone, bank, judge) as engine:
        engine.submit(call("good"))
        engine.submit(call("bad", **changes))
        assert complaint in (result(engine, "bad").error or "")
        assert result(engine, "good").error is None


def test_banks_make_room_for_one_another(backbone: FrozenCLIP, bank: SupportBank) -> None:
    loads: list[str] = []

    def load(digest: str) -> SupportBank:
        loads.append(digest)
        return bank

    limits = EngineLimits(bank_mib=bank.nbytes // 2**20 + 1)
    engine = Engine(backbone, load, limits=limits)
    for digest in "aaba":
        engine.bank(digest)
    engine.close()
    assert loads == ["a", "b", "a"]


def test_a_closed_engine_leaves_no_thread(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    with running(backbone, bank, judge) as engine:
        engine.submit(call())
    assert "engine" not in [thread.name for thread in threading.enumerate()]
